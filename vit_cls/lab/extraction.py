"""A frozen model run over images: the tokens of chosen layers, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vit_cls.data.dataset import FolderSource, ImageDataset, ImageSource
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.evaluation.predictions import choose_bf16, choose_device
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel
from vit_cls.weights.file_classifier import transform_of


@dataclass(frozen=True)
class Rows:
    """Which images the rows of some features are.

    Args:
        labels: Class of each row, int64, shape ``(n,)``.
        class_names: The classes, in the order of their labels.
        paths: Relative path of each row's image.
        positions: Position of each row's image in its source, int64, shape ``(n,)``.
        failures: Why an image is no row, by its relative path.
    """

    labels: np.ndarray
    class_names: list[str]
    paths: list[str]
    positions: np.ndarray
    failures: dict[str, str]

    @classmethod
    def of(cls, source: ImageSource, failures: dict[int, str]) -> Rows:
        """The images of a source that could be read.

        Args:
            source: All images.
            failures: Why an image could not be read, by its position.

        Raises:
            DataError: If none could.
        """
        index = source.index
        kept = np.array([i for i in range(len(index)) if i not in failures], dtype=np.int64)
        if not len(kept):
            first = next(iter(failures), None)
            reason = "" if first is None else f"; the first, {index.path(first)}: {failures[first]}"
            raise DataError(f"{index.root}: none of {len(index)} images could be read{reason}.")
        paths = [index.paths[i] for i in kept.tolist()]
        named = {index.paths[i]: reason for i, reason in sorted(failures.items())}
        return cls(index.labels[kept].astype(np.int64), list(index.class_names), paths, kept, named)


@dataclass(frozen=True)
class Running:
    """How a model is run over images.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: ``auto`` (bf16 autocast on a GPU), ``32`` or ``bf16``.
        batch_size: Images a forward pass.
        num_workers: Loading processes; None means one a core, at most 8, and none for images in memory.
        show_progress: Whether a bar is drawn on stderr.
        cache: Folder that keeps frozen tokens; None keeps none.
    """

    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 64
    num_workers: int | None = None
    show_progress: bool = False
    cache: Path | None = None


def checked_layers(model: TokenModel, layers: Sequence[int] | None) -> list[int]:
    """Ascending layers that a model has, each once.

    Args:
        model: Any.
        layers: 0 is before the first block, ``l`` after block ``l``; None means the last alone.

    Raises:
        ConfigError: If there is no such layer, or none is named.
    """
    depth = len(model.blocks)
    wanted = sorted(set([depth] if layers is None else layers))
    if not wanted or wanted[0] < 0 or wanted[-1] > depth:
        raise ConfigError(
            f"layers must be from 0 (before the first block) to {depth} (after the last); got "
            f"{', '.join(map(str, wanted)) or 'none'}."
        )
    return wanted


@torch.inference_mode()
def token_batches(
    classifier: ImageClassifier, source: ImageSource, layers: Sequence[int], running: Running
) -> Iterator[tuple[dict[int, Tensor], dict[int, str]]]:
    """Run the encoder over all images.

    Hooks on the blocks take the tokens, so native and adapted models are read alike.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        source: The images; files are read with the background of the preprocessing.
        layers: As `checked_layers` gives them.
        running: How.

    Yields:
        For each batch the tokens of each layer, float32, on the CPU, shape ``(batch, tokens, dim)``, as the
        block left them, none where no image could be read; and the reason of each failure, by position.

    Raises:
        ConfigError: If the device or a number is not available.
        ModelFileError: If tokens are not finite.
    """
    where = choose_device(running.device)
    low = choose_bf16(running.precision, where)
    pre = classifier.preprocess
    if isinstance(source, FolderSource):
        source = FolderSource(source.index, pre.background)
    workers = running.num_workers
    if workers is None:
        workers = default_num_workers() if isinstance(source, FolderSource) else 0
    loader = make_loader(
        ImageDataset(source, transform_of(pre)),
        EpochSampler(len(source.index), seed=0, shuffle=False),
        batch_size=running.batch_size,
        num_workers=workers,
        pin_memory=where.type == "cuda",
    )
    classifier.to(where).eval()
    quiet = not running.show_progress
    console = Console(stderr=True, quiet=quiet)
    seen: dict[int, Tensor] = {}
    with _tapped(classifier.model, layers, seen):
        for batch in track(loader, "freezing", total=len(loader), console=console, disable=quiet):
            seen.clear()
            if len(batch.indices):
                images = batch.images.to(where, non_blocking=True)
                with torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
                    classifier.model.encode(classifier.normalise(images))
                _refuse_diverged(seen, source)
            yield (
                {layer: seen[layer].float().cpu() for layer in layers if layer in seen},
                dict(batch.failures),
            )


@contextlib.contextmanager
def _tapped(model: TokenModel, layers: Sequence[int], seen: dict[int, Tensor]) -> Iterator[None]:
    """Have each forward pass leave the tokens of some layers in ``seen``."""

    def before(module: Any, args: tuple[Any, ...]) -> None:
        seen[0] = args[0]

    def after(layer: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
            seen[layer] = out

        return keep

    blocks = list(model.blocks)
    hooks = [
        blocks[0].register_forward_pre_hook(before)
        if layer == 0
        else blocks[layer - 1].register_forward_hook(after(layer))
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_diverged(seen: dict[int, Tensor], source: ImageSource) -> None:
    for layer, tokens in seen.items():
        if not bool(tokens.isfinite().all()):
            raise ModelFileError(
                f"tokens of layer {layer} are not finite for some image of {source.index.root}: weights that "
                "diverged, or --precision bf16."
            )
