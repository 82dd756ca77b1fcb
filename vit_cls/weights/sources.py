"""Where weights come from: a tag of timm's, a file, a folder; each as one `Source` with timm's names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import Preprocess
from vit_cls.model.config import ModelConfig
from vit_cls.weights.adapter import AdapterConfig, adapter_config
from vit_cls.weights.bundle import MODEL_FILE, architecture_config, is_own_file, read_own_file
from vit_cls.weights.class_names import class_names_of
from vit_cls.weights.hf_folder import is_hf_folder, read_hf_folder
from vit_cls.weights.hub import weights_file
from vit_cls.weights.npz import read_npz
from vit_cls.weights.tensor_files import read_tensors
from vit_cls.weights.timm_models import (
    QUICK_GELU_NOTE,
    filter_of,
    native_config,
    preprocess_of,
    pretrained_config,
    skeleton,
    timm_arguments,
)
from vit_cls.weights.tracing import Weights


@dataclass(frozen=True)
class Source:
    """Weights that are known but not yet read.

    Args:
        label: Where they come from, for people.
        config: Their architecture.
        read: Reads them for a target architecture.
        preprocess: How their images are prepared; None where the source does not say.
        class_names: Classes of their head; None where unknown.
        licence: Their licence; None where the source does not say.
        remarks: What a user should know before they are read.
    """

    label: str
    config: Any
    read: Callable[[ModelConfig], Weights]
    preprocess: Preprocess | None = None
    class_names: list[str] | None = None
    licence: str | None = None
    remarks: tuple[str, ...] = ()


def architecture_of(name: str) -> Any:
    """The architecture of timm's ``name`` or ``name.tag``: native where native blocks can do it.

    Args:
        name: As the user wrote it.

    Raises:
        ConfigError: If there is no such name.
    """
    pretrained_config(name)
    model = skeleton(name)
    return native_config(model) or adapter_config(name.partition(".")[0], model)


def tag_source(name: str, path: Path | None = None) -> Source:
    """A tag of timm's, from the hub or from a file that holds it.

    Args:
        name: ``architecture.tag``, or ``architecture`` for its default tag.
        path: The file; None takes the hub's.

    Raises:
        ConfigError: If there is no such name.
    """
    record = pretrained_config(name)
    base = name.partition(".")[0]
    label = f"{base}.{record.tag}" if record.tag else base
    config, remarks = architecture_of(name), tuple[str, ...]()
    notes = record.notes or ()
    if any(QUICK_GELU_NOTE in note for note in notes) and getattr(config, "act", None) == "gelu":
        config = dataclasses.replace(config, act="quick_gelu")
        remarks = ("these weights were trained with QuickGELU, so the model is built with it, not with GELU",)

    def read(target: ModelConfig) -> Weights:
        file = weights_file(label, record) if path is None else path
        return read_timm_file(file, config, target, name=base)

    return Source(
        label if path is None else f"{path} ({label})",
        config,
        read,
        preprocess_of(record),
        class_names_of(record),
        record.license,
        remarks,
    )


def file_source(path: Path, config: Any, *, name: str | None) -> Source:
    """A file under timm's names or in a format that timm converts, for an architecture given by name.

    Args:
        path: The file.
        config: The architecture.
        name: timm's name of it, which decides how foreign formats are converted; None where it has none.
    """
    classes = _classes_in(path) if path.exists() else None  # a resumed run does without
    if classes is not None:
        config = dataclasses.replace(config, num_classes=classes)
    return Source(str(path), config, lambda target: read_timm_file(path, config, target, name=name))


def _classes_in(path: Path) -> int | None:
    """Rows of the head in a file; None where it has none under a name that needs no conversion."""
    if path.suffix == ".npz":
        known = {f"{prefix}head/bias" for prefix in ("", "opt/target/", "params/", "params/img/")}
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return next((len(file[name]) for name in file.files if name in known), None)
        except Exception:  # a damaged archive can raise anything; reading the weights says what is wrong
            return None
    if path.suffix == ".safetensors":  # the header tells; the tensors are read once, later
        try:
            with safe_open(path, framework="pt") as opened:
                shape = opened.get_slice("head.weight").get_shape()
        except (SafetensorError, OSError):
            return None
    else:
        head = read_tensors(path)[0].get("head.weight")
        shape = [] if head is None else list(head.shape)
    return shape[0] if len(shape) == 2 else None


def own_source(path: Path) -> Source:
    """A model file or a training checkpoint of ours.

    Args:
        path: The file.

    Raises:
        ModelFileError: If it is damaged.
    """
    metadata = read_own_file(path, weights=False)[0]
    try:
        config = architecture_config(metadata["architecture"])
        preprocess = Preprocess(**metadata["preprocess"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} does not describe a model: {error}.") from error

    def read(target: ModelConfig) -> Weights:
        state = read_own_file(path)[1]
        name = getattr(config, "timm_architecture", None)
        return Weights(dict(state), _filtered(dict(state), config, target, name, path), config)

    return Source(
        metadata.get("weights_source") or str(path),
        config,
        read,
        preprocess,
        list(metadata["class_names"]) or None,
        metadata.get("weights_licence"),
    )


def folder_source(path: Path) -> Source | None:
    """A folder that says by itself what it holds: of transformers, of timm, or a run of ours.

    Args:
        path: The folder.

    Returns:
        None where the folder is none of these.

    Raises:
        ModelFileError: If it is one of these, and damaged or of an unknown kind.
    """
    if is_hf_folder(path):
        model = read_hf_folder(path)

        def read(target: ModelConfig) -> Weights:
            return Weights(
                model.raw, _filtered(dict(model.state), model.stored, target, None, path), model.stored
            )

        return Source(str(path), model.config, read, model.preprocess, model.class_names, model.licence)
    if (path / MODEL_FILE).is_file() and is_own_file(path / MODEL_FILE):
        return own_source(path / MODEL_FILE)
    if (path / "config.json").is_file():
        return _timm_folder(path)
    return None


def _timm_folder(path: Path) -> Source:
    """What timm's ``save_for_hf`` and ``vit-cls export --format timm`` write."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = settings["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path / 'config.json'} names no architecture ({error}): it is neither timm's nor transformers'."
        ) from error
    pretrained_config(name)
    try:
        model = skeleton(f"local-dir:{path}")
        record = PretrainedCfg(**{k: v for k, v in model.pretrained_cfg.items() if k != "source"})
    except (ConfigError, RuntimeError, TypeError, KeyError) as error:
        reason = error.__cause__ or error
        raise ModelFileError(f"timm cannot build what {path / 'config.json'} describes: {reason}.") from error
    passed = ("img_size", "patch_size", "in_chans", "num_classes")  # the adapter's own fields
    arguments = {k: v for k, v in settings.get("model_args", {}).items() if k not in passed}
    config = native_config(model) or adapter_config(name, model, **arguments)
    file = path / MODEL_FILE
    return Source(
        str(path),
        config,
        lambda target: read_timm_file(file, config, target, name=name),
        preprocess_of(record),
        class_names_of(record),
        record.license,
    )


