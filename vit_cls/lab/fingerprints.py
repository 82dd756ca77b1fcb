"""Digests of a model and of images, to tell whether something was computed already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import torch

from vit_cls.data.dataset import ArraySource, ImageSource
from vit_cls.lab.results import plain
from vit_cls.model.classifier import ImageClassifier


def model_digest(classifier: ImageClassifier) -> str:
    """A digest of every weight, the architecture and the preprocessing.

    Args:
        classifier: Names of its classes and its temperature do not count: tokens do not depend on them.

    Example:
        >>> from vit_cls import create_model
        >>> from vit_cls.model.classifier import Preprocess
        >>> model = create_model("vit_pico_patch7_28", num_classes=1)
        >>> one = model_digest(ImageClassifier(model, Preprocess((28, 28)), ["a"]))
        >>> one == model_digest(ImageClassifier(model, Preprocess((28, 28)), ["b"]))
        True
        >>> one == model_digest(ImageClassifier(model, Preprocess((28, 28), crop_pct=1.0), ["a"]))
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    described = {
        "architecture": plain(classifier.model.config.to_dict()),
        "preprocess": dataclasses.asdict(classifier.preprocess),
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for key, value in sorted(classifier.model.state_dict().items()):
        weights = value.detach().cpu().contiguous()
        digest.update(f"{key} {weights.dtype} {tuple(weights.shape)}\n".encode())
        digest.update(weights.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_digest(source: ImageSource) -> str:
    """A digest of which images there are, in their order.

    Args:
        source: Of files in a folder the path, size and date count; of images in memory every pixel.
    """
    index = source.index
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, ArraySource):
        # Its root is a name, not a place: where one stands does not count.
        digest.update(f"{index.root}\n{index.fingerprint()}\n".encode("utf-8", "surrogateescape"))
        digest.update(f"{tuple(source.images.shape)}\n".encode())
        digest.update(source.images.contiguous().numpy().data)
        return digest.hexdigest()
    digest.update(f"{index.root.resolve()}\n{index.fingerprint()}\n".encode("utf-8", "surrogateescape"))
    for i in range(len(index)):
        try:
            status = os.stat(index.path(i))
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:  # it will be a failure, with its reason
            digest.update(b"gone\n")
    return digest.hexdigest()


def joined_digest(*texts: str) -> str:
    """One digest of several texts, short enough for a file name.

    Args:
        texts: In an order that counts.

    Example:
        >>> joined_digest("a", "b") == joined_digest("ab", "")
        False
    """
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=12).hexdigest()
