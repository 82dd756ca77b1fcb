"""One finder: folders, manifests and digits become parts, and each use takes its own by one rule."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vit_cls.data.folders import find_parts
from vit_cls.data.index import ImageIndex
from vit_cls.data.partition import Split, partition_data, split_for_training
from vit_cls.data.parts import PART_OF, PARTS, part_folders
from vit_cls.errors import ConfigError, DataError

TWO_CLASSES = ("a/1.png", "b/1.png")
BY_PATIENT = r"/(p\d+)_"


def _touch(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def _split(root: Path, val_fraction: float = 0.1, seed: int = 0, group_by: str | None = None) -> Split:
    found = find_parts(root, name="data.root")
    return split_for_training(found, val_fraction=val_fraction, seed=seed, group_by=group_by)


def _groups(index: ImageIndex) -> set[str]:
    return {path.split("/")[1].split("_")[0] for path in index.paths}


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("val", ["val", "Validation", "VALID", "valid"])
def test_split_folders_are_found_in_every_usual_spelling(tmp_path, train, val):
    _touch(tmp_path / train, *TWO_CLASSES, "a/2.png")
    _touch(tmp_path / val, "a/9.png", "b/9.png")
    split = _split(tmp_path)
    assert list(split.train.index.paths) == ["a/1.png", "a/2.png", "b/1.png"]
    assert list(split.val.index.paths) == ["a/9.png", "b/9.png"]
    assert split.train.index.path(0) == tmp_path / train / "a/1.png"
    assert split.val.index.path(0) == tmp_path / val / "a/9.png"
    assert train in split.origin
    assert val in split.origin
    assert not split.made_here


def test_validation_folder_is_preferred_to_a_test_folder(tmp_path):
    for name in ("train", "test", "valid", "extra"):
        _touch(tmp_path / name, *TWO_CLASSES)
    split = _split(tmp_path)
    assert split.val.index.root == tmp_path / "valid"


@pytest.mark.parametrize("test", ["test", "Testing"])
def test_a_test_folder_is_not_touched_and_a_share_of_train_is_held_out(tmp_path, test):
    _touch(tmp_path / "train", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    _touch(tmp_path / test, "a/1.png", "none/1.png")  # a class that training lacks: nobody looks
    split = _split(tmp_path, val_fraction=0.2)
    assert split.made_here
    assert split.val.index.counts().tolist() == [2, 2]
    assert split.val.index.root == split.train.index.root == tmp_path / "train"
    assert split.origin.endswith(
        f"0.2 of each class of train/ held out, seed 0; {tmp_path / test}: not touched"
    )


def test_train_folder_alone_is_split_and_the_origin_says_what_was_looked_for(tmp_path):
    _touch(tmp_path / "train", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    split = _split(tmp_path, val_fraction=0.2, seed=3)
    assert split.train.index.counts().tolist() == [8, 8]
    assert split.val.index.counts().tolist() == [2, 2]
    assert split.val.index.root == tmp_path / "train"
    assert "looked for val/, validation/, valid/)" in split.origin
    assert "0.2 of each class of train/ held out, seed 3" in split.origin


def test_folder_of_class_folders_is_split_and_the_origin_says_how(tmp_path):
    _touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    split = _split(tmp_path, val_fraction=0.3, seed=5)
    assert split.val.index.counts().tolist() == [3, 3]
    assert split.origin == f"0.3 of each class of {tmp_path} held out for validation, seed 5"


def test_split_is_the_same_for_any_order_in_which_the_files_were_made(tmp_path):
    files = [f"{c}/{i}.png" for c in "ab" for i in range(30)]
    rng = np.random.default_rng(0)
    held_out = [
        list(_split(_touch(tmp_path / str(i), *(files[j] for j in rng.permutation(60)))).val.index.paths)
        for i in range(3)
    ]
    assert held_out[0] == held_out[1] == held_out[2]


def test_folder_with_one_image_a_class_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path} has one image a class.*Add images or a val/ folder"):
        _split(_touch(tmp_path, *TWO_CLASSES))


def test_validation_class_that_training_lacks_is_refused_with_both_lists(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    _touch(tmp_path / "val", "a/1.png", "c/1.png")
    with pytest.raises(DataError, match=r"val has 1 class.*: c\. Its classes: a, c\. Known classes: a, b\."):
        _split(tmp_path)


def test_validation_may_lack_classes_and_its_labels_are_those_of_training(tmp_path):
    _touch(tmp_path / "train", "a/1.png", "b/1.png", "c/1.png")
    _touch(tmp_path / "val", "b/1.png", "c/1.png")
    split = _split(tmp_path)
    assert split.val.index.class_names == split.train.index.class_names == ["a", "b", "c"]
    assert split.val.index.labels.tolist() == [1, 2]


def test_validation_folder_with_a_single_class_is_labelled_by_training(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    _touch(tmp_path / "val", "b/1.png", "b/2.png")
    assert _split(tmp_path).val.index.labels.tolist() == [1, 1]


def test_training_folder_with_a_single_class_is_refused(tmp_path):
    _touch(tmp_path / "train", "a/1.png")
    _touch(tmp_path / "val", *TWO_CLASSES)
    with pytest.raises(DataError, match=r"train has only one class folder \(a\)"):
        _split(tmp_path)


def test_validation_folder_without_classes_or_images_is_refused_by_name(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    _touch(tmp_path / "val", "readme.txt")
    with pytest.raises(DataError, match=r"val/ of data\.root .* has no class folders"):
        _split(tmp_path)
    _touch(tmp_path / "val", "a/1.txt")
    with pytest.raises(DataError, match=r"val/ of data\.root .* has a class folder without images: a\."):
        _split(tmp_path)


@pytest.mark.parametrize("folders", [["val"], ["Test"], ["val", "test"]])
def test_root_without_a_folder_to_train_on_is_refused(tmp_path, folders):
    for name in folders:
        _touch(tmp_path / name, *TWO_CLASSES)
    with pytest.raises(DataError, match=r"no folder to train on; looked for train/ or training/") as error:
        _split(tmp_path)
    assert all(name in str(error.value) for name in folders)


def test_missing_root_is_named_as_the_user_knows_it(tmp_path):
    with pytest.raises(DataError, match=r"^data\.root .*nowhere does not exist"):
        _split(tmp_path / "nowhere")


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(b"")
    split = _split(tmp_path, 0.25)
    assert split.train.index.class_names == ["bus", "train"]
    assert split.train.index.counts().tolist() == [3, 3]


@pytest.mark.parametrize("inside", ["", "train"])
def test_root_is_split_by_groups_and_the_origin_says_how(tmp_path, inside):
    _touch(tmp_path / inside, *(f"{c}/p{g}_{i}.png" for c in "ab" for g in range(5) for i in range(2)))
    _touch(tmp_path / inside, "c/p9_1.png", "c/p9_2.png")
    split = _split(tmp_path, 0.2, 1, group_by=BY_PATIENT)
    assert not _groups(split.train.index) & _groups(split.val.index)
    assert len(split.val.index) == 4
    assert (
        r"0.2 of the groups of each class (by '/(p\\d+)_'; 4 of 22 images; 1 class(es) could give none) of "
        in split.origin
    )


def test_group_in_both_split_folders_is_refused_and_other_groups_are_not(tmp_path):
    _touch(tmp_path / "train", "a/p1_1.png", "b/p2_1.png")
    _touch(tmp_path / "val", "a/p3_1.png", "b/p4_1.png")
    split = _split(tmp_path, 0.1, 0, group_by=BY_PATIENT)
    assert "no group of '/(p" in split.origin
    _touch(tmp_path / "val", "b/p1_7.png")
    with pytest.raises(DataError, match=r"data\.group_by .*: 1 group\(s\) are in train and in val: p1\."):
        _split(tmp_path, 0.1, 0, group_by=BY_PATIENT)
    assert len(_split(tmp_path).val.index) == 3  # nobody asked for groups


def test_validation_folder_that_is_a_link_to_the_training_folder_is_refused(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(
        DataError, match=r"val is the same folder as .*train, so images would be in two parts, and the model"
    ):
        _split(tmp_path)


def test_validation_class_that_is_a_link_to_a_training_class_is_refused(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    _touch(tmp_path / "val", "a/1.png")
    (tmp_path / "val" / "b").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(DataError, match=r"val/b is the same folder as .*train/a, so"):
        _split(tmp_path)


def _files(partition, part):
    index = getattr(partition, part).index
    return [str(index.path(i).resolve()) for i in range(len(index))]


def test_a_folder_of_classes_is_divided_without_overlap_or_loss(tmp_path, write_folder):
    root = write_folder(tmp_path / "all", {"a": 20, "b": 12})
    found = partition_data(root, seed=3, val_fraction=0.2, test_fraction=0.25)
    files = [_files(found, part) for part in PARTS]
    assert [len(one) for one in files] == [19, 5, 8]  # 5 + 3 of 20 + 12, then 3 + 2 of 15 + 9
    assert sorted(file for one in files for file in one) == sorted(
        str(path.resolve()) for path in root.rglob("*.png")
    )
    assert "seed 3" in found.origin
    assert found.counts() == {"train": 19, "val": 5, "test": 8}


def test_the_test_part_is_the_same_for_every_seed_and_the_validation_part_is_not(tmp_path, write_folder):
    root = write_folder(tmp_path / "all", {"a": 20, "b": 20})
    one, other, again = (partition_data(root, seed=seed) for seed in (0, 1, 0))
    assert _files(one, "test") == _files(other, "test")
    assert _files(one, "val") != _files(other, "val")
    assert _files(one, "val") == _files(again, "val")


def test_three_folders_are_taken_as_they_are_and_classes_are_matched_by_name(tmp_path, write_folder):
    for part, classes in (
        ("train", {"a": 2, "b": 3, "c": 4}),
        ("valid", {"c": 1, "b": 1}),
        ("TEST", {"c": 2}),
    ):
        write_folder(tmp_path / part, classes)
    found = partition_data(tmp_path, seed=5)
    assert [len(_files(found, part)) for part in PARTS] == [9, 2, 2]
    assert found.class_names == ["a", "b", "c"]
    assert found.val.index.labels.tolist() == [1, 2]
    assert found.test.index.labels.tolist() == [2, 2]
    assert "valid/" in found.origin
    assert "TEST/" in found.origin


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_one_folder_beside_train_is_the_test_part(tmp_path, write_folder, name):
    write_folder(tmp_path / "train", {"a": 10, "b": 10})
    write_folder(tmp_path / name, {"a": 3, "b": 3})
    found = partition_data(tmp_path, val_fraction=0.3)
    assert [len(_files(found, part)) for part in PARTS] == [14, 6, 6]
    assert all(f"/{name}/" in file for file in _files(found, "test"))
    assert all("/train/" in file for file in _files(found, "val"))
    assert found.origin.startswith(f"{name}/ of")


def test_digits_are_the_embedded_ones_with_their_held_out_third_as_the_test_part():
    from vit_cls.data.digits import load_digits

    found = partition_data("digits", seed=1)
    held_out = load_digits("test")
    assert list(found.test.index.paths) == list(held_out.index.paths)
    paths = [set(getattr(found, part).index.paths) for part in PARTS]
    assert sum(map(len, paths)) == len(set.union(*paths)) == 1797
    everything = load_digits("train")
    by_path = dict(zip(everything.index.paths, everything.images, strict=True))
    for row in (0, 7):  # pixels go with their names
        assert found.val.read(row).equal(by_path[found.val.index.paths[row]])
    assert "embedded digits" in found.origin


def test_a_folder_called_digits_wins_over_the_embedded_digits(tmp_path, write_folder, monkeypatch):
    write_folder(tmp_path / "digits", {"a": 8, "b": 8})
    monkeypatch.chdir(tmp_path)
    assert partition_data("digits").class_names == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path, write_folder):
    found = partition_data(write_folder(tmp_path / "cifar", {"train": 8, "tulip": 8}))
    assert found.class_names == ["train", "tulip"]


def test_a_test_class_that_training_lacks_is_refused(tmp_path, write_folder):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    write_folder(tmp_path / "test", {"a": 2, "zebra": 2})
    with pytest.raises(DataError, match="not known: zebra"):
        partition_data(tmp_path)


def test_a_class_folder_that_is_linked_into_two_parts_is_refused(tmp_path, write_folder):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    write_folder(tmp_path / "test", {"b": 2})
    os.symlink(tmp_path / "train" / "a", tmp_path / "test" / "a")
    with pytest.raises(DataError, match=r"--data: .*test/a is the same folder as .*train/a"):
        partition_data(tmp_path)


@pytest.mark.parametrize("images", [1, 2])
def test_too_few_images_are_refused_and_the_message_says_how_many_it_takes(tmp_path, write_folder, images):
    root = write_folder(tmp_path / "all", {"a": images, "b": images})
    with pytest.raises(DataError, match=r"too few images for three parts.*at least three images a class"):
        partition_data(root)


def test_three_images_a_class_are_enough(tmp_path, write_folder):
    found = partition_data(write_folder(tmp_path / "all", {"a": 3, "b": 3}))
    assert [len(_files(found, part)) for part in PARTS] == [2, 2, 2]


def test_a_test_part_alone_is_refused_with_what_to_give_instead(tmp_path, write_folder):
    write_folder(tmp_path / "two" / "test", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"has test/ but no folder to train on.*two/test itself"):
        partition_data(tmp_path / "two")


def test_train_alone_is_divided_into_three(tmp_path, write_folder):
    write_folder(tmp_path / "train", {"a": 12, "b": 12})
    alone, inside = partition_data(tmp_path), partition_data(tmp_path / "train")
    assert [_files(alone, part) for part in PARTS] == [_files(inside, part) for part in PARTS]
    assert (alone.split, inside.split) == ("train", "all")


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["train", "val", "test"], None, "test"),
        (["train", "val", "test"], "Validation", "val"),
        (["train", "valid"], None, "val"),
        (["test"], None, "test"),
        (["train"], None, "train"),
        (["train", "val", "TESTING"], "training", "train"),
        (["cat", "dog"], None, "all"),
    ],
)
def test_test_is_scored_if_there_is_one_else_val_else_everything(tmp_path, folders, split, expected):
    for name in folders:
        _touch(tmp_path / name, *TWO_CLASSES)
    found = find_parts(tmp_path)
    assert found.choose(split) == expected
    place = {"all": ""} | {name.lower()[:3]: name for name in folders}
    assert found.where(expected) == str(tmp_path / place[expected[:3]])


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    _touch(tmp_path / "train", *TWO_CLASSES)
    with pytest.raises(ConfigError, match=r"^--split test: --data .* has only train\."):
        find_parts(tmp_path).choose("test")
    with pytest.raises(ConfigError, match=r"has no parts, so leave --split out"):
        find_parts(tmp_path / "train").choose("test")


def test_the_part_that_is_reported_on_can_be_chosen(tmp_path, write_folder):
    for part in PARTS:
        write_folder(tmp_path / part, {"a": 10, "b": 10})
    chosen = partition_data(tmp_path, split="val")
    assert (chosen.split, chosen.made_here) == ("val", ("val",))
    assert all("/val/" in file for file in _files(chosen, "test"))
    assert all("/train/" in file for part in ("train", "val") for file in _files(chosen, part))
    chosen = partition_data(tmp_path, split="train")
    assert chosen.made_here == ("val", "test")
    assert all("/train/" in file for part in PARTS for file in _files(chosen, part))


def test_a_file_that_is_no_manifest_is_refused_with_what_may_be_given(tmp_path):
    _touch(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"^--data .*a\.jpg is a file, but no manifest\. Give a folder"):
        find_parts(tmp_path / "a.jpg")


def test_a_model_that_has_a_class_called_train_is_scored_on_a_folder_of_that_class(tmp_path):
    _touch(tmp_path, "train/1.png", "train/2.png")
    assert list(find_parts(tmp_path, class_names=["bus", "train"]).places) == ["all"]
    assert list(find_parts(tmp_path).places) == ["train"]


def _manifest(folder: Path, parts: str, images: int = 12) -> Path:
    """``images`` rows of each of two classes for each part."""
    rows = [f"{part}_{c}{i}.png,{c},{part}" for part in parts.split() for c in "ab" for i in range(images)]
    _touch(folder, *(row.split(",")[0] for row in rows))
    path = folder / "m.csv"
    path.write_text("\n".join(["path,label,split", *rows]))
    return path


def test_rows_of_a_manifest_are_parts_as_folders_are(tmp_path):
    path = _manifest(tmp_path, "train val test")
    split = split_for_training(find_parts(path), val_fraction=0.5, seed=0)
    assert {Path(p).name.split("_")[0] for p in split.train.index.paths} == {"train"}
    assert {Path(p).name.split("_")[0] for p in split.val.index.paths} == {"val"}
    parts = partition_data(path)
    assert parts.counts() == {"train": 24, "val": 24, "test": 24}
    assert parts.origin == f"the parts train, val and test of {path}"
    assert find_parts(path).where("test") == f"the test rows of {path}"


def test_test_rows_are_not_touched_by_training_and_are_what_is_reported_on(tmp_path):
    path = _manifest(tmp_path, "train test")
    for i in range(12):
        (tmp_path / f"test_a{i}.png").unlink()  # nobody looks for them
    split = split_for_training(find_parts(path), val_fraction=0.25, seed=0)
    assert split.made_here
    assert split.val.index.counts().tolist() == [3, 3]
    assert split.origin.endswith(f"seed 0; the test rows of {path}: not touched")
    with pytest.raises(DataError, match=r"12 of 48 rows have a path where there is no file"):
        partition_data(path)
    parts = partition_data(_manifest(tmp_path, "train test"))
    assert parts.made_here == ("val",)
    assert all(name.startswith("test_") for name in parts.test.index.paths)


def test_a_manifest_without_training_rows_can_be_scored_and_not_be_trained_on(tmp_path):
    path = _manifest(tmp_path, "test")
    found = find_parts(path)
    assert len(found.read(found.choose(None)).index) == 24
    with pytest.raises(DataError, match=r"has no row to train on: none has train in its split column"):
        partition_data(path)


def test_a_missing_folder_is_named_as_the_user_wrote_it(tmp_path):
    with pytest.raises(DataError, match=r"--images .*nowhere does not exist"):
        partition_data(tmp_path / "nowhere", name="--images")


def test_a_share_that_was_asked_for_of_a_part_that_is_there_already_is_refused(tmp_path, write_folder):
    for part in PARTS:
        write_folder(tmp_path / "three" / part, {"a": 4, "b": 4})
        if part != "val":
            write_folder(tmp_path / "two" / part, {"a": 4, "b": 4})
    write_folder(tmp_path / "one", {"a": 4, "b": 4})
    both = {"val_fraction": 0.5, "test_fraction": 0.25}
    partition_data(tmp_path / "one", **both).refuse_unused(both)
    for data in (tmp_path / "two", "digits"):
        found = partition_data(data, **both)
        found.refuse_unused({"val_fraction": 0.5})
        with pytest.raises(
            ConfigError, match=r"--test_fraction 0\.25 has no effect, for the test part is not"
        ):
            found.refuse_unused({"test_fraction": 0.25})
    found = partition_data(tmp_path / "three", **both)
    found.refuse_unused({})
    with pytest.raises(ConfigError, match=r"--val_fraction 0\.5 has no effect.*the folders train/, val/ and"):
        found.refuse_unused(both)


@pytest.mark.parametrize("setting", ["val_fraction", "test_fraction"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_fraction_must_lie_between_0_and_1(tmp_path, setting, value):
    with pytest.raises(ConfigError, match=f"--{setting} must be above 0 and below 1"):
        partition_data(tmp_path, **{setting: value})


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


@pytest.mark.parametrize(("chosen", "left"), [("val", "valid"), ("validation", "VALID"), ("Test", "test")])
def test_a_second_folder_of_a_part_is_named_in_one_warning_line(tmp_path, caplog, chosen, left):
    for name in ("train", chosen, left):
        _touch(tmp_path / name, *TWO_CLASSES)
    for _ in range(2):  # a study finds its data many times
        assert chosen in find_parts(tmp_path).places.values()
    part = "test" if chosen == "Test" else "val"
    assert caplog.messages == [
        f"--data {tmp_path}: {left}/ is not read, for {chosen}/ is the {part} part already. "
        "Put their images together, or rename one."
    ]


def test_folders_of_classes_or_of_one_part_each_are_not_warned_of(tmp_path, caplog):
    for name in ("parts/train", "parts/val", "parts/extra", "classes/valid", "classes/val", "classes/bus"):
        _touch(tmp_path / name, *TWO_CLASSES)
    assert list(find_parts(tmp_path / "parts").places) == ["train", "val"]
    assert list(find_parts(tmp_path / "classes").places) == ["all"]
    assert not caplog.messages
