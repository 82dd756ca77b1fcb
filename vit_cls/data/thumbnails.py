"""Small JPEGs of image files, to put inside a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

from PIL import Image
from torch import Tensor

from vit_cls.data.dataset import ImageSource
from vit_cls.data.decode import decode_image
from vit_cls.errors import ImageError

SIDE = 192
"""Pixels of the longer side: sharp on a dense screen, some 5 kB."""


def reader_by_path(source: ImageSource) -> Callable[[str], bytes | Tensor]:
    """The images of a source by their path in its index; KeyError for another path."""
    positions = {path: i for i, path in enumerate(source.index.paths)}
    return lambda path: source.read(positions[path])


def thumbnails(read: Callable[[str], bytes | Tensor], paths: Iterable[str]) -> dict[str, bytes]:
    """The pixels that training would see, made small: JPEG by path, without what cannot be read.

    Args:
        read: From a path to a file's bytes or to pixels, uint8 ``(3, height, width)``; ImageError, OSError or
            KeyError where there are none.
    """
    made = {}
    for path in paths:
        try:
            image = read(path)
            pixels = image if isinstance(image, Tensor) else decode_image(image)
        except (ImageError, OSError, KeyError):
            continue
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=75, optimize=True)
        made[path] = buffer.getvalue()
    return made
