"""One resolver: what a user names, to the architecture and the weights that it means.

``name`` and ``pretrained``, or ``--model``   `parse_pretrained`, `parse_model`: a `Reference`
`Reference`                                   `find_source`: a `Source`, of which only headers are read
`Source`                                      `Source.read`: its tensors, for an architecture

timm takes seconds to import. Fresh presets do without, so what needs it imports it itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import Preprocess
from vit_cls.model.config import ModelConfig
from vit_cls.model.presets import PRESETS, preset_config
from vit_cls.weights.architecture import architecture_from_dict
from vit_cls.weights.bundle import MODEL_FILE, check_own_poolings, is_own_file, model_file, read_own_file
from vit_cls.weights.metadata import check_timm_settings, read_json
from vit_cls.weights.tensor_files import SUFFIXES, Weights

AUTO = "auto"
"""As ``model.name``: the architecture that the weights say by themselves."""


@dataclass(frozen=True)
class Reference:
    """What a user named: an architecture, and its published weights or a file of weights or neither."""

    name: str  # architecture, architecture.tag, or auto
    tag: str | None = None  # of published weights: architecture.tag, or architecture for its default
    path: Path | None = None  # need not exist
    written: str = ""  # how the user wrote it, for messages


@dataclass(frozen=True)
class Source:
    """An architecture, and the weights for it that are known but not yet read."""

    config: Any  # with the classes of the weights
    preprocess: Preprocess
    label: str | None = None  # where the weights come from, for people; None: fresh ones
    read: Callable[[ModelConfig], Weights] | None = None  # for a target; None: fresh
    class_names: list[str] | None = None  # None: unknown, or no head
    licence: str | None = None  # None: the source does not say
    remarks: tuple[str, ...] = ()  # for the user, before they are read


def parse_model(model: str | Path) -> Reference:
    """What ``--model`` means: a path that exists, a name, or ``name=weights``; else ModelFileError."""
    text, path = str(model), Path(model)
    if path.exists():
        return Reference(AUTO, path=path, written=f"--model {text}")
    name, equals, weights = text.partition("=")
    if equals:
        return dataclasses.replace(parse_pretrained(name, weights), written=f"--model {text}")
    from vit_cls.weights.timm_models import is_timm_name, module_of

    if not is_timm_name(text) and module_of(text.partition(".")[0]) is None:
        raise ModelFileError(
            f"there is no file or folder {text!r}, and no architecture of that name. --model takes a run "
            f"folder, its {MODEL_FILE}, a .ckpt of a run, a name of timm's (`vit-cls models`), or "
            "name=path/to/weights."
        )
    return Reference(text, tag=text)


def parse_pretrained(name: str, pretrained: bool | str | Path | None) -> Reference:
    """What ``model.name`` and ``model.pretrained`` mean; a tag is known, whatever else is a path."""
    if pretrained is None or isinstance(pretrained, bool):
        return Reference(name, tag=name if pretrained else None)
    from vit_cls.weights.timm_models import is_timm_name

    text, base = str(pretrained), name.partition(".")[0]
    for tag in (text, f"{base}.{text}"):
        if is_timm_name(tag) and (name == AUTO or tag.partition(".")[0] == base):
            return Reference(name, tag=tag)
    return Reference(name, path=Path(pretrained), written=f"model.pretrained {text}")


def find_source(
    reference: Reference, overrides: Mapping[str, Any] | None = None, *, needed: bool = True
) -> Source:
    """The architecture and the weights that a reference means; reads headers and records, no weights yet.

    Overrides may explain why a file differs from the architecture of its name. Weights that are not needed
    may be gone. ConfigError for an unknown name, ModelFileError for weights that are not there or differ.
    """
    name, path = reference.name, reference.path
    if reference.tag is not None:
        return _published(reference.tag)
    if path is None:
        return _fresh(name)
    if not path.exists() and needed:
        raise _missing(reference)
    source = _self_described(path)
    if source is not None:
        _check_agreement(reference, source, overrides or {})
        return source
    if path.is_dir():
        raise _no_model(reference, path)
    if name == AUTO:
        raise ConfigError(
            f"{reference.written} does not say which architecture it holds. Give its name as model.name."
        )
    return _plain_file(name, path)


def _fresh(name: str) -> Source:
    if name == AUTO:
        raise ConfigError("model.name auto takes the architecture of the weights: give model.pretrained too.")
    if name in PRESETS:
        config = preset_config(name)
        return Source(config, Preprocess.for_size(config.image_hw))
    from vit_cls.weights.adapter import timm_config
    from vit_cls.weights.timm_models import preprocess_of, pretrained_config, skeleton

    record = pretrained_config(name)
    return Source(timm_config(name, skeleton(name)), preprocess_of(record))


def _published(name: str, path: Path | None = None) -> Source:
    """A tag of timm's, from the hub or from a file that holds it."""
    from vit_cls.weights.adapter import timm_config
    from vit_cls.weights.hub import weights_file
    from vit_cls.weights.timm_files import read_timm_file
    from vit_cls.weights.timm_models import (
        QUICK_GELU_NOTE,
        class_names_of,
        preprocess_of,
        pretrained_config,
        skeleton,
    )

    record = pretrained_config(name)
    base = name.partition(".")[0]
    label = f"{base}.{record.tag}" if record.tag else base
    config: Any = timm_config(name, skeleton(name))
    remarks: tuple[str, ...] = ()
    if any(QUICK_GELU_NOTE in note for note in record.notes or ()) and getattr(config, "act", "") == "gelu":
        config = dataclasses.replace(config, act="quick_gelu")
        remarks = ("these weights were trained with QuickGELU, so the model is built with it, not with GELU",)

    def read(target: ModelConfig) -> Weights:
        return read_timm_file(path or weights_file(label, record), config, target, name=base)

    return Source(
        config,
        preprocess_of(record),
        label if path is None else f"{path} ({label})",
        read,
        class_names_of(record),
        record.license,
        remarks,
    )


