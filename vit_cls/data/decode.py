"""Bytes of an image file to uint8 RGB pixels; every oddity of a file ends here."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vit_cls.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 300 MB of RGB."""
BACKGROUND = (255, 255, 255)
"""Colour that shows through transparent pixels."""


def decode_image(data: bytes) -> Tensor:
    """Decode one image file.

    Orientation from EXIF is applied, 16-bit pixels are scaled, transparency is laid over white, the first
    frame of an animation is taken.

    Args:
        data: The whole file: JPEG, PNG, WebP, BMP, GIF, TIFF or PPM.

    Returns:
        RGB pixels, uint8, shape ``(3, height, width)``.

    Raises:
        ImageError: If the bytes are not a complete image of those formats, or it has too many pixels.

    Example:
        >>> decode_image(b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])).tolist()
        [[[255, 0]], [[0, 0]], [[0, 255]]]
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Our own limit stands below, and damaged EXIF is no reason to refuse an image.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,}")
                image.load()
                return _to_tensor(_to_rgb(_upright(image)))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"the image declares more than the limit of {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise anything on hostile bytes; all of it means: not an image
        raise ImageError(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is not damaged pixels: they are taken as they are stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled_to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit integers over 257, floats in [0, 1] times 255; Pillow's own conversion would clip both."""
    pixels = np.asarray(image)
    scaled = pixels * 255.0 if pixels.dtype.kind == "f" else pixels / 257.0
    return Image.fromarray(np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "it is not an image of a known format" if "cannot identify image file" in text else text
