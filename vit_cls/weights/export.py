"""Models for others: a folder that timm opens, checked for equal logits before it is left behind."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.config import ViTConfig
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.timm_models import (
    POOLS,
    is_timm_name,
    make_timm,
    module_of,
    native_config,
    skeleton,
    timm_arguments,
)

HOMES = ("vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_giant_patch14_dinov2")
"""Architectures of timm whose norm epsilon and kind of MLP cover the native ones; all else is an argument."""

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, at which an export is still the same model."""


@dataclass(frozen=True)
class TimmExport:
    """A folder that timm opens.

    Args:
        folder: ``config.json`` and ``model.safetensors``.
        architecture: timm's name for it.
        difference: Largest difference of logits between this model and timm's, relative to the largest logit.
    """

    folder: Path
    architecture: str
    difference: float


def export_timm(classifier: ImageClassifier, folder: Path) -> TimmExport:
    """Write a model as timm's hub stores it.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it.

    Args:
        classifier: What to write, in float32.
        folder: Is made; must be new or empty.

    Raises:
        ConfigError: If timm has no counterpart of the architecture, or the folder is taken.
        ModelFileError: If timm's logits are not ours; nothing is left behind then.
        OSError: If the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {folder} is not an empty folder. Give a new one.")
    config = classifier.model.config
    architecture, arguments = _home(config, classifier.weights_source)
    theirs = make_timm(architecture, **arguments)
    theirs.load_state_dict(classifier.model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _save(classifier, theirs, temporary)
        difference = _difference(classifier, temporary)
        if difference > TOLERANCE:
            raise ModelFileError(
                f"timm's logits differ from this model's by {difference:.1e} of the largest one, more than "
                f"{TOLERANCE:g}: timm's {architecture} is not the same function (norm_eps "
                f"{getattr(config, 'norm_eps', 'as timm')}). Nothing was written."
            )
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return TimmExport(folder, architecture, difference)


def _home(config: Any, source: str | None) -> tuple[str, dict[str, Any]]:
    """timm's architecture for a model and the arguments that make it this one; its own name if it has one."""
    if isinstance(config, AdapterConfig):
        return config.timm_architecture, _adapter_arguments(config)
    assert isinstance(config, ViTConfig)
    arguments = timm_arguments(config)
    own = (source or "").partition(".")[0]
    for name in [*([own] if is_timm_name(own) else []), *HOMES]:
        built = native_config(skeleton(name, **arguments))
        if built is None or built.mlp != config.mlp or max(config.norm_eps, 1e-6) != built.norm_eps:
            continue
        if dataclasses.replace(built, norm_eps=config.norm_eps) == _as_timm_sees(config):
            return name, arguments
    raise ConfigError(
        f"timm has no architecture with mlp {config.mlp} and norm_eps {config.norm_eps:g} that this model "
        "could be."
    )


def _as_timm_sees(config: ViTConfig) -> ViTConfig:
    """Without what is no part of the function at inference, and with norm placement written timm's way."""
    rates: dict[str, Any] = {f.name: 0.0 for f in dataclasses.fields(config) if f.name.endswith("_rate")}
    implied = config.pool in ("gap", "max")
    fc_norm = None if config.fc_norm in (None, implied) or not config.final_norm else config.fc_norm
    positions = "none" if config.pos_embed == "none" else "learn"
    return dataclasses.replace(config, **rates, fc_norm=fc_norm, pos_embed=positions)


def _adapter_arguments(config: AdapterConfig) -> dict[str, Any]:
    arguments = {
        **config.arguments,
        "img_size": list(config.img_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "num_classes": config.num_classes,
    }
    if config.pool != "distilled":
        names = {ours: theirs for theirs, ours in POOLS.items()}
        if config.pool not in names:
            raise ConfigError(
                f"timm has no counterpart of model.pool {config.pool}; it knows {', '.join(names)}."
            )
        after = config.pool in ("gap", "max") if config.fc_norm is None else config.fc_norm
        spelled = (
            "fc_norm"
            if module_of(config.timm_architecture) in ("vision_transformer", "deit")
            else "use_fc_norm"
        )
        arguments |= {"global_pool": names[config.pool], spelled: after}
    return arguments


def _save(classifier: ImageClassifier, theirs: Any, folder: Path) -> None:
    pre = classifier.preprocess
    record = {"license": classifier.weights_licence, "tag": None}
    save_for_hf(
        theirs,
        str(folder),
        model_config={"pretrained_cfg": record, "label_names": classifier.class_names},
        safe_serialization=True,
        data_config={
            "input_size": (len(pre.mean), *pre.img_size),
            "mean": pre.mean,
            "std": pre.std,
            "crop_pct": pre.crop_pct,
            "crop_mode": pre.crop_mode,
            "interpolation": pre.interpolation,
        },
    )


@torch.inference_mode()
def _difference(classifier: ImageClassifier, folder: Path) -> float:
    """What timm's model of the written folder gives, against ours, on random images."""
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model, config = classifier.model.eval(), classifier.model.config
    images = torch.randn(2, config.in_chans, *config.image_hw, generator=torch.Generator().manual_seed(0))
    ours = model(images)
    return float((ours - theirs(images)).abs().max() / ours.abs().max().clamp_min(1e-12))
