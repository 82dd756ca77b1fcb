"""A classifier's answer for any number of image files, in their order and in constant memory."""

from __future__ import annotations

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit_cls.data.dataset import Batch, Sample, collate
from vit_cls.data.decode import read_image
from vit_cls.data.loader import default_num_workers
from vit_cls.data.transforms import Transform
from vit_cls.errors import ConfigError, ImageError, ModelFileError, RunError
from vit_cls.evaluation.predictions import choose_bf16, choose_device
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.file_classifier import NO_HEAD, transform_of


@dataclass(frozen=True)
class Runtime:
    """How a model is run over images; does not change the result beyond rounding.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``mps``.
        precision: ``auto`` (bf16 autocast on a GPU), ``32`` or ``bf16``.
        batch_size: Images a forward pass.
        num_workers: Loading processes; None means one a core, at most 8, and none for less than a batch.
        compile: Whether the encoder's blocks are compiled.
        exact: Whether images are resized by Pillow, as timm's loader does it.

    Raises:
        ConfigError: If a number is out of range, or the device or the precision is not available.
    """

    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 64
    num_workers: int | None = None
    compile: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size must be at least 1; got {self.batch_size}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"--num_workers must not be negative; got {self.num_workers}.")
        choose_bf16(self.precision, choose_device(self.device))


class Outputs(NamedTuple):
    """A model's output for some paths."""

    paths: list[str]
    values: np.ndarray
    """float32, one row a path; NaN where the file could not be read."""
    errors: dict[int, str]
    """Why there is no output, by position in ``paths``."""


@dataclass(frozen=True)
class Row:
    """What a classifier said about one file.

    Args:
        path: As it was given.
        best: Classes and their probabilities, the likeliest first; empty where the file could not be read.
        error: Why it could not.
    """

    path: str
    best: tuple[tuple[str, float], ...]
    error: str | None = None


Compute = Callable[[Tensor], Tensor]


def predict_files(
    classifier: ImageClassifier,
    paths: Iterable[str | Path],
    *,
    top_k: int = 1,
    runtime: Runtime | None = None,
) -> Iterator[Row]:
    """Label image files as they come.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        paths: Files; an endless source will do. It is read only a few batches ahead.
        top_k: Classes a row.
        runtime: Device, batch size and the like; None takes the defaults.

    Returns:
        One row a path, in the order of the paths.

    Raises:
        ConfigError: If ``top_k`` is not in [1, classes].
        ModelFileError: If the model has no head, or logits are not finite.
    """
    return itertools.chain.from_iterable(
        predict_batches(classifier, paths, top_k=top_k, runtime=runtime or Runtime())
    )


def predict_batches(
    classifier: ImageClassifier, paths: Iterable[str | Path], *, top_k: int, runtime: Runtime
) -> Iterator[list[Row]]:
    """The rows of `predict_files`, a batch at a time.

    Args:
        classifier: As for `predict_files`.
        paths: As for `predict_files`.
        top_k: As for `predict_files`.
        runtime: As for `predict_files`.

    Raises:
        ConfigError: As for `predict_files`.
        ModelFileError: As for `predict_files`.
    """
    check_top_k(classifier, top_k)
    shape = (len(classifier.class_names),)
    batches = run_batches(classifier, paths, classifier, shape=shape, runtime=runtime)
    return (_rows(classifier, outputs, top_k) for outputs in batches)


def check_top_k(classifier: ImageClassifier, top_k: int) -> None:
    """Make sure that a classifier can name that many classes.

    Args:
        classifier: Knows its classes.
        top_k: Classes a row.

    Raises:
        ConfigError: If ``top_k`` is not in [1, classes].
        ModelFileError: If the model has no head.
    """
    if not classifier.class_names:
        raise ModelFileError(NO_HEAD)
    if not 1 <= top_k <= len(classifier.class_names):
        raise ConfigError(
            f"--top_k must be from 1 to the model's {len(classifier.class_names)} classes; got {top_k}."
        )


