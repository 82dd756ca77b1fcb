"""Times that the package promises. They are too noisy for the test suite: run them on a machine at rest.

Run:    .venv/bin/python scripts/timing_checks.py
Ends with 1 if a limit is exceeded.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from vit_cls.data import listing
from vit_cls.data.decode import decode_image
from vit_cls.data.index import index_folder
from vit_cls.errors import ImageError
from vit_cls.stats.metrics import Scored, measure

CLASSES, IMAGES = 40, 500


def _cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of this process: it does not count what else the machine does."""
    started = time.process_time()
    function()
    return time.process_time() - started


def index_against_image_folder() -> float:
    """Time of an index over that of torchvision's ImageFolder, on 20,000 names like ImageNet's."""
    listing.LONG_SECONDS = 1e9  # in one process
    with tempfile.TemporaryDirectory() as name:
        for i in range(CLASSES):
            folder = Path(name) / f"n{1440764 + i:08d}"
            folder.mkdir()
            first = folder / f"{folder.name}_0.JPEG"
            first.touch()
            for j in range(1, IMAGES):
                os.link(first, f"{folder}/{folder.name}_{j * 7919 % 100_003}.JPEG")
        ratios = [
            _cpu_seconds(lambda: index_folder(name)) / _cpu_seconds(lambda: ImageFolder(name))
            for _ in range(7)
        ]
    return statistics.median(ratios)


def metrics_of_ten_thousand_images() -> float:
    """CPU seconds of all metrics, each resampled a thousand times."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(10), size=10_000)
    return _cpu_seconds(lambda: measure(Scored(probs, rng.integers(0, 10, 10_000))))


def refusal_of_a_hundred_million_pixels() -> float:
    """Seconds until an image over the limit of pixels is refused: before it is decoded."""
    buffer = io.BytesIO()
    Image.new("L", (10_001, 10_000)).save(buffer, "PNG", compress_level=1)
    started = time.perf_counter()
    try:
        decode_image(buffer.getvalue())
    except ImageError:
        return time.perf_counter() - started
    raise AssertionError("an image over the limit was decoded")


LIMITS: dict[Callable[[], float], float] = {
    index_against_image_folder: 0.6,
    metrics_of_ten_thousand_images: 2.0,
    refusal_of_a_hundred_million_pixels: 0.1,
}


def main() -> int:
    failed = 0
    for check, limit in LIMITS.items():
        value = check()
        failed += value > limit
        print(f"{'ok  ' if value <= limit else 'FAIL'} {check.__name__}: {value:.3f}, at most {limit}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
