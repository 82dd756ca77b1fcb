"""Which folders of a root are parts, and which are classes."""

from __future__ import annotations

import pytest

from vit_cls.data.parts import PART_OF, PARTS, part_folders


@pytest.mark.parametrize(
    ("folders", "class_names", "expected"),
    [
        (["Train/", "VALID/", "testing/"], [], {"train": "Train", "val": "VALID", "test": "testing"}),
        (["train/", "extra"], [], {"train": "train"}),
        (["train", "extra"], [], {}),  # a class called train
        (["train", "test"], [], {"train": "train", "test": "test"}),  # so that training says what is missing
        (["train", "test"], ["train"], {}),
        (["train/", "test"], ["train"], {"train": "train", "test": "test"}),
        (["val/", "validation/"], [], {"val": "val"}),
        (["test/", "bus"], [], {}),
        (["a", "b"], [], {}),
        ([], [], {}),
    ],
)
def test_folders_are_parts_or_classes_by_one_rule(folders, class_names, expected):
    nested = {name[:-1] for name in folders if name.endswith("/")}
    names = [name.removesuffix("/") for name in folders]
    assert part_folders(names, has_folders=nested.__contains__, class_names=class_names) == expected


def test_every_part_has_spellings_of_its_own():
    assert PARTS == ("train", "val", "test")
    assert len(PART_OF) == 7
    assert all(spelling == spelling.lower() for spelling in PART_OF)
