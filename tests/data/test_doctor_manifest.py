"""What is wrong with the rows of a manifest is found, all of it, and none of it stops the search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_cls.data.doctor.report import examine
from vit_cls.errors import ConfigError, DataError

PARTS = {"train": 10, "val": 2}


@pytest.fixture
def table(tmp_path):
    """A function that writes a manifest of a clean data set with further rows, and returns its path."""
    rng = np.random.default_rng(0)
    rows = []
    for part, count in PARTS.items():
        for label in ("cat", "dog"):
            for i in range(count):
                path = tmp_path / "images" / f"{part}_{label}{i}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
                rows.append(f"images/{path.name},{label},{part},{path.stem}")

    def write(*more: str) -> Path:
        path = tmp_path / "m.csv"
        path.write_text("\n".join(["path,label,split,group", *rows, *more]) + "\n")
        return path

    return write


def _problems(path: Path, **options) -> dict[str, list[tuple[str, str]]]:
    report = examine(path, num_workers=0, **options)
    return {p.kind: [(o.path, o.detail) for o in p.offenders] for p in report.problems}


def test_a_clean_manifest_has_no_problems(table):
    report = examine(table(), num_workers=0)
    assert report.problems == []
    assert report.images == 24
    assert report.classes == {"train": {"cat": 10, "dog": 10}, "val": {"cat": 2, "dog": 2}}


def test_every_fault_of_the_rows_is_listed_with_its_row(table, tmp_path):
    path = table(
        "images/gone.png,cat,train,g1",  # row 26
        "images/train_cat0.png,cat,train,g2",
        f"{tmp_path}/images/train_cat1.png,dog,train,g3",
        "images/train_cat2.png,cat,val,g4",
        "images/val_cat0.png,,val,g5",
        "images/val_cat1.png,cat,dev,g6",
    )
    found = _problems(path)
    assert found["missing_file"] == [("images/gone.png", "row 26")]
    assert found["bad_row"] == [("row 30", "an empty label"), ("row 31", "a split that is not known: 'dev'")]
    assert found["repeated_row"] == [
        ("images/train_cat0.png", "rows 2 and 27"),
        ("images/train_cat1.png", "rows 3 and 28"),
        ("images/train_cat2.png", "rows 4 and 29"),
    ]
    assert found["label_conflict"] == [("images/train_cat1.png", "rows 3 and 28: cat and dog")]
    assert found["leakage"] == [("images/train_cat2.png", "rows 4 and 29: train and val")]
    assert found.keys() == {"missing_file", "bad_row", "repeated_row", "label_conflict", "leakage"}


def test_equal_files_of_two_parts_and_groups_of_two_parts_are_found(table, tmp_path):
    copy = tmp_path / "images" / "copy.png"
    copy.write_bytes((tmp_path / "images" / "train_dog0.png").read_bytes())
    found = _problems(table(f"{copy},dog,val,train_dog1"))
    assert found["leakage"] == [("images/copy.png", "same file as images/train_dog0.png")]
    assert found["shared_group"] == [("train_dog1", "in train, val")]


def test_images_elsewhere_are_looked_at_too(table, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "bad.png"
    elsewhere.write_bytes(b"no image")
    found = _problems(table(f"{elsewhere},dog,val,g"))
    assert [path for path, _ in found["unreadable"]] == [str(elsewhere)]


def test_classes_that_training_lacks_and_parts_to_train_on_are_asked_for(table, tmp_path):
    found = _problems(table("images/val_cat0.png,bird,val,g"))
    assert "unknown_class" not in found  # the row repeats a file, so it makes no class
    (tmp_path / "images" / "new.png").write_bytes((tmp_path / "images" / "val_cat0.png").read_bytes() + b" ")
    assert _problems(table("images/new.png,bird,val,g"))["unknown_class"] == [("val/bird/", "")]
    (tmp_path / "t.csv").write_text("path,label,split\nimages/new.png,bird,test\n")
    assert "no_training_split" in _problems(tmp_path / "t.csv")


def test_one_part_is_looked_at_alone(table):
    path = table("images/gone.png,cat,train,g1")
    assert _problems(path, split="validation") == {}
    assert "missing_file" in _problems(path, split="train")
    with pytest.raises(ConfigError, match=r"--split test: --data .*m\.csv has only train, val\."):
        examine(path, split="test")


def test_a_part_of_folders_is_looked_at_alone(tmp_path, write_folder):
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "Test", {"a": 3})
    report = examine(tmp_path, num_workers=0, split="test")
    assert report.classes == {"": {"a": 3}}
    assert {problem.kind for problem in report.problems} == {"tiny"}


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("file,class\n1,a\n")
    with pytest.raises(DataError, match=r"^--data .*m\.csv has no column path and no column label"):
        examine(tmp_path / "m.csv")
