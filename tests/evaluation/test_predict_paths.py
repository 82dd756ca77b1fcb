"""What a user names becomes paths: files, folders, globs and stdin."""

from __future__ import annotations

import io
import os

import pytest

from tests.data.files import touch
from vit_cls.errors import DataError
from vit_cls.evaluation.predict import iter_paths


def test_a_folder_gives_visible_images_sorted_at_any_depth(tmp_path):
    names = ("b/2.png", "b/.x.png", ".h/1.png", "b-c/1.JPG", "a.webp", "notes.txt", "b/deep/er/0.tif")
    touch(tmp_path, *names)
    (tmp_path / "b/deep/loop").symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in iter_paths([str(tmp_path)], io.BytesIO())]
    assert found == ["a.webp", "b-c/1.JPG", "b/2.png", "b/deep/er/0.tif"]
    (tmp_path / "b/deep/loop").unlink()
    globbed = iter_paths([f"{tmp_path}/**/*.png", f"{tmp_path}/nope.jpg"], io.BytesIO())
    assert [os.path.relpath(path, tmp_path) for path in globbed] == ["b/2.png", "nope.jpg"]


def test_a_path_with_glob_characters_that_exists_is_itself(tmp_path):
    (tmp_path / "x[1].png").touch()
    assert list(iter_paths([f"{tmp_path}/x[1].png"], io.BytesIO())) == [f"{tmp_path}/x[1].png"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a.jpg\nb c.png\n", ["a.jpg", "b c.png"]),
        (b"a.jpg\r\n\r\nb.png", ["a.jpg", "b.png"]),
        (b"a\nb.jpg\0c.png\0", ["a\nb.jpg", "c.png"]),
        (b"caf\xe9.png\n", [os.fsdecode(b"caf\xe9.png")]),
    ],
)
def test_stdin_holds_a_path_a_line_or_a_path_a_nul(data, expected):
    assert list(iter_paths(["-"], io.BytesIO(data))) == expected


def test_what_holds_no_image_is_refused(tmp_path):
    for words, message in (
        ([], r"PATH is missing. Give image files"),
        (["-"], r"stdin holds no path"),
        (["-", "a.jpg"], r"cannot be combined"),
        ([str(tmp_path)], r"folder .* holds no image file"),
        ([f"{tmp_path}/*.jpg"], r"glob .* matches no file"),
    ):
        with pytest.raises(DataError, match=message):
            iter_paths(words, io.BytesIO())