def run_batches(
    classifier: ImageClassifier,
    paths: Iterable[str | Path],
    compute: Compute,
    *,
    shape: tuple[int, ...],
    runtime: Runtime,
) -> Iterator[Outputs]:
    """Any function of the pixels, for image files as they come.

    Args:
        classifier: Knows the preprocessing; is moved to the device and put in evaluation mode.
        paths: Files; read only a few batches ahead.
        compute: From uint8 images on the device, shape ``(batch, 3, height, width)``, to one row an image.
        shape: Of such a row.
        runtime: Device, batch size and the like.

    Yields:
        Outputs of ``runtime.batch_size`` paths, of fewer at the end.

    Raises:
        ModelFileError: If an output is not finite.
    """
    where = choose_device(runtime.device)
    low = choose_bf16(runtime.precision, where)
    classifier.to(where).eval()
    if runtime.compile:
        classifier.model.blocks.compile()
    pending: deque[list[str]] = deque()
    loader = _loader(
        classifier, (os.fspath(path) for path in paths), pending, runtime, pin=where.type == "cuda"
    )
    for batch in _named_crashes(loader):
        part = pending.popleft()
        values = np.full((len(part), *shape), np.nan, dtype=np.float32)
        if len(batch.indices):
            images = batch.images.to(where, non_blocking=True)
            with torch.inference_mode(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
                values[batch.indices.numpy()] = compute(images).float().cpu().numpy()
        outputs = Outputs(part, values, dict(batch.failures))
        _refuse_diverged(outputs)
        yield outputs


def _named_crashes(loader: Iterable[Batch]) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a loading process died ({str(error).splitlines()[0]}), of a fault in a decoder or for want "
                "of memory. Use fewer --num_workers, or 0."
            ) from error
        yield batch


def _rows(classifier: ImageClassifier, outputs: Outputs, top_k: int) -> list[Row]:
    probs = classifier.probs(torch.from_numpy(outputs.values)).numpy()
    # stable: of equal ones the first, as argmax has it
    best = probs.argmax(1)[:, None] if top_k == 1 else np.argsort(-probs, 1, kind="stable")[:, :top_k]
    names = classifier.class_names
    return [
        Row(path, (), outputs.errors[i])
        if i in outputs.errors
        else Row(path, tuple((names[k], float(probs[i, k])) for k in best[i].tolist()))
        for i, path in enumerate(outputs.paths)
    ]


def _refuse_diverged(outputs: Outputs) -> None:
    finite = np.isfinite(outputs.values).reshape(len(outputs.paths), -1).all(axis=1)
    broken = [i for i in np.flatnonzero(~finite).tolist() if i not in outputs.errors]
    if broken:
        raise ModelFileError(
            f"the model's output is not finite for {outputs.paths[broken[0]]}: weights that diverged, or "
            "--precision bf16."
        )


Key = tuple[int, str]
"""Place in the batch, and path."""


class _Files(Dataset[Sample]):
    """Samples by their keys; it holds no path, so it is small however many there are."""

    def __init__(self, transform: Transform, background: tuple[int, int, int]) -> None:
        self.transform = transform
        self.background = background

    def __getitem__(self, key: Key) -> Sample:
        place, path = key
        try:
            image = self.transform(read_image(Path(path), self.background))
        except (ImageError, OSError, ValueError) as error:  # ValueError: a NUL byte in a path
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Sample(place, None, 0, reason)
        return Sample(place, image, 0, None)


def _loader(
    classifier: ImageClassifier, paths: Iterator[str], pending: deque[list[str]], runtime: Runtime, pin: bool
) -> DataLoader[Batch]:
    """Batches of the paths, in order; the paths of those under way are in ``pending``."""
    size, num_workers = runtime.batch_size, runtime.num_workers
    if num_workers is None:
        ahead = list(itertools.islice(paths, size + 1))
        num_workers = default_num_workers() if len(ahead) > size else 0  # processes take longer to start
        paths = itertools.chain(ahead, paths)

    def keys() -> Iterator[list[Key]]:
        while part := list(itertools.islice(paths, size)):
            pending.append(part)
            yield list(enumerate(part))

    pre = classifier.preprocess
    return DataLoader(
        _Files(transform_of(pre, exact=runtime.exact), pre.background),  # type: ignore[arg-type]
        batch_sampler=keys(),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )


def _leave_signals_to_the_main_process(worker_id: int) -> None:
    # A scheduler signals every process of a job; the main one ends the others when it has kept the rows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
