"""Decoded and resized evaluation images on disk, so that they are decoded once."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from vit_cls.data.decode import FAST_JPEG
from vit_cls.data.index import ImageIndex
from vit_cls.data.transforms import Reader
from vit_cls.files import writing

FORMAT_VERSION = 2
_CHECKSUM = struct.Struct("<I")


class PixelCache:
    """uint8 pixels that a fixed reader makes of an index, in one file that grows to the size of all.

    The file's name is a digest of everything that decides its content: each file's path, size and time of
    change, the reader, and the versions of the libraries that decode and resize. What is not there yet is
    written by whichever process comes first; images that cannot be read are never written, so they fail
    again.

    A table of checksums comes first, one an image, 0 where there is none; then the pixels. Pixels without
    their checksum do not count as there, so a file cut off when the power failed costs time, never a wrong
    image. It is read and written in calls: in a memory map, a full disk would kill the process.

    Raises:
        ConfigError: If the folder cannot be made or written.
    """

    def __init__(self, folder: Path, index: ImageIndex, reader: Reader) -> None:
        self.shape = (len(index), reader.in_chans, *reader.size)
        self._image_bytes = math.prod(self.shape[1:])
        self.path = folder / f"{_digest(index, reader)}.uint8"
        self._descriptor: int | None = None
        self._full = False
        with writing(folder, "data.cache"):
            self._open()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}  # each process opens the file itself

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def get(self, index: int) -> Tensor | None:
        """Pixels of one image, uint8 ``(channels, height, width)``; None where they are not there yet."""
        recorded = os.pread(self._open(), _CHECKSUM.size, index * _CHECKSUM.size)
        if not any(recorded):
            return None
        pixels = os.pread(self._open(), self._image_bytes, self._place(index))
        if recorded != _checksum(pixels):
            return None
        planes = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(self.shape[1:]).copy())
        # In the layout of a decoded image: in another a convolution may round differently.
        return planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        """Keep the pixels of one image; where the disk is full, warn and keep no more."""
        assert tuple(image.shape) == self.shape[1:], (image.shape, self.shape)
        if self._full:
            return
        pixels = image.numpy().tobytes()
        try:
            _write(self._open(), pixels, self._place(index))
            _write(self._open(), _checksum(pixels), index * _CHECKSUM.size)
        except OSError as error:
            self._full = True
            warnings.warn(
                f"data.cache {self.path.parent} takes no more images: {error.strerror}. "
                "Those that are not there are decoded anew each time.",
                stacklevel=2,
            )

    def _place(self, index: int) -> int:
        return self.shape[0] * _CHECKSUM.size + index * self._image_bytes


def _checksum(pixels: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(pixels) or 1)  # 0 says that there are none


def _write(descriptor: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _digest(index: ImageIndex, reader: Reader) -> str:
    digest = hashlib.blake2b(digest_size=16)
    root = str(index.root.absolute())
    versions = (PIL.__version__, torch.__version__, torchvision.__version__, FAST_JPEG)
    digest.update(repr((FORMAT_VERSION, versions, reader.description, reader.size, root)).encode())
    for path in index.paths:
        digest.update(os.fsencode(path))
        try:
            status = os.stat(index.root / path)
        except OSError:
            digest.update(b"\0missing")
            continue
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
