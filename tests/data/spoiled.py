"""A clean data folder, and ways to spoil it: each says which problems must be found, at which paths."""

from __future__ import annotations

import os
import unicodedata
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.files import copy, image_file, noise, png_file, put
from vit_cls.data.decode import MAX_BYTES

A, FIRST = "train/cat/a.jpg", "train/cat/00.png"
Expected = dict[str, Collection[str]]
"""Offenders by kind of problem: a list has an order."""


def fill(root: Path, classes: dict[str, int], seed: int) -> None:
    for label, count in classes.items():
        for i in range(count):
            seed += 1
            put(root, f"{label}/{i:02d}.png", image_file(noise(seed)))


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _turned(orientation: int, image_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_file(noise(1000 + orientation), image_format, exif=exif)


def _several(image_format: str) -> bytes:
    frames = [Image.fromarray(noise(1000 + i)) for i in range(3)]
    return image_file(frames[0], image_format, save_all=True, append_images=frames[1:])


def _with_alpha(alpha: int, image_format: str = "PNG", **options) -> bytes:
    image = Image.fromarray(noise(1000)).convert("RGBA")
    image.putalpha(alpha)
    return image_file(image, image_format, **options)


def _palette() -> bytes:
    palette = Image.fromarray(noise(1001)[..., 0] // 64, "P")
    palette.putpalette(range(12))
    return image_file(palette, "GIF", transparency=1)


_GREY = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
_PHOTO = image_file(noise(1000))
_BLACK = zlib.compress(b"".join(b"\0" + bytes(240) for _ in range(40)))

FILES: dict[str, dict[str, bytes]] = {
    "unreadable": {"a.jpg": b"no image" * 9},
    "truncated": {
        "a.jpg": _half(image_file(noise(1000), "JPEG")),
        "b.png": _half(image_file(noise(1001))),
    },
    "empty_file": {"a.jpg": b"", "../../val/cat/a.jpg": b""},
    "wrong_extension": {"a.jpg": _PHOTO, "b.png": image_file(noise(1001), "BMP")},
    "exif_orientation": {
        "a.jpg": _turned(6, "JPEG"),
        "b.png": _turned(6, "PNG"),
        "c.webp": _turned(6, "WEBP"),
    },
    "sixteen_bit": {
        "a.png": image_file(_GREY),
        "b.tif": image_file(Image.fromarray((_GREY / 65535).astype(np.float32)), "TIFF"),
        "c.png": png_file(40, 40, _BLACK, bits=16),
        "d.ppm": b"P6 40 40 65535\n" + bytes(9600),
    },
    "transparent": {
        "a.png": _with_alpha(254),
        "b.webp": _with_alpha(0, "WEBP", lossless=True, exact=True),
        "c.gif": _palette(),
    },
    "cmyk": {"a.jpg": image_file(Image.fromarray(noise(1000)).convert("CMYK"), "JPEG")},
    "animated": {"a.gif": _several("GIF"), "b.tiff": _several("TIFF"), "c.webp": _several("WEBP")},
    "tiny": {"a.png": image_file(noise(1000, 100, 31))},
    "huge": {"a.png": image_file(Image.new("L", (8001, 5000)))},
    "not_image": {"notes.txt": b"P.S. look at 7 dogs"},
    "unread_name": {"a": _PHOTO, "a.jpg_large": image_file(noise(1000), "JPEG")},
    "unsupported_format": {"a.HEIC": b"....ftypheic", "b.ico": image_file(noise(1000), "ICO")},
    "loose_image": {"../../a.png": _PHOTO, "../b.png": _PHOTO},
    "nested": {
        f"{'/'.join('d' * 600)}/a.png": _PHOTO,  # deeper than Python's recursion
        "more/b.png": image_file(noise(1001)),
    },
}
"""By kind: files of train/cat that have the problem."""
HARMLESS: dict[str, dict[str, bytes]] = {
    "exif_orientation": {"upright.jpg": _turned(1, "JPEG")},
    "transparent": {"opaque.png": _with_alpha(255)},
    "animated": {"phone.jpg": _several("MPO")},  # a preview beside the picture is no animation
    "tiny": {"b.png": image_file(noise(1001, 32, 32))},
    "huge": {"b.png": image_file(Image.new("L", (8000, 5000)))},
    "not_image": {"../../README.md": b"about the data", "../labels.csv": b"outside of class folders"},
}
"""By kind: files beside them that have no problem."""


def _files(kind: str) -> Callable[[Path], Expected]:
    def spoil(root: Path) -> Expected:
        for path, data in (FILES[kind] | HARMLESS.get(kind, {})).items():
            put(root, os.path.normpath(f"train/cat/{path}"), data)
        return {kind: [os.path.normpath(f"train/cat/{path}") for path in FILES[kind]]}

    return spoil


def _does(act: Callable[[Path], object], **expected: list[str]) -> Callable[[Path], Expected]:
    """Something that one expression does to the folder, and what must be found then."""

    def spoil(root: Path) -> Expected:
        act(root)
        return expected

    return spoil


def _a_file_larger_than_any_image(root: Path) -> None:
    with (root / A).open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: no space is taken


def _hidden_junk(root: Path) -> Expected:
    files = (".ipynb_checkpoints/a.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/._a.jpg")
    for path in (*(f"train/{file}" for file in files), "__MACOSX/train/cat/._a.jpg"):
        put(root, path, _PHOTO)
    found = {"__MACOSX/", "train/.ipynb_checkpoints/", "train/cat/.DS_Store", "train/cat/._a.jpg"}
    return {"hidden_junk": {*found, "train/cat/Thumbs.db"}}


def _empty_class(root: Path) -> Expected:
    (root / "train/eel").mkdir()
    put(root, "val/eel/notes.txt", b"soon")
    return {"empty_class": ["train/eel/", "val/eel/"], "not_image": ["val/eel/notes.txt"]}


def _similar_class_names(root: Path) -> Expected:
    umlaut = "Bär"
    names = ["CAT", "cat ", unicodedata.normalize("NFD", umlaut), unicodedata.normalize("NFC", umlaut)]
    for i, name in enumerate([*names, "a b", "a  b"]):
        for split, count in (("train", 10), ("val", 1)):
            fill(root / split, {name: count}, seed=1000 + 100 * i + 50 * (split == "val"))
    return {"similar_class_names": {*names, "cat", "a b", "a  b"}}


def _missing_class(root: Path) -> Expected:
    fill(root / "train", {"eel": 10}, seed=1000)
    fill(root / "test", {"eel": 1, "cat": 1, "dog": 1}, seed=2000)
    return {"missing_class": ["val/eel/"]}


def _too_few_classes(root: Path) -> Expected:
    os.rename(root / "train/dog", root / "train/cat/dog")
    for path in (root / "val/dog").iterdir():
        path.unlink()
    (root / "val/dog").rmdir()
    nested = [f"train/cat/dog/{i:02d}.png" for i in range(10)]
    return {"too_few_classes": ["train"], "nested": nested}


def _leakage(root: Path) -> Expected:
    found = [copy(root, "train/cat/00.png", "val/cat/a.png"), copy(root, "val/cat/01.png", "test/cat/b.png")]
    fill(root / "test", {"dog": 1}, seed=1000)
    return {"leakage": found}


def _near(kind: str, target: str) -> Callable[[Path], Expected]:
    """A smooth picture, and another size and format of it elsewhere."""

    def spoil(root: Path) -> Expected:
        smooth = Image.fromarray(noise(1000, 5, 6)).resize((48, 40), Image.Resampling.BICUBIC)
        put(root, "train/cat/s.png", image_file(smooth))
        smaller = smooth.resize((36, 30), Image.Resampling.LANCZOS, box=(0, 0, 48, 40))
        return {kind: [put(root, target, image_file(smaller.resize((96, 80)), "JPEG", quality=60))]}

    return spoil


def _imbalance(root: Path) -> Expected:
    fill(root / "train", {"eel": 101}, seed=1000)
    fill(root / "val", {"eel": 1}, seed=2000)
    return {"imbalance": ["train/cat/", "train/dog/"]}


def _link_loop(root: Path) -> Expected:
    (root / "train/cat/loop").symlink_to(root / "train")
    (root / "train/cat/round").symlink_to(root / "train/cat")
    (root / "train/dog/self").symlink_to("self")
    return {"link_loop": {"train/cat/loop/", "train/cat/round/", "train/dog/self"}}


SPOILED: dict[str, Callable[[Path], Expected]] = {
    **{kind: _files(kind) for kind in FILES},
    "unreadable: a pipe": _does(lambda root: os.mkfifo(root / A), unreadable=[A]),
    "unreadable: a link to nowhere": _does(lambda root: (root / A).symlink_to("gone.jpg"), unreadable=[A]),
    "unreadable: larger than any image": _does(_a_file_larger_than_any_image, unreadable=[A]),
    "leakage": _leakage,
    "label_conflict": _does(
        lambda root: copy(root, FIRST, "train/dog/a.png"), label_conflict=[FIRST, "train/dog/a.png"]
    ),
    "label_conflict: across splits": _does(
        lambda root: copy(root, FIRST, "val/dog/a.png"),
        leakage=["val/dog/a.png"],
        label_conflict=[FIRST, "val/dog/a.png"],
    ),
    "link_loop": _link_loop,
    "too_few_classes": _too_few_classes,
    "too_few_classes: none": _does(lambda root: (root / "test").mkdir(), too_few_classes=["test"]),
    "empty_class": _empty_class,
    "junk_class": _does(
        lambda root: put(root, "train/__MACOSX/a.jpg", b"resource fork"), junk_class=["train/__MACOSX/"]
    ),
    "unknown_class": _does(lambda root: fill(root / "val", {"eel": 1}, 1000), unknown_class=["val/eel/"]),
    "similar_class_names": _similar_class_names,
    "missing_class": _missing_class,
    "no_training_split": _does(
        lambda root: os.rename(root / "train", root / "test"), no_training_split=["."]
    ),
    "near_leakage": _near("near_leakage", "val/cat/t.jpg"),
    "near_label_conflict": _near("near_label_conflict", "train/dog/t.jpg"),
    "near_duplicate": _near("near_duplicate", "train/cat/t.jpg"),
    "duplicate": _does(lambda root: copy(root, FIRST, "train/cat/a.png"), duplicate=["train/cat/a.png"]),
    "imbalance": _imbalance,
    "few_images": _does(lambda root: (root / FIRST).unlink(), few_images=["train/cat/"]),
    "hidden_junk": _hidden_junk,
    "ignored_folder": _does(lambda root: put(root, "extra/cat/a.jpg", b""), ignored_folder=["extra/"]),
}
"""By kind, and after a colon the way."""
DETAILS = {
    "wrong_extension": "PNG content",
    "exif_orientation": "orientation 6",
    "sixteen_bit": "more than 8 bits",
    "transparent": "pixels that show in part",
    "tiny": "31x100 pixels",
    "animated": "3 pictures",
    "leakage": "same file as train/cat/00.png",
    "label_conflict": "same file as train/dog/a.png",
    "imbalance": "10 images, eel has 101",
    "few_images": "9 images",
    "too_few_classes": "1 class folder(s)",
    "missing_class": "is not there",
    "link_loop": "leads back to a folder above it",
    "unreadable: a pipe": "it is not a regular file",
    "unreadable: a link to nowhere": "No such file or directory",
    "unreadable: larger than any image": "the file has 400,000,001 bytes, more than the limit of 400,000,000",
    "empty_file": "0 bytes",
}
"""What is said of the first offender."""
