"""Decoded and resized evaluation images on disk, so that they are decoded once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from torch import Tensor

from vit_cls.data.index import ImageIndex
from vit_cls.errors import ConfigError

EMPTY, FILLED = 0, 1
FORMAT_VERSION = 1


class PixelCache:
    """uint8 pixels of an index after a fixed transform, in one file that is mapped into memory.

    The file's name is a digest of everything that decides its content: each file's path, size and time of
    change, the transform, and the versions of the libraries that decode and resize. What is not there yet is
    computed and written by whichever process comes first; images that cannot be read are never written, so
    they fail again. Pixels are written before the mark that says so.

    Args:
        folder: Where the file goes; is made if it does not exist. It grows to the size of all pixels.
        index: The images.
        transform: A description of the transform, such as its settings.
        size: Height and width after the transform, in pixels.

    Raises:
        ConfigError: If the folder cannot be written.
    """

    def __init__(self, folder: Path, index: ImageIndex, transform: str, size: tuple[int, int]) -> None:
        self.shape = (len(index), 3, *size)
        self.path = folder / f"{_digest(index, transform)}.uint8"
        self._maps: tuple[np.ndarray, np.ndarray] | None = None
        bytes_needed = int(np.prod(self.shape)) + len(index)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() != bytes_needed:
                    file.truncate(bytes_needed)  # new bytes are zero: EMPTY, and sparse until written
        except OSError as error:
            raise ConfigError(f"data.cache {folder} cannot be written: {error.strerror}.") from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": None}  # each process maps the file itself

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        if self._maps is None:
            count = self.shape[0]
            marks = np.memmap(self.path, np.uint8, "r+", offset=0, shape=(count,))
            self._maps = marks, np.memmap(self.path, np.uint8, "r+", offset=count, shape=self.shape)
        return self._maps

    def get(self, index: int) -> Tensor | None:
        """Pixels of one image, uint8 ``(3, height, width)``; None where they are not there yet.

        Args:
            index: Position in the index.
        """
        marks, pixels = self._open()
        return torch.from_numpy(np.array(pixels[index])) if marks[index] == FILLED else None

    def put(self, index: int, image: Tensor) -> None:
        """Keep the pixels of one image.

        Args:
            index: Position in the index.
            image: uint8, shape ``(3, height, width)``.
        """
        marks, pixels = self._open()
        pixels[index] = image.numpy()
        marks[index] = FILLED

    @property
    def filled(self) -> int:
        """Images that are there."""
        return int((self._open()[0] == FILLED).sum())


def _digest(index: ImageIndex, transform: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    versions = (PIL.__version__, torch.__version__, torchvision.__version__, simplejpeg.__version__)
    digest.update(repr((FORMAT_VERSION, versions, transform, str(index.root.absolute()))).encode())
    for path in index.paths:
        digest.update(os.fsencode(path))
        try:
            status = os.stat(index.root / path)
        except OSError:
            digest.update(b"\0missing")
            continue
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
