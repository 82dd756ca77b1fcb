"""Images that are there more than once: equal bytes, or pictures that look alike."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from vit_cls.data.doctor.image_check import content_hash
from vit_cls.data.doctor.issues import Finding, Offender
from vit_cls.data.doctor.scan import FoundImage
from vit_cls.data.index import ImageIndex

SIMILAR = 0.95
"""Of 7 million pairs of photos of clothes, no two that differ reach 0.93; copies at JPEG quality 40, half the
size or 15 % brighter reach 0.97 at least; cropped by 2 % a side, half of them reach 0.92."""
CELLS = 4_000_000
"""Similarities computed at once: 16 MB."""
BLOCK_BYTES = 16_384
READERS = 8


def exact_copies(images: Sequence[FoundImage], contents: Sequence[bytes | None]) -> list[Finding]:
    """Every image whose bytes another one has, by digests that may be None; of two splits, the later copy."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, content in enumerate(contents):
        if content is not None:
            groups[content].append(position)
    return [finding for group in groups.values() for finding in _copies_in_group([images[i] for i in group])]


def _copies_in_group(group: list[FoundImage]) -> Iterator[Finding]:
    first = group[0]
    kept: dict[tuple[str, str], FoundImage] = {}
    for image in group:
        other_class = next((copy for copy in group if copy.label != image.label), None)
        if other_class is not None:
            yield "label_conflict", _offender(image, "same file as", other_class)
        if image.split != first.split:
            yield "leakage", _offender(image, "same file as", first)
        before = kept.setdefault((image.split, image.label), image)
        if before is not image:
            yield "duplicate", _offender(image, "same file as", before)


def near_copies(
    images: Sequence[FoundImage], signatures: np.ndarray, contents: Sequence[Hashable]
) -> list[Finding]:
    """Every image that looks like an earlier one, the most similar of each kind; equal contents are exact
    copies.
    """
    splits, labels = _codes([i.split for i in images]), _codes([i.label for i in images])
    same_file = _codes([("", i) if content is None else content for i, content in enumerate(contents)])
    findings: list[Finding] = []
    start = 0
    while start < len(images):
        stop = min(len(images), start + max(1, CELLS // len(images)))
        similar = signatures[start:stop] @ signatures[:stop].T
        rows = np.arange(start, stop)[:, None]
        similar[rows <= np.arange(stop)] = -1  # each pair once
        similar[same_file[start:stop, None] == same_file[:stop]] = -1
        other_split = splits[start:stop, None] != splits[:stop]
        other_class = labels[start:stop, None] != labels[:stop]
        for kind, mask in (
            ("near_leakage", other_split),
            ("near_label_conflict", other_class),
            ("near_duplicate", ~other_split & ~other_class),
        ):
            best = np.where(mask, similar, -1).argmax(axis=1)
            for row, column in enumerate(best):
                if mask[row, column] and similar[row, column] >= SIMILAR:
                    words = f"similarity {similar[row, column]:.3f} to"
                    findings.append((kind, _offender(images[start + row], words, images[column])))
        start = stop
    return findings


def shared_images(train: ImageIndex, val: ImageIndex, *, most_reads: int) -> tuple[list[Offender], int, int]:
    """Validation images whose bytes a training image has, by paths below both; how many were compared, of how
    many.

    Sizes are compared first; of files of equal size, 16 kB from the middle; of those that agree, everything.
    A file that cannot be read is passed over: training, which reads every file, names it. Where more than
    ``most_reads`` files have a size that both sides have, a part of the sizes is taken, spread evenly.
    """
    groups = [(_paths(val), _paths(train))]
    with ThreadPoolExecutor(READERS) as pool:
        groups = sorted(_refine(groups, _size, pool))
        suspects = sum(len(ours) for ours, _ in groups)
        groups = _within_budget(groups, most_reads)
        compared = sum(len(ours) for ours, _ in groups)
        for mark in (_middle_hash, _whole_hash):
            groups = _refine(groups, mark, pool)
    root = os.path.commonpath([os.path.abspath(train.root), os.path.abspath(val.root)])
    pairs = sorted((ours, copies[0]) for all_ours, copies in groups for ours in all_ours)
    return [_pair(*pair, root) for pair in pairs], compared, suspects


Group = tuple[list[str], list[str]]
"""Validation and training files that agree in all that is known of them so far."""


def _refine(
    groups: list[Group], mark: Callable[[str], Hashable | None], pool: ThreadPoolExecutor
) -> list[Group]:
    """Part each group by a mark; what has none, or has it on one side alone, falls out."""
    paths = list(dict.fromkeys(path for group in groups for side in group for path in side))
    parts = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    marked = pool.map(lambda part: [mark(path) for path in part], parts)
    marks = dict(zip(paths, chain.from_iterable(marked), strict=True))
    refined: list[Group] = []
    for group in groups:
        by_mark: dict[Hashable, Group] = defaultdict(lambda: ([], []))
        for i, side in enumerate(group):
            for path in side:
                by_mark[marks[path]][i].append(path)
        by_mark.pop(None, None)
        refined += [part for part in by_mark.values() if all(part)]
    return refined


def _within_budget(groups: list[Group], most_reads: int) -> list[Group]:
    costs = [sum(map(len, group)) for group in groups]
    chosen = []
    for i in range(0, len(groups), max(1, math.ceil(sum(costs) / most_reads))):
        if costs[i] <= most_reads:
            chosen.append(groups[i])
            most_reads -= costs[i]
    return chosen


def _paths(index: ImageIndex) -> list[str]:
    return [os.path.join(index.root, path) for path in index.paths]


def _size(path: str) -> int | None:
    """Bytes; None for an empty file, for one that cannot be read and for what is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size or None if stat.S_ISREG(status.st_mode) else None


def _middle_hash(path: str) -> bytes | None:
    """Of the middle, for files of one program begin alike."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size // 2 - BLOCK_BYTES // 2))
            return content_hash(file.read(BLOCK_BYTES))
    except OSError:
        return None


def _whole_hash(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _pair(path: str, other: str, root: str) -> Offender:
    path, other = (os.path.relpath(p, root).replace(os.sep, "/") for p in (path, other))
    return Offender(path, f"same file as {other}", other)


def _offender(image: FoundImage, words: str, other: FoundImage) -> Offender:
    return Offender(image.path, f"{words} {other.path}", other.path)


def _codes(values: Sequence[Hashable]) -> np.ndarray:
    """Numbers that are equal where the values are."""
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values], dtype=np.int64)
