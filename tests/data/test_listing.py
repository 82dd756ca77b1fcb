"""A listing is what a plain walk finds, in one process or shared with helpers."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.files import entries, touch
from vit_cls.data import listing
from vit_cls.data.index import EXTENSIONS, index_folder
from vit_cls.errors import DataError


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
            touch(root, "/".join((class_name, *folders, file)))
        touch(root, f"{class_name}/one.png")
    return root


@pytest.mark.parametrize("seed", range(8))
def test_index_is_what_a_plain_walk_finds(tmp_path, seed):
    root = _random_tree(tmp_path, np.random.default_rng(seed))
    index = index_folder(root)
    assert index.class_names == ["k", "k-2", "k.png"]
    expected = [(path, name) for name in index.class_names for path in _reference_paths(root, name)]
    assert entries(index) == expected
    assert index.counts().sum() == len(index) == len(index.paths)


def test_a_folder_whose_name_ends_like_an_image_is_a_folder(tmp_path):
    index = index_folder(touch(tmp_path, "a/x.png/1.png", "a/x.png-/2.png", "a/y.png", "b/1.png"))
    assert list(index.paths) == ["a/x.png-/2.png", "a/x.png/1.png", "a/y.png", "b/1.png"]


@pytest.mark.parametrize("links", [1, 2, 3])
def test_index_does_not_rest_on_what_a_file_system_says_about_links(tmp_path, monkeypatch, links):
    names = ("a/1.png", "a/2.JPG", "a/x/3.png", "a/y.txt", "b/1.png", "b/2.png", "c/.h.png", "c/!.png")
    root = touch(tmp_path, *names)
    (root / "b" / "link").symlink_to(root / "a" / "x")
    stat = os.stat

    def stat_with_links(path, *args, **kwargs):
        found = list(stat(path, *args, **kwargs))
        return os.stat_result((*found[:3], links, *found[4:]))

    monkeypatch.setattr(os, "stat", stat_with_links)
    expected = "a/1.png a/2.JPG a/x/3.png b/1.png b/2.png b/link/3.png c/!.png"
    assert " ".join(index_folder(root).paths) == expected


def _tree_of_many_classes(root: Path) -> Path:
    names = [f"c{i}/{i}_{j}.{e}" for i in range(12) for j, e in enumerate(("png", "JPG", "txt"))]
    return touch(root, *names, "c3/deep/er/é.png", "c7/" + os.fsdecode(b"\xfe.png"))


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
    assert entries(shared) == entries(alone)
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


@pytest.mark.parametrize("class_name", ["c1", "c9"], ids=["own share", "share of a helper"])
def test_error_in_a_shared_listing_names_the_folder_and_leaves_no_helper(
    tmp_path, shared_listing, class_name
):
    root = _tree_of_many_classes(tmp_path)
    (root / class_name / "loop").symlink_to(root / class_name)
    with pytest.raises(DataError, match=rf"data\.root: .*{class_name}/loop.* cannot be read"):
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


def test_link_that_leads_back_to_its_own_folder_is_refused_not_followed_for_ever(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"data\.root: .*a/loop.* cannot be read"):
        index_folder(tmp_path)


def test_class_folder_without_permission_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "b/1.png")

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
