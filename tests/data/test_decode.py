"""Every image file becomes the RGB pixels that a viewer shows, or an ImageError; nothing else."""

import csv
import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_cls.data import decode
from vit_cls.data.decode import FORMATS, decode_image
from vit_cls.errors import ImageError

TEST_DATA = Path(os.environ.get("VIT_CLS_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
BAD_IMAGES = TEST_DATA / "bad_images"
needs_bad_images = pytest.mark.skipif(
    not BAD_IMAGES.is_dir(),
    reason=f"no folder {BAD_IMAGES}; VIT_CLS_TEST_DATA names the one that holds bad_images/",
)

ORIENTATION = 0x0112
SHOWN_AS_STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),  # shown a quarter turn clockwise, so stored a quarter turn counter-clockwise
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""EXIF 2.32, table 6: from the picture as it is shown to the rows and columns as they are stored."""


def _noise(height: int = 9, width: int = 14, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _smooth(height: int = 40, width: int = 56) -> np.ndarray:
    """What JPEG keeps nearly as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 4, x * 4, (x + y) * 2], axis=-1).astype(np.uint8)


def _file(image: Image.Image | np.ndarray, image_format: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    """Decoded pixels, rows first."""
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def _grey(data: bytes) -> list[int]:
    """The pixels of a grey image, in raster order; all three channels agree."""
    pixels = _pixels(data)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


def _png(width: int, height: int, pixels: bytes) -> bytes:
    """An RGB PNG whose pixel data need not be what the header says."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _outcome(data: bytes) -> torch.Tensor | str:
    """The image, or the reason why there is none; any other exception is an error of the test."""
    try:
        return decode_image(data)
    except ImageError as error:
        return str(error)


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {}}


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_pixels_of_lossless_formats_are_exact(image_format):
    pixels = _noise()
    assert np.array_equal(_pixels(_file(pixels, image_format, **LOSSLESS[image_format])), pixels)


def test_jpeg_and_gif_keep_the_picture():
    assert set(FORMATS) == {*LOSSLESS, "JPEG", "GIF"}
    pixels = _smooth()
    decoded = _pixels(_file(pixels, "JPEG", quality=95)).astype(int)
    assert np.abs(decoded - pixels).max() <= 16
    assert np.abs(decoded - pixels).mean() < 2
    two_colours = np.where(_noise(channels=1) < 128, (250, 10, 30), (0, 200, 90)).astype(np.uint8)
    assert np.array_equal(_pixels(_file(two_colours, "GIF")), two_colours)


@pytest.mark.parametrize("orientation", SHOWN_AS_STORED)
def test_every_exif_orientation_is_turned_upright(orientation):
    upright = _noise()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = SHOWN_AS_STORED[orientation](upright)
    assert stored.shape[:2] == ((9, 14) if orientation <= 4 else (14, 9))
    for image_format in ("PNG", "WEBP", "TIFF"):
        data = _file(stored, image_format, exif=exif, **LOSSLESS[image_format])
        assert np.array_equal(_pixels(data), upright), image_format


@pytest.mark.parametrize("orientation", SHOWN_AS_STORED)
def test_every_jpeg_orientation_is_the_stored_picture_turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = SHOWN_AS_STORED[orientation](_smooth())
    untagged, tagged = _pixels(_file(stored, "JPEG")), _pixels(_file(stored, "JPEG", exif=exif))
    assert np.array_equal(SHOWN_AS_STORED[orientation](tagged), untagged)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage!", b"II*\0", b"", b"MM\0*\0\0\xff\xff"])
def test_damaged_exif_does_not_cost_the_image(image_format, exif):
    options = LOSSLESS.get(image_format, {})
    damaged = _file(_smooth(), image_format, exif=b"Exif\0\0" + exif, **options)
    assert np.array_equal(_pixels(damaged), _pixels(_file(_smooth(), image_format, **options)))


def test_unknown_orientation_leaves_the_image_as_it_is_stored():
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    assert np.array_equal(_pixels(_file(_noise(), exif=exif)), _noise())


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(image_format):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert _grey(_file(levels, image_format)) == list(range(256))
    # 128 is nearer to 0 than to 257, 129 is not; 32896 = 128 * 257
    assert _grey(_file(np.array([[0, 128, 129, 32896, 65535]], dtype=np.uint16), image_format)) == [
        0,
        0,
        1,
        128,
        255,
    ]


def test_big_endian_sixteen_bit_grey_is_scaled_too():
    image = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 257 * 7, 65535))
    assert _grey(_file(image, "TIFF")) == [0, 7, 255]


def test_sixteen_bit_colour_keeps_its_high_byte():
    rows = b"\0" + struct.pack(">6H", 0, 0x7F00, 0xFFFF, 0x0180, 0x8080, 0xFF00)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = _png(2, 1, zlib.compress(rows))
    data = data.replace(data[16:29], header).replace(
        data[29:33], struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    assert _pixels(data).tolist() == [[[0, 127, 255], [1, 128, 255]]]


def test_float_grey_is_taken_from_zero_to_one_and_not_a_number_is_black():
    levels = np.array([[0.0, 0.2, 0.8, 1.0, 1.5, -1.0, np.nan]], dtype=np.float32)
    assert _grey(_file(levels, "TIFF")) == [0, 51, 204, 255, 255, 0, 0]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_over_white(image_format):
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    rgba = np.array([[(0, 100, 250, 255), (0, 100, 250, 51), (0, 100, 250, 0)]], dtype=np.uint8)
    # 51 / 255 is a fifth: 0.2 * colour + 0.8 * 255
    assert _pixels(_file(rgba, image_format, **options)).tolist() == [
        [[0, 100, 250], [204, 224, 254], [255, 255, 255]]
    ]


def test_grey_with_alpha_is_laid_over_white():
    grey_alpha = np.array([[(0, 255), (0, 51), (0, 0), (200, 51)]], dtype=np.uint8)
    assert _grey(_file(Image.fromarray(grey_alpha, "LA"))) == [0, 204, 255, 244]


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_transparent_palette_colour_is_white_and_the_others_are_themselves(image_format):
    image = Image.fromarray(np.array([[0, 1, 2, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert _pixels(_file(image, image_format)).tolist() == [[red, green, blue, green]]
    assert _pixels(_file(image, image_format, transparency=1)).tolist() == [[red, white, blue, white]]


def test_palette_with_half_transparent_colours_is_blended():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([0, 100, 250] * 3)
    data = _file(image, transparency=bytes([255, 51, 0]))
    assert _pixels(data).tolist() == [[[0, 100, 250], [204, 224, 254], [255, 255, 255]]]


def test_transparent_grey_level_and_transparent_colour_are_white():
    assert _grey(_file(np.array([[7, 8, 9]], dtype=np.uint8), transparency=8)) == [7, 255, 9]
    colours = np.array([[(1, 2, 3), (3, 2, 1)]], dtype=np.uint8)
    assert _pixels(_file(colours, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [3, 2, 1]]]


def test_grey_and_one_bit_images_have_three_equal_channels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert _grey(_file(levels)) == list(range(256))
    bits = _noise(channels=1)[..., 0] < 128
    for image_format in ("PNG", "TIFF", "BMP", "PPM"):
        assert _grey(_file(Image.fromarray(bits), image_format)) == (bits.ravel() * 255).tolist()


@pytest.mark.parametrize(("image_format", "tolerance"), [("TIFF", 0), ("JPEG", 3)])
def test_cmyk_is_shown_as_ink_on_paper(image_format, tolerance):
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 0, 0): (255, 0, 255),
        (0, 0, 255, 0): (255, 255, 0),
    }
    for ink, colour in inks.items():
        pixels = _pixels(_file(Image.new("CMYK", (16, 16), ink), image_format)).astype(int)
        assert np.abs(pixels - colour).max() <= tolerance


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several_is_taken(image_format):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = _file(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.array_equal(_pixels(data), np.asarray(frames[0]))


def test_jpeg_with_a_second_picture_inside_is_read_as_phones_write_it():
    first, second = Image.fromarray(_smooth()), Image.new("RGB", (56, 40))
    data = _file(first, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(_pixels(data), _pixels(_file(first, "JPEG")))


def test_empty_file_is_refused():
    with pytest.raises(ImageError, match=r"^the file is empty$"):
        decode_image(b"")


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is a text\n" * 20,
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4\n",
        b"\0" * 1000,
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
    ],
)
def test_what_is_no_image_of_a_known_format_is_refused_in_plain_words(data):
    with pytest.raises(ImageError, match=r"^it is not an image of a known format$"):
        decode_image(data)


def test_formats_that_pillow_reads_but_we_do_not_list_are_refused():
    for image_format in ("ICO", "PCX", "TGA"):
        with pytest.raises(ImageError, match="not an image of a known format"):
            decode_image(_file(Image.new("RGB", (16, 16)), image_format))


def test_random_bytes_behind_any_magic_number_are_refused():
    rng = np.random.default_rng(0)
    magic = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF\x40\0\0\0WEBPVP8 ",
    ]
    for start in magic * 30:
        with pytest.raises(ImageError):
            decode_image(start + rng.bytes(int(rng.integers(1, 400))))


TRUNCATED = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("image_format", "options"), TRUNCATED)
def test_truncated_file_is_refused_unless_all_of_its_pixels_are_there(image_format, options):
    assert {name for name, _ in TRUNCATED} == set(FORMATS)
    data = _file(np.concatenate([_noise(), np.full((9, 14, 3), 128, np.uint8)]), image_format, **options)
    whole = decode_image(data)
    lengths = {*range(1, len(data), 11), *range(len(data) - 40, len(data))}
    outcomes = {length: _outcome(data[:length]) for length in lengths}
    assert all(isinstance(outcome, str) or torch.equal(outcome, whole) for outcome in outcomes.values())
    assert sum(isinstance(outcome, str) for outcome in outcomes.values()) >= 0.6 * len(lengths)


@pytest.mark.parametrize(("image_format", "options"), TRUNCATED)
def test_flipped_bytes_give_an_image_or_an_image_error(image_format, options):
    data = _file(_noise(), image_format, **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), size=4):
            damaged[place] = rng.integers(256)
        outcome = _outcome(bytes(damaged))
        if isinstance(outcome, str):
            assert outcome
            assert "\n" not in outcome
        else:
            assert outcome.dtype == torch.uint8
            assert outcome.shape[0] == 3


@pytest.mark.parametrize(("width", "height"), [(65_000, 65_000), (10_001, 10_000), (1, 100_000_001)])
def test_image_over_the_pixel_limit_is_refused_before_it_is_decoded(width, height):
    started = time.perf_counter()
    # were it decoded, the damaged pixel data would be what is complained about
    with pytest.raises(ImageError, match=r"limit of 100,000,000"):
        decode_image(_png(width, height, b"no pixels"))
    assert time.perf_counter() - started < 2


def test_pixel_limit_itself_is_still_allowed(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 9 * 14)
    assert _pixels(_file(_noise(9, 14))).shape == (9, 14, 3)
    with pytest.raises(ImageError, match=r"^15x9 pixels are more than the limit of 126$"):
        decode_image(_file(_noise(9, 15)))


def test_warnings_of_the_decoder_do_not_reach_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="limit"):
            decode_image(_png(10_001, 10_000, b""))  # Pillow would warn of a decompression bomb
        _pixels(_file(_noise(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))  # and of damaged EXIF


@needs_bad_images
def test_every_odd_file_of_the_collection_becomes_an_image_or_an_image_error():
    with (BAD_IMAGES / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 281
    decoded = 0
    for row in rows:
        outcome = _outcome((BAD_IMAGES / row["file"]).read_bytes())
        if isinstance(outcome, str):
            # what Pillow reads in one of our formats, we read
            assert row["format"] not in FORMATS or row["pillow_rgb_load"] != "ok", (row["file"], outcome)
        else:
            assert (outcome.dtype, outcome.ndim, outcome.shape[0]) == (torch.uint8, 3, 3), row["file"]
            decoded += 1
    assert decoded >= 200


@needs_bad_images
@pytest.mark.parametrize("scene", ["Landscape", "Portrait"])
def test_one_photo_in_every_orientation_is_decoded_to_the_same_picture(scene):
    files = sorted((BAD_IMAGES / "exif_orientation").glob(f"{scene}_?.jpg"))
    assert len(files) == 9
    images = [decode_image(file.read_bytes()) for file in files]
    assert {tuple(image.shape) for image in images} == {
        (3, 1200, 1800) if scene == "Landscape" else (3, 1800, 1200)
    }
    small = torch.stack([torch.nn.functional.adaptive_avg_pool2d(image.float(), 64) for image in images])
    assert (small - small[0]).abs().mean(dim=(1, 2, 3)).max() < 0.8
