"""The embedded digits are scikit-learn's, split once for all, and the same as files."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from vit_cls.data.dataset import FolderSource
from vit_cls.data.decode import decode_image
from vit_cls.data.digits import CLASS_NAMES, load_digits, write_digits
from vit_cls.data.index import index_folder
from vit_cls.errors import DataError


def test_parts_are_disjoint_complete_and_a_third_of_each_class_is_held_out():
    train, test = load_digits("train"), load_digits("test")
    sizes = np.bincount(sklearn_digits().target)
    assert sizes.sum() == 1797
    held_out = np.array([round(int(n) / 3) for n in sizes])
    assert test.index.counts().tolist() == held_out.tolist()
    assert train.index.counts().tolist() == (sizes - held_out).tolist()
    assert not set(train.index.paths) & set(test.index.paths)
    assert len({*train.index.paths, *test.index.paths}) == 1797
    assert (len(train.index), len(test.index)) == (1198, 599)


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_digit_has_the_pixels_and_the_label_of_scikit_learn(part):
    data = sklearn_digits()
    source = load_digits(part)
    assert source.images.dtype == torch.uint8
    assert source.images.shape == (len(source.index), 3, 8, 8)
    rows = [int(path.split("/")[1].removesuffix(".png")) for path in source.index.paths]
    assert source.index.labels.tolist() == data.target[rows].tolist()
    assert [CLASS_NAMES[label] for label in source.index.labels] == [
        p.split("/")[0] for p in source.index.paths
    ]
    expected = data.images[rows] * 255 / 16  # 0 to 16 there, 0 to 255 here
    for channel in range(3):
        assert np.abs(source.images[:, channel].numpy() - expected).max() <= 0.5


def test_part_is_the_same_each_time():
    first, second = load_digits("test"), load_digits("test")
    assert list(first.index.paths) == list(second.index.paths)
    assert torch.equal(first.images, second.images)
    assert first.index.fingerprint() == "b7c1e4a7d191298f746686b07fe013bf"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "new" / "test"
    return folder, write_digits(folder)


def test_written_folder_decodes_to_the_same_pixels_and_labels(written):
    folder, count = written
    source = load_digits("test")
    assert count == len(source.index)
    index = index_folder(folder)
    assert index.class_names == source.index.class_names
    assert sorted(index.paths) == sorted(source.index.paths)
    rows = {path: i for i, path in enumerate(source.index.paths)}  # a folder is sorted by class
    files = FolderSource(index)
    for i, path in enumerate(index.paths):
        assert index.labels[i] == source.index.labels[rows[path]]
        assert torch.equal(decode_image(files.read(i)), source.read(rows[path]))


def test_part_decides_what_is_written(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_digits(empty, "train") == 1198
    assert sorted(index_folder(empty).paths) == sorted(load_digits("train").index.paths)


def test_folder_that_is_not_empty_is_refused_and_left_alone(written, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=rf"{tmp_path} is not empty; give a new folder"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="is not empty"):
        write_digits(written[0])
