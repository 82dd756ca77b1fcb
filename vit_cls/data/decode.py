"""Bytes of an image file to uint8 RGB pixels; every oddity of a file ends here."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor

from vit_cls import formatting as fmt
from vit_cls.errors import ImageError

try:
    import simplejpeg
except ImportError:  # where a machine lacks it, Pillow gives the same pixels in more time
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
FAST_JPEG: str | None = None if simplejpeg is None else simplejpeg.__version__
"""Version of the library that decodes ordinary JPEGs; None where Pillow decodes them too."""
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 300 MB of RGB."""
MAX_BYTES = 400_000_000
"""Larger files are refused before they are read."""
BACKGROUND = (255, 255, 255)
"""Colour that shows through transparent pixels."""


def read_file(path: Path) -> bytes:
    """The bytes of a file, whose size is looked at before it is read.

    Raises:
        ImageError: If it has more than `MAX_BYTES`, is a pipe or a device, or no file can have that name.
        OSError: If it cannot be read.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a NUL byte in the path
        raise ImageError(str(error)) from error
    if status.st_size > MAX_BYTES:
        held, limit = fmt.count(status.st_size), fmt.count(MAX_BYTES)
        raise ImageError(f"the file has {held} bytes, more than the limit of {limit}")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ImageError("it is not a regular file")  # to open a pipe would wait for its other end
    with path.open("rb") as file:
        # Not MAX_BYTES: Python reserves what it is asked for, which costs a tenth of decoding a photo.
        return file.read(status.st_size)


def decode_image(data: bytes, background: tuple[int, int, int] = BACKGROUND) -> Tensor:
    """Decode JPEG, PNG, WebP, BMP, GIF, TIFF or PPM to RGB pixels, uint8, shape ``(3, height, width)``.

    Orientation from EXIF is applied, 16-bit pixels are scaled, transparency is laid over one colour, the
    first frame of an animation is taken.

    Args:
        data: The whole file.
        background: Red, green and blue of the colour that shows through, each from 0 to 255.

    Raises:
        ImageError: If the bytes are not a complete image of those formats, or it has too many pixels.

    Example:
        >>> decode_image(b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])).tolist()
        [[[255, 0]], [[0, 0]], [[0, 255]]]
    """
    if not data:
        raise ImageError("the file is empty")
    pixels = _plain_jpeg(data)
    return pixels if pixels is not None else _with_pillow(data, background)


def picture_to_tensor(image: Image.Image, background: tuple[int, int, int] = BACKGROUND) -> Tensor:
    """The pixels of a Pillow image, as those of a file: upright, RGB, over ``background`` where transparent.

    Returns:
        uint8, ``(3, height, width)``.
    """
    return _to_tensor(_to_rgb(_upright(image), background))


def _plain_jpeg(data: bytes) -> Tensor | None:
    """An ordinary JPEG by the faster of two libraries; None for all that may need more care.

    Both decode through libjpeg-turbo with the same settings, so the pixels are Pillow's to the bit.
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        header = _before_scans(data)
        turned = b"Exif\0" in header or b"tiff:Orientation" in header
        orientation = _orientation(data) if turned else 1
        if orientation is None:
            return None
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except Exception:  # ValueError where damaged, KeyError where unusual (4:4:1): Pillow knows what to do
        return None
    return image if orientation == 1 else _TURNS[orientation](image)


# EXIF orientation: what makes the image upright. Source: EXIF 2.32, tag 0x0112.
_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda image: image.flip(2),
    3: lambda image: image.flip(1, 2),
    4: lambda image: image.flip(1),
    5: lambda image: image.transpose(1, 2),
    6: lambda image: image.transpose(1, 2).flip(2),
    7: lambda image: image.transpose(1, 2).flip(1, 2),
    8: lambda image: image.transpose(1, 2).flip(1),
}


def _before_scans(data: bytes) -> bytes:
    """The part of a JPEG in which EXIF and XMP stand; all of it where that part is unusual."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xDA:  # start of scan
            return data[:place]
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # without a length
            break
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data


def _orientation(data: bytes) -> int | None:
    """Orientation by EXIF or XMP, 1 where there is none; None where Pillow had better look at the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF can raise anything
        return None
    return orientation if orientation in _TURNS else 1


def _with_pillow(data: bytes, background: tuple[int, int, int]) -> Tensor:
    try:
        with warnings.catch_warnings():
            # Our own limit stands below, and damaged EXIF is no reason to refuse an image.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    limit = fmt.count(MAX_PIXELS)
                    raise ImageError(f"{width}x{height} pixels are more than the limit of {limit}")
                transparent = _transparent_value(image)
                image.load()
                if transparent is not None:
                    image.info["transparency"] = transparent
                return picture_to_tensor(image, background)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        limit = fmt.count(MAX_PIXELS)
        raise ImageError(f"the image declares more than the limit of {limit} pixels") from None
    except Exception as error:  # decoders raise anything on hostile bytes; all of it means: not an image
        raise ImageError(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is not damaged pixels: they are taken as they are stored
        return image


def _transparent_value(image: ImageFile.ImageFile) -> int | tuple[int, ...] | None:
    """The one transparent value of a PNG, not yet loaded, in the 8 bits of its pixels; None if it needs no
    scaling.
    """
    value = image.info.get("transparency")
    layout = image.tile[0].args if image.format == "PNG" and image.tile else None
    if isinstance(value, int) and layout in ("L;2", "L;4"):
        return (value & 3) * 85 if layout == "L;2" else (value & 15) * 17
    if isinstance(value, tuple) and layout == "RGB;16B":
        return tuple(channel >> 8 for channel in value)
    return None


def _to_rgb(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        transparent = image.info.get("transparency")
        pixels = np.asarray(image)
        image = _scaled_to_8_bit(pixels)
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*colour, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bit(pixels: np.ndarray) -> Image.Image:
    """16-bit integers over 257, floats in [0, 1] times 255; Pillow's own conversion would clip both."""
    scaled = pixels * 255.0 if pixels.dtype.kind == "f" else pixels / 257.0
    return Image.fromarray(np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):  # as a file that lies of its size may cause, too
        return "there is not enough memory to decode it"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "it is not an image of a known format" if "cannot identify image file" in text else text
