"""What is wrong with an image folder, before hours are spent on it."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vit_cls.checks import check_range
from vit_cls.data.doctor.copies import exact_copies, near_copies, shared_images
from vit_cls.data.doctor.image_check import CRASHED, Checked, CheckTask, check_image
from vit_cls.data.doctor.issues import DatasetReport, Finding, Offender, Problem, problems_of
from vit_cls.data.doctor.manifest_scan import scan_manifest
from vit_cls.data.doctor.scan import FoundImage, Scan, scan_folder
from vit_cls.data.index import ImageIndex
from vit_cls.data.manifest import inspect_manifest, is_manifest
from vit_cls.environment import cpu_count
from vit_cls.workers import each_in_processes

MOST_IMBALANCE = 10.0
"""Largest class over smallest, above which a warning is due."""
MIN_IMAGES = 10
"""Training images a class, below which a warning is due."""
WORTH_PROCESSES = 5.0
"""Seconds of reading, by a rough guess, below which to start processes would take longer."""

MAX_PROCESSES = 8
"""Each is started anew and holds its own libraries."""


def examine(
    root: str | Path,
    *,
    near_duplicates: bool = False,
    num_workers: int | None = None,
    show_progress: bool = False,
    split: str | None = None,
) -> DatasetReport:
    """Look at every file of an image folder or a manifest, and decode every image.

    Args:
        root: A folder of parts, one folder of class folders, or a manifest, as training takes it.
        near_duplicates: Whether to look for pictures that look alike, beside files that are equal.
        num_workers: None means one a core, at most `MAX_PROCESSES`, and none for a small folder; 0 reads in
            this process.
        split: The part to look at, by any of its names; None looks at all parts, and across them.

    Returns:
        What was found; a file or folder that cannot be read is a part of it.

    Raises:
        ConfigError: If ``num_workers`` is negative, or there is no such part.
        DataError: If ``root`` is not a folder that can be read.
    """
    check_range("--num_workers", num_workers, at_least=0)
    started = time.perf_counter()
    scan = _scan(root, split)
    checked = _check(scan, near_duplicates, _workers(scan, num_workers), show_progress)
    counts = _counts(scan)
    names = [name for classes in scan.classes.values() for name in classes]
    findings = [
        *scan.findings,
        *(
            (kind, Offender(image.path, detail))
            for image, check in zip(scan.images, checked, strict=True)
            for kind, detail in check.findings
        ),
        *exact_copies(scan.images, [check.content for check in checked]),
        *(_near(scan.images, checked) if near_duplicates else ()),
        *_similar_names(names),
        *_missing_and_unknown(scan),
        *_sizes_of_classes(scan, counts),
    ]
    return DatasetReport(
        root=scan.root,
        images=len(scan.images),
        unreadable=sum(not check.readable for check in checked),
        classes=counts,
        problems=problems_of(findings),
        seconds=time.perf_counter() - started,
    )


def _scan(root: str | Path, split: str | None) -> Scan:
    """What there is, of one part or of all; a part is looked at as a folder of classes would be."""
    table = is_manifest(root)
    if split is None:
        return scan_manifest(str(root)) if table else scan_folder(root)
    from vit_cls.data.folders import FoundParts, find_parts  # with torchvision: seconds, for this alone

    if table:
        manifest, _ = inspect_manifest(root)
        parts = FoundParts(str(root), "--data", "manifest", dict.fromkeys(manifest.parts, ""), manifest)
        return scan_manifest(str(root), split=parts.choose(split))
    parts = find_parts(root)
    part = parts.choose(split)
    return scan_folder(parts.where(part), trained=part == "train")


def quick_check(train: ImageIndex, val: ImageIndex, *, most_reads: int = 100_000) -> list[Problem]:
    """The cheap part of `examine`, for before a training run: shared images, and class names that collide.

    Where more than ``most_reads`` files would have to be opened, a ``partly_checked`` note says so. Paths are
    relative to the folder that holds both splits.
    """
    shared, compared, suspects = shared_images(train, val, most_reads=most_reads)
    findings = [("leakage", offender) for offender in shared]
    findings += _similar_names([*train.class_names, *val.class_names])
    if compared < suspects:
        detail = f"{compared} of {suspects} validation images were compared with training images"
        findings.append(("partly_checked", Offender("leakage", detail)))
    return problems_of(findings)


def _workers(scan: Scan, num_workers: int | None) -> int:
    """The number given, or one that suits the folder, by the guess of 0.3 ms a file and 60 MB/s."""
    if num_workers is not None:
        return num_workers
    if sum(3e-4 + (image.size or 0) / 60e6 for image in scan.images) < WORTH_PROCESSES:
        return 0
    return min(MAX_PROCESSES, cpu_count())


def _check(scan: Scan, near_duplicates: bool, num_workers: int, show_progress: bool) -> list[Checked]:
    """Each image of the scan, checked."""
    of_size = Counter(image.size for image in scan.images)
    tasks = [
        CheckTask(os.path.join(scan.root, image.path), of_size[image.size] > 1, near_duplicates)
        for image in scan.images
    ]
    checked: list[Checked] = [CRASHED] * len(tasks)
    results = each_in_processes(check_image, tasks, crashed=CRASHED, num_workers=num_workers)
    console = Console(stderr=True, quiet=not show_progress)
    for position, result in track(
        results, "reading", total=len(tasks), console=console, disable=not show_progress
    ):
        checked[position] = result
    return checked


def _near(images: Sequence[FoundImage], checked: Sequence[Checked]) -> list[Finding]:
    signed = [i for i, check in enumerate(checked) if check.signature is not None]
    if not signed:
        return []
    signatures = np.stack([check.signature for check in checked if check.signature is not None])
    return near_copies([images[i] for i in signed], signatures, [checked[i].content for i in signed])


def _counts(scan: Scan) -> dict[str, dict[str, int]]:
    counts = {split: dict.fromkeys(classes, 0) for split, classes in scan.classes.items()}
    for image in scan.images:
        counts[image.split][image.label] += 1
    return counts


def _similar_names(names: Iterable[str]) -> list[Finding]:
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        groups[re.sub(r"\s+", " ", plain).strip()].add(name)
    return [
        ("similar_class_names", Offender(name, f"beside {', '.join(map(ascii, sorted(group - {name})))}"))
        for group in groups.values()
        if len(group) > 1
        for name in sorted(group)
    ]


def _missing_and_unknown(scan: Scan) -> Iterator[Finding]:
    """Splits against the training split, or against all of them where there is none."""
    if scan.training is None:
        known = {name for classes in scan.classes.values() for name in classes}
    else:
        known = set(scan.classes[scan.training])
    for split, classes in scan.classes.items():
        if split == scan.training or not classes or not known:
            continue
        for name in sorted(set(classes) - known):
            yield "unknown_class", Offender(f"{split}/{name}/")
        for name in sorted(known - set(classes)):
            yield "missing_class", Offender(f"{split}/{name}/", "is not there")


def _sizes_of_classes(scan: Scan, counts: dict[str, dict[str, int]]) -> Iterator[Finding]:
    """Of the training split; an empty class is an error of its own."""
    if scan.training is None:
        return
    images = {name: count for name, count in counts[scan.training].items() if count}
    largest = max(images, key=lambda name: images[name], default="")
    for name, count in images.items():
        path = f"{scan.training}/{name}/" if scan.training else f"{name}/"
        if images[largest] > MOST_IMBALANCE * count:
            yield "imbalance", Offender(path, f"{_images(count)}, {largest} has {images[largest]}")
        if count < MIN_IMAGES:
            yield "few_images", Offender(path, _images(count))


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
