"""Tiny image folders for the data tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def write_folder():
    """A function that writes noise images, ``{"class": images or file names}``, and returns the root."""

    rng = np.random.default_rng(0)  # one for all calls: no image comes twice

    def write(root: Path, classes: dict[str, int | list[str]]) -> Path:
        for name, files in classes.items():
            for file in [f"{i:03d}.png" for i in range(files)] if isinstance(files, int) else files:
                path = root / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                height, width = rng.integers(8, 20, size=2)
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        return root

    return write
