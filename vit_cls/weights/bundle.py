"""One file is the model: weights and JSON metadata in ``model.safetensors``, rebuilt from it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.files import replacing
from vit_cls.model.classifier import ImageClassifier

FORMAT_VERSION = 1
METADATA_KEY = "vit_cls"
MODEL_FILE = "model.safetensors"
CHECKPOINT_KEY = "vit_cls_metadata"


def save_classifier(
    classifier: ImageClassifier, path: str | Path, *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a classifier as one safetensors file; the old file stays until the new one is complete.

    Args:
        classifier: What to save. Weights are stored with their dtype.
        path: The file to write; its folder must exist.
        extra: More plain data for the metadata: metrics, versions, licence.

    Returns:
        The path written.

    Raises:
        OSError: If the folder cannot be written or is full; nothing is left behind.
    """
    path = Path(path)
    metadata = {"format_version": FORMAT_VERSION, **classifier.to_metadata(), **(extra or {})}
    tensors = {name: tensor.detach().contiguous() for name, tensor in classifier.model.state_dict().items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a model file, without its weights.

    Args:
        path: A file that `save_classifier` wrote.

    Raises:
        ModelFileError: If the file is missing, damaged or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file. --model takes a run folder or its {MODEL_FILE}.")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} is not a model file: it cannot be read as safetensors ({error}). "
            f"--model takes a run folder, or the {MODEL_FILE} that `vit-cls fit` wrote."
        ) from error
    if raw is None:
        raise ModelFileError(
            f"{path} holds tensors but no vit_cls metadata (architecture, preprocessing, class names), so it "
            f"cannot be rebuilt from it alone. --model takes the {MODEL_FILE} that `vit-cls fit` wrote."
        )
    try:
        metadata = json.loads(raw)
        version = metadata["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFileError(f"{path} has damaged metadata: {error}.") from error
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this vit_cls reads up to {FORMAT_VERSION}. Upgrade it."
        )
    return metadata


def load_classifier(path: str | Path) -> ImageClassifier:
    """Rebuild a classifier from a file that `save_classifier` wrote.

    Args:
        path: The file.

    Returns:
        The classifier in evaluation mode, on the CPU, weights bit for bit those saved.

    Raises:
        ModelFileError: If the file is missing, damaged, not one of ours, or does not hold every weight.
    """
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no dict
    return _rebuild(metadata, state, str(path))


def load_checkpoint_classifier(path: str | Path) -> ImageClassifier:
    """Rebuild a classifier from a training checkpoint (``.ckpt``) of ours.

    Args:
        path: The checkpoint. It is read with ``weights_only=True``: no code in it ever runs.

    Raises:
        ModelFileError: If the file is missing, unsafe, damaged or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        metadata = checkpoint[CHECKPOINT_KEY]
    except Exception as error:  # unpickling a foreign file can raise anything
        raise ModelFileError(
            f"{path} is not a training checkpoint of vit_cls (it is opened for tensors and plain data "
            f"alone): {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error
    prefix = "classifier.model."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return _rebuild(metadata, state, str(path))


def _rebuild(metadata: Mapping[str, Any], state: Mapping[str, torch.Tensor], path: str) -> ImageClassifier:
    try:
        classifier = ImageClassifier.from_metadata(metadata)
        classifier.model.load_state_dict(state, assign=True)
    except (ConfigError, RuntimeError) as error:
        raise ModelFileError(f"{path} does not hold the model that it describes: {error}") from error
    for name, parameter in classifier.model.named_parameters():
        parameter.requires_grad_(name != "pos_embed" or classifier.model.config.pos_embed == "learn")
    # The dtype of the weights is the dtype of the input.
    classifier.to(next(classifier.model.parameters()).dtype)
    return classifier.eval()


def load(model: str | Path) -> ImageClassifier:
    """Load a classifier from anything that ``--model`` takes.

    Args:
        model: A run folder, a ``model.safetensors``, or a training checkpoint (``.ckpt``).

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        ModelFileError: If there is no such file, or it is not a model of ours.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise ModelFileError(
                f"{path} is a folder without a {MODEL_FILE}. --model takes a run folder that `vit-cls fit` "
                "finished at least one epoch in, or a model file."
            )
        return load_classifier(path / MODEL_FILE)
    if not path.exists():
        raise ModelFileError(
            f"there is no file or folder {str(model)!r}. --model takes a run folder, its {MODEL_FILE}, or a "
            ".ckpt of a run."
        )
    return load_checkpoint_classifier(path) if path.suffix == ".ckpt" else load_classifier(path)
