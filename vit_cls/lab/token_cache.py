"""Under which name the tokens of a model for some images are kept, and how a folder of them is made."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vit_cls import formatting as fmt
from vit_cls.data.dataset import ArraySource, ImageSource
from vit_cls.errors import DataError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.results import plain
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel

FORMAT = 1
"""Goes up when what is stored changes its meaning."""


def cache_key(
    classifier: ImageClassifier, source: ImageSource, layers: Sequence[int], config: InferenceConfig
) -> str:
    """A digest of everything that the stored tokens depend on.

    Args:
        classifier: Weights, architecture and preprocessing count; names of classes do not.
        source: Paths, sizes and dates of files count, or pixels where images are in memory.
        layers: Which are stored.
        config: What the precision means on the device counts.
    """
    settings = {"format": FORMAT, "layers": list(layers), "precision": config.computes_in.name}
    return joined_digest(json.dumps(settings), model_digest(classifier), data_digest(source))


def model_digest(classifier: ImageClassifier) -> str:
    """A digest of every weight, the architecture and the preprocessing, but not of class names."""
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
    """A digest of the images in their order: path, size and date of files, every pixel of arrays."""
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
    """One digest of several texts, short enough for a file name; their order counts.

    Example:
        >>> joined_digest("a", "b") == joined_digest("ab", "")
        False
    """
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=12).hexdigest()


def check_disk(folder: Path, model: TokenModel, images: int, layers: Sequence[int]) -> None:
    """Refuse tokens that a folder has no room for.

    Raises:
        DataError: If its disk is too small.
    """
    needed = 4 * images * model.layout.num_tokens * model.config.embed_dim * len(layers)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the tokens of {images} images ({model.layout.num_tokens} tokens of {model.config.embed_dim} "
            f"numbers, {len(layers)} layer(s)) need {fmt.size(needed)}, but {folder} has {fmt.size(free)} "
            "left. Use another cache folder, fewer images or fewer layers."
        )


@contextlib.contextmanager
def completing(folder: Path, sidecar: str) -> Iterator[Path]:
    """A folder to write to, ``NAME.part...``, that gets its name when it is complete, with its sidecar."""
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part-"))
    try:
        yield part
        part.chmod(0o755)
        try:
            os.rename(part, folder)
        except OSError:
            if not (folder / sidecar).is_file():  # unless another process was faster, with the same numbers
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
