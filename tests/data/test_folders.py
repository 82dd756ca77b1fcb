"""One finder: folders, manifests and digits become parts, and each use takes its own by one rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.data.files import touch
from vit_cls.data.digits import load_digits
from vit_cls.data.folders import find_parts
from vit_cls.data.index import ImageIndex
from vit_cls.data.partition import Partition, Split, partition_data, split_for_training
from vit_cls.data.parts import PARTS
from vit_cls.errors import ConfigError, DataError

BY_PATIENT = r"/(p\d+)_"


def _tree(root: Path, **parts: str) -> Path:
    """Class folders with images: ``train="a3 b1"``; those of the root itself are of the part ``here``."""
    for part, classes in parts.items():
        folder = root if part == "here" else root / part
        folder.mkdir(exist_ok=True, parents=True)
        for name, count in re.findall(r"(\w+?)(\d+)", classes):
            (folder / name).mkdir(exist_ok=True)
            touch(folder, *(f"{name}/{i}.png" for i in range(int(count))))
    return root


def _split(root: Path, val_fraction: float = 0.1, seed: int = 0, group_by: str | None = None) -> Split:
    found = find_parts(root, name="data.root")
    return split_for_training(found, val_fraction=val_fraction, seed=seed, group_by=group_by)


def _groups(index: ImageIndex) -> set[str]:
    return {path.split("/")[1].split("_")[0] for path in index.paths}


def _files(partition: Partition, part: str) -> list[str]:
    index = getattr(partition, part).index
    return [str(index.path(i).resolve()) for i in range(len(index))]


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("val", ["val", "Validation", "VALID", "valid"])
def test_split_folders_are_found_in_every_usual_spelling(tmp_path, train, val):
    _tree(tmp_path, **{train: "a2 b1", val: "a1 b1", "test": "a1 b1", "extra": "a1 b1"})
    split = _split(tmp_path)
    assert list(split.train.index.paths) == ["a/0.png", "a/1.png", "b/0.png"]
    assert list(split.val.index.paths) == ["a/0.png", "b/0.png"]
    assert split.train.index.path(0) == tmp_path / train / "a/0.png"
    assert split.val.index.path(0) == tmp_path / val / "a/0.png"
    assert split.origin == f"{tmp_path / train} and {tmp_path / val}"
    assert not split.made_here


ALONE = (
    "no validation folder beside {root}/train (looked for val/, validation/, valid/): 0.3 of each class of "
    "train/ held out, seed 5"
)


@pytest.mark.parametrize(
    ("parts", "origin"),
    [
        ({"here": "a10 b10"}, "0.3 of each class of {root} held out for validation, seed 5"),
        ({"here": "bus10 train10"}, "0.3 of each class of {root} held out for validation, seed 5"),
        ({"train": "a10 b10"}, ALONE),
        # a class that training lacks: nobody looks
        ({"train": "a10 b10", "test": "a1 none1"}, ALONE + "; {root}/test: not touched"),
        ({"train": "a10 b10", "Testing": "a1 none1"}, ALONE + "; {root}/Testing: not touched"),
    ],
)
def test_a_share_is_held_out_where_there_is_no_validation_folder_and_the_origin_says_how(
    tmp_path, parts, origin
):
    split = _split(_tree(tmp_path, **parts), val_fraction=0.3, seed=5)
    assert split.made_here
    assert split.train.index.counts().tolist() == [7, 7]
    assert split.val.index.counts().tolist() == [3, 3]
    assert split.train.index.class_names == (["bus", "train"] if "bus" in str(parts) else ["a", "b"])
    root = tmp_path if "here" in parts else tmp_path / "train"
    assert split.val.index.root == split.train.index.root == root
    assert split.origin == origin.format(root=tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"here": "a1 b1"}, r"{root} has one image a class.*Add images or a val/ folder"),
        (
            {"train": "a1 b1", "val": "a1 c1"},
            r"val has 1 class.*: c\. Its classes: a, c\. Known classes: a, b\.",
        ),
        ({"train": "a1", "val": "a1 b1"}, r"train has only one class folder \(a\)"),
        ({"train": "a1 b1", "val": ""}, r"val/ of data\.root .* has no class folders"),
        (
            {"train": "a1 b1", "val": "a0"},
            r"val/ of data\.root .* has a class folder without images: a\.",
        ),
        ({"val": "a1 b1"}, r"has val/ but no folder to train on; looked for train/ or training/"),
        ({"Test": "a1 b1"}, r"has Test/ but no folder to train on.*give {root}/Test itself"),
        ({"val": "a1 b1", "test": "a1"}, r"has val/, test/ but no folder to train on"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path, parts, message):
    with pytest.raises(DataError, match=message.format(root=re.escape(str(tmp_path)))):
        _split(_tree(tmp_path, **parts))


def test_missing_root_is_named_as_the_user_knows_it(tmp_path):
    with pytest.raises(DataError, match=r"^data\.root .*nowhere does not exist"):
        _split(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"--images .*nowhere does not exist"):
        partition_data(tmp_path / "nowhere", name="--images")


@pytest.mark.parametrize(("val", "labels"), [("b1 c1", [1, 2]), ("b2", [1, 1])])
def test_validation_may_lack_classes_and_its_labels_are_those_of_training(tmp_path, val, labels):
    split = _split(_tree(tmp_path, train="a1 b1 c1", val=val))
    assert split.val.index.class_names == split.train.index.class_names == ["a", "b", "c"]
    assert split.val.index.labels.tolist() == labels


@pytest.mark.parametrize("inside", ["", "train"])
def test_root_is_split_by_groups_and_the_origin_says_how(tmp_path, inside):
    touch(tmp_path / inside, *(f"{c}/p{g}_{i}.png" for c in "ab" for g in range(5) for i in range(2)))
    touch(tmp_path / inside, "c/p9_1.png", "c/p9_2.png")
    split = _split(tmp_path, 0.2, 1, group_by=BY_PATIENT)
    assert not _groups(split.train.index) & _groups(split.val.index)
    assert len(split.val.index) == 4
    assert (
        r"0.2 of the groups of each class (by '/(p\\d+)_'; 4 of 22 images; 1 class(es) could give none) of "
        in split.origin
    )


def test_group_in_both_split_folders_is_refused_and_other_groups_are_not(tmp_path):
    touch(tmp_path / "train", "a/p1_1.png", "b/p2_1.png")
    touch(tmp_path / "val", "a/p3_1.png", "b/p4_1.png")
    split = _split(tmp_path, 0.1, 0, group_by=BY_PATIENT)
    assert "no group of '/(p" in split.origin
    touch(tmp_path / "val", "b/p1_7.png")
    with pytest.raises(DataError, match=r"data\.group_by .*: 1 group\(s\) are in train and in val: p1\."):
        _split(tmp_path, 0.1, 0, group_by=BY_PATIENT)
    assert len(_split(tmp_path).val.index) == 3  # nobody asked for groups


@pytest.mark.parametrize(
    ("part", "use", "name"), [("val", _split, "data.root"), ("test", partition_data, "--data")]
)
@pytest.mark.parametrize(("link", "target"), [("", "train"), ("/b", "train/a")])
def test_a_folder_that_is_linked_into_two_parts_is_refused(tmp_path, part, use, name, link, target):
    _tree(tmp_path, train="a4 b4")
    place = tmp_path / f"{part}{link}"
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / target)
    same = f"{part}{link} is the same folder as .*{target}, so"
    with pytest.raises(DataError, match=f"^{name}: .*{same} images would be in two parts, and the model"):
        use(tmp_path)


def test_a_folder_of_classes_is_divided_without_overlap_or_loss(tmp_path):
    root = _tree(tmp_path, here="a20 b12")
    found = partition_data(root, seed=3, val_fraction=0.2, test_fraction=0.25)
    files = [_files(found, part) for part in PARTS]
    assert found.counts() == {"train": 19, "val": 5, "test": 8}  # 5 + 3 of 20 + 12, then 3 + 2 of 15 + 9
    assert [len(part) for part in files] == [19, 5, 8]
    assert sorted(sum(files, [])) == sorted(str(path.resolve()) for path in root.rglob("*.png"))  # noqa: RUF017
    assert "seed 3" in found.origin


def test_the_test_part_is_the_same_for_every_seed_and_the_validation_part_is_not(tmp_path):
    root = _tree(tmp_path, here="a20 b20")
    one, other, again = (partition_data(root, seed=seed) for seed in (0, 1, 0))
    assert _files(one, "test") == _files(other, "test")
    assert _files(one, "val") != _files(other, "val")
    assert _files(one, "val") == _files(again, "val")


def test_three_folders_are_taken_as_they_are_and_classes_are_matched_by_name(tmp_path):
    found = partition_data(_tree(tmp_path, train="a2 b3 c4", valid="c1 b1", TEST="c2"), seed=5)
    assert found.counts() == {"train": 9, "val": 2, "test": 2}
    assert found.class_names == ["a", "b", "c"]
    assert found.val.index.labels.tolist() == [1, 2]
    assert found.test.index.labels.tolist() == [2, 2]
    assert "valid/" in found.origin
    assert "TEST/" in found.origin


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_one_folder_beside_train_is_the_test_part(tmp_path, name):
    found = partition_data(_tree(tmp_path, **{"train": "a10 b10", name: "a3 b3"}), val_fraction=0.3)
    assert found.counts() == {"train": 14, "val": 6, "test": 6}
    assert all(f"/{name}/" in file for file in _files(found, "test"))
    assert all("/train/" in file for file in _files(found, "val"))
    assert found.origin.startswith(f"{name}/ of")


def test_digits_are_the_embedded_ones_with_their_held_out_third_as_the_test_part():
    found = partition_data("digits", seed=1)
    assert list(found.test.index.paths) == list(load_digits("test").index.paths)
    paths = [set(getattr(found, part).index.paths) for part in PARTS]
    assert sum(map(len, paths)) == len(set.union(*paths)) == 1797
    everything = load_digits("train")
    by_path = dict(zip(everything.index.paths, everything.images, strict=True))
    for row in (0, 7):  # pixels go with their names
        assert found.val.read(row).equal(by_path[found.val.index.paths[row]])
    assert "embedded digits" in found.origin


def test_a_folder_called_digits_wins_over_the_embedded_digits(tmp_path, monkeypatch):
    _tree(tmp_path, digits="a8 b8")
    monkeypatch.chdir(tmp_path)
    assert partition_data("digits").class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": "a4 b4", "test": "a2 zebra2"}, "not known: zebra"),
        ({"here": "a1 b1"}, r"too few images for three parts.*at least three images a class"),
        ({"here": "a2 b2"}, r"too few images for three parts.*at least three images a class"),
        ({"test": "a4 b4"}, r"has test/ but no folder to train on.*/test itself"),
    ],
)
def test_what_cannot_be_divided_into_three_is_refused_with_what_it_takes(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        partition_data(_tree(tmp_path, **parts))


def test_three_images_a_class_are_enough_and_a_class_may_be_called_train(tmp_path):
    found = partition_data(_tree(tmp_path, here="train3 tulip3"))
    assert found.counts() == {"train": 2, "val": 2, "test": 2}
    assert found.class_names == ["train", "tulip"]


def test_train_alone_is_divided_into_three(tmp_path):
    _tree(tmp_path, train="a12 b12")
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
    found = find_parts(_tree(tmp_path, **dict.fromkeys(folders, "a1 b1")))
    assert found.choose(split) == expected
    place = {"all": ""} | {name.lower()[:3]: name for name in folders}
    assert found.where(expected) == str(tmp_path / place[expected[:3]])


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    _tree(tmp_path, train="a1 b1")
    with pytest.raises(ConfigError, match=r"^--split test: --data .* has only train\."):
        find_parts(tmp_path).choose("test")
    with pytest.raises(ConfigError, match=r"has no parts, so leave --split out"):
        find_parts(tmp_path / "train").choose("test")


def test_the_part_that_is_reported_on_can_be_chosen(tmp_path):
    _tree(tmp_path, **dict.fromkeys(PARTS, "a10 b10"))
    chosen = partition_data(tmp_path, split="val")
    assert (chosen.split, chosen.made_here) == ("val", ("val",))
    assert all("/val/" in file for file in _files(chosen, "test"))
    assert all("/train/" in file for part in ("train", "val") for file in _files(chosen, part))
    chosen = partition_data(tmp_path, split="train")
    assert chosen.made_here == ("val", "test")
    assert all("/train/" in file for part in PARTS for file in _files(chosen, part))


def test_a_file_that_is_no_manifest_is_refused_with_what_may_be_given(tmp_path):
    with pytest.raises(DataError, match=r"^--data .*a\.jpg is a file, but no manifest\. Give a folder"):
        find_parts(touch(tmp_path, "a.jpg") / "a.jpg")


def test_a_model_that_has_a_class_called_train_is_scored_on_a_folder_of_that_class(tmp_path):
    touch(tmp_path, "train/1.png", "train/2.png")
    assert list(find_parts(tmp_path, class_names=["bus", "train"]).places) == ["all"]
    assert list(find_parts(tmp_path).places) == ["train"]


def _manifest(folder: Path, parts: str, images: int = 12) -> Path:
    """``images`` rows of each of two classes for each part."""
    rows = [f"{part}_{c}{i}.png,{c},{part}" for part in parts.split() for c in "ab" for i in range(images)]
    touch(folder, *(row.split(",")[0] for row in rows))
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


def test_a_share_that_was_asked_for_of_a_part_that_is_there_already_is_refused(tmp_path):
    for name, parts in (("one", ("here",)), ("two", ("train", "test")), ("three", PARTS)):
        _tree(tmp_path / name, **dict.fromkeys(parts, "a4 b4"))
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


@pytest.mark.parametrize(("chosen", "left"), [("val", "valid"), ("validation", "VALID"), ("Test", "test")])
def test_a_second_folder_of_a_part_is_named_in_one_warning_line(tmp_path, caplog, chosen, left):
    _tree(tmp_path, **dict.fromkeys(("train", chosen, left), "a1 b1"))
    for _ in range(2):  # a study finds its data many times
        assert chosen in find_parts(tmp_path).places.values()
    part = "test" if chosen == "Test" else "val"
    assert caplog.messages == [
        f"--data {tmp_path}: {left}/ is not read, for {chosen}/ is the {part} part already. "
        "Put their images together, or rename one."
    ]


def test_folders_of_classes_or_of_one_part_each_are_not_warned_of(tmp_path, caplog):
    _tree(tmp_path / "parts", train="a1 b1", val="a1 b1", extra="a1 b1")
    _tree(tmp_path / "classes", valid="a1 b1", val="a1 b1", bus="a1 b1")
    assert list(find_parts(tmp_path / "parts").places) == ["train", "val"]
    assert list(find_parts(tmp_path / "classes").places) == ["all"]
    assert not caplog.messages
