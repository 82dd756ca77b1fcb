"""Three parts of one data set: where they come from, and that no image is in two of them."""

from __future__ import annotations

import os

import pytest

from vit_cls.data.partition import PARTS, partition_data
from vit_cls.errors import ConfigError, DataError


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


def test_train_alone_or_test_alone_is_refused_with_what_to_give_instead(tmp_path, write_folder):
    write_folder(tmp_path / "one" / "train", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"has train/ but no val/ or test/ folder.*one/train itself"):
        partition_data(tmp_path / "one")
    write_folder(tmp_path / "two" / "test", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"has test/ but no train/ folder.*two/test itself"):
        partition_data(tmp_path / "two")


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
    with pytest.raises(ConfigError, match=f"{setting} must be between 0 and 1"):
        partition_data(tmp_path, **{setting: value})
