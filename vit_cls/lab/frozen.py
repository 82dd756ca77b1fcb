"""Tokens of a frozen model, computed once: a memory map for each layer, or the reads alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vit_cls.data.dataset import ImageSource
from vit_cls.errors import ConfigError, DataError
from vit_cls.evaluation.predictions import choose_bf16, choose_device
from vit_cls.files import write_text
from vit_cls.lab.extraction import Rows, Running, checked_layers, token_batches
from vit_cls.lab.fingerprints import data_digest, joined_digest, model_digest
from vit_cls.lab.reads import Reader, layers_of
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import TokenLayout

FORMAT = 1
"""Goes up when what is stored changes its meaning."""
SIDECAR = "tokens.json"
AT_ONCE = 1 << 26
"""Numbers that are held at a time while tokens are read: 256 MB."""


class FrozenTokens:
    """Tokens of one model for the images of one part, and ways to read them.

    Args:
        folder: Holds one raw file of float32 a layer.
        reader: Layout and final norm of the model.
        layers: Which layers are there, ascending: 0 is before the first block, ``l`` after block ``l``.
        rows: The images.
        embed_dim: Width of a token.
        temporary: Whether the folder's parent goes away with this object.
    """

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        layers: Sequence[int],
        rows: Rows,
        embed_dim: int,
        temporary: bool = False,
    ) -> None:
        self.folder = folder
        self.reader = reader
        self.layers = tuple(layers)
        self.rows = rows
        self.embed_dim = embed_dim
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder.parent, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.rows.labels)

    @property
    def layout(self) -> TokenLayout:
        """Where class token, registers and patches stand."""
        return self.reader.layout

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return self.layout.grid_size

    @property
    def depth(self) -> int:
        """The model's blocks; the number of the last layer."""
        return self.reader.depth

    @property
    def labels(self) -> np.ndarray:
        """Class of each row, int64, shape ``(n,)``."""
        return self.rows.labels

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of their labels."""
        return self.rows.class_names

    @property
    def paths(self) -> list[str]:
        """Relative path of each row's image."""
        return self.rows.paths

    @property
    def positions(self) -> np.ndarray:
        """Position of each row's image in the source, int64, shape ``(n,)``."""
        return self.rows.positions

    @property
    def failures(self) -> dict[str, str]:
        """Why an image is no row, by its relative path."""
        return self.rows.failures

    def tokens(self, layer: int) -> np.ndarray:
        """Every token of every image, as the block left them.

        Args:
            layer: One of ``layers``.

        Returns:
            A read-only memory map, float32, shape ``(n, tokens, dim)``.

        Raises:
            ConfigError: If the layer was not frozen.
        """
        if layer not in self.layers:
            raise ConfigError(
                f"layer {layer} was not frozen; there are layers {', '.join(map(str, self.layers))} of "
                f"{self.depth}. Freeze it too: layers={sorted({*self.layers, layer})}."
            )
        shape = (len(self), self.layout.num_tokens, self.embed_dim)
        return np.memmap(self.folder / _file_name(layer), dtype="<f4", mode="r", shape=shape)

    def normed(self, layer: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Tokens after the model's final norm, token by token, whichever side of the pooling it stands on.

        Args:
            layer: One of ``layers``.
            rows: Which images.

        Returns:
            Float32, in memory, shape ``(rows, tokens, dim)``.

        Raises:
            ConfigError: If the layer was not frozen.
        """
        return self.reader.normed(torch.from_numpy(np.array(self.tokens(layer)[rows]))).numpy()

    def read(self, way: str, layer: int | None = None) -> np.ndarray:
        """What a head with that pooling would get.

        Args:
            way: See `vit_cls.lab.reads.READS`.
            layer: Where to read; None means after the last block.

        Returns:
            Float32, shape ``(n, dim)``; a multiple of the width for a concatenation.

        Raises:
            ConfigError: If the model cannot be read that way, or a layer that it needs was not frozen.
        """
        layer = self.depth if layer is None else layer
        needed = layers_of(self.reader.parse(way), layer)
        maps = {one: self.tokens(one) for one in needed}
        step = max(1, AT_ONCE // (self.layout.num_tokens * self.embed_dim * len(needed)))
        found = []
        for start in range(0, len(self), step):
            part = {k: torch.from_numpy(np.array(m[start : start + step])) for k, m in maps.items()}
            found.append(self.reader.read(way, part, layer).numpy())
        return np.concatenate(found)


def freeze(
    classifier: ImageClassifier,
    source: ImageSource,
    *,
    layers: Sequence[int] | None = None,
    cache: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> FrozenTokens:
    """Compute the tokens of every image once.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        source: The images; files are read as the classifier's preprocessing says.
        layers: Which; 0 is before the first block, ``l`` after block ``l``. None means the last alone.
        cache: A folder that keeps them: the same model, images and settings are not computed twice. None
            means a temporary one, as long as the returned object lives.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: ``auto`` (bf16 autocast on a GPU), ``32`` or ``bf16``.
        batch_size: Images a forward pass.
        num_workers: Loading processes; None means one a core, at most 8, and none for images in memory.
        show_progress: Whether a bar is drawn on stderr.

    Raises:
        ConfigError: If there is no such layer or device.
        DataError: If no image can be read, or the disk is too small.
        ModelFileError: If tokens are not finite.
    """
    running = Running(device, precision, batch_size, num_workers, show_progress)
    wanted = checked_layers(classifier.model, layers)
    temporary = cache is None
    root = Path(tempfile.mkdtemp(prefix="vit_cls-tokens-")) if cache is None else cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = root / cache_key(classifier, source, wanted, precision=precision, device=device)
        if not (folder / SIDECAR).is_file():
            _compute(classifier, source, wanted, folder, running)
        stored = json.loads((folder / SIDECAR).read_text(encoding="utf-8", errors="surrogateescape"))
        rows = Rows.of(source, {int(k): v for k, v in stored["failures"].items()})
        dim = classifier.model.config.embed_dim
        return FrozenTokens(folder, Reader(classifier.model), wanted, rows, dim, temporary)
    except BaseException:
        if temporary:
            shutil.rmtree(root, ignore_errors=True)
        raise


def freeze_reads(
    classifier: ImageClassifier,
    source: ImageSource,
    layers: Sequence[int],
    ways: Sequence[str],
    *,
    running: Running | None = None,
) -> tuple[dict[tuple[str, int], np.ndarray], Rows]:
    """Read many layers in one pass, without keeping their tokens.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        source: The images.
        layers: Where to read; 0 is before the first block.
        ways: See `vit_cls.lab.reads.READS`.
        running: How the model is run.

    Returns:
        Float32, shape ``(n, dim)``, for each way and layer, and which images the rows are.

    Raises:
        ConfigError: If the model cannot be read that way or has no such layer.
        DataError: If no image can be read.
        ModelFileError: If tokens are not finite.
    """
    reader = Reader(classifier.model)
    pairs = [(way, layer) for way in ways for layer in checked_layers(classifier.model, layers)]
    needed = sorted({one for way, layer in pairs for one in layers_of(reader.parse(way), layer)})
    found: dict[tuple[str, int], list[np.ndarray]] = {pair: [] for pair in pairs}
    failures: dict[int, str] = {}
    for tokens, failed in token_batches(classifier, source, needed, running or Running()):
        failures |= failed
        for way, layer in pairs if tokens else ():
            found[way, layer].append(reader.read(way, tokens, layer).numpy())
    rows = Rows.of(source, failures)
    return {pair: np.concatenate(parts) for pair, parts in found.items()}, rows


def cache_key(
    classifier: ImageClassifier, source: ImageSource, layers: Sequence[int], *, precision: str, device: str
) -> str:
    """A digest of everything that the stored tokens depend on.

    Args:
        classifier: Weights, architecture and preprocessing count; names of classes do not.
        source: Paths, sizes and dates of files count, or pixels where images are in memory.
        layers: Which are stored.
        precision: As for `freeze`; what it means on the device counts.
        device: As for `freeze`.
    """
    low = choose_bf16(precision, choose_device(device))
    settings = {"format": FORMAT, "layers": list(layers), "bf16": low}
    return joined_digest(json.dumps(settings), model_digest(classifier), data_digest(source))


def _file_name(layer: int) -> str:
    return f"layer{layer:03d}.f32"


def _check_disk(cache: Path, model: TokenModel, images: int, layers: Sequence[int]) -> None:
    needed = 4 * images * model.layout.num_tokens * model.config.embed_dim * len(layers)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise DataError(
            f"the tokens of {images} images ({model.layout.num_tokens} tokens of {model.config.embed_dim} "
            f"numbers, {len(layers)} layer(s)) need {needed / 1e9:.2f} GB, but {cache} has {free / 1e9:.2f} "
            "GB left. Use another cache folder, fewer images or fewer layers."
        )


@contextlib.contextmanager
def _completing(folder: Path) -> Iterator[Path]:
    """A folder to write to, ``NAME.part...``, that gets its name when it is complete."""
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part-"))
    try:
        yield part
        part.chmod(0o755)
        try:
            os.rename(part, folder)
        except OSError:
            if not (folder / SIDECAR).is_file():  # unless another process was faster, with the same numbers
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _compute(
    classifier: ImageClassifier, source: ImageSource, layers: Sequence[int], folder: Path, running: Running
) -> None:
    """Write the files of some layers, and beside them which images failed."""
    _check_disk(folder.parent, classifier.model, len(source.index), layers)
    failures: dict[int, str] = {}
    with _completing(folder) as part, contextlib.ExitStack() as stack:
        files: dict[int, BinaryIO] = {
            layer: stack.enter_context((part / _file_name(layer)).open("wb")) for layer in layers
        }
        for tokens, failed in token_batches(classifier, source, layers, running):
            failures |= failed
            for layer, values in tokens.items():
                files[layer].write(np.ascontiguousarray(values.numpy(), dtype="<f4").data)
        Rows.of(source, failures)  # raises where no image could be read
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        kept = {"layers": list(layers), "failures": {str(k): v for k, v in sorted(failures.items())}}
        write_text(part / SIDECAR, json.dumps(kept, indent=1))
