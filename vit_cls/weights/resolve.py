"""From a name, and what to load, to an architecture and a source of weights; nothing heavy is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import Preprocess
from vit_cls.model.presets import PRESETS, preset_config
from vit_cls.weights.bundle import MODEL_FILE, is_own_file
from vit_cls.weights.tensor_files import SUFFIXES

AUTO = "auto"
"""As ``model.name``: the architecture that the weights say by themselves."""


@dataclass(frozen=True)
class Found:
    """An architecture by name, and the weights for it.

    Args:
        config: The architecture, unchanged.
        preprocess: How its images are prepared.
        source: The weights; None for fresh ones.
        class_names: Classes of the weights' head.
    """

    config: Any
    preprocess: Preprocess
    source: Any = None
    class_names: list[str] | None = None


def find(
    name: str,
    pretrained: bool | str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    needed: bool = True,
) -> Found:
    """Resolve a name and what to load; reads headers and records, no weights yet.

    Args:
        name: An architecture, with or without a tag, or ``auto``.
        pretrained: None or False, True, a tag, a file or a folder.
        overrides: Settings that may explain why a file differs from the architecture of that name.
        needed: Whether the weights will be read; where they will not, their file may be gone.

    Raises:
        ConfigError: If the name is unknown, or needs weights that say their architecture.
        ModelFileError: If the weights are not there, or are of another architecture.
    """
    if pretrained is None or pretrained is False:
        if name == AUTO:
            raise ConfigError(
                "model.name auto takes the architecture of the weights: give model.pretrained too."
            )
        if name in PRESETS:
            config = preset_config(name)
            return Found(config, Preprocess.for_size(config.image_hw))
        # timm takes seconds to import; the native presets do without.
        from vit_cls.weights.sources import architecture_of
        from vit_cls.weights.timm_models import preprocess_of, pretrained_config

        record = pretrained_config(name)
        return Found(architecture_of(name), preprocess_of(record))
    from vit_cls.weights import sources

    if isinstance(pretrained, bool):
        source = sources.tag_source(name)
    else:
        source = _tag_source(name, str(pretrained)) or _path_source(name, Path(pretrained), overrides, needed)
    preprocess = source.preprocess or find(name, None).preprocess
    return Found(source.config, preprocess, source, source.class_names)


def _tag_source(name: str, text: str) -> Any:
    """The weights that a tag means, alone or behind its architecture; None where it is no tag."""
    from vit_cls.weights.sources import tag_source
    from vit_cls.weights.timm_models import is_timm_name

    if name == AUTO and is_timm_name(text):
        return tag_source(text)
    base = name.partition(".")[0]
    for tag in (text, f"{base}.{text}"):
        if is_timm_name(tag) and tag.partition(".")[0] == base:
            return tag_source(tag)
    return None


def _path_source(name: str, path: Path, overrides: Mapping[str, Any] | None, needed: bool) -> Any:
    """The weights in a file or a folder; the name decides what is in it where the file does not."""
    from vit_cls.weights import sources
    from vit_cls.weights.timm_models import is_timm_name, pretrained_config

    base = name.partition(".")[0]
    if not path.exists() and needed:
        looks_like_path = "/" in str(path) or path.suffix in SUFFIXES
        if not looks_like_path and is_timm_name(base):
            pretrained_config(f"{base}.{path}")  # raises, and names the tags that there are
        raise ModelFileError(f"model.pretrained {path}: there is no such file or folder.")
    if path.exists():
        own = _own_architecture(path)
        if own is not None:
            _check_agreement(name, own, path, overrides or {})
            return own
    if path.is_dir():
        raise ModelFileError(
            f"model.pretrained {path} is a folder that holds no model: it has neither a config.json nor a "
            f"{MODEL_FILE} of ours. Give the weights file itself."
        )
    if name == AUTO:
        raise ConfigError(
            f"model.pretrained {path} does not say which architecture it holds. Give its name as model.name."
        )
    if is_timm_name(name) and name != base:
        return sources.tag_source(name, path)
    return sources.file_source(path, find(name, None).config, name=base if is_timm_name(base) else None)


def _own_architecture(path: Path) -> Any:
    """The source of a file or folder that says its architecture itself; None where it does not."""
    from vit_cls.weights import sources

    if path.is_dir():
        return sources.folder_source(path)
    return sources.own_source(path) if is_own_file(path) else None


def _check_agreement(name: str, source: Any, path: Path, overrides: Mapping[str, Any]) -> None:
    """The architecture's name is a check on a file that says its own."""
    if name == AUTO:
        return
    config = find(name, None).config
    for field in ("embed_dim", "num_heads"):
        ours, theirs = overrides.get(field) or getattr(config, field), getattr(source.config, field)
        if ours != theirs:
            raise ModelFileError(
                f"model.pretrained {path} holds another architecture than model.name {name}: {field} is "
                f"{theirs}, not {ours}. Use model.name auto to take the file's."
            )
