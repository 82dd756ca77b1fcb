"""A large folder is indexed in a fraction of the memory of torchvision's ImageFolder."""

import gc
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
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


def test_index_and_its_split_take_a_fraction_of_the_memory_of_image_folder(large_folder):
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


def test_no_list_of_paths_stays_with_the_index(large_folder):
    index = index_folder(large_folder)
    train, val = _split(index.with_class_names([*index.class_names, "one more"]))
    for part in (index, train, val):
        gc.collect()
        reachable, waiting = set(), [part]
        while waiting:
            thing = waiting.pop()
            if id(thing) not in reachable and not isinstance(thing, type):
                reachable.add(id(thing))
                waiting += gc.get_referents(thing)
        assert len(reachable) < 2_000
    assert len(train) + len(val) == len(index) == CLASSES * IMAGES


def test_split_of_many_images_is_stratified(large_folder):
    train, val = _split(index_folder(large_folder))
    assert np.unique(train.counts()).tolist() == [IMAGES * 9 // 10]
    assert np.unique(val.counts()).tolist() == [IMAGES // 10]
