"""Embeddings of any number of image files, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig, batches
from vit_cls.model.classifier import ImageClassifier

FEATURES = ("cls", "gap", "tokens")


def feature_function(
    classifier: ImageClassifier, features: str
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """What to compute for ``--features``, and its shape for one image.

    Args:
        classifier: Its encoder's tokens are taken, after the final norm where that stands before the pooling.
        features: ``cls``, the class token; ``gap``, the mean of the patches; ``tokens``, all of them.

    Returns:
        A function from uint8 images, and the shape of a row: ``(dim,)`` or ``(tokens, dim)``.

    Raises:
        ConfigError: If ``features`` is unknown, or is the class token of a model that has none.
    """
    check_choice("--features", features, FEATURES)
    model = classifier.model
    if features == "cls" and not model.layout.class_token:
        raise ConfigError("--features cls: the model has no class token. Use --features gap or tokens.")

    def compute(images: Tensor) -> Tensor:
        tokens = model.encode(classifier.normalise(images))  # (B, N, D)
        if features == "cls":
            return tokens[:, 0]
        return tokens[:, model.layout.num_prefix_tokens :].mean(dim=1) if features == "gap" else tokens

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
        compute: From `feature_function`, as is ``shape``.

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
