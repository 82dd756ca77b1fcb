"""Files that the tests of data write: images whole, odd and damaged, and empty files where names matter."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_cls.data.decode import decode_image
from vit_cls.data.index import ImageIndex
from vit_cls.errors import ImageError

TEST_DATA = Path(os.environ.get("VIT_CLS_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
BAD_IMAGES = TEST_DATA / "bad_images"
needs_bad_images = pytest.mark.skipif(
    not BAD_IMAGES.is_dir(),
    reason=f"no folder {BAD_IMAGES}; VIT_CLS_TEST_DATA names the one that holds bad_images/",
)
BEGINNINGS = (
    *(b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0"),
    b"RIFF\x40\0\0\0WEBPVP8 ",
)
"""How images begin, and nothing."""


def image_file(image: Image.Image | np.ndarray, image_format: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_file(
    width: int, height: int, pixels: bytes, *, bits: int = 8, colour_type: int = 2, transparent: bytes = b""
) -> bytes:
    """A PNG in depths that Pillow does not write; ``pixels`` are compressed, and need not fit."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
        if body or name != b"tRNS"
    )


def noise(seed: int = 0, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def put(root: Path, path: str, data: bytes) -> str:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return path


def copy(root: Path, source: str, target: str) -> str:
    return put(root, target, (root / source).read_bytes())


def touch(root: Path, *files: str) -> Path:
    """Empty files, for those who read names and no pixels."""
    for file in files:
        put(root, file, b"")
    return root


def entries(index: ImageIndex) -> list[tuple[str, str]]:
    """Path and class of each image."""
    return [(path, index.class_names[label]) for path, label in zip(index.paths, index.labels, strict=True)]


def outcome(data: bytes) -> torch.Tensor | str:
    """The image, or the reason why there is none; any other exception is an error of the test."""
    try:
        return decode_image(data)
    except ImageError as error:
        return str(error)
