"""Each problem is found where it is, none is found in a clean folder, and no file ends the program."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_cls.data.decode import MAX_BYTES
from vit_cls.data.doctor import image_check, scan
from vit_cls.data.doctor.image_check import CheckTask, check_image
from vit_cls.data.doctor.issues import ISSUE_TYPES, MOST_EXAMPLES, SEVERITIES, UNREADABLE
from vit_cls.data.doctor.report import examine, quick_check
from vit_cls.data.doctor.scan import scan_folder
from vit_cls.data.folders import find_parts
from vit_cls.data.index import EXTENSIONS, index_folder
from vit_cls.data.partition import split_for_training
from vit_cls.errors import ConfigError, DataError

TEST_DATA = Path(os.environ.get("VIT_CLS_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
BAD_IMAGES = TEST_DATA / "bad_images"


def _noise(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _file(image: np.ndarray | Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _put(root: Path, path: str, data: bytes) -> str:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return path


def _fill(root: Path, classes: dict[str, int], seed: int) -> None:
    for label, count in classes.items():
        for i in range(count):
            seed += 1
            _put(root, f"{label}/{i:02d}.png", _file(_noise(seed)))


@pytest.fixture
def clean(tmp_path):
    """train/ with 10 images a class, val/ with 2; nothing is wrong with them."""
    root = tmp_path / "data"
    _fill(root / "train", {"cat": 10, "dog": 10}, seed=0)
    _fill(root / "val", {"cat": 2, "dog": 2}, seed=100)
    return root


def _found(diagnosis) -> dict[str, list[str]]:
    return {problem.kind: [offender.path for offender in problem.offenders] for problem in diagnosis.problems}


@pytest.mark.parametrize("near_duplicates", [False, True])
def test_a_clean_folder_has_no_problem(clean, near_duplicates):
    diagnosis = examine(clean, num_workers=0, near_duplicates=near_duplicates)
    assert diagnosis.problems == []
    assert diagnosis.ok
    assert (diagnosis.images, diagnosis.readable, diagnosis.unreadable) == (24, 24, 0)
    assert diagnosis.classes == {"train": {"cat": 10, "dog": 10}, "val": {"cat": 2, "dog": 2}}
    assert diagnosis.class_names == ["cat", "dog"]
    assert diagnosis.seconds > 0


# Each of these spoils a clean folder in one way and says what must be found: every kind, every path.


def _unreadable(root):
    return {"unreadable": [_put(root, "train/cat/a.jpg", b"no image" * 9)]}


def _a_pipe(root):
    os.mkfifo(root / "train/cat/a.jpg")
    return {"unreadable": ["train/cat/a.jpg"]}


def _a_link_to_nowhere(root):
    (root / "train/cat/a.jpg").symlink_to(root / "gone.jpg")
    return {"unreadable": ["train/cat/a.jpg"]}


def _a_file_larger_than_any_image(root):
    with (root / "train/cat/a.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: no space is taken
    return {"unreadable": ["train/cat/a.jpg"]}


def _truncated(root):
    jpeg, png = _file(_noise(1000), "JPEG"), _file(_noise(1001))
    return {
        "truncated": [
            _put(root, "train/cat/a.jpg", jpeg[: len(jpeg) // 2]),
            _put(root, "train/cat/b.png", png[: len(png) // 2]),
        ]
    }


def _empty_file(root):
    return {"empty_file": [_put(root, f"{split}/cat/a.jpg", b"") for split in ("train", "val")]}


def _wrong_extension(root):
    return {
        "wrong_extension": [
            _put(root, "train/cat/a.jpg", _file(_noise(1000))),
            _put(root, "train/cat/b.png", _file(_noise(1001), "BMP")),
        ]
    }


def _exif_orientation(root):
    found = []
    for name, image_format in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.webp", "WEBP")):
        exif = Image.Exif()
        exif[0x0112] = 6
        found.append(_put(root, f"train/cat/{name}", _file(_noise(1000), image_format, exif=exif)))
    exif[0x0112] = 1
    _put(root, "train/cat/upright.jpg", _file(_noise(1001), "JPEG", exif=exif))
    return {"exif_orientation": found}


def _sixteen_bit(root):
    grey = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
    floats = Image.fromarray((grey / 65535).astype(np.float32))
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(240) for _ in range(40))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    colour = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return {
        "sixteen_bit": [
            _put(root, "train/cat/a.png", _file(grey)),
            _put(root, "train/cat/b.tif", _file(floats, "TIFF")),
            _put(root, "train/cat/c.png", colour),
            _put(root, "train/cat/d.ppm", b"P6 40 40 65535\n" + bytes(9600)),
        ]
    }


def _transparent(root):
    def with_alpha(alpha):
        image = Image.fromarray(_noise(1000)).convert("RGBA")
        image.putalpha(alpha)
        return image

    palette = Image.fromarray(_noise(1001)[..., 0] // 64, "P")
    palette.putpalette(range(12))
    _put(root, "train/cat/opaque.png", _file(with_alpha(255)))
    return {
        "transparent": [
            _put(root, "train/cat/a.png", _file(with_alpha(254))),
            _put(root, "train/cat/b.webp", _file(with_alpha(0), "WEBP", lossless=True, exact=True)),
            _put(root, "train/cat/c.gif", _file(palette, "GIF", transparency=1)),
        ]
    }


def _cmyk(root):
    return {
        "cmyk": [_put(root, "train/cat/a.jpg", _file(Image.fromarray(_noise(1000)).convert("CMYK"), "JPEG"))]
    }


def _animated(root):
    frames = [Image.fromarray(_noise(1000 + i)) for i in range(3)]
    for name, image_format in (("a.gif", "GIF"), ("b.tiff", "TIFF"), ("c.webp", "WEBP")):
        _put(
            root, f"train/cat/{name}", _file(frames[0], image_format, save_all=True, append_images=frames[1:])
        )
    phone = _file(Image.fromarray(_noise(1001)), "MPO", save_all=True, append_images=frames[2:])
    _put(root, "train/cat/phone.jpg", phone)  # a preview beside the picture is no animation
    return {"animated": ["train/cat/a.gif", "train/cat/b.tiff", "train/cat/c.webp"]}


def _tiny(root):
    _put(root, "train/cat/b.png", _file(_noise(1001, 32, 32)))
    return {"tiny": [_put(root, "train/cat/a.png", _file(_noise(1000, 100, 31)))]}


def _huge(root):
    _put(root, "train/cat/b.png", _file(Image.new("L", (8000, 5000))))
    return {"huge": [_put(root, "train/cat/a.png", _file(Image.new("L", (8001, 5000))))]}


def _hidden_junk(root):
    photo = _file(_noise(1))
    paths = [
        "train/cat/.DS_Store",
        "train/cat/Thumbs.db",
        "train/.ipynb_checkpoints/a.png",
        "train/cat/._a.jpg",
    ]
    for path in paths:
        _put(root, path, photo)
    _put(root, "__MACOSX/train/cat/._a.jpg", photo)
    found = {"__MACOSX/", "train/.ipynb_checkpoints/", "train/cat/.DS_Store", "train/cat/._a.jpg"}
    return {"hidden_junk": {*found, "train/cat/Thumbs.db"}}


def _not_image(root):
    _put(root, "README.md", b"about the data")
    _put(root, "train/labels.csv", b"outside of class folders nothing is meant")
    return {"not_image": [_put(root, "train/cat/notes.txt", b"P.S. look at 7 dogs")]}


def _unread_name(root):
    return {
        "unread_name": [
            _put(root, "train/cat/a", _file(_noise(1000))),
            _put(root, "train/cat/a.jpg_large", _file(_noise(1000), "JPEG")),
        ]
    }


def _unsupported_format(root):
    ico = _file(_noise(1000), "ICO")
    paths = [_put(root, "train/cat/a.HEIC", b"....ftypheic"), _put(root, "train/cat/b.ico", ico)]
    return {"unsupported_format": paths}


def _loose_image(root):
    photo = _file(_noise(1000))
    return {"loose_image": [_put(root, "a.png", photo), _put(root, "train/b.png", photo)]}


def _empty_class(root):
    (root / "train/eel").mkdir()
    (root / "val/eel").mkdir()
    _put(root, "val/eel/notes.txt", b"soon")
    return {"empty_class": ["train/eel/", "val/eel/"], "not_image": ["val/eel/notes.txt"]}


def _junk_class(root):
    _put(root, "train/__MACOSX/a.jpg", b"resource fork")
    return {"junk_class": ["train/__MACOSX/"]}


def _nested(root):
    deep = "/".join("d" * 600)  # deeper than Python's recursion
    return {
        "nested": [
            _put(root, f"train/cat/{deep}/a.png", _file(_noise(1000))),
            _put(root, "train/cat/more/b.png", _file(_noise(1001))),
        ]
    }


def _similar_class_names(root):
    umlaut = "Bär"
    names = ["CAT", "cat ", unicodedata.normalize("NFD", umlaut), unicodedata.normalize("NFC", umlaut)]
    for i, name in enumerate([*names, "a b", "a  b"]):
        for split, count in (("train", 10), ("val", 1)):
            _fill(root / split, {name: count}, seed=1000 + 100 * i + 50 * (split == "val"))
    return {"similar_class_names": {*names, "cat", "a b", "a  b"}}


def _unknown_class(root):
    _fill(root / "val", {"eel": 1}, seed=1000)
    return {"unknown_class": ["val/eel/"]}


def _missing_class(root):
    _fill(root / "train", {"eel": 10}, seed=1000)
    _fill(root / "test", {"eel": 1, "cat": 1, "dog": 1}, seed=2000)
    return {"missing_class": ["val/eel/"]}


def _too_few_classes(root):
    os.rename(root / "train/dog", root / "train/cat/dog")
    for path in (root / "val/dog").iterdir():
        path.unlink()
    (root / "val/dog").rmdir()
    nested = [f"train/cat/dog/{i:02d}.png" for i in range(10)]
    return {"too_few_classes": ["train"], "nested": nested}


def _split_without_classes(root):
    (root / "test").mkdir()
    return {"too_few_classes": ["test"]}


def _no_training_split(root):
    os.rename(root / "train", root / "test")
    return {"no_training_split": ["."]}


def _ignored_folder(root):
    _put(root, "extra/cat/a.jpg", b"")
    return {"ignored_folder": ["extra/"]}


def _copy(root, source, target):
    return _put(root, target, (root / source).read_bytes())


def _duplicate(root):
    return {"duplicate": [_copy(root, "train/cat/00.png", "train/cat/a.png")]}


def _leakage(root):
    found = [
        _copy(root, "train/cat/00.png", "val/cat/a.png"),
        _copy(root, "val/cat/01.png", "test/cat/b.png"),
    ]
    _fill(root / "test", {"dog": 1}, seed=1000)
    return {"leakage": found}


def _label_conflict(root):
    return {"label_conflict": ["train/cat/00.png", _copy(root, "train/cat/00.png", "train/dog/a.png")]}


def _label_conflict_across_splits(root):
    copy = _copy(root, "train/cat/00.png", "val/dog/a.png")
    return {"leakage": [copy], "label_conflict": ["train/cat/00.png", copy]}


def _recompressed(root, source, target):
    with Image.open(root / source) as image:
        smaller = image.resize((36, 30), Image.Resampling.LANCZOS, box=(0, 0, 48, 40))
        return _put(root, target, _file(smaller.resize((96, 80)), "JPEG", quality=60))


def _smooth(root, path, seed):
    return _put(
        root, path, _file(Image.fromarray(_noise(seed, 5, 6)).resize((48, 40), Image.Resampling.BICUBIC))
    )


def _near_duplicate(root):
    _smooth(root, "train/cat/s.png", 1000)
    return {"near_duplicate": [_recompressed(root, "train/cat/s.png", "train/cat/t.jpg")]}


def _near_leakage(root):
    _smooth(root, "train/cat/s.png", 1000)
    return {"near_leakage": [_recompressed(root, "train/cat/s.png", "val/cat/t.jpg")]}


def _near_label_conflict(root):
    _smooth(root, "train/cat/s.png", 1000)
    return {"near_label_conflict": [_recompressed(root, "train/cat/s.png", "train/dog/t.jpg")]}


def _imbalance(root):
    _fill(root / "train", {"eel": 101}, seed=1000)
    _fill(root / "val", {"eel": 1}, seed=2000)
    return {"imbalance": ["train/cat/", "train/dog/"]}


def _few_images(root):
    (root / "train/cat/00.png").unlink()
    return {"few_images": ["train/cat/"]}


def _link_loop(root):
    (root / "train/cat/loop").symlink_to(root / "train")
    (root / "train/cat/round").symlink_to(root / "train/cat")
    (root / "train/dog/self").symlink_to("self")
    return {"link_loop": {"train/cat/loop/", "train/cat/round/", "train/dog/self"}}


SPOILED = {
    "unreadable": _unreadable,
    "unreadable: a pipe": _a_pipe,
    "unreadable: a link to nowhere": _a_link_to_nowhere,
    "unreadable: larger than any image": _a_file_larger_than_any_image,
    "truncated": _truncated,
    "empty_file": _empty_file,
    "leakage": _leakage,
    "label_conflict": _label_conflict,
    "label_conflict across splits": _label_conflict_across_splits,
    "link_loop": _link_loop,
    "too_few_classes": _too_few_classes,
    "too_few_classes: none": _split_without_classes,
    "empty_class": _empty_class,
    "junk_class": _junk_class,
    "unknown_class": _unknown_class,
    "similar_class_names": _similar_class_names,
    "missing_class": _missing_class,
    "no_training_split": _no_training_split,
    "nested": _nested,
    "loose_image": _loose_image,
    "unread_name": _unread_name,
    "unsupported_format": _unsupported_format,
    "near_leakage": _near_leakage,
    "near_label_conflict": _near_label_conflict,
    "duplicate": _duplicate,
    "near_duplicate": _near_duplicate,
    "imbalance": _imbalance,
    "few_images": _few_images,
    "tiny": _tiny,
    "huge": _huge,
    "wrong_extension": _wrong_extension,
    "exif_orientation": _exif_orientation,
    "sixteen_bit": _sixteen_bit,
    "transparent": _transparent,
    "cmyk": _cmyk,
    "animated": _animated,
    "hidden_junk": _hidden_junk,
    "not_image": _not_image,
    "ignored_folder": _ignored_folder,
}
OF_MANIFESTS = {"bad_row", "missing_file", "repeated_row", "shared_group"}  # see test_doctor_manifest.py
TESTED_BELOW = {"no_access", "partly_checked"}


def test_every_kind_has_a_folder_that_is_spoiled_in_its_way():
    assert {
        name.partition(":")[0].partition(" ")[0] for name in SPOILED
    } | TESTED_BELOW | OF_MANIFESTS == set(ISSUE_TYPES)


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_found_and_nothing_else(name, clean):
    expected = SPOILED[name](clean)
    copies = "near" in name or name.partition(" ")[0] in ("duplicate", "leakage", "label_conflict")
    diagnosis = examine(clean, num_workers=0, near_duplicates=copies)
    found = _found(diagnosis)
    assert found.keys() == expected.keys()
    for kind, paths in expected.items():
        assert (set(found[kind]) if isinstance(paths, set) else found[kind]) == paths, kind
        assert len(set(found[kind])) == len(found[kind])
    assert diagnosis.ok == all(ISSUE_TYPES[kind].severity != "error" for kind in expected)
    assert diagnosis.unreadable == sum(len(expected.get(kind, ())) for kind in UNREADABLE)
    assert diagnosis.images == sum(n for counts in diagnosis.classes.values() for n in counts.values())


ERRORS_OF_LAYOUT = ["empty_class", "link_loop", "too_few_classes", "unknown_class"]


@pytest.mark.parametrize("name", ERRORS_OF_LAYOUT)
def test_training_refuses_what_is_called_an_error_of_the_layout(name, clean):
    SPOILED[name](clean)
    with pytest.raises(DataError):
        split_for_training(find_parts(clean), val_fraction=0.1, seed=0)


def test_near_copies_are_looked_for_when_asked_alone(clean):
    _near_leakage(clean)
    assert examine(clean, num_workers=0).problems == []


def test_kinds_are_sorted_by_severity_and_speak_in_sentences():
    order = [SEVERITIES.index(kind.severity) for kind in ISSUE_TYPES.values()]
    assert order == sorted(order)
    for name, kind in ISSUE_TYPES.items():
        assert name.isidentifier()
        assert kind.title
        assert not kind.title.endswith(".")
        assert kind.advice.endswith(".")


def test_problem_has_ten_examples_and_every_offender(clean):
    for i in range(MOST_EXAMPLES + 2):
        _put(clean, f"train/cat/x{i:02d}.jpg", b"")
    diagnosis = examine(clean, num_workers=0)
    (problem,) = diagnosis.problems
    assert (problem.kind, problem.severity, problem.count) == ("empty_file", "error", MOST_EXAMPLES + 2)
    assert problem.examples == [f"train/cat/x{i:02d}.jpg" for i in range(MOST_EXAMPLES)]
    assert problem.to_dict() == {
        "kind": "empty_file",
        "severity": "error",
        "count": 12,
        "examples": problem.examples,
        "advice": ISSUE_TYPES["empty_file"].advice,
    }
    as_json = diagnosis.to_dict()
    assert list(as_json) == ["images", "unreadable", "classes", "problems", "ok", "seconds"]
    assert (as_json["images"], as_json["unreadable"], as_json["classes"], as_json["ok"]) == (36, 12, 2, False)


def test_one_folder_of_class_folders_is_one_split(tmp_path):
    _fill(tmp_path, {"cat": 10, "dog": 9}, seed=0)
    diagnosis = examine(tmp_path, num_workers=0)
    assert diagnosis.classes == {"": {"cat": 10, "dog": 9}}
    assert _found(diagnosis) == {"few_images": ["dog/"]}


def test_folder_of_images_without_classes_is_a_diagnosis(tmp_path):
    _put(tmp_path, "a.png", _file(_noise(0)))
    diagnosis = examine(tmp_path, num_workers=0)
    assert _found(diagnosis) == {"too_few_classes": ["."], "loose_image": ["a.png"]}
    assert (diagnosis.images, diagnosis.ok) == (0, False)


def test_missing_folder_and_file_instead_of_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"^--data .*nowhere does not exist"):
        examine(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^--data .*file cannot be read as a folder: Not a directory"):
        examine(tmp_path / "file")
    with pytest.raises(ConfigError, match="num_workers must be at least 0; got -1"):
        examine(tmp_path, num_workers=-1)


LAYOUTS = {
    "train and val": ["train/a", "val/a"],
    "other spellings": ["Training/a", "VALIDATION/a", "test/a"],
    "a class that is called train": ["train", "car", "boat"],
    "classes alone": ["a", "b"],
    "train alone": ["train/a"],
    "a folder beside the splits": ["train/a", "val/a", "extra/b"],
    "a class called test": ["test", "b"],
    "no training folder": ["val/a", "test/a"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_read_as_training_reads_it(name, tmp_path):
    for folder in LAYOUTS[name]:
        for label in ("", "/b") if "/" in folder else ("",):
            place = folder if not label else folder.rpartition("/")[0] + label
            for i in range(3):
                _put(tmp_path, f"{place}/{i}.png", _file(_noise(0)))
    found = scan_folder(tmp_path)
    try:
        split = split_for_training(find_parts(tmp_path), val_fraction=0.4, seed=0)
    except DataError:
        assert name == "no training folder"
        assert (found.training, found.splits) == (None, ["val", "test"])
        return
    assert found.training is not None
    prefix = f"{found.training}/" if found.training else ""
    ours = [image.path for image in found.images if image.split == found.training]
    in_one_folder = split.train.index.root == split.val.index.root
    theirs = [*split.train.index.paths, *(split.val.index.paths if in_one_folder else ())]
    assert sorted(ours) == sorted(prefix + path for path in theirs)
    assert found.classes[found.training] == split.train.index.class_names


def test_images_are_those_that_the_index_has(clean):
    for spoil in (_nested, _hidden_junk, _unread_name, _unsupported_format, _not_image, _loose_image):
        spoil(clean)
    ours = [image.path for image in scan_folder(clean).images if image.split == "train"]
    assert sorted(ours) == sorted(f"train/{path}" for path in index_folder(clean / "train").paths)


def test_folder_without_permission_is_an_error_of_its_own(clean, monkeypatch):
    """Patched, for root may read everything."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(scan.os, "scandir", refuse)
    diagnosis = examine(clean, num_workers=0)
    assert _found(diagnosis) == {"no_access": ["train/cat/"], "empty_class": ["train/cat/"]}
    assert diagnosis.problems[0].offenders[0].detail == "Permission denied"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "no memory")],
)
def test_file_that_cannot_be_opened_is_a_row(error, reason, clean, monkeypatch):
    def refuse(path):
        raise error

    monkeypatch.setattr(image_check, "read_file", refuse)
    checked = check_image(CheckTask(str(clean / "train/cat/00.png")))
    assert (checked.readable, checked.findings) == (False, [("unreadable", reason)])


