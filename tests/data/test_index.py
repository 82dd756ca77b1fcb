"""The index lists exactly the images of a folder, in one order, compactly."""

import hashlib
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.files import entries, touch
from vit_cls.data import index as index_module
from vit_cls.data.decode import FORMATS
from vit_cls.data.index import (
    EXTENSIONS,
    ImageIndex,
    PathTable,
    balanced_weights,
    index_folder,
)
from vit_cls.errors import DataError


def _random_strings(rng: np.random.Generator, count: int) -> list[str]:
    """Unicode, empty strings, and file names that are not UTF-8, as `os.fsdecode` gives them."""
    strings = []
    for _ in range(count):
        kind, length = rng.integers(3), int(rng.integers(0, 12))
        if kind == 0:
            strings.append("".join(chr(c) for c in rng.integers(0x20, 0xD800, size=length)))
        elif kind == 1:
            strings.append(
                bytes(rng.integers(1, 256, size=length, dtype=np.uint8)).decode("utf-8", "surrogateescape")
            )
        else:
            strings.append("".join(chr(c) for c in rng.integers(0x1F300, 0x1F600, size=length)))
    return strings


def test_index_holds_each_image_once_with_the_class_of_its_folder(tmp_path):
    index = index_folder(touch(tmp_path, "cat/1.png", "cat/2.JPG", "dog/1.webp", "ant/x.jpeg"))
    assert index.class_names == ["ant", "cat", "dog"]
    assert list(index.paths) == ["ant/x.jpeg", "cat/1.png", "cat/2.JPG", "dog/1.webp"]
    assert index.labels.tolist() == [0, 1, 1, 2]
    assert index.labels.dtype == np.int64
    assert index.counts().tolist() == [1, 2, 1]
    assert [index.path(i) for i in range(4)] == [tmp_path / path for path in index.paths]


def test_index_passes_over_hidden_files_hidden_folders_and_files_that_are_no_images(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "b/1.png",
        "a/.hidden.png",
        "a/._1.png",
        "a/.cache/2.png",
        ".git/3.png",
        "top.png",
    )
    index = index_folder(touch(tmp_path, "a/notes.txt", "a/png", "a/1.png.bak"))
    assert entries(index) == [("a/1.png", "a"), ("b/1.png", "b")]


def test_linked_class_folders_and_linked_images_are_indexed(tmp_path):
    stored = touch(tmp_path / "stored", "dogs/1.png", "2.png")
    root = touch(tmp_path / "root", "cat/1.png")
    (root / "dog").symlink_to(stored / "dogs")
    (root / "cat" / "2.png").symlink_to(stored / "2.png")
    assert entries(index_folder(root)) == [("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/1.png", "dog")]


def test_order_of_classes_and_files_does_not_depend_on_the_order_they_were_made(tmp_path):
    files = [f"{c}/{i}.png" for c in ("b", "a10", "a2", "B") for i in (10, 9, 1)]
    rng = np.random.default_rng(0)
    indices = [
        index_folder(touch(tmp_path / str(i), *(files[j] for j in rng.permutation(len(files)))))
        for i in range(3)
    ]
    assert [index.class_names for index in indices] == [["B", "a10", "a2", "b"]] * 3
    assert all(list(index.paths) == sorted(files) for index in indices)
    assert len({index.fingerprint() for index in indices}) == 1


def test_every_extension_is_found_in_any_case_and_belongs_to_a_format_that_is_decoded(tmp_path):
    Image.init()
    assert len(EXTENSIONS) >= 13
    assert {Image.registered_extensions()[extension] for extension in EXTENSIONS} == set(FORMATS)
    upper = [f"a/{extension[1:]}{extension.upper()}" for extension in EXTENSIONS]
    lower = [f"b/x{extension}" for extension in EXTENSIONS]
    assert sorted(index_folder(touch(tmp_path, *upper, *lower)).paths) == sorted(upper + lower)


