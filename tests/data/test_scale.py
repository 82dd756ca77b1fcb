"""A large folder is indexed in a fraction of the memory of torchvision's ImageFolder."""

import gc
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from vit_cls.data.index import ImageIndex, index_folder
from vit_cls.data.splits import held_out_images

CLASSES, IMAGES = 40, 500


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Iterator[Path]:
    """20,000 names like ImageNet's; links, for a new file costs some systems a millisecond."""
    root = tmp_path_factory.mktemp("large")
    for i in range(CLASSES):
        folder = root / f"n{1440764 + i:08d}"
        folder.mkdir()
        first = folder / f"{folder.name}_0.JPEG"
        first.touch()
        for j in range(1, IMAGES):
            os.link(first, f"{folder}/{folder.name}_{j * 7919 % 100_003}.JPEG")
    yield root
    shutil.rmtree(root)  # pytest would keep it for three runs


def _retained_bytes(function: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        kept = function()
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    del kept
    return size


def test_index_and_its_split_take_a_fraction_of_the_memory_of_image_folder(large_folder, monkeypatch):
    # a listing that is shared with helpers loads modules, which are not what an index keeps
    monkeypatch.setattr("vit_cls.data.listing.LONG_SECONDS", 1e9)
    samples = _retained_bytes(lambda: ImageFolder(large_folder).samples)
    assert samples > 100 * CLASSES * IMAGES  # what it is compared with is there
    assert _retained_bytes(lambda: index_folder(large_folder)) <= 0.2 * samples
    assert _retained_bytes(lambda: _split(index_folder(large_folder))) <= 0.2 * samples


def _split(index: ImageIndex) -> tuple[ImageIndex, ImageIndex]:
    held_out = held_out_images(index, val_fraction=0.1, seed=0)
    return index.subset(~held_out), index.subset(held_out)


def test_index_has_the_samples_of_image_folder(large_folder):
    samples = ImageFolder(large_folder).samples
    index = index_folder(large_folder)
    assert [
        (str(large_folder / path), label) for path, label in zip(index.paths, index.labels, strict=True)
    ] == (samples)
