"""A folder that timm opens, checked for equal logits before it is left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.files import making
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.config import ViTConfig
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.timm_models import (
    NORM_AFTER,
    POOLS,
    is_timm_name,
    make_timm,
    module_of,
    native_config,
    placement,
    ratio_of,
    skeleton,
    timm_arguments,
)

GENERAL_ARCHITECTURES = ("vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_giant_patch14_dinov2")
"""Architectures of timm whose norm epsilon and kind of MLP cover the native ones; all else is an argument."""

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, at which an export is still the same model."""


@dataclass(frozen=True)
class TimmExport:
    """A folder that timm opens.

    Args:
        architecture: timm's name for it.
        difference: Largest difference of logits between this model and timm's, relative to the largest logit.
    """

    folder: Path
    architecture: str
    difference: float


def export_timm(classifier: ImageClassifier, folder: Path) -> TimmExport:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

    Args:
        classifier: What to write, in float32.
        folder: Is made; must be new or empty.

    Raises:
        ConfigError: If timm has no counterpart of the architecture, or the folder is taken.
        ModelFileError: If timm's logits are not ours; nothing is left behind then.
        OSError: If the folder cannot be written.
    """
    check_new_folder(folder)
    config = classifier.model.config
    architecture, arguments = _timm_architecture(config, classifier.weights_source)
    theirs = _made(architecture, arguments, config)
    _take_weights(theirs, classifier.model.state_dict(), f"{architecture} with model.pool {config.pool}")
    with making(folder.parent):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _save(classifier, theirs, temporary)
            difference = _difference(classifier, temporary)
            if difference > TOLERANCE:
                raise ModelFileError(
                    f"timm's logits differ from this model's by {difference:.1e} of the largest one, more "
                    f"than {TOLERANCE:g}: timm's {architecture} with model.pool {config.pool} is not the "
                    "same function. Nothing was written. Export it with --format safetensors instead."
                )
            temporary.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return TimmExport(folder, architecture, difference)


def check_new_folder(folder: Path) -> None:
    """Refuse to write among other files.

    Raises:
        ConfigError: If ``folder`` exists and is anything but an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {folder} is not an empty folder. Give a new one.")


def _made(architecture: str, arguments: Mapping[str, Any], config: Any) -> Any:
    try:
        return make_timm(architecture, **arguments)
    except ConfigError as error:
        reason = str(error.__cause__ or error).rstrip(".")
        raise ConfigError(f"timm's {architecture} cannot have model.pool {config.pool}: {reason}.") from error


def _take_weights(theirs: Any, state: Mapping[str, Tensor], description: str) -> None:
    """Into timm's model, with ones for a LayerScale that it has and ours lacks: the same function."""
    wanted = theirs.state_dict()
    missing = wanted.keys() - state.keys()
    ones = {key: torch.ones_like(wanted[key]) for key in missing if key.endswith(".gamma")}
    given = {**state, **ones}
    shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in (wanted, given)]
    differ = [key for key in {**wanted, **given} if shapes[0].get(key) != shapes[1].get(key)]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(
            f"timm's {description} has other weights than this model: {', '.join(differ[:3])}{more}. Export "
            "it with --format safetensors instead."
        )
    theirs.load_state_dict(given)


def _timm_architecture(config: Any, source: str | None) -> tuple[str, dict[str, Any]]:
    """timm's architecture for a model and the arguments that make it this one; its own name if it has one."""
    if isinstance(config, AdapterConfig):
        return config.timm_architecture, _adapter_arguments(config)
    assert isinstance(config, ViTConfig)
    if config.causal:
        raise ConfigError(
            "timm has no counterpart of model.causal true: its tokens attend to all others. Export it with "
            "--format safetensors instead."
        )
    own = (source or "").partition(".")[0]
    # timm's constructor cannot be told to leave out the LayerScale of an architecture that has it.
    scaled = [config] if config.init_values is not None else [config, replace(config, init_values=1.0)]
    for wanted in scaled:
        arguments = timm_arguments(wanted)
        for name in [*([own] if is_timm_name(own) else []), *GENERAL_ARCHITECTURES]:
            if _as_built(name, arguments) == _canonical(wanted):
                return name, arguments
    raise ConfigError(
        f"timm has no architecture with model.mlp {config.mlp}, model.act {config.act} and model.norm_eps "
        f"{config.norm_eps:g} that this model could be."
    )


def _as_built(name: str, arguments: Mapping[str, Any]) -> ViTConfig | None:
    """What an architecture of timm's becomes with these arguments; None where they do not fit it."""
    try:
        built = native_config(skeleton(name, **arguments))
    except ConfigError:
        return None
    return None if built is None else _canonical(built)


def _canonical(config: ViTConfig) -> ViTConfig:
    """Without what is no part of the function at inference, and the rest written in one way."""
    rates: dict[str, Any] = {f.name: 0.0 for f in fields(config) if f.name.endswith("_rate")}
    implied = config.pool in NORM_AFTER
    return replace(
        config,
        **rates,
        fc_norm=None if config.fc_norm in (None, implied) or not config.final_norm else config.fc_norm,
        class_position="first",  # no difference to a model that is not causal
        pos_embed="none" if config.pos_embed == "none" else "learn",
        mlp_ratio=ratio_of(config.mlp_dim, config.embed_dim),
        norm_eps=max(config.norm_eps, 1e-6),  # transformers' 1e-12 is the same in float32
        floor_grid=any(side % config.patch_size for side in config.image_hw),
    )


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
        arguments["global_pool"] = names[config.pool]
        # Told where the norm stands, timm's constructor would make one for an architecture that has none.
        if placement(skeleton(config.timm_architecture, **config.arguments)).final_norm:
            plain = module_of(config.timm_architecture) in ("vision_transformer", "deit")
            after = config.pool in NORM_AFTER if config.fc_norm is None else config.fc_norm
            arguments["fc_norm" if plain else "use_fc_norm"] = after
    return arguments


def _save(classifier: ImageClassifier, theirs: Any, folder: Path) -> None:
    pre = classifier.preprocess
    record = {"license": classifier.weights_licence, "tag": None}
    data_config = {
        "input_size": (len(pre.mean), *pre.img_size),
        "mean": pre.mean,
        "std": pre.std,
        "crop_pct": pre.crop_pct,
        "crop_mode": pre.crop_mode,
        "interpolation": pre.interpolation,
    }
    try:
        save_for_hf(
            theirs,
            str(folder),
            model_config={"pretrained_cfg": record, "label_names": classifier.class_names},
            safe_serialization=True,
            data_config=data_config,
        )
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


@torch.inference_mode()
def _difference(classifier: ImageClassifier, folder: Path) -> float:
    """What timm's model of the written folder gives, against ours, on random images."""
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model, config = classifier.model.eval(), classifier.model.config
    images = torch.randn(2, config.in_chans, *config.image_hw, generator=torch.Generator().manual_seed(0))
    ours = model(images)
    return float((ours - theirs(images)).abs().max() / ours.abs().max().clamp_min(1e-12))