@pytest.mark.parametrize("name", [b"caf\xe9.png", "日本 ü.png".encode(), b"\xff\xfe\x80.png", b"a\nb.png"])
def test_file_names_that_are_not_utf8_or_not_ascii_still_open(tmp_path, name):
    touch(tmp_path, "a/1.png", "b/1.png")
    written = os.path.join(os.fsencode(tmp_path), b"a", name)
    try:
        Path(os.fsdecode(written)).write_bytes(b"content")
    except OSError:
        pytest.skip("this file system refuses such names")
    index = index_folder(tmp_path)
    position = list(index.paths).index("a/" + os.fsdecode(name))
    assert os.fsencode(index.path(position)) == written
    assert index.path(position).read_bytes() == b"content"
    assert len(index.fingerprint()) == 32  # hashing does not stumble over such names either


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_path_table_behaves_as_the_list_it_was_made_of(count):
    strings = ["", "a", "", "", "b", "", *_random_strings(np.random.default_rng(count), count)][:count]
    table = PathTable(strings)
    assert list(table) == strings
    assert len(table) == count
    assert [table[i] for i in range(-count, count)] == strings + strings
    assert list(reversed(table)) == strings[::-1]
    assert [table[i] for i in np.arange(count)] == strings
    assert list(pickle.loads(pickle.dumps(table))) == strings
    for outside in (count, count + 7, -count - 1):
        with pytest.raises(IndexError):
            table[outside]


def test_a_hundred_thousand_paths_pickle_as_a_few_arrays():
    paths = [f"class_{i % 10}/image_{i:06d}.png" for i in range(100_000)]
    index = ImageIndex(
        Path("root"), PathTable(paths), np.arange(100_000) % 10, [f"class_{i}" for i in range(10)]
    )
    data = pickle.dumps(index)
    assert len(data) <= sum(map(len, paths)) + 2 * 8 * len(paths) + 2_000  # text, ends, labels
    # one object a path would be copied into every worker as its reference counts are touched
    assert sum(1 for _ in pickletools.genops(data)) < 500
    assert list(pickle.loads(data).paths) == paths


