"""Each problem is found where it is, none is found in a clean folder, and no file ends the program."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.data.files import BAD_IMAGES, BEGINNINGS, image_file, needs_bad_images, noise, put
from tests.data.spoiled import DETAILS, SPOILED, fill
from vit_cls.data.doctor import image_check, scan
from vit_cls.data.doctor.image_check import CheckTask, check_image
from vit_cls.data.doctor.issues import ISSUE_TYPES, MOST_EXAMPLES, SEVERITIES, UNREADABLE
from vit_cls.data.doctor.report import examine, quick_check
from vit_cls.data.doctor.scan import scan_folder
from vit_cls.data.folders import find_parts
from vit_cls.data.index import EXTENSIONS, index_folder
from vit_cls.data.partition import split_for_training
from vit_cls.errors import ConfigError, DataError


@pytest.fixture
def clean(tmp_path):
    """train/ with 10 images a class, val/ with 2; nothing is wrong with them."""
    root = tmp_path / "data"
    fill(root / "train", {"cat": 10, "dog": 10}, seed=0)
    fill(root / "val", {"cat": 2, "dog": 2}, seed=100)
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


OF_MANIFESTS = {"bad_row", "missing_file", "repeated_row", "shared_group"}  # see test_doctor_manifest.py
TESTED_BELOW = {"no_access", "partly_checked"}


def test_every_kind_has_a_folder_that_is_spoiled_in_its_way():
    assert {name.partition(":")[0] for name in SPOILED} | TESTED_BELOW | OF_MANIFESTS == set(ISSUE_TYPES)
    assert DETAILS.keys() <= SPOILED.keys()


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_found_and_nothing_else(name, clean):
    expected = SPOILED[name](clean)
    kind, _, _ = name.partition(":")
    copies = "near" in name or kind in ("duplicate", "leakage", "label_conflict")
    diagnosis = examine(clean, num_workers=0, near_duplicates=copies)
    found = _found(diagnosis)
    assert found.keys() == expected.keys()
    for each, paths in expected.items():
        assert (set(found[each]) if isinstance(paths, set) else found[each]) == paths, each
        assert len(set(found[each])) == len(found[each])
    if name in DETAILS:
        problem = next(problem for problem in diagnosis.problems if problem.kind == kind)
        assert problem.offenders[0].detail == DETAILS[name]
    assert diagnosis.ok == all(ISSUE_TYPES[each].severity != "error" for each in expected)
    assert diagnosis.unreadable == sum(len(expected.get(each, ())) for each in UNREADABLE)
    assert diagnosis.images == sum(n for counts in diagnosis.classes.values() for n in counts.values())


ERRORS_OF_LAYOUT = ["empty_class", "link_loop", "too_few_classes", "unknown_class"]


@pytest.mark.parametrize("name", ERRORS_OF_LAYOUT)
def test_training_refuses_what_is_called_an_error_of_the_layout(name, clean):
    SPOILED[name](clean)
    with pytest.raises(DataError):
        split_for_training(find_parts(clean), val_fraction=0.1, seed=0)


def test_near_copies_are_looked_for_when_asked_alone(clean):
    SPOILED["near_leakage"](clean)
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
        put(clean, f"train/cat/x{i:02d}.jpg", b"")
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
    fill(tmp_path, {"cat": 10, "dog": 9}, seed=0)
    diagnosis = examine(tmp_path, num_workers=0)
    assert diagnosis.classes == {"": {"cat": 10, "dog": 9}}
    assert _found(diagnosis) == {"few_images": ["dog/"]}


def test_folder_of_images_without_classes_is_a_diagnosis(tmp_path):
    put(tmp_path, "a.png", image_file(noise(0)))
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
                put(tmp_path, f"{place}/{i}.png", image_file(noise(0)))
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
    for name in ("nested", "hidden_junk", "unread_name", "unsupported_format", "not_image", "loose_image"):
        SPOILED[name](clean)
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
        put(clean, f"train/cat/{name}", image_file(noise(1000 + i)))
        put(clean, f"val/dog/{name}", b"")
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
    path = put(tmp_path, "a.jpg", data)
    ((kind, detail),) = check_image(CheckTask(str(tmp_path / path))).findings
    assert kind == "unreadable"
    assert "not an image of a known format" in detail
    assert what in detail


def test_random_bytes_under_any_ending_are_rows(clean):
    rng = np.random.default_rng(0)
    endings = sorted(EXTENSIONS)
    for i in range(70):
        put(clean, f"train/cat/x{i}{endings[i % len(endings)]}", BEGINNINGS[i % 7] + rng.bytes(1 + 5 * i))
    diagnosis = examine(clean, num_workers=0, near_duplicates=True)
    assert (diagnosis.images, diagnosis.readable) == (24 + 70, 24)


@needs_bad_images
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
    for name in ("unreadable", "truncated", "leakage", "exif_orientation", "near_label_conflict"):
        SPOILED[name](clean)
    here, there = (examine(clean, num_workers=n, near_duplicates=True) for n in (0, 2))
    assert _found(here) == _found(there)
    assert here.problems == there.problems
    assert len(here.problems) >= 5


def test_doctor_and_quick_check_agree(clean):
    SPOILED["leakage"](clean)
    problems = {p.kind: p for p in examine(clean, num_workers=0).problems}
    ours = [o for o in problems["leakage"].offenders if o.path.startswith("val/")]
    split = split_for_training(find_parts(clean), val_fraction=0.2, seed=0)
    (problem,) = quick_check(split.train.index, split.val.index)
    assert (problem.kind, problem.offenders) == ("leakage", ours)
