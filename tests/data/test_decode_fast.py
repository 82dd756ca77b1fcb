"""The fast path for ordinary JPEGs gives Pillow's pixels to the bit, or leaves the file to Pillow."""

import io
import itertools
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps

from tests.data.files import TEST_DATA, image_file, outcome
from vit_cls.data import decode as decode_module
from vit_cls.data.decode import decode_image

SIZES = [(1, 1), (7, 13), (8, 1), (1, 9), (16, 16), (17, 33), (40, 56)]
"""Height and width in pixels: single pixels, single rows, whole blocks, and blocks cut off at both edges."""


def _picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Slopes, edges and noise: every coefficient of a block is in use."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([y * 4, x * 4, (x + y) // 3 % 2 * 200], axis=-1)
    noise = np.random.default_rng(height * 1000 + width).integers(0, 56, slopes.shape)
    return Image.fromarray((slopes % 200 + noise).astype(np.uint8)).convert(mode)


def _jpeg(image: Image.Image, **options) -> bytes:
    return image_file(image, "JPEG", **options)


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def _behind_start(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _reference_pillow(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)


def _decoded(data: bytes) -> tuple[torch.Tensor | str, bool]:
    """The image or the reason why there is none, and whether the fast library made it."""
    made = []

    def decode_jpeg(*args):
        made.append(original(*args))
        return made[0]

    original = simplejpeg.decode_jpeg
    with mock.patch.object(simplejpeg, "decode_jpeg", decode_jpeg):
        return outcome(data), bool(made)


def _by_pillow(data: bytes) -> torch.Tensor | str:
    with mock.patch.object(simplejpeg, "decode_jpeg_header", side_effect=ValueError):
        return outcome(data)


def test_a_machine_without_the_fast_library_decodes_the_same(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(pixels)
    expected, fast = _decoded(data)
    assert fast
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    found, fast = _decoded(data)
    assert not fast
    assert torch.equal(found, expected)


def _same(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    return torch.equal(a, b)


def _assert_fast_and_exact(data: bytes) -> None:
    image, fast = _decoded(data)
    assert fast
    assert image.dtype == torch.uint8
    assert torch.equal(image, _reference_pillow(data))


def _assert_left_to_pillow(data: bytes) -> None:
    image, fast = _decoded(data)
    assert not fast
    assert torch.equal(image, _reference_pillow(data))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_pixels_are_pillows_for_every_size_quality_and_sampling(subsampling, progressive):
    count = 0
    for (height, width), quality, mode in itertools.product(SIZES, [5, 50, 75, 95, 100], ["RGB", "L"]):
        options = {} if mode == "L" else {"subsampling": subsampling}
        data = _jpeg(_picture(height, width, mode), quality=quality, progressive=progressive, **options)
        _assert_fast_and_exact(data)
        count += 1
    assert count == 70


@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 3, "progressive": True},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"comment": b"holiday"},
        {"icc_profile": bytes(range(256)) * 600},  # three segments
        {"dpi": (300, 300)},
    ],
    ids=lambda options: "-".join(options),
)
def test_restart_intervals_comments_and_profiles_change_nothing(options):
    for mode, (height, width) in itertools.product(["RGB", "L"], SIZES):
        _assert_fast_and_exact(_jpeg(_picture(height, width, mode), **options))


@pytest.mark.parametrize("sampling", ["440", "411", "Gray"])
def test_samplings_that_pillow_does_not_write_are_read_alike(sampling):
    pixels = np.asarray(_picture(40, 56))
    if sampling == "Gray":
        data = simplejpeg.encode_jpeg(pixels[..., :1].copy(), colorspace="GRAY", colorsubsampling="Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels.copy(), colorsubsampling=sampling)
    _assert_fast_and_exact(data)


def test_sampling_that_the_fast_library_has_no_name_for_is_left_to_pillow():
    """4:4:1 comes of turning a 4:1:1 photo without decoding it; the library raises KeyError."""
    data = bytearray(_jpeg(_picture(16, 16), subsampling="4:2:0"))
    frame = data.index(b"\xff\xc0")
    # 16x16 pixels in 4:2:0 are one unit of four luma blocks and two chroma blocks; so are 32 rows of 8.
    data[frame + 5 : frame + 9] = b"\0\x20\0\x08"
    data[frame + 11] = 0x14
    image = decode_image(bytes(data))
    assert image.shape == (3, 32, 8)
    assert torch.equal(image, _reference_pillow(bytes(data)))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 1000])  # the last three do not exist
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (8, 1), (40, 56)])
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, size):
    for mode, progressive in itertools.product(["RGB", "L"], [False, True]):
        data = _jpeg(_picture(*size, mode), exif=_oriented(orientation), progressive=progressive)
        _assert_fast_and_exact(data)
        assert decode_image(data).shape[1:] == (size[::-1] if 5 <= orientation <= 8 else size)


@pytest.mark.parametrize("text", [b'tiff:Orientation="6"', b"<tiff:Orientation>6</tiff:Orientation>"])
def test_orientation_that_stands_in_xmp_alone_is_applied(text):
    xmp = _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta " + text + b"/>")
    data = _behind_start(_jpeg(_picture(7, 13)), xmp)
    _assert_fast_and_exact(data)
    assert decode_image(data).shape == (3, 13, 7)
    # where both speak, EXIF wins
    _assert_fast_and_exact(_behind_start(_jpeg(_picture(7, 13), exif=_oriented(3)), xmp))