ODD_NAMES = [
    "Ünï çödé 猫.png",
    os.fsdecode(b"not \xff utf-8.png"),
    "line\nbreak.png",
    "tab\tand \x1b[31mred.png",
    "\u202eright to left.png",
    "'quote\".png",
    "  spaces  .png",
]


def test_odd_names_are_read_and_reported_as_they_are(clean):
    for i, name in enumerate(ODD_NAMES):
        _put(clean, f"train/cat/{name}", _file(_noise(1000 + i)))
        _put(clean, f"val/dog/{name}", b"")
    diagnosis = examine(clean, num_workers=0, near_duplicates=True)
    assert diagnosis.images == 24 + 2 * len(ODD_NAMES)
    assert set(_found(diagnosis)) == {"empty_file"}
    assert set(_found(diagnosis)["empty_file"]) == {f"val/dog/{name}" for name in ODD_NAMES}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG"),
        (b"%PDF-1.4", "PDF"),
        (b"\0\0\0\x18ftypheic\0", "HEIC"),
        (b"\0\0\0\x18ftypavif\0", "AVIF"),
        (b"PK\x03\x04zip", "a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not fetched"),
        (b"\0" * 5000, "zeros"),
    ],
)
def test_reason_names_what_the_file_is_instead(data, what, tmp_path):
    path = _put(tmp_path, "a.jpg", data)
    ((kind, detail),) = check_image(CheckTask(str(tmp_path / path))).findings
    assert kind == "unreadable"
    assert "not an image of a known format" in detail
    assert what in detail


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


