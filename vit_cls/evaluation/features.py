"""Embeddings of any number of image files to one safetensors file, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from vit_cls.errors import ConfigError, DataError
from vit_cls.inference import InferenceConfig, batches
from vit_cls.model.classifier import ImageClassifier

FEATURES = ("cls", "gap", "tokens")
HEADER_BYTES = 4096
"""Room for the header, which is written last: only then is the number of rows known."""


def feature_function(
    classifier: ImageClassifier, what: str
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """What to compute for ``--features``, and its shape for one image.

    Args:
        classifier: Its encoder's tokens are taken, after the final norm where that stands before the pooling.
        what: ``cls``, the class token; ``gap``, the mean of the patches; ``tokens``, all of them.

    Returns:
        A function from uint8 images, and the shape of a row: ``(dim,)`` or ``(tokens, dim)``.

    Raises:
        ConfigError: If ``what`` is unknown, or is the class token of a model that has none.
    """
    if what not in FEATURES:
        raise ConfigError(f"--features must be one of {', '.join(FEATURES)}; got {what!r}.")
    model = classifier.model
    if what == "cls" and not model.layout.class_token:
        raise ConfigError("--features cls: the model has no class token. Use --features gap or tokens.")

    def compute(images: Tensor) -> Tensor:
        tokens = model.encode(classifier.normalise(images))  # (B, N, D)
        if what == "cls":
            return tokens[:, 0]
        return tokens[:, model.layout.num_prefix_tokens :].mean(dim=1) if what == "gap" else tokens

    height, width = classifier.preprocess.img_size
    blank = torch.zeros(1, len(classifier.preprocess.mean), height, width, dtype=torch.uint8)
    classifier.eval()
    with torch.inference_mode():
        shape = tuple(compute(blank.to(classifier.mean.device)).shape[1:])
    return compute, shape


def feature_chunks(
    classifier: ImageClassifier,
    paths: Iterable[str | Path],
    compute: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    config: InferenceConfig,
) -> Iterator[tuple[list[Mapping[str, str | None]], np.ndarray]]:
    """Embeddings of image files as they come, a batch at a time.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        paths: Files; an endless source will do.
        compute: From `feature_function`.
        shape: Likewise.
        config: How the model is run.

    Yields:
        Path and error of each file, and float32 of shape ``(files, *shape)``, NaN where there is an error.

    Raises:
        ModelFileError: If a number is not finite.
    """
    for outputs in batches(classifier, paths, compute, config):
        values = np.full((len(outputs.items), *shape), np.nan, dtype=np.float32)
        if outputs.values is not None:
            values[outputs.places] = outputs.values.numpy()
        yield [{"path": p, "error": outputs.errors.get(i)} for i, p in enumerate(outputs.items)], values


class FeatureFile:
    """The tensor ``features``, float32, a row a path; ``NAME.part`` until it is complete.

    Args:
        path: Where it goes.
        shape: Of a row.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.shape = shape
        self._row_bytes = 4 * int(np.prod(shape))
        self._file: BinaryIO | None = None

    def start(self) -> None:
        """Begin with no row; the folder exists."""
        self._file = self.part.open("wb")
        self._file.seek(HEADER_BYTES)
        self._file.truncate()

    def resume(self, rows: int) -> None:
        """Continue after the first ``rows`` rows of a part.

        Args:
            rows: That many are kept.

        Raises:
            DataError: If it holds fewer.
        """
        end = HEADER_BYTES + rows * self._row_bytes
        size = self.part.stat().st_size if self.part.exists() else 0
        if size < end:
            raise DataError(
                f"--resume: {self.part} holds fewer than {rows} rows. Delete the parts to start anew."
            )
        self._file = self.part.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, values: np.ndarray) -> None:
        """Add rows.

        Args:
            values: float32, shape ``(rows, *shape)``.
        """
        assert self._file is not None
        self._file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        self._file.flush()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Put the complete file in its place.

        Args:
            metadata: Texts for its header.
        """
        assert self._file is not None
        end = self._file.tell() - HEADER_BYTES
        tensor = {"dtype": "F32", "shape": [end // self._row_bytes, *self.shape], "data_offsets": [0, end]}
        header = json.dumps({"__metadata__": dict(metadata), "features": tensor}).encode()
        if len(header) > HEADER_BYTES - 8:
            raise ConfigError("the names of model and files are too long for the header of the features.")
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.part, self.path)

    def close(self, keep: bool) -> None:
        """Leave the part, or nothing.

        Args:
            keep: Whether the rows are worth keeping.
        """
        if self._file is not None:
            self._file.close()
            if not keep:
                self.part.unlink(missing_ok=True)
