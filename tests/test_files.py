"""Files are whole or not there; folders are checked before any work, and complaints name the option."""

from __future__ import annotations

import os

import pytest

from vit_cls.errors import ConfigError
from vit_cls.files import output_folder, write_text, writing


def test_output_is_checked_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        output_folder(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be written"):
        output_folder(str(tmp_path / "file/below"))
    assert output_folder(str(tmp_path / "new/deep")) == tmp_path / "new/deep"
    assert not (tmp_path / "new").exists()
    assert output_folder(None) is None


def test_a_disk_that_is_full_is_told_by_the_option_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"^--output .* cannot be written: No space left on device\.$"
    with pytest.raises(ConfigError, match=message), writing(tmp_path):
        write_text(tmp_path / "a.txt", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
