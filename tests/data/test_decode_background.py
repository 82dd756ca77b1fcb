"""The background colour, and nothing else, shows where an image is transparent; in every format and mode."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.files import image_file, noise, png_file
from vit_cls.data.dataset import FolderSource
from vit_cls.data.decode import decode_image
from vit_cls.data.index import index_folder
from vit_cls.data.transforms import eval_reader, model_reader
from vit_cls.model.classifier import Preprocess

GREEN = (10, 200, 30)


def _row(data: bytes, background: tuple[int, int, int] = GREEN) -> list[list[int]]:
    """Colours of an image of one row."""
    image = decode_image(data, background)
    assert image.shape[1] == 1
    return image[:, 0].T.tolist()


def _png(width: int, bits: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """One row."""
    pixels = zlib.compress(b"\0" + row)
    return png_file(width, 1, pixels, bits=bits, colour_type=colour_type, transparent=transparent)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), GREEN])
def test_half_transparent_colours_are_blended_with_the_background(image_format, background):
    rgba = np.array([[(0, 100, 250, 255), (0, 100, 250, 51), (0, 100, 250, 0)]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    # 51 / 255 is a fifth
    blended = [round(0.2 * ink + 0.8 * paper) for ink, paper in zip((0, 100, 250), background, strict=True)]
    data = image_file(rgba, image_format, **options)
    assert _row(data, background) == [[0, 100, 250], blended, list(background)]
    assert torch.equal(decode_image(data), decode_image(data, (255, 255, 255)))


def test_background_shows_through_grey_with_alpha():
    grey_alpha = np.array([[(0, 255), (0, 51), (7, 0)]], dtype=np.uint8)
    assert _row(image_file(Image.fromarray(grey_alpha, "LA"))) == [[0, 0, 0], [8, 160, 24], list(GREEN)]


def _palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_background_shows_through_a_palette_whose_colours_have_alpha():
    data = image_file(_palette_image(), transparency=bytes([255, 51, 0]))
    assert _row(data) == [[255, 0, 0], [8, 211, 24], list(GREEN)]


def test_background_is_the_same_in_every_format_that_knows_a_transparent_colour():
    expected = [[255, 0, 0], list(GREEN), [0, 0, 255]]
    image = _palette_image()
    for name in ("PNG", "GIF"):
        assert _row(image_file(image, name)) == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    files = {name: image_file(image, name, transparency=1) for name in ("PNG", "GIF")}
    image.info["transparency"] = 1
    rgba = image.convert("RGBA")
    files |= {"WEBP": image_file(rgba, "WEBP", lossless=True), "TIFF": image_file(rgba, "TIFF")}
    assert {name: _row(data) for name, data in files.items()} == dict.fromkeys(files, expected)


@pytest.mark.parametrize(
    ("bits", "row"), [(1, b"\x40"), (2, b"\x24"), (4, b"\x0a\x20"), (8, b"\x00\x0a\x02")]
)
def test_transparent_grey_level_is_meant_in_the_bits_of_the_file(bits, row):
    first, middle, last = {1: (0, 1, 0), 2: (0, 2, 1), 4: (0, 10, 2), 8: (0, 10, 2)}[bits]
    scale = 255 // (2**bits - 1)
    data = _png(3, bits, 0, row, struct.pack(">H", middle))
    assert _row(data) == [[first * scale] * 3, list(GREEN), [last * scale] * 3]
    if bits in (2, 4):  # only the low bits count (PNG, section 11.3.2.1)
        assert _row(_png(3, bits, 0, row, struct.pack(">H", 0x0100 | middle))) == _row(data)


def test_transparent_level_of_sixteen_bit_grey_is_exact():
    data = _png(3, 16, 0, struct.pack(">3H", 0x0180, 0x0181, 0xFFFF), struct.pack(">H", 0x0180))
    assert _row(data) == [list(GREEN), [1, 1, 1], [255, 255, 255]]


def test_transparent_colour_of_sixteen_bits_is_compared_by_high_bytes():
    red, other = (
        (0x0180, 0x7F00, 0x0240),
        (0x8001, 0x007F, 0x4002),
    )  # low bytes of one, high bytes of the other
    data = _png(2, 16, 2, struct.pack(">6H", *red, *other), struct.pack(">3H", *red))
    assert _row(data) == [list(GREEN), [0x80, 0x00, 0x40]]
    eight = image_file(np.array([[(1, 2, 3), (3, 2, 1)]], dtype=np.uint8), transparency=(1, 2, 3))
    assert _row(eight) == [list(GREEN), [3, 2, 1]]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
def test_background_is_nowhere_in_an_opaque_image(mode):
    image = Image.fromarray(noise()).convert(mode)
    for image_format in ("TIFF", "JPEG"):
        if (mode, image_format) == ("1", "JPEG"):
            continue
        data = image_file(image, image_format)
        assert torch.equal(decode_image(data, GREEN), decode_image(data, (0, 0, 0)))


def test_background_of_a_model_reaches_files_for_training_and_evaluation(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image_file(Image.new("RGBA", (3, 2))))
    green = torch.tensor(GREEN, dtype=torch.uint8)[:, None, None].expand(3, 2, 3)
    source = FolderSource(index_folder(tmp_path))
    for augment in (None, "none"):
        reader = model_reader(Preprocess((2, 3), crop_pct=1.0, background=GREEN), augment=augment)
        assert torch.equal(reader(source.read(1)), green)
    assert (eval_reader((2, 3), crop_pct=1.0)(source.read(1)) == 255).all()
