"""A folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.weights.checkpoints import Checkpoint


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(tmp_path):
    """Makes a checkpoint of the settings given."""
    return lambda **settings: Checkpoint(tmp_path, **settings)


@pytest.fixture
def images(generator) -> torch.Tensor:
    """For such a checkpoint."""
    return torch.randn(3, 3, 16, 16, generator=generator)