@pytest.mark.parametrize(
    ("files", "below", "message"),
    [
        ([], "nowhere", r"^--data .*nowhere does not exist"),
        (["1.png"], "1.png", r"^--data .*1\.png cannot be read as a folder"),
        (["1.png", ".hidden/1.png"], "", r"^--data .* has no class folders"),
        (["lonely/1.png"], "", r"^--data .* has only one class folder \(lonely\)"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused_by_name(tmp_path, files, below, message):
    with pytest.raises(DataError, match=message) as error:
        index_folder(touch(tmp_path, *files) / below, name="--data")
    assert str(tmp_path) in str(error.value)


def test_a_single_class_is_enough_where_the_classes_are_known(tmp_path):
    assert index_folder(touch(tmp_path, "lonely/1.png"), min_classes=1).class_names == ["lonely"]


def test_class_folders_without_images_are_named(tmp_path):
    touch(tmp_path, "full/1.png", "texts/1.txt", "z/.x.png")
    with pytest.raises(DataError, match=rf"{tmp_path} has class folders without images: texts, z\."):
        index_folder(tmp_path)
    touch(tmp_path, "z/1.png")
    with pytest.raises(DataError, match=rf"{tmp_path} has a class folder without images: texts\."):
        index_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "same"),
    [
        (("a/1.png", "a/2.png", "b/1.png"), True),  # in another folder
        (("a/1.png", "a/3.png", "b/1.png"), False),  # a file renamed
        (("a/1.png", "a/2.png", "c/1.png"), False),  # a class renamed
        (("a/1.png", "b/1.png"), False),  # a file gone
        (("a/1.png", "b/1.png", "b/2.png"), False),  # a file in another class
    ],
)
def test_fingerprint_tells_files_and_classes_apart_but_not_where_they_lie(tmp_path, files, same):
    before = index_folder(touch(tmp_path / "before", "a/1.png", "a/2.png", "b/1.png"))
    after = index_folder(touch(tmp_path / "after/deeper", *files))
    assert (before.fingerprint() == after.fingerprint()) == same


def test_fingerprint_sees_the_class_of_a_path_but_not_the_numbering_of_classes():
    paths, labels = PathTable(["1.png", "2.png"]), np.array([0, 1])
    index = ImageIndex(Path("x"), paths, labels, ["a", "b"])
    assert index.fingerprint() == index.with_class_names(["z", "b", "a"]).fingerprint()
    assert index.fingerprint() != ImageIndex(Path("x"), paths, labels[::-1], ["a", "b"]).fingerprint()


def test_with_class_names_matches_by_name_not_by_position(tmp_path):
    index = index_folder(touch(tmp_path, "b/1.png", "c/1.png", "c/2.png"))
    other = index.with_class_names(["c", "a", "b"])
    assert other.labels.tolist() == [2, 0, 0]
    assert other.class_names == ["c", "a", "b"]
    assert entries(other) == entries(index)
    assert index.labels.tolist() == [0, 1, 1]  # the original is as it was


def test_unknown_classes_are_all_counted_but_not_all_printed():
    names = [f"c{i:02d}" for i in range(30)]
    index = ImageIndex(Path("nowhere"), PathTable(f"{name}/1.png" for name in names), np.arange(30), names)
    with pytest.raises(DataError, match=r"nowhere has 30 class.*c00, c01, .*c19 and 10 more\."):
        index.with_class_names(["a", "b"])


@pytest.mark.parametrize("chunk", [3, index_module.CHUNK])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_taking_paths_is_indexing_a_list_of_them(monkeypatch, count, chunk):
    monkeypatch.setattr(index_module, "CHUNK", chunk)
    rng = np.random.default_rng(count)
    strings = [f"{'/'.join(_random_strings(rng, 2))}/{i}" for i in range(count)]
    table = PathTable(strings)
    for indices in (rng.integers(0, count, size=2 * count), np.arange(count)[::-1], np.array([], dtype=int)):
        assert list(table.take(indices)) == [strings[i] for i in indices]
        again = np.arange(len(indices))[::2]
        assert list(table.take(indices).take(again)) == [strings[indices[i]] for i in again]
    mask = rng.random(count) < 0.5
    assert list(table.take(mask)) == [s for s, kept in zip(strings, mask, strict=True) if kept]
    assert list(table.iter_bytes()) == [s.encode("utf-8", "surrogateescape") for s in strings]


def test_path_table_of_more_paths_than_a_small_number_holds():
    strings = [f"{i:06d}/{'x' * (i % 3)}" for i in range(70_000)]
    table = PathTable(strings)
    assert list(table) == strings
    assert [table[i] for i in (0, 65_535, 65_536, -1)] == [strings[i] for i in (0, 65_535, 65_536, -1)]


def _reference_fingerprint(index: ImageIndex) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, label in zip(index.paths, index.labels.tolist(), strict=True):
        digest.update(f"{path}\0{index.class_names[label]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def test_fingerprint_is_that_of_one_path_after_the_other(tmp_path, monkeypatch):
    names = (
        "a/1.png",
        "a/é/2.png",
        f"b/{os.fsdecode(bytes([255]))}.png",
        "b/x/y/z.png",
        "c/3.png",
        "c/4.png",
    )
    index = index_folder(touch(tmp_path, *names))
    expected = _reference_fingerprint(index)
    assert index.fingerprint() == expected
    monkeypatch.setattr("vit_cls.data.index.CHUNK", 4)
    assert index.fingerprint() == expected


def test_groups_and_weights_stay_with_their_images():
    index = ImageIndex(
        Path(),
        ["b/1", "c/2", "c/3"],
        np.array([0, 1, 1]),
        ["b", "c"],
        groups=["x", "y", "x"],
        weights=np.array([1.0, 2.0, 3.0]),
    )
    for part in (index.subset(np.array([2, 0])), index.subset(np.array([2, 0])).with_class_names("abc")):
        assert entries(part) == [("c/3", "c"), ("b/1", "b")]
        assert list(part.groups) == ["x", "x"]
        assert part.weights.tolist() == [3.0, 1.0]
    bare = ImageIndex(Path(), ["b/1"], np.array([0]), ["b"]).subset(np.array([0]))
    assert bare.groups is None
    assert bare.weights is None


def test_balanced_weights_draw_every_class_equally_often_and_are_one_on_average():
    labels = np.array([0] * 90 + [1] * 9 + [3])
    index = ImageIndex(Path(), [f"{i}" for i in range(100)], labels, ["a", "b", "none", "d"])
    weights = balanced_weights(index)
    assert weights.mean() == pytest.approx(1.0)
    assert np.bincount(labels, weights=weights, minlength=4) == pytest.approx([100 / 3, 100 / 3, 0, 100 / 3])
    assert len(np.unique(weights[:90])) == 1


def test_balanced_weights_keep_the_proportions_of_given_weights_within_a_class():
    given = np.array([1.0, 3.0, 0.0, 5.0, 0.0, 0.0])
    index = ImageIndex(Path(), list("123456"), np.array([0, 0, 0, 1, 2, 2]), list("abc"), weights=given)
    assert balanced_weights(index) == pytest.approx([0.75, 2.25, 0.0, 3.0, 0.0, 0.0])
