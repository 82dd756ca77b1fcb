"""From what a user names (an architecture, a tag, a file, a folder) to a model or a classifier."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.config import ViTConfig
from vit_cls.model.token_model import TokenModel
from vit_cls.weights.bundle import MODEL_FILE, build_model, is_own_file, load_classifier
from vit_cls.weights.families import FROM_SCRATCH_LICENCE, UNKNOWN_LICENCE, is_non_commercial
from vit_cls.weights.resolve import AUTO, Found, find

log = logging.getLogger("vit_cls")

MAX_FRESH = 0.1
"""More of the encoder than this must not be fresh, unless the user says so."""
HEAD_INITS = ("normal", "zero")


@dataclass(frozen=True)
class HeadOptions:
    """What becomes of the head when weights are loaded.

    Args:
        class_names: Classes of the new model; None where only their number matters.
        keep: Whether the checkpoint's head is kept where its classes are known and agree.
        init: A new head's weights: ``normal`` (standard deviation 0.02) or ``zero``.
        max_fresh: Largest share of the encoder's parameters that may be missing, in [0, 1].

    Raises:
        ConfigError: If a value is impossible.
    """

    class_names: Sequence[str] | None = None
    keep: bool = True
    init: str = "normal"
    max_fresh: float = MAX_FRESH

    def __post_init__(self) -> None:
        if self.init not in HEAD_INITS:
            raise ConfigError(f"model.head_init must be one of {', '.join(HEAD_INITS)}; got {self.init!r}.")
        if not 0.0 <= self.max_fresh <= 1.0:
            raise ConfigError(f"model.max_fresh must be in [0, 1]; got {self.max_fresh}.")


def create_model(
    name: str,
    *,
    pretrained: bool | str | Path | None = None,
    num_classes: int | None = None,
    pool: str | None = None,
    class_names: Sequence[str] | None = None,
    keep_head: bool = True,
    head_init: str = "normal",
    max_fresh: float = MAX_FRESH,
    **overrides: Any,
) -> TokenModel:
    """Build a Vision Transformer, with fresh or with pretrained weights.

    Args:
        name: An architecture of ``vit-cls models``, such as ``vit_tiny_patch16_224``; with pretrained
            weights also ``architecture.tag``, or ``auto`` where the weights say their architecture
            themselves.
        pretrained: None: fresh weights. True: those of the tag, from the hub's cache or the hub. Otherwise a
            tag, a file (``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.npz``) or a folder (a
            run, a model of transformers, an export for timm).
        num_classes: Classes of the head; 0 leaves the model headless. None keeps those of the weights, or
            1,000.
        pool: What the head reads: ``cls``, ``gap``, ``max``, ``token:K``, ``cls+gap`` or ``map``; None keeps
            the architecture's own.
        class_names: The classes, where a head whose classes agree is to be kept; sets ``num_classes``.
        keep_head: Whether the checkpoint's head is kept where it fits.
        head_init: A new head's weights: ``normal`` or ``zero``.
        max_fresh: Largest share of the encoder that may be missing from the weights, in [0, 1].
        overrides: Other fields of `ViTConfig`, with timm's names: ``depth=2``, ``img_size=96``. An adapted
            architecture takes the arguments of its constructor in timm.

    Returns:
        The model, in training mode, on the CPU; ``load_report`` tells the fate of every key. Fresh weights
        are drawn from torch's global generator.

    Raises:
        ConfigError: If the name or a setting is unknown, or the settings do not fit together.
        ModelFileError: If the weights cannot be had, read, or do not fit.

    Example:
        >>> import torch
        >>> model = create_model("vit_pico_patch7_28", num_classes=10, pool="gap")
        >>> model(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """
    head = HeadOptions(class_names, keep_head, head_init, max_fresh)
    if class_names is not None:
        if num_classes not in (None, len(class_names)):
            raise ConfigError(f"num_classes is {num_classes}, but there are {len(class_names)} class names.")
        num_classes = len(class_names)
    found = find(name, pretrained, overrides)
    changes = {**overrides, "num_classes": num_classes, "pool": pool}
    config = changed(found.config, **{k: v for k, v in changes.items() if v is not None})
    return _build(config, found, head)


def create_classifier(
    name: str,
    class_names: Sequence[str] | None = None,
    *,
    pretrained: bool | str | Path | None = None,
    load_weights: bool = True,
    keep_head: bool = True,
    head_init: str = "normal",
    max_fresh: float = MAX_FRESH,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    **overrides: Any,
) -> ImageClassifier:
    """Build a classifier whose preprocessing is that of its weights.

    Args:
        name: As for `create_model`.
        class_names: One name an output; None takes those of the weights.
        pretrained: As for `create_model`.
        load_weights: Whether the weights are read; without, the architecture is theirs and the weights are
            fresh.
        keep_head: As for `create_model`.
        head_init: As for `create_model`.
        max_fresh: As for `create_model`.
        crop_pct: Evaluation crop instead of the weights' own.
        crop_mode: Evaluation crop instead of the weights' own.
        overrides: Fields of the architecture, ``pool`` among them.

    Returns:
        The classifier, in training mode, on the CPU; ``weights_licence`` and ``weights_source`` are set.

    Raises:
        ConfigError: As for `create_model`.
        ModelFileError: As for `create_model`.
    """
    head = HeadOptions(class_names, keep_head, head_init, max_fresh)
    found = find(name, pretrained, overrides, needed=load_weights)
    if class_names is not None:
        overrides["num_classes"] = len(class_names)
    config = changed(found.config, **{k: v for k, v in overrides.items() if v is not None})
    preprocess = found.preprocess.resized(config.image_hw, config.in_chans)
    crop: dict[str, Any] = {
        k: v for k, v in (("crop_pct", crop_pct), ("crop_mode", crop_mode)) if v is not None
    }
    preprocess = dataclasses.replace(preprocess, **crop)
    if class_names is None:
        known = found.class_names if found.source is not None else None
        fits = known is not None and len(known) == config.num_classes
        class_names = known if fits and known else [f"output_{i}" for i in range(config.num_classes)]
    model = _build(config, found if load_weights else dataclasses.replace(found, source=None), head)
    classifier = ImageClassifier(model, preprocess, list(class_names))
    licence = found.source.licence or UNKNOWN_LICENCE if found.source else FROM_SCRATCH_LICENCE
    classifier.weights_licence = licence
    classifier.weights_source = found.source.label if found.source else None
    return classifier


def pool_of(name: str, pretrained: bool | str | Path | None = None) -> str:
    """What the head of an architecture reads if nothing else is asked for.

    Args:
        name: As for `create_model`.
        pretrained: As for `create_model`.

    Raises:
        ConfigError: As for `create_model`.
        ModelFileError: As for `create_model`.

    Example:
        >>> pool_of("vit_pico_patch7_28")
        'cls'
    """
    return find(name, pretrained).config.pool


def changed(config: Any, **changes: Any) -> Any:
    """An architecture with some settings changed.

    Args:
        config: A `ViTConfig`, or an `AdapterConfig`.
        changes: Fields of it; for an adapted one also arguments of its constructor in timm.

    Raises:
        ConfigError: If a setting is unknown or impossible.

    Example:
        >>> changed(ViTConfig(), pool="gap").pool
        'gap'
    """
    if changes.get("pool", config.pool) != config.pool:
        changes.setdefault("pool_include_prefix", False)
    if isinstance(config, ViTConfig):
        return ViTConfig.from_dict({**config.to_dict(), **changes})
    from vit_cls.weights.adapter import changed_adapter

    return changed_adapter(config, changes)


def _build(config: Any, found: Found, head: HeadOptions) -> TokenModel:
    model = build_model(config, init=found.source is None)
    if found.source is not None:
        from vit_cls.weights.loading import load_weights

        load_weights(model, found.source, head)
        announce(model)
    if head.init == "zero":
        fresh = None if model.load_report is None else model.load_report.of("fresh")
        for layer in (model.head, getattr(model, "head_dist", None)):
            if isinstance(layer, nn.Linear) and (fresh is None or "head.weight" in fresh):
                nn.init.zeros_(layer.weight)
    return model


def announce(model: TokenModel) -> None:
    """Say what was loaded, and under which licence; a non-commercial one as a warning.

    Args:
        model: Has a load report.
    """
    report = model.load_report
    for note in report.notes:
        log.info(note)
    licence = report.licence or UNKNOWN_LICENCE
    if is_non_commercial(report.licence):
        log.warning(
            f"licence of the weights of {report.source}: {licence}, which does not allow commercial use"
        )
    else:
        log.info(f"licence of the weights of {report.source}: {licence}")


def load(model: str | Path) -> ImageClassifier:
    """Load a classifier from anything that ``--model`` takes; see `vit_cls.api.load`.

    Args:
        model: What the user named.

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        ModelFileError: If there is no such model, or it cannot be read.
        ConfigError: If the name is unknown.
    """
    text, path = str(model), Path(model)
    if not path.exists():
        name, equals, file = text.partition("=")
        if equals:
            return create_classifier(name, pretrained=Path(file) if Path(file).exists() else file).eval()
        return _load_name(text)
    if path.is_dir() and (path / MODEL_FILE).is_file() and is_own_file(path / MODEL_FILE):
        return load_classifier(path / MODEL_FILE)
    if path.is_file() and (path.suffix == ".ckpt" or is_own_file(path)):
        return load_classifier(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return create_classifier(AUTO, pretrained=path).eval()
        if (path / MODEL_FILE).is_file():
            raise ModelFileError(
                f"{path / MODEL_FILE} does not say its architecture, and there is no config.json beside it. "
                "Use name=path/to/weights, with one of the names of `vit-cls models`."
            )
        raise ModelFileError(
            f"{path} is a folder without a {MODEL_FILE}. --model takes a run folder that `vit-cls fit` "
            "finished at least one epoch in, or a model file."
        )
    return load_classifier(path)  # raises, and says why


def _load_name(text: str) -> ImageClassifier:
    from vit_cls.weights.timm_models import is_timm_name, module_of

    if not is_timm_name(text) and module_of(text.partition(".")[0]) is None:
        raise ModelFileError(
            f"there is no file or folder {text!r}, and no architecture of that name. --model takes a run "
            f"folder, its {MODEL_FILE}, a .ckpt of a run, a name of timm's (`vit-cls models`), or "
            "name=path/to/weights."
        )
    return create_classifier(text, pretrained=True).eval()