def read_timm_file(path: Path, config: Any, target: ModelConfig, *, name: str | None) -> Weights:
    """Read a file that is in timm's format, or in one that timm converts.

    Args:
        path: The file.
        config: The architecture that the file should have.
        target: The architecture that the weights are for: their grid is resized to its.
        name: timm's name of the architecture; None where it has none.

    Raises:
        ModelFileError: If the file cannot be read, or does not hold that architecture.
    """
    if path.suffix == ".npz":
        return read_npz(path, config, target)
    raw, remarks = read_tensors(path)
    config = _structure_in(raw, config)
    state = _filtered(dict(raw), config, target, name, path)
    head = state.get("head.weight")
    if head is not None and head.ndim == 2:
        config = dataclasses.replace(config, num_classes=head.shape[0])
    return Weights(dict(raw), state, config, remarks)


def _structure_in(raw: Mapping[str, Tensor], config: Any) -> Any:
    """The architecture with class token, registers and positions as a file under timm's names has them."""
    positions, weight = raw.get("pos_embed"), raw.get("patch_embed.proj.weight")
    if isinstance(config, AdapterConfig) or positions is None or weight is None or positions.ndim != 3:
        return config
    if "mask_token" in raw:  # DINOv2's own layout, which timm converts
        return config
    registers, classes = raw.get("reg_token"), raw.get("cls_token")
    found: dict[str, Any] = {
        "class_token": classes is not None,
        "reg_tokens": 0 if registers is None else registers.shape[1],
    }
    count = 0 if classes is None else classes.numel() // positions.shape[2]
    prefix = count + found["reg_tokens"]
    length = positions.shape[1]
    counts = {True: length, False: length - prefix}  # of patches, without and with positions for the prefix
    fits = {embed: count == math.prod(config.grid_size) for embed, count in counts.items()}
    squares = {embed: math.isqrt(count) ** 2 == count for embed, count in counts.items()}
    told = fits if any(fits.values()) else squares
    if prefix and told[True] != told[False]:
        found["no_embed_class"] = told[True]
    head = raw.get("head.weight")
    if "attn_pool.latent" in raw:
        found["pool"] = "map"
    elif count > 1:
        joined = head is not None and head.ndim == 2 and head.shape[1] == count * positions.shape[2]
        kind = "-diverse" if "attn_pool.weight" in raw else "-concat" if joined else ""
        found["pool"] = f"multicls{kind}:{count}"
    elif head is not None and head.ndim == 2 and head.shape[1] == 2 * positions.shape[2]:
        found["pool"] = "cls+gap"
    elif config.pool in ("cls", "cls+gap") and ("fc_norm.weight" in raw or not found["class_token"]):
        found["pool"] = "gap"
    return dataclasses.replace(config, **found)


def _filtered(
    raw: dict[str, Tensor], config: Any, target: ModelConfig, name: str | None, path: Path
) -> dict[str, Tensor]:
    """Through timm's own conversion: foreign names, another grid, another patch size."""
    convert = checkpoint_filter_fn if name is None else filter_of(name)
    try:
        return convert(raw, _twin(config, target))
    except (RuntimeError, KeyError, AssertionError, ValueError, IndexError, AttributeError) as error:
        raise ModelFileError(
            f"{path} does not hold the weights of {name or 'this architecture'}: timm's conversion stops at "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error


def _twin(config: Any, target: ModelConfig) -> Any:
    """A skeleton with the tokens of the weights and the grid of the target."""
    size = {"img_size": target.image_hw, "patch_size": target.patch_size}
    if isinstance(config, AdapterConfig):
        adapted = skeleton(config.timm_architecture, **{**config.arguments, **size}, in_chans=config.in_chans)
        adapted.pretrained_model_args = {"img_size": config.image_hw}  # or timm takes any grid for a square
        return adapted
    pool = "cls" if config.class_token else "gap"
    others = config.layout.num_prefix_tokens - config.class_token  # timm's has one class token
    plain = dataclasses.replace(config, **size, pool=pool, reg_tokens=others, depth=1, floor_grid=True)
    arguments = {**timm_arguments(plain), "fc_norm": False}
    with torch.device("meta"):
        twin: Any = TimmViT(**arguments)
    twin.pretrained_model_args = {"img_size": config.image_hw}
    return twin
