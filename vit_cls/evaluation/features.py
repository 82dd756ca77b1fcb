"""Embeddings of any number of image files, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig, batches, layer_tokens
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_reader import TokenReader

TOKENS = "tokens"
"""Every token instead of one vector."""


def feature_function(
    classifier: ImageClassifier, features: str
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """What to compute of uint8 images for ``--features``, and its shape for one: ``(dim,)`` or ``(tokens,
    dim)``.

    Args:
        features: A pooling (`vit_cls.model.pooling.parse_pool`): what a head with it would get. Or
            ``tokens``: all of them, after the final norm where that stands before the model's pooling.

    Raises:
        ConfigError: If ``features`` is unknown, or cannot be read of this model.
    """
    model = classifier.model
    reader = TokenReader(model, "--features")
    if features == TOKENS:

        def compute(images: Tensor) -> Tensor:
            return model.encode(classifier.normalise(images))  # (B, N, D)

    else:
        try:
            tokens = layer_tokens(classifier, reader.layers(features, reader.depth))
        except ConfigError as error:
            raise ConfigError(f"{error} Or --features tokens, all tokens.") from error

        def compute(images: Tensor) -> Tensor:
            return reader.read(features, tokens(images), reader.depth)

    height, width = classifier.preprocess.img_size
    blank = torch.zeros(1, classifier.preprocess.in_chans, height, width, dtype=torch.uint8)
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
    """Path and error of image files as they come, and their features, float32; NaN where there is an error.

    Raises:
        ModelFileError: If a number is not finite.
    """
    for outputs in batches(classifier, paths, compute, config):
        values = np.full((len(outputs.items), *shape), np.nan, dtype=np.float32)
        if outputs.values is not None:
            values[outputs.places] = outputs.values.numpy()
        yield [{"path": p, "error": outputs.errors.get(i)} for i, p in enumerate(outputs.items)], values
