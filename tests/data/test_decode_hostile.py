"""Files that were made to do harm, or were damaged: refused quickly, in little memory, by an ImageError."""

import json
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.files import image_file, outcome, png_file
from vit_cls.data import decode
from vit_cls.data.decode import FORMATS, MAX_BYTES, decode_image, read_file
from vit_cls.errors import ImageError

MEGABYTE = 2**20


def _zlib_zeros(count: int) -> bytes:
    """What zlib makes of ``count`` zeros; a megabyte of them is compressed once and repeated."""
    packer = zlib.compressobj(9)
    start = packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = rest.compress(bytes(count % MEGABYTE)) + rest.flush()
    adler = count % 65521 << 16 | 1
    return start + block * (count // MEGABYTE) + end + struct.pack(">I", adler)


def _black_png(side: int) -> bytes:
    return png_file(side, side, _zlib_zeros(side * (3 * side + 1)))


def _patched(data: bytes, place: int, size: bytes) -> bytes:
    return data[:place] + size + data[place + len(size) :]


def _bombs() -> dict[str, bytes]:
    """A whole PNG of 2.7 GB of pixels, and headers that promise as much, in every format."""
    small = Image.new("RGB", (8, 8))
    jpeg, bmp, gif, tiff = (image_file(small, name) for name in ("JPEG", "BMP", "GIF", "TIFF"))
    frames = image_file(small, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    still = image_file(small, "WEBP", lossless=True)
    place = still.index(b"VP8L") + 9
    sizes = int.from_bytes(still[place : place + 4], "little") | 16_382 | 16_382 << 14
    for tag in (256, 257):  # width and height
        entry = struct.pack("<HHI", tag, 4, 1)
        tiff = _patched(tiff, tiff.index(entry) + len(entry), struct.pack("<I", 65_000))
    return {
        "whole png": _black_png(30_000),
        "png": png_file(65_000, 65_000, b""),
        "jpeg": _patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_000, 65_000)),
        "webp": _patched(still, place, sizes.to_bytes(4, "little")),
        "animated webp": _patched(frames, frames.index(b"VP8X") + 12, (59_999).to_bytes(3, "little") * 2),
        "gif": _patched(gif, 6, struct.pack("<HH", 65_000, 65_000)),
        "bmp": _patched(bmp, 18, struct.pack("<ii", 65_000, 65_000)),
        "tiff": tiff,
        "ppm": b"P6 65000 65000 255 ",
    }


MEASURE = """
import json, resource, sys
from pathlib import Path
from vit_cls.data.decode import decode_image, read_file
from vit_cls.errors import ImageError

def peak():
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the process that this one was forked from
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

outcomes = {}
for path in sys.argv[1:]:
    before = peak()
    try:
        outcome = repr(decode_image(read_file(Path(path))).shape)
    except ImageError as error:
        outcome = str(error)
    outcomes[Path(path).name] = outcome, peak() - before
print(json.dumps(outcomes))
"""


def test_zeros_are_what_zlib_makes_of_zeros():
    for count in (0, 5, MEGABYTE, 3 * MEGABYTE + 77):
        assert zlib.decompress(_zlib_zeros(count)) == bytes(count)
    image = decode_image(_black_png(700))
    assert image.shape == (3, 700, 700)
    assert not image.any()


def test_decompression_bombs_are_refused_within_a_hundred_megabytes(tmp_path):
    bombs = _bombs()
    assert len(bombs) == 9
    assert len(bombs["whole png"]) < 3 * MEGABYTE
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "healthy").write_bytes(_black_png(4000))
    paths = [str(tmp_path / name) for name in (*bombs, "healthy")]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, *paths], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    outcomes = json.loads(run.stdout)
    answer, growth = outcomes.pop("healthy")
    assert "4000, 4000" in answer
    assert growth > 40 * MEGABYTE  # what is measured is real: 48 MB of pixels
    assert set(outcomes) == set(bombs)
    for name, (answer, growth) in outcomes.items():
        assert "limit of 100,000,000" in answer, name
        assert growth < 100 * MEGABYTE, name