def _plain_file(name: str, path: Path) -> Source:
    """A file of tensors alone, whose architecture, or whose tag, the user named."""
    if "." in name:
        return _published(name, path)
    from vit_cls.weights.timm_files import count_classes, read_timm_file

    fresh = _fresh(name)
    classes = count_classes(path) if path.exists() else None  # a resumed run does without
    config = fresh.config if classes is None else dataclasses.replace(fresh.config, num_classes=classes)

    def read(target: ModelConfig) -> Weights:
        return read_timm_file(path, config, target, name=name)

    return Source(config, fresh.preprocess, str(path), read)


def _self_described(path: Path) -> Source | None:
    """What says its architecture itself: a file or run of ours, a folder of transformers or of timm."""
    if is_own_file(model_file(path)):
        return _own(model_file(path))
    if not (path / "config.json").is_file():
        return None
    from vit_cls.weights.hf_folder import is_hf_folder

    return _transformers(path) if is_hf_folder(path) else _timm_folder(path)


def _own(path: Path) -> Source:
    metadata = read_own_file(path, weights=False)[0]
    check_own_poolings(metadata, path)
    try:
        config = architecture_from_dict(metadata["architecture"])
        preprocess = Preprocess(**metadata["preprocess"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} does not describe a model: {error}.") from error

    def read(target: ModelConfig) -> Weights:
        from vit_cls.weights.timm_files import fitted

        state, name = read_own_file(path)[1], getattr(config, "timm_architecture", "")
        return Weights(state, fitted(state, config, target, name, path), config)

    return Source(
        config,
        preprocess,
        metadata.get("weights_source") or str(path),
        read,
        list(metadata["class_names"]) or None,
        metadata.get("weights_licence"),
    )


def _transformers(path: Path) -> Source:
    from vit_cls.weights.hf_folder import read_hf_folder
    from vit_cls.weights.timm_files import fitted

    model = read_hf_folder(path)

    def read(target: ModelConfig) -> Weights:
        return Weights(model.raw, fitted(model.state, model.stored, target, "", path), model.stored)

    return Source(model.config, model.preprocess, str(path), read, model.class_names, model.licence)


def _timm_folder(path: Path) -> Source:
    """What timm's ``save_for_hf`` and ``vit-cls export --format timm`` write."""
    from timm.models import PretrainedCfg

    from vit_cls.weights.adapter import timm_config
    from vit_cls.weights.timm_files import read_timm_file
    from vit_cls.weights.timm_models import FOLDER, class_names_of, preprocess_of, pretrained_config, skeleton

    try:
        settings = read_json(path / "config.json")
        name = str(settings["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path / 'config.json'} names no architecture ({error}): it is neither timm's nor transformers'."
        ) from error
    pretrained_config(name)
    try:
        check_timm_settings(settings)
        model = skeleton(f"{FOLDER}{path}")
        record = PretrainedCfg(**{k: v for k, v in model.pretrained_cfg.items() if k != "source"})
    except (ConfigError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        reason = error.__cause__ or error
        raise ModelFileError(f"timm cannot build what {path / 'config.json'} describes: {reason}.") from error
    passed = ("img_size", "patch_size", "in_chans", "num_classes")  # the adapter's own fields
    arguments = {k: v for k, v in (settings.get("model_args") or {}).items() if k not in passed}
    config = timm_config(name, model, **arguments)

    def read(target: ModelConfig) -> Weights:
        return read_timm_file(path / MODEL_FILE, config, target, name=name)

    return Source(config, preprocess_of(record), str(path), read, class_names_of(record), record.license)


def _missing(reference: Reference) -> ModelFileError:
    from vit_cls.weights.timm_models import is_timm_name, pretrained_config

    base, path = reference.name.partition(".")[0], reference.path
    assert path is not None
    looks_like_path = "/" in str(path) or path.suffix in SUFFIXES
    if not looks_like_path and is_timm_name(base):
        pretrained_config(f"{base}.{path}")  # raises, and names the tags that there are
    return ModelFileError(f"{reference.written}: there is no such file or folder.")


def _no_model(reference: Reference, folder: Path) -> ModelFileError:
    if (folder / MODEL_FILE).is_file():
        return ModelFileError(
            f"{folder / MODEL_FILE} does not say its architecture, and there is no config.json beside it. "
            "Use name=path/to/weights, with one of the names of `vit-cls models`."
        )
    return ModelFileError(
        f"{reference.written} is a folder without a {MODEL_FILE} and without a config.json. Give a run "
        "folder that `vit-cls fit` finished at least one epoch in, a folder of timm's or of transformers', "
        "or a weights file with the name of its architecture (name=path/to/weights)."
    )


def _check_agreement(reference: Reference, source: Source, overrides: Mapping[str, Any]) -> None:
    """The architecture's name is a check on a file that says its own."""
    if reference.name == AUTO:
        return
    config = _fresh(reference.name).config
    for field in ("embed_dim", "num_heads"):
        ours, theirs = overrides.get(field) or getattr(config, field), getattr(source.config, field)
        if ours != theirs:
            raise ModelFileError(
                f"{reference.written} holds another architecture than model.name {reference.name}: {field} "
                f"is {theirs}, not {ours}. Use model.name auto to take the file's."
            )
