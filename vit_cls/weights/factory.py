"""From what a user names to a model or a classifier, step by step.

What was written, to a reference and then a source of weights: `sources`. The architecture, with the settings
that were changed: `architecture`. The weights, converted to it, and the fate of each key: `loading`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vit_cls.errors import ConfigError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel
from vit_cls.weights.architecture import build_model, changed
from vit_cls.weights.bundle import is_own_file, load_classifier, model_file
from vit_cls.weights.families import FROM_SCRATCH_LICENCE, UNKNOWN_LICENCE, is_non_commercial
from vit_cls.weights.load_report import LoadReport
from vit_cls.weights.loading import MAX_FRESH, HeadOptions, load_weights
from vit_cls.weights.sources import AUTO, Reference, Source, find_source, parse_model, parse_pretrained

log = logging.getLogger("vit_cls")


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
        name: An architecture of ``vit-cls models``, such as ``vit_tiny_patch16_224``; with pretrained weights
            also ``architecture.tag``, or ``auto`` where the weights say their architecture themselves.
        pretrained: None: fresh weights. True: those of the tag, from the hub's cache or the hub. Otherwise a
            tag, a file (``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.npz``) or a folder (a
            run, a model of transformers, an export for timm).
        num_classes: 0 leaves the model headless; None keeps those of the weights, or 1,000.
        pool: What the head reads; None keeps the architecture's own.
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
    source = find_source(parse_pretrained(name, pretrained), overrides)
    changes = {**overrides, "num_classes": num_classes, "pool": pool}
    config = changed(source.config, **{k: v for k, v in changes.items() if v is not None})
    return _build(config, source, head)


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
    """Build a classifier whose preprocessing is that of its weights, as `create_model` builds a model.

    Args:
        class_names: One name an output; None takes those of the weights.
        load_weights: Whether the weights are read; without, the architecture is theirs and they are fresh.
        crop_pct: Evaluation crop instead of the weights' own.
        crop_mode: Evaluation crop instead of the weights' own.

    Returns:
        The classifier, in training mode, on the CPU; ``weights_licence`` and ``weights_source`` are set.
    """
    head = HeadOptions(class_names, keep_head, head_init, max_fresh)
    crop = {k: v for k, v in (("crop_pct", crop_pct), ("crop_mode", crop_mode)) if v is not None}
    return _classifier(parse_pretrained(name, pretrained), head, overrides, crop, load_weights=load_weights)


def architecture_of(name: str, pretrained: bool | str | Path | None = None, **overrides: Any) -> Any:
    """The `ViTConfig` or `AdapterConfig` that arguments of `create_model` stand for; no weights are read.

    Args:
        overrides: Settings to change.

    Example:
        >>> architecture_of("vit_pico_patch7_28", pool="gap").grid_size
        (4, 4)
    """
    return changed(find_source(parse_pretrained(name, pretrained), overrides).config, **overrides)


def load(model: str | Path) -> ImageClassifier:
    """Load a classifier from anything that ``--model`` takes; see `vit_cls.api.load`."""
    reference = parse_model(model)
    path = reference.path
    if reference.name == AUTO and path is not None and (path.is_file() or is_own_file(model_file(path))):
        return load_classifier(model_file(path))  # as it was saved; of a file that is not ours it says why
    return _classifier(reference, HeadOptions(), {}, {}).eval()


def _classifier(
    reference: Reference,
    head: HeadOptions,
    overrides: Mapping[str, Any],
    crop: Mapping[str, Any],
    *,
    load_weights: bool = True,
) -> ImageClassifier:
    source = find_source(reference, overrides, needed=load_weights)
    changes = {k: v for k, v in overrides.items() if v is not None}
    if head.class_names is not None:
        changes["num_classes"] = len(head.class_names)
    config = changed(source.config, **changes)
    names = head.class_names
    if names is None and source.class_names is not None and len(source.class_names) == config.num_classes:
        names = source.class_names
    model = _build(config, source, head, load=load_weights)
    return ImageClassifier(model, dataclasses.replace(model.preprocess, **crop), names)


def _build(config: Any, source: Source, head: HeadOptions, *, load: bool = True) -> TokenModel:
    load = load and source.read is not None
    model = build_model(config, init=not load)
    model.preprocess = source.preprocess.resized(config.image_hw, config.in_chans)
    model.weights_licence = FROM_SCRATCH_LICENCE if source.read is None else source.licence or UNKNOWN_LICENCE
    model.weights_source = source.label
    report = None
    if load:
        load_weights(model, source, head)
        report = model.load_report
        _announce(report)
    if head.init == "zero" and (report is None or "head.weight" in report.of("fresh")):
        for layer in (model.head, getattr(model, "head_dist", None)):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
    return model


def _announce(report: LoadReport) -> None:
    """Say what was loaded, and under which licence; a non-commercial one as a warning."""
    for note in report.notes:
        log.info(note)
    text = f"licence of the weights of {report.source}: {report.licence or UNKNOWN_LICENCE}"
    if is_non_commercial(report.licence):
        log.warning(f"{text}, which does not allow commercial use")
    else:
        log.info(text)