@pytest.mark.parametrize("name", DETAILS)
def test_detail_says_what_is_the_matter(name, clean):
    SPOILED[name](clean)
    kind = name.partition(":")[0]
    problem = next(p for p in examine(clean, num_workers=0).problems if p.kind == kind)
    assert problem.offenders[0].detail == DETAILS[name]


def test_random_bytes_under_any_ending_are_rows(clean):
    rng = np.random.default_rng(0)
    magic = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF\x40\0\0\0WEBP",
    ]
    endings = sorted(EXTENSIONS)
    for i in range(70):
        _put(clean, f"train/cat/x{i}{endings[i % len(endings)]}", magic[i % 7] + rng.bytes(1 + 5 * i))
    diagnosis = examine(clean, num_workers=0, near_duplicates=True)
    assert (diagnosis.images, diagnosis.readable) == (24 + 70, 24)


@pytest.mark.skipif(
    not BAD_IMAGES.is_dir(),
    reason=f"no folder {BAD_IMAGES}; VIT_CLS_TEST_DATA names the one that holds bad_images/",
)
def test_every_file_of_the_odd_ones_ends_as_readable_or_as_a_row():
    files = {path.relative_to(BAD_IMAGES).as_posix() for path in BAD_IMAGES.rglob("*.*") if path.is_file()}
    files.discard("manifest.csv")
    assert len(files) >= 281
    diagnosis = examine(BAD_IMAGES, num_workers=0, near_duplicates=True)
    found = _found(diagnosis)
    passed_over = [
        path for kind in ("unsupported_format", "not_image", "unread_name") for path in found.get(kind, [])
    ]
    unreadable = [path for kind in UNREADABLE for path in found.get(kind, [])]
    assert diagnosis.images + len(passed_over) == len(files)
    assert diagnosis.unreadable == len(unreadable) == len(set(unreadable))
    assert set(unreadable) | set(passed_over) <= files
    assert 20 <= diagnosis.unreadable <= 40
    assert {path for path in found["exif_orientation"] if path.startswith("exif")} == {
        f"exif_orientation/{side}_{i}.jpg" for side in ("Landscape", "Portrait") for i in range(2, 9)
    }
    assert {path for path in files if path.endswith("16.png") and "/bas" in path} <= set(found["sixteen_bit"])


def test_processes_give_what_one_process_gives(clean):
    for spoil in (_unreadable, _truncated, _leakage, _exif_orientation, _near_label_conflict):
        spoil(clean)
    here, there = (examine(clean, num_workers=n, near_duplicates=True) for n in (0, 2))
    assert _found(here) == _found(there)
    assert here.problems == there.problems
    assert len(here.problems) >= 5


def test_doctor_and_quick_check_agree(clean):
    _leakage(clean)
    problems = {p.kind: p for p in examine(clean, num_workers=0).problems}
    ours = [o for o in problems["leakage"].offenders if o.path.startswith("val/")]
    split = split_for_training(find_parts(clean), val_fraction=0.2, seed=0)
    (problem,) = quick_check(split.train.index, split.val.index)
    assert (problem.kind, problem.offenders) == ("leakage", ours)
