"""One image file, read once: whether it decodes, what is odd about it, and marks to find its copies by."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vit_cls.data.decode import FORMATS, decode_image, read_file
from vit_cls.errors import ImageError

MIN_SIDE = 32
"""Pixels of the shorter side under which an image is tiny: two patches of 16."""
MAX_MEGAPIXELS = 40
SIGNATURE_SIDE = 16

FORMAT_OF_ENDING = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
}
SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}
"""A phone's JPEG with a second picture inside, which readers of JPEG take as JPEG."""
BEGINNINGS = {
    rb"\s*<(!doctype\s+html|html|head|body)": "a web page",
    rb"\s*(<\?xml.*)?<svg": "SVG",
    rb"%PDF": "PDF",
    rb"....ftyp(heic|heix|hevc|mif1|msf1)": "HEIC",
    rb"....ftypavif": "AVIF",
    rb"....ftyp": "a film",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"8BPS": "Photoshop",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x1f\x8b": "a gzip archive",
    rb"version https://git-lfs": "a Git LFS pointer: the image was not fetched",
    rb"\0+\Z": "zeros",
}
"""How files begin that are often found under an image's name, matched in turn."""
CUT_SHORT = re.compile(
    r"truncat|not enough|incomplete|unexpected end|premature|bytes not processed|broken data|too few", re.I
)
"""What decoders say of a file whose end is missing."""


@dataclass(frozen=True)
class CheckTask:
    """What to do with a file: hash it, if some other file has as many bytes, and sign its pixels."""

    path: str
    hash_content: bool = False
    sign: bool = False


@dataclass(frozen=True)
class Checked:
    """What a file is: whether it decodes, issue types with a detail each, and marks to find its copies by."""

    readable: bool
    findings: list[tuple[str, str]] = field(default_factory=list)
    content: bytes | None = None
    signature: np.ndarray | None = None


CRASHED = Checked(False, [("unreadable", "the decoder crashed or ran out of memory")])


def check_image(task: CheckTask) -> Checked:
    """Read, hash, decode and look at one file; whatever is wrong with it is in the answer."""
    try:
        data = read_file(Path(task.path))
    except (ImageError, OSError, MemoryError) as error:
        return Checked(False, [("unreadable", getattr(error, "strerror", None) or str(error) or "no memory")])
    if not data:
        return Checked(False, [("empty_file", "0 bytes")])
    try:
        pixels = decode_image(data)
    except ImageError as error:
        return Checked(False, [_failure(data, str(error))])
    content = content_hash(data) if task.hash_content else None
    return Checked(True, _oddities(data, task.path), content, sign(pixels) if task.sign else None)


def content_hash(data: bytes) -> bytes:
    """A digest that equal contents share, and no others."""
    return hashlib.blake2b(data, digest_size=16).digest()


def sign(pixels: Tensor) -> np.ndarray | None:
    """Describe a picture by its steps of grey, so that copies of other size, quality or brightness agree.

    The steps between the cells of a 16x16 grid of mean grey make a float32 vector of length 1; its dot
    product with another is their similarity. None where the picture is flat, so that steps are rounding
    errors.

    Source:
        The difference hash of
        https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html with the size of the
        steps kept, which the hash rounds to its sign.
    """
    grey = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    side = (SIGNATURE_SIDE, SIGNATURE_SIDE)
    cells = np.asarray(grey.resize(side, Image.Resampling.BOX, reducing_gap=2.0), dtype=np.float32)
    steps = np.concatenate([np.diff(cells, axis=0).ravel(), np.diff(cells, axis=1).ravel()])
    length = float(np.linalg.norm(steps))
    return steps / length if length > 2 * steps.size**0.5 else None  # 2 of 255 levels, on average


def _failure(data: bytes, reason: str) -> tuple[str, str]:
    """Kind and detail of bytes that `decode_image` refused."""
    for beginning, kind_of_file in BEGINNINGS.items():
        if re.match(beginning, data[:512] if len(data) > 512 else data, re.DOTALL | re.I):
            return "unreadable", f"{reason} (it looks like {kind_of_file})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Exception:  # decoders raise anything; it has no readable header, so it is not a part of an image
        return "unreadable", reason
    return "truncated" if CUT_SHORT.search(reason) else "unreadable", reason


def _oddities(data: bytes, path: str) -> list[tuple[str, str]]:
    """What is odd about an image that decodes."""
    findings = []
    ending = os.path.splitext(path)[1].lower()
    # Pillow decodes a whole PNG to look for EXIF behind the pixels: only where there is any.
    turned = not data.startswith(b"\x89PNG") or any(mark in data for mark in (b"eXIf", b"exif", b"xmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            for kind, oddity in ODDITIES.items():
                try:
                    detail = oddity(image, ending) if kind != "exif_orientation" or turned else None
                except Exception:  # damaged metadata; the pixels were read
                    continue
                if detail:
                    findings.append((kind, detail))
    return findings


def _extension(image: Image.Image, ending: str) -> str | None:
    content = SAME_FORMAT.get(str(image.format), str(image.format))
    return f"{content} content" if content != FORMAT_OF_ENDING.get(ending, content) else None


def _orientation(image: Image.Image, ending: str) -> str | None:
    orientation = image.getexif().get(0x0112)  # EXIF 2.32, table 6
    return f"orientation {orientation}" if orientation in range(2, 9) else None


def _depth(image: Image.Image, ending: str) -> str | None:
    if image.mode == "F":
        return "floating point"
    args = image.tile[0].args if image.tile else ()  # type: ignore[attr-defined]  # of files, not of images
    args = args if isinstance(args, tuple) else (args,)
    wide = image.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255
    wide |= image.format in ("PNG", "TIFF") and re.search(r";(12|16|32)", str(args[0])) is not None
    return "more than 8 bits" if wide or image.mode.startswith("I") else None


def _transparency(image: Image.Image, ending: str) -> str | None:
    if not image.has_transparency_data:
        return None
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return None if lowest == 255 else "pixels that do not show" if lowest == 0 else "pixels that show in part"


def _cmyk(image: Image.Image, ending: str) -> str | None:
    return "CMYK" if image.mode == "CMYK" else None


def _frames(image: Image.Image, ending: str) -> str | None:
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    return f"{frames} pictures" if frames > 1 else None


def _tiny(image: Image.Image, ending: str) -> str | None:
    return f"{image.width}x{image.height} pixels" if min(image.size) < MIN_SIDE else None


def _huge(image: Image.Image, ending: str) -> str | None:
    large = image.width * image.height > MAX_MEGAPIXELS * 1e6
    return f"{image.width}x{image.height} pixels" if large else None


ODDITIES: dict[str, Callable[[Image.Image, str], str | None]] = {
    "wrong_extension": _extension,
    "sixteen_bit": _depth,
    "cmyk": _cmyk,
    "animated": _frames,
    "tiny": _tiny,
    "huge": _huge,
    # The header is enough so far; these may decode, after which the depth in the file is forgotten.
    "exif_orientation": _orientation,
    "transparent": _transparency,
}
"""Kind, and what says of an opened image and its file's ending that it is so."""
