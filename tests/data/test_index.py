"""The index lists exactly the images of a folder, in one order, compactly."""

import errno
import hashlib
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_cls.data import index as index_module
from vit_cls.data import listing
from vit_cls.data.decode import FORMATS
from vit_cls.data.index import (
    EXTENSIONS,
    ImageIndex,
    PathTable,
    balanced_weights,
    index_folder,
)
from vit_cls.data.parts import class_folders
from vit_cls.errors import DataError


def _touch(root: Path, *files: str) -> Path:
    """Empty files: the index reads names, no pixels."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def _entries(index: ImageIndex) -> list[tuple[str, str]]:
    return [(path, index.class_names[label]) for path, label in zip(index.paths, index.labels, strict=True)]


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
    index = index_folder(_touch(tmp_path, "cat/1.png", "cat/2.JPG", "dog/1.webp", "ant/x.jpeg"))
    assert index.class_names == ["ant", "cat", "dog"]
    assert _entries(index) == [
        ("ant/x.jpeg", "ant"),
        ("cat/1.png", "cat"),
        ("cat/2.JPG", "cat"),
        ("dog/1.webp", "dog"),
    ]
    assert index.labels.dtype == np.int64
    assert index.counts().tolist() == [1, 2, 1]
    assert [index.path(i) for i in range(4)] == [tmp_path / path for path in index.paths]


def test_index_passes_over_hidden_files_hidden_folders_and_files_that_are_no_images(tmp_path):
    index = index_folder(
        _touch(
            tmp_path,
            "a/1.png",
            "b/1.png",
            "a/.hidden.png",
            "a/._1.png",
            "a/.cache/2.png",
            ".git/3.png",
            "a/notes.txt",
            "a/png",
            "a/1.png.bak",
            "top.png",
        )
    )
    assert _entries(index) == [("a/1.png", "a"), ("b/1.png", "b")]


def test_images_may_lie_deeper_inside_a_class_folder(tmp_path):
    index = index_folder(_touch(tmp_path, "a/2020/05/x.png", "a/2019/y.png", "a/z.png", "b/b/b.png"))
    assert _entries(index) == [
        ("a/2019/y.png", "a"),
        ("a/2020/05/x.png", "a"),
        ("a/z.png", "a"),
        ("b/b/b.png", "b"),
    ]


def test_linked_class_folders_and_linked_images_are_indexed(tmp_path):
    stored = _touch(tmp_path / "stored", "dogs/1.png", "2.png")
    root = _touch(tmp_path / "root", "cat/1.png")
    (root / "dog").symlink_to(stored / "dogs")
    (root / "cat" / "2.png").symlink_to(stored / "2.png")
    assert _entries(index_folder(root)) == [("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/1.png", "dog")]


def test_order_of_classes_and_files_does_not_depend_on_the_order_they_were_made(tmp_path):
    files = [f"{c}/{i}.png" for c in ("b", "a10", "a2", "B") for i in (10, 9, 1)]
    rng = np.random.default_rng(0)
    indices = [
        index_folder(_touch(tmp_path / str(i), *(files[j] for j in rng.permutation(len(files)))))
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
    assert sorted(index_folder(_touch(tmp_path, *upper, *lower)).paths) == sorted(upper + lower)


@pytest.mark.parametrize("name", [b"caf\xe9.png", "日本 ü.png".encode(), b"\xff\xfe\x80.png", b"a\nb.png"])
def test_file_names_that_are_not_utf8_or_not_ascii_still_open(tmp_path, name):
    _touch(tmp_path, "a/1.png", "b/1.png")
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
    strings = _random_strings(np.random.default_rng(count), count)
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


def test_path_table_keeps_empty_strings_apart_from_their_neighbours():
    strings = ["", "a", "", "", "b", ""]
    assert list(PathTable(strings)) == strings


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


def test_subset_keeps_paths_labels_and_class_names_together(tmp_path):
    index = index_folder(_touch(tmp_path, "a/1.png", "a/2.png", "b/3.png", "c/4.png"))
    part = index.subset(np.array([3, 1]))
    assert _entries(part) == [("c/4.png", "c"), ("a/2.png", "a")]
    assert part.class_names == ["a", "b", "c"]
    assert part.counts().tolist() == [1, 0, 1]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^data\.root .*nowhere does not exist"):
        index_folder(tmp_path / "nowhere")


def test_file_in_place_of_a_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^--data .*1\.png cannot be read as a folder"):
        index_folder(_touch(tmp_path, "1.png") / "1.png", name="--data")


def test_folder_with_images_but_without_class_folders_is_refused(tmp_path):
    with pytest.raises(DataError, match=rf"data\.root {tmp_path} has no class folders"):
        index_folder(_touch(tmp_path, "1.png", ".hidden/1.png"))


def test_single_class_folder_is_refused_by_name_unless_the_classes_are_known(tmp_path):
    _touch(tmp_path, "lonely/1.png")
    with pytest.raises(DataError, match=rf"data\.root {tmp_path} has only one class folder \(lonely\)"):
        index_folder(tmp_path)
    assert index_folder(tmp_path, min_classes=1).class_names == ["lonely"]


def test_class_folders_without_images_are_named(tmp_path):
    _touch(tmp_path, "full/1.png", "texts/1.txt", "z/.x.png")
    with pytest.raises(DataError, match=rf"{tmp_path} has class folders without images: texts, z\."):
        index_folder(tmp_path)
    _touch(tmp_path, "z/1.png")
    with pytest.raises(DataError, match=rf"{tmp_path} has a class folder without images: texts\."):
        index_folder(tmp_path)


def test_link_that_leads_back_to_its_own_folder_is_refused_not_followed_for_ever(tmp_path):
    _touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"data\.root: .*a/loop.* cannot be read"):
        index_folder(tmp_path)


def test_class_folder_without_permission_is_named(tmp_path, monkeypatch):
    _touch(tmp_path, "a/1.png", "b/1.png")

    def without_permission(function):  # chmod would not stop root
        def refused(path):
            if os.fspath(path).endswith("/b"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path)

        return refused

    monkeypatch.setattr(os, "scandir", without_permission(os.scandir))
    monkeypatch.setattr(os, "listdir", without_permission(os.listdir))
    with pytest.raises(DataError, match=rf"^data\.root: {tmp_path}/b cannot be read: Permission denied\.$"):
        index_folder(tmp_path)


def test_class_folders_are_the_visible_sub_folders_in_order(tmp_path):
    _touch(tmp_path, "b/1.png", "a/1.png", ".c/1.png", "file.png")
    assert class_folders(tmp_path, name="data.root") == ["a", "b"]


def test_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path):
    files = ("a/1.png", "a/2.png", "b/1.png")
    here, there = (index_folder(_touch(tmp_path / name, *files)) for name in ("here", "there/deeper"))
    assert here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize(
    "files",
    [
        ("a/1.png", "a/3.png", "b/1.png"),  # a file renamed
        ("a/1.png", "a/2.png", "c/1.png"),  # a class renamed
        ("a/1.png", "b/1.png"),  # a file gone
        ("a/1.png", "b/1.png", "b/2.png"),  # a file in another class
    ],
)
def test_fingerprint_tells_other_files_and_classes_apart(tmp_path, files):
    before = index_folder(_touch(tmp_path / "before", "a/1.png", "a/2.png", "b/1.png"))
    after = index_folder(_touch(tmp_path / "after", *files))
    assert before.fingerprint() != after.fingerprint()


def test_fingerprint_sees_the_class_of_a_path_but_not_the_numbering_of_classes():
    paths, labels = PathTable(["1.png", "2.png"]), np.array([0, 1])
    index = ImageIndex(Path("x"), paths, labels, ["a", "b"])
    assert index.fingerprint() == index.with_class_names(["z", "b", "a"]).fingerprint()
    assert index.fingerprint() != ImageIndex(Path("x"), paths, labels[::-1], ["a", "b"]).fingerprint()


def test_with_class_names_matches_by_name_not_by_position(tmp_path):
    index = index_folder(_touch(tmp_path, "b/1.png", "c/1.png", "c/2.png"))
    other = index.with_class_names(["c", "a", "b"])
    assert other.labels.tolist() == [2, 0, 0]
    assert other.class_names == ["c", "a", "b"]
    assert _entries(other) == _entries(index)
    assert index.labels.tolist() == [0, 1, 1]  # the original is as it was


def test_unknown_classes_are_all_counted_but_not_all_printed():
    names = [f"c{i:02d}" for i in range(30)]
    index = ImageIndex(Path("nowhere"), PathTable(f"{name}/1.png" for name in names), np.arange(30), names)
    with pytest.raises(DataError, match=r"nowhere has 30 class.*c00, c01, .*c19 and 10 more\."):
        index.with_class_names(["a", "b"])


def _reference_paths(root: Path, class_name: str) -> list[str]:
    """The images of a class, one `Path` at a time."""
    found = []
    for path in root.joinpath(class_name).iterdir():
        if path.name.startswith("."):
            continue
        relative = f"{class_name}/{path.name}"
        if path.is_dir():
            found += _reference_paths(root, relative)
        elif path.suffix.lower() in EXTENSIONS:
            found.append(relative)
    return sorted(found)


def _random_tree(root: Path, rng: np.random.Generator) -> Path:
    """Names that share beginnings, and that sort around the slash: b.png, b/c.png, b-c.png, b0.png."""
    parts = ("a", "ab", "b", "b-", "b.x", "b0", "é", "日本", "B", ".h", os.fsdecode(b"\xff"), "p.png")
    endings = (".png", ".JPG", ".jpeg", ".txt", "", ".png.bak", ".", "png")
    for class_name in ("k", "k.png", "k-2"):
        for _ in range(int(rng.integers(4, 40))):
            folders = [f"_{parts[i]}" for i in rng.integers(len(parts), size=rng.integers(0, 4))]
            file = parts[rng.integers(len(parts))] + endings[rng.integers(len(endings))]
            _touch(root, "/".join((class_name, *folders, file)))
        _touch(root, f"{class_name}/one.png")
    return root


@pytest.mark.parametrize("seed", range(8))
def test_index_is_what_a_plain_walk_finds(tmp_path, seed):
    root = _random_tree(tmp_path, np.random.default_rng(seed))
    index = index_folder(root)
    assert index.class_names == ["k", "k-2", "k.png"]
    expected = [(path, name) for name in index.class_names for path in _reference_paths(root, name)]
    assert _entries(index) == expected
    assert index.counts().sum() == len(index) == len(index.paths)


def test_a_folder_whose_name_ends_like_an_image_is_a_folder(tmp_path):
    index = index_folder(_touch(tmp_path, "a/x.png/1.png", "a/x.png-/2.png", "a/y.png", "b/1.png"))
    assert list(index.paths) == ["a/x.png-/2.png", "a/x.png/1.png", "a/y.png", "b/1.png"]


@pytest.mark.parametrize("links", [1, 2, 3])
def test_index_does_not_rest_on_what_a_file_system_says_about_links(tmp_path, monkeypatch, links):
    names = ("a/1.png", "a/2.JPG", "a/x/3.png", "a/y.txt", "b/1.png", "b/2.png", "c/.h.png", "c/!.png")
    root = _touch(tmp_path, *names)
    (root / "b" / "link").symlink_to(root / "a" / "x")
    stat = os.stat

    def stat_with_links(path, *args, **kwargs):
        found = list(stat(path, *args, **kwargs))
        return os.stat_result((*found[:3], links, *found[4:]))

    monkeypatch.setattr(os, "stat", stat_with_links)
    assert list(index_folder(root).paths) == [
        "a/1.png",
        "a/2.JPG",
        "a/x/3.png",
        "b/1.png",
        "b/2.png",
        "b/link/3.png",
        "c/!.png",
    ]


def _tree_of_many_classes(root: Path) -> Path:
    names = [f"c{i}/{i}_{j}.{e}" for i in range(12) for j, e in enumerate(("png", "JPG", "txt"))]
    return _touch(root, *names, "c3/deep/er/é.png", "c7/" + os.fsdecode(b"\xfe.png"))


@pytest.fixture
def shared_listing(monkeypatch):
    """Every listing counts as long; returns the helpers that were started."""
    monkeypatch.setattr(listing, "LONG_SECONDS", 1e-9)
    monkeypatch.setattr(listing, "START_SECONDS", 0.0)
    monkeypatch.setattr("vit_cls.environment.cpu_count", lambda: 4)
    helpers = []
    popen = subprocess.Popen

    def recorded(*args, **kwargs):
        helpers.append(popen(*args, **kwargs))
        return helpers[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    return helpers


def test_listing_shared_with_helper_processes_is_the_same(tmp_path, shared_listing, monkeypatch):
    root = _tree_of_many_classes(tmp_path)
    shared = index_folder(root)
    assert [helper.returncode for helper in shared_listing] == [0, 0, 0]
    monkeypatch.setattr(listing, "LONG_SECONDS", 1e9)
    alone = index_folder(root)
    assert len(shared_listing) == 3
    assert _entries(shared) == _entries(alone)
    assert len(alone) == 26
    assert shared.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize("executable", ["/nowhere/python", "false"])
def test_helpers_that_do_not_start_or_fail_are_done_without(
    tmp_path, shared_listing, monkeypatch, executable
):
    root = _tree_of_many_classes(tmp_path)
    monkeypatch.setattr(sys, "executable", executable)
    assert len(index_folder(root)) == 26
    assert [helper.returncode for helper in shared_listing] == ([1] * 3 if executable == "false" else [])


def test_error_in_a_share_of_a_helper_names_the_folder(tmp_path, shared_listing):
    root = _tree_of_many_classes(tmp_path)
    (root / "c9" / "loop").symlink_to(root / "c9")
    with pytest.raises(DataError, match=r"data\.root: .*c9/loop.* cannot be read"):
        index_folder(root)
    assert len(shared_listing) == 3
    assert all(helper.returncode is not None for helper in shared_listing)


def test_error_in_the_own_share_leaves_no_helper_behind(tmp_path, shared_listing):
    root = _tree_of_many_classes(tmp_path)
    (root / "c1" / "loop").symlink_to(root / "c1")
    with pytest.raises(DataError, match=r"data\.root: .*c1/loop.* cannot be read"):
        index_folder(root)
    assert len(shared_listing) == 3
    assert all(helper.returncode is not None for helper in shared_listing)


def test_program_of_the_helpers_needs_nothing_installed():
    code = (
        "import sys; sys.argv=['x']; exec(open(sys.stdin.readline().strip()).read().split('if __name__')[0])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{code}; print('numpy' in sys.modules, 'typing' in sys.modules)"],
        input=listing.__file__,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


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
    index = index_folder(_random_tree(tmp_path, np.random.default_rng(0)))
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
        assert list(part.paths) == ["c/3", "b/1"]
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
