"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.forked import Server

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}


@pytest.fixture
def tiny() -> dict[str, int]:
    """Settings that make any preset tiny: 16 patches, 2 blocks, width 24."""
    return dict(TINY)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def python() -> Iterator[Server]:
    """Starts programs that have the heavy libraries already."""
    with Server() as server:
        yield server


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator of the test's own."""
    return torch.Generator().manual_seed(20260101)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with two classes that differ in colour: red and blue noise, 12 and 4 PNGs a class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
