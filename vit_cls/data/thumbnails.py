"""Small JPEGs of image files, to put inside a page."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from vit_cls.data.decode import decode_image
from vit_cls.errors import ImageError

SIDE = 192
"""Pixels of the longer side: sharp on a dense screen, some 5 kB."""


def thumbnails(root: str | Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The pixels that training would see, made small; files that cannot be read are left out.

    Args:
        root: The folder that the paths are relative to.
        paths: Image files.
    """
    made = {}
    for path in paths:
        try:
            pixels = decode_image((Path(root) / path).read_bytes())
        except (ImageError, OSError):
            continue
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75, optimize=True)
        made[path] = buffer.getvalue()
    return made