def test_file_over_the_limit_of_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    monkeypatch.setattr(type(path), "open", lambda *args: pytest.fail("the file was read"))
    with pytest.raises(
        ImageError, match=r"^the file has 400,000,001 bytes, more than the limit of 400,000,000$"
    ):
        read_file(path)


def test_file_of_exactly_the_limit_of_bytes_is_read(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(_black_png(5))
    monkeypatch.setattr(decode, "MAX_BYTES", path.stat().st_size)
    assert decode_image(read_file(path)).shape == (3, 5, 5)
    monkeypatch.setattr(decode, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ImageError, match="more than the limit"):
        read_file(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"^it is not a regular file$"):
        read_file(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=r"^it is not a regular file$"):
        read_file(tmp_path / "endless.jpg")


def _seeds() -> list[bytes]:
    """Small valid files of every format, of three in many modes."""
    y, x = np.mgrid[:13, :21]
    noise = np.random.default_rng(0).integers(0, 90, (13, 21, 4))
    rgba = Image.fromarray((np.stack([y * 9, x * 7, x + y, y * 12], axis=-1) + noise).astype(np.uint8))
    image = rgba.convert("RGB")
    grey = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs: list[tuple[Image.Image, dict]] = [
        (image, {}),
        (image, {"subsampling": "4:4:4", "progressive": True}),
        (image, {"exif": exif, "restart_marker_blocks": 1}),
        (grey, {"comment": b"grey"}),
        (image.convert("CMYK"), {}),
        (image, {"keep_rgb": True}),
    ]
    pngs: list[tuple[Image.Image, dict]] = [
        (image, {}),
        (rgba, {"exif": exif}),
        (grey, {"transparency": 7}),
        (rgba.convert("LA"), {}),
        (image.quantize(16), {"transparency": 3}),
        (grey.convert("1"), {}),
        (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
    ]
    webps: list[tuple[Image.Image, dict]] = [
        (image, {}),
        (image, {"lossless": True}),
        (rgba, {"exif": exif}),
        (image, {"save_all": True, "append_images": [grey.convert("RGB")]}),
    ]
    table = {"JPEG": jpegs, "PNG": pngs, "WEBP": webps, "BMP": [(image, {})], "GIF": [(image, {})]}
    table |= {"PPM": [(image, {})], "TIFF": [(image, {}), (image, {"compression": "tiff_lzw"})]}
    assert set(table) == set(FORMATS)
    return [image_file(picture, name, **options) for name, rows in table.items() for picture, options in rows]


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, inserted, deleted, repeated or cut off, at one to three places."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place, length = int(rng.integers(len(changed))), int(rng.integers(1, 17))
        match rng.choice(["flip", "insert", "delete", "repeat", "truncate"], p=[0.4, 0.2, 0.15, 0.15, 0.1]):
            case "flip":
                changed[place] ^= 1 << int(rng.integers(8))
            case "insert":
                changed[place:place] = rng.bytes(length)
            case "delete":
                del changed[place : place + length]
            case "repeat":
                changed[place:place] = changed[place : place + length]
            case "truncate":
                del changed[place:]
        if not changed:
            break
    return bytes(changed)


def _with_sound_chunks(data: bytes) -> bytes:
    """The PNG with every checksum right again, so that the damage reaches the decoder behind them."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def test_damaged_files_give_an_image_or_an_image_error_and_nothing_else():
    rng = np.random.default_rng(0)
    seeds = _seeds()
    assert len(seeds) == 22
    images = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2600):
            data = _mutated(seeds[i % len(seeds)], rng)
            if data.startswith(b"\x89PNG") and i % 2:
                data = _with_sound_chunks(data)
            found = outcome(data)
            if isinstance(found, str):
                assert found
                assert "\n" not in found
            else:
                assert (found.dtype, found.ndim, found.shape[0]) == (torch.uint8, 3, 3)
                assert found.numel() > 0
                images += 1
    assert images > 200