@pytest.mark.parametrize(
    "before",
    [
        [_segment(0xE5, bytes(65_533))] * 20,
        [_segment(0xFE, b"Exif\0 is not here")],
        [b"\xff"],  # fill byte
        [_segment(0xED, b"\xff\xda\xff\xd9")],  # looks like a scan and its end
        [b"\xff\xd0"],  # a marker without a length, out of place
    ],
    ids=["megabyte", "decoy", "fill", "scan", "restart"],
)
def test_orientation_is_found_behind_other_segments(before):
    data = _behind_start(_jpeg(_picture(7, 13), exif=_oriented(6)), *before)
    assert torch.equal(decode_image(data), _reference_pillow(data))
    assert decode_image(data).shape == (3, 13, 7)


def test_thumbnail_inside_exif_is_not_taken_for_the_picture():
    exif = _oriented(8)
    body = exif.tobytes()
    thumbnail = _jpeg(_picture(8, 8))
    data = _behind_start(_jpeg(_picture(40, 56)), _segment(0xE1, body + thumbnail))
    _assert_fast_and_exact(data)
    assert decode_image(data).shape == (3, 56, 40)


@pytest.mark.parametrize("orientation", [1, 6])
def test_first_of_two_pictures_in_one_file_is_taken(orientation):
    first, second = _picture(40, 56), _picture(24, 24)
    options = {"save_all": True, "append_images": [second], "exif": _oriented(orientation)}
    data = image_file(first, "MPO", **options)
    _assert_fast_and_exact(data)
    assert decode_image(data).shape == ((3, 40, 56) if orientation == 1 else (3, 56, 40))


@pytest.mark.parametrize("transform", [0, 2])
def test_inks_and_rgb_that_is_stored_as_such_are_left_to_pillow(transform):
    """Adobe's marker says how inks are stored: as they are (0), or as YCCK (2)."""
    data = bytearray(_jpeg(_picture(40, 56).convert("CMYK")))
    data[data.index(b"Adobe") + 11] = transform
    _assert_left_to_pillow(bytes(data))
    _assert_left_to_pillow(_jpeg(_picture(40, 56), keep_rgb=True))


@pytest.mark.parametrize("with_jfif", [True, False])
@pytest.mark.parametrize("transform", [0, 1])
def test_adobe_marker_means_to_us_what_it_means_to_pillow(with_jfif, transform):
    data = _jpeg(_picture(40, 56), quality=95)
    assert data[2:4] == b"\xff\xe0"
    adobe = _segment(0xEE, b"Adobe\0\x64" + bytes(4) + bytes([transform]))
    data = data[:2] + (data[2:20] if with_jfif else b"") + adobe + data[20:]
    is_rgb = transform == 0 and not with_jfif
    (_assert_left_to_pillow if is_rgb else _assert_fast_and_exact)(data)


TRUNCATED = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "4:4:4": {"subsampling": "4:4:4"},
    "turned": {"exif": _oriented(6)},
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_truncated_file_fares_alike_on_both_paths(kind):
    data = _jpeg(_picture(40, 56), **TRUNCATED[kind])
    lengths = sorted({*range(3, len(data), 17), *range(len(data) - 30, len(data))})
    refused = 0
    for length in lengths:
        pillow = _by_pillow(data[:length])
        assert _same(outcome(data[:length]), pillow), length
        refused += isinstance(pillow, str)
    assert refused == len(lengths)


def test_progressive_file_without_its_last_scans_is_smoothed_alike():
    data = _jpeg(_picture(40, 56), progressive=True)
    starts = [i for i in range(len(data)) if data.startswith(b"\xff\xda", i)]
    assert len(starts) > 5
    for start in starts[1:]:
        _assert_fast_and_exact(data[:start] + b"\xff\xd9")


@pytest.mark.parametrize(
    "junk",
    [
        *(b"\0" * 100, b"not a picture", b"\xff\xd9", b'Exif\0\0MM\0*tiff:Orientation="6"'),
        _jpeg(_picture(8, 8)),
    ],
)
def test_what_follows_the_picture_is_ignored(junk):
    data = _jpeg(_picture(40, 56), quality=90)
    _assert_fast_and_exact(data + junk)
    assert torch.equal(decode_image(data + junk), decode_image(data))


def test_damaged_files_never_give_other_pixels_than_pillow():
    rng = np.random.default_rng(0)
    options = [
        {},
        {"subsampling": "4:4:4"},
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"exif": _oriented(6)},
    ]
    files = [_jpeg(_picture(13, 21), **chosen) for chosen in options]
    answered = 0
    for i in range(3000):
        data = bytearray(files[i % len(files)])
        place = int(rng.integers(2, len(data)))
        if i % 3:
            data[place] = rng.integers(256)
        else:
            del data[place : place + int(rng.integers(1, 9))]
        (image, fast), pillow = _decoded(bytes(data)), _by_pillow(bytes(data))
        if fast and not isinstance(pillow, str):
            assert torch.equal(image, pillow), i
            answered += 1
    assert answered > 150


@pytest.mark.skipif(not TEST_DATA.is_dir(), reason=f"no folder {TEST_DATA}; VIT_CLS_TEST_DATA names another")
def test_real_photos_and_odd_files_have_pillows_pixels():
    photos = sorted((TEST_DATA / "clothing_small" / "test").rglob("*.jpg"))[:300]
    odd = [path for path in sorted((TEST_DATA / "bad_images").rglob("*")) if path.is_file()]
    answered = dict.fromkeys(("photos", "odd"), 0)
    for kind, path in [*(("photos", path) for path in photos), *(("odd", path) for path in odd)]:
        data = path.read_bytes()
        image, fast = _decoded(data)
        if fast:
            assert torch.equal(image, _by_pillow(data)), path
            answered[kind] += 1
    assert answered["photos"] == 300
    assert answered["odd"] >= 27
