"""What a frozen model says of images, computed once: tokens in memory maps, reads of many layers, logits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from vit_cls.data.dataset import ImageSource
from vit_cls.errors import ConfigError, DataError
from vit_cls.files import replacing, write_text, writing
from vit_cls.inference import InferenceConfig, batches, layer_tokens
from vit_cls.lab.token_cache import cache_key, check_disk, completing, joined_digest
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel
from vit_cls.model.token_reader import TokenReader
from vit_cls.model.tokens import TokenLayout

SIDECAR = "tokens.json"
FAILURES = "failures"
AT_ONCE = 1 << 26
"""Numbers that are held at a time while tokens are read: 256 MB."""
OF_TRAINED = InferenceConfig(precision="32", batch_size=256)
"""How a study runs the models that it has trained."""


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
        """The images of a source that could be read; ``failures`` say by position why one could not.

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


def checked_layers(model: TokenModel, layers: Sequence[int] | None) -> list[int]:
    """Ascending layers that a model has, each once; None means the last alone, 0 is before the first block.

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


class FrozenTokens:
    """Tokens of one model for the images of one part, and how to read them.

    Args:
        folder: Holds one raw file of float32 a layer; ``temporary``: its parent goes away with this object.
        layers: Which layers are there, ascending: 0 is before the first block, ``l`` after block ``l``.
        rows: The images; ``labels``, ``class_names``, ``paths``, ``positions`` and ``failures`` are theirs.
    """

    def __init__(
        self,
        folder: Path,
        reader: TokenReader,
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
        self.layout: TokenLayout = reader.layout
        self.grid_size = reader.layout.grid_size
        self.depth = reader.depth
        self.labels = rows.labels
        self.class_names = rows.class_names
        self.paths = rows.paths
        self.positions = rows.positions
        self.failures = rows.failures
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder.parent, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.rows.labels)

    def tokens(self, layer: int) -> np.ndarray:
        """Every token of every image, as the block left them: a read-only map, float32, ``(n, tokens, dim)``.

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

        Float32, in memory, shape ``(rows, tokens, dim)``.
        """
        return self.reader.normed(torch.from_numpy(np.array(self.tokens(layer)[rows]))).numpy()

    def read(self, pool: str, layer: int | None = None) -> np.ndarray:
        """What a head with that pooling would get; ``layer`` None means after the last block.

        Returns:
            Float32, shape ``(n, dim)``; a multiple of the width for a concatenation.

        Raises:
            ConfigError: If the model cannot be read by that pool, or a layer that it needs was not frozen.
        """
        layer = self.depth if layer is None else layer
        needed = self.reader.layers(pool, layer)
        maps = {needed_layer: self.tokens(needed_layer) for needed_layer in needed}
        step = max(1, AT_ONCE // (self.layout.num_tokens * self.embed_dim * len(needed)))
        vectors = []
        for start in range(0, len(self), step):
            part = {k: torch.from_numpy(np.array(m[start : start + step])) for k, m in maps.items()}
            vectors.append(self.reader.read(pool, part, layer).numpy())
        return np.concatenate(vectors)


def freeze(
    classifier: ImageClassifier,
    source: ImageSource,
    *,
    layers: Sequence[int] | None = None,
    config: InferenceConfig | None = None,
    cache: Path | None = None,
) -> FrozenTokens:
    """Compute the tokens of every image once.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        layers: Which; 0 is before the first block, ``l`` after block ``l``. None means the last alone.
        cache: A folder that keeps them: the same model, images and settings are not computed twice. None
            means a temporary one, as long as the returned object lives.

    Raises:
        ConfigError: If there is no such layer.
        DataError: If no image can be read, or the disk is too small.
        ModelFileError: If tokens are not finite.
    """
    config = config or InferenceConfig()
    wanted = checked_layers(classifier.model, layers)
    root = Path(tempfile.mkdtemp(prefix="vit_cls-tokens-")) if cache is None else cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = root / cache_key(classifier, source, wanted, config)
        if not (folder / SIDECAR).is_file():
            _compute(classifier, source, wanted, folder, config)
        stored = json.loads((folder / SIDECAR).read_text(encoding="utf-8", errors="surrogateescape"))
        rows = Rows.of(source, {int(k): v for k, v in stored[FAILURES].items()})
        dim = classifier.model.config.embed_dim
        reader = TokenReader(classifier.model).on_cpu()
        return FrozenTokens(folder, reader, wanted, rows, dim, temporary=cache is None)
    except BaseException:
        if cache is None:
            shutil.rmtree(root, ignore_errors=True)
        raise


def freeze_reads(
    classifier: ImageClassifier,
    source: ImageSource,
    layers: Sequence[int],
    pools: Sequence[str],
    *,
    config: InferenceConfig | None = None,
    cache: Path | None = None,
) -> tuple[dict[tuple[str, int], np.ndarray], Rows]:
    """Read many layers in one pass, without keeping their tokens, or take what an earlier call left.

    Args:
        cache: A folder that keeps the reads in one file; None keeps none.

    Returns:
        Float32, shape ``(n, dim)``, for each pool and layer, and which images the rows are.

    Raises:
        ConfigError: As for `freeze`, or if the cache cannot be written.
        DataError: If no image can be read.
        ModelFileError: If tokens are not finite.
    """
    config = config or InferenceConfig()
    wanted = checked_layers(classifier.model, layers)
    pairs = [(pool, layer) for pool in pools for layer in wanted]
    if cache is None:
        reads, failures = _read_layers(classifier, source, pairs, config)
        return reads, Rows.of(source, failures)
    key = cache_key(classifier, source, wanted, config)
    file = cache / f"{joined_digest(key, 'reads', *pools)}.npz"
    if file.is_file():
        with np.load(file) as stored:
            failures = {int(k): v for k, v in json.loads(stored[FAILURES].tobytes()).items()}
            reads = {(pool, layer): stored[f"{pool} {layer}"] for pool, layer in pairs}
        return reads, Rows.of(source, failures)
    reads, failures = _read_layers(classifier, source, pairs, config)
    rows = Rows.of(source, failures)
    reasons = json.dumps({i: failures[i] for i in sorted(failures)}).encode()
    arrays = {f"{pool} {layer}": values for (pool, layer), values in reads.items()}
    arrays[FAILURES] = np.frombuffer(reasons, dtype=np.uint8)
    with writing(cache, "--cache"), replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    return reads, rows


def _read_layers(
    classifier: ImageClassifier,
    source: ImageSource,
    pairs: Sequence[tuple[str, int]],
    config: InferenceConfig,
) -> tuple[dict[tuple[str, int], np.ndarray], dict[int, str]]:
    """What is read at each layer, and why images failed, by position."""
    reader = TokenReader(classifier.model).on_cpu()
    needed = sorted({n for pool, layer in pairs for n in reader.layers(pool, layer)})
    parts: dict[tuple[str, int], list[np.ndarray]] = {pair: [] for pair in pairs}
    failures: dict[int, str] = {}
    for outputs in batches(classifier, source, layer_tokens(classifier, needed), config):
        failures |= outputs.failures
        if outputs.values is not None:
            for pool, layer in pairs:
                parts[pool, layer].append(reader.read(pool, outputs.values, layer).numpy())
    Rows.of(source, failures)  # raises where no image could be read
    return {pair: np.concatenate(vectors) for pair, vectors in parts.items()}, failures


def _compute(
    classifier: ImageClassifier,
    source: ImageSource,
    layers: Sequence[int],
    folder: Path,
    config: InferenceConfig,
) -> None:
    """Write the files of some layers, and beside them which images failed."""
    check_disk(folder.parent, classifier.model, len(source.index), layers)
    failures: dict[int, str] = {}
    with completing(folder, SIDECAR) as part, contextlib.ExitStack() as stack:
        files: dict[int, BinaryIO] = {
            layer: stack.enter_context((part / _file_name(layer)).open("wb")) for layer in layers
        }
        for outputs in batches(classifier, source, layer_tokens(classifier, layers), config):
            failures |= outputs.failures
            for layer, values in (outputs.values or {}).items():
                files[layer].write(np.ascontiguousarray(values.numpy(), dtype="<f4").data)
        Rows.of(source, failures)  # raises where no image could be read
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        kept = {"layers": list(layers), FAILURES: {str(k): v for k, v in sorted(failures.items())}}
        write_text(part / SIDECAR, json.dumps(kept, indent=1))


def _file_name(layer: int) -> str:
    return f"layer{layer:03d}.f32"


@dataclass(frozen=True)
class Answered:
    """Logits of the images that could be read.

    Args:
        logits: float32, shape ``(images, classes)``.
        targets: True classes by the model's order, int64, shape ``(images,)``.
        positions: Where each image stands in its source.
        failures: Why an image has none, by its position.
    """

    logits: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    failures: dict[int, str]


def logits_of(classifier: ImageClassifier, source: ImageSource) -> Answered:
    """Classify every image once; the classifier is moved to the device and put in evaluation mode.

    Raises:
        DataError: If no image can be read, or a class is not the model's.
        ModelFileError: If logits are not finite.
    """
    index = source.index.with_class_names(classifier.class_names)
    logits: list[Tensor] = []
    positions: list[int] = []
    failures: dict[int, str] = {}
    for outputs in batches(classifier, source, classifier, OF_TRAINED):
        failures |= outputs.failures
        if outputs.values is not None:
            logits.append(outputs.values)
            positions += outputs.done
    if not logits:
        raise DataError(f"none of {len(source.index)} images of {source.index.root} can be read.")
    kept = np.array(positions, dtype=np.int64)
    return Answered(torch.cat(logits).numpy(), index.labels[kept], kept, failures)
