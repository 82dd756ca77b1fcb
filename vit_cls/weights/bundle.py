"""One file is the model: weights and JSON metadata in ``model.safetensors``, rebuilt from it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.files import replacing
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import POOLINGS
from vit_cls.weights.architecture import architecture_from_dict, build_model, check_shapes
from vit_cls.weights.archives import check_archive, check_pickle, check_tensors
from vit_cls.weights.digest import DIGEST_KEY, check_metadata_of, check_seal, check_tensors_of, tensor_digests
from vit_cls.weights.metadata import check_metadata, parse_json
from vit_cls.weights.tensor_files import check_weights_file

FORMAT_VERSION = 2
"""Files have digests of what they hold since 2."""
SEALED_SINCE = 2
METADATA_KEY = "vit_cls"
MODEL_FILE = "model.safetensors"
CHECKPOINT_KEY = "vit_cls_metadata"
KEPT = "kept"
"""Which weights of a run did better, in the metadata of its files: those of `RAW` or of `EMA`."""
RAW, EMA = "raw", "ema"
_PREFIXES = {RAW: "classifier.model.", EMA: "ema.classifier.model."}


def save_classifier(
    classifier: ImageClassifier, path: str | Path, *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a classifier as one safetensors file; the old file stays until the new one is complete.

    Args:
        path: The file to write; its folder must exist.
        extra: More plain data for the metadata: metrics, versions, licence.

    Raises:
        OSError: If the folder cannot be written or is full; nothing is left behind.
    """
    path = Path(path)
    metadata = {"format_version": FORMAT_VERSION, **classifier.to_metadata(), **(extra or {})}
    tensors = {name: tensor.detach().contiguous() for name, tensor in classifier.model.state_dict().items()}
    try:
        with replacing(path) as temporary:
            text = json.dumps(metadata, sort_keys=True)
            digests = tensor_digests(tensors, text)
            save_file(tensors, temporary, metadata={METADATA_KEY: text, DIGEST_KEY: digests})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a model file, without its weights; ModelFileError if it is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file. --model takes a run folder or its {MODEL_FILE}.")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} is not a model file: it cannot be read as safetensors ({error}). "
            f"--model takes a run folder, or the {MODEL_FILE} that `vit-cls fit` wrote."
        ) from error
    if (raw := texts.get(METADATA_KEY)) is None:
        raise ModelFileError(
            f"{path} holds tensors but no vit_cls metadata (architecture, preprocessing, class names), so it "
            f"cannot be rebuilt from it alone. Name its architecture: --model NAME={path} (`vit-cls "
            f"models`), or give the {MODEL_FILE} that `vit-cls fit` wrote."
        )
    try:
        metadata = parse_json(raw)
    except ValueError as error:
        raise ModelFileError(f"{path} has damaged metadata: {error}.") from error
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if type(version) is not int:
        raise ModelFileError(f"{path} has damaged metadata: no format_version that is a whole number.")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this vit_cls reads up to {FORMAT_VERSION}. Upgrade it."
        )
    if DIGEST_KEY in texts or version >= SEALED_SINCE:
        check_metadata_of(raw, texts.get(DIGEST_KEY), path)
    return check_metadata(metadata, path)


def model_file(path: Path) -> Path:
    """The model file that a run folder stands for; any other path stands for itself."""
    return path / MODEL_FILE if path.is_dir() else path


def is_own_file(path: Path) -> bool:
    """Whether a file is one that `save_classifier` wrote, or a checkpoint of ours; a damaged one is not.

    ModelFileError for a safetensors file that is damaged: nobody can tell whose it was.
    """
    if path.suffix == ".ckpt":
        try:
            _read_checkpoint(path)
        except ModelFileError:
            return False
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        check_weights_file(path)
        raise ModelFileError(
            f"{path} is damaged (cut short?) or no safetensors file: {error}. Copy or download it again; a "
            "run writes its model anew when it is resumed."
        ) from error


def read_own_file(
    path: Path, *, weights: bool = True, which: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and weights under timm's names if wanted, of a model file or a checkpoint; or ModelFileError.

    A ``.ckpt`` is read with ``weights_only=True``: no code in it ever runs.

    Args:
        which: Weights of a checkpoint, `RAW` or `EMA`; None takes those that were kept.
    """
    if path.suffix == ".ckpt":
        checkpoint = _read_checkpoint(path)
        metadata = check_metadata(checkpoint[CHECKPOINT_KEY], path)
        prefix = _PREFIXES[EMA if (which or metadata.get(KEPT)) == EMA else RAW]
        state = {
            k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)
        }
        return metadata, state
    metadata = read_metadata(path)
    if not weights:
        return metadata, {}
    with safe_open(path, framework="pt") as file:
        # Copies lie where torch's own tensors do. Those of the file lie wherever its header ends, and may be
        # computed with by other instructions, whose results differ in the last bit.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        texts = file.metadata()
    if DIGEST_KEY in texts or metadata["format_version"] >= SEALED_SINCE:
        check_tensors_of(state, texts[METADATA_KEY], texts.get(DIGEST_KEY), path)
    return metadata, state


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    check_archive(path)
    check_pickle(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"].items()
        if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in checkpoint["state_dict"].items()):
            raise ValueError("its state_dict is not of tensors by name")
    except Exception as error:  # unpickling a foreign file can raise anything
        raise ModelFileError(
            f"{path} is not a training checkpoint of vit_cls (it is opened for tensors and plain data "
            f"alone): {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error
    check_tensors(checkpoint, path)
    check_seal(checkpoint, path)
    return checkpoint


def check_own_poolings(metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse (ModelFileError) a pooling that somebody registered, as a model file says, and that is not here.

    Nothing is imported for it: that would run whatever code a file names.
    """
    for name, module in metadata.get("own_poolings", {}).items():
        if name not in POOLINGS:
            script = module == "__main__"
            raise ModelFileError(
                f"{path} cannot be built: its pooling {name} is not known here; it was registered by "
                f"{'a script or a notebook' if script else f'module {module}'}: give --import "
                f"{'FILE, the file that registers it,' if script else module} (or import it before "
                "vit_cls.load). Nothing is imported by itself."
            )


def load_classifier(path: str | Path, *, which: str | None = None) -> ImageClassifier:
    """Rebuild a classifier, bit for bit and in evaluation mode, from a model file or checkpoint of ours.

    Args:
        which: Weights of a checkpoint, `RAW` or `EMA`; None takes those that were kept.

    Raises:
        ModelFileError: If the file is missing, damaged, not one of ours, or does not hold every weight.
    """
    metadata, state = read_own_file(Path(path), which=which)
    try:
        check_own_poolings(metadata, Path(path))
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_shapes(architecture_from_dict(metadata["architecture"]), shapes)
        classifier = ImageClassifier.from_metadata(
            metadata, lambda values: build_model(architecture_from_dict(values), init=False)
        )
        classifier.model.load_state_dict(state, assign=True)
    except (ConfigError, RuntimeError) as error:
        raise ModelFileError(f"{path} does not hold the model that it describes: {error}") from error
    config = classifier.model.config
    fixed = isinstance(config, ViTConfig) and config.pos_embed != "learn"
    for name, parameter in classifier.model.named_parameters():
        parameter.requires_grad_(name != "pos_embed" or not fixed)
    # The dtype of the weights is the dtype of the input.
    classifier.to(next(classifier.model.parameters()).dtype)
    return classifier.eval()
