"""The embedded data: 1,797 handwritten digits of 8x8 pixels, two thirds to train on, one third held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vit_cls.data.dataset import ArraySource
from vit_cls.data.index import ImageIndex, PathTable
from vit_cls.data.splits import held_out_images
from vit_cls.errors import DataError

HELD_OUT = 1 / 3
CLASS_NAMES = [str(digit) for digit in range(10)]


def load_digits(part: str) -> ArraySource:
    """The digits of one part as RGB, uint8, shape ``(images, 3, 8, 8)``: ``train`` or ``test``.

    Source:
        scikit-learn's ``load_digits``; UCI, https://archive.ics.uci.edu/dataset/80.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    grey = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(data.target.tolist())]
    index = ImageIndex(Path("digits"), PathTable(names), data.target.astype(np.int64), CLASS_NAMES)
    held_out = held_out_images(index, val_fraction=HELD_OUT, seed=0)
    rows = np.flatnonzero({"train": ~held_out, "test": held_out}[part])
    return ArraySource(index.subset(rows), images[rows])


def write_digits(folder: str | Path, part: str = "test") -> int:
    """Write a part of the digits as a folder of PNG files, one sub-folder a class; says how many.

    Args:
        folder: Must not exist yet, or be empty.

    Raises:
        DataError: If ``folder`` has something in it.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder.")
    source = load_digits(part)
    for i in range(len(source.index)):
        path = folder / source.index.paths[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(i).permute(1, 2, 0).numpy()).save(path)
    return len(source.index)
