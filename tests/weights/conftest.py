"""A folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
