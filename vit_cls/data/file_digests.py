"""Digests of the content of image files, read again only where size or time have changed."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_cls.data.dataset import ArraySource, FolderSource, ImageSource
from vit_cls.environment import cpu_count
from vit_cls.files import replacing
from vit_cls.verification import VERIFY

MOST_BYTES = 4 * 2**30
"""Of the files that are read: of more than that a sample, spread evenly, and of all others the sizes."""
DIGEST_BYTES = 16
Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sizes, times of the last change in ns, int64, and digests, uint8, ``(files, 16)``: zeros where not read."""


class FileDigests:
    """Of what each part of some data holds: labels, weights and images.

    Args:
        parts: Sources of images; of a dataset of anybody's only labels and weights are known.
        cache: What `save` wrote; None, or where it is damaged, reads all files.
    """

    def __init__(self, parts: Mapping[str, ImageSource], cache: Path | None = None) -> None:
        self.content: dict[str, str] = {}
        """Digests by ``PART_content``; empty with ``--no_verify``."""
        self._tables: dict[str, Table] = {}
        known = _read(cache)
        for part, source in parts.items() if VERIFY.get() else ():
            table = _files(source, known.get(part)) if isinstance(source, FolderSource) else None
            self.content[f"{part}_content"] = _content(source, table)
            if table is not None:
                self._tables[part] = table

    def save(self, cache: Path) -> None:
        """Keep the digests of the single files."""
        if self._tables:
            _write(cache, self._tables)


def _content(source: ImageSource, table: Table | None) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(source.index.labels).tobytes())
    if source.index.weights is not None:
        digest.update(np.ascontiguousarray(source.index.weights).tobytes())
    if isinstance(source, ArraySource):
        digest.update(source.images.contiguous().numpy().tobytes())
    for array in table[::2] if table is not None else ():  # sizes and digests; times may change
        digest.update(array.tobytes())
    return digest.hexdigest()


def _files(source: FolderSource, known: Table | None) -> Table:
    """The table of a part; digests of files whose size and time are as they were are taken over."""
    count = len(source.index)
    sizes, times = np.full(count, -1), np.zeros(count, dtype=np.int64)
    for i in range(count):
        with contextlib.suppress(OSError):  # it is told when it is read
            status = source.index.path(i).stat()
            if stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
                sizes[i], times[i] = status.st_size, status.st_mtime_ns
    digests = np.zeros((count, DIGEST_BYTES), dtype=np.uint8)
    read = _sample(sizes)
    if known is not None and len(known[0]) == count:
        same = (known[0] == sizes) & (known[1] == times) & known[2].any(axis=1)
        digests[read & same] = known[2][read & same]
        read &= ~same
    places = np.flatnonzero(read)
    with ThreadPoolExecutor(cpu_count()) as pool:
        paths = (source.index.path(int(place)) for place in places)
        lengths = (int(sizes[place]) for place in places)
        for place, digest in zip(places, pool.map(_digest, paths, lengths), strict=True):
            digests[place] = np.frombuffer(digest, dtype=np.uint8)
    return sizes, times, digests


def _sample(sizes: np.ndarray) -> np.ndarray:
    """Which files are read: all, or every n-th."""
    every = max(1, -(-int(sizes.clip(0).sum()) // MOST_BYTES))
    return (np.arange(len(sizes)) % every == 0) & (sizes >= 0)


def _digest(path: Path, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with contextlib.suppress(OSError), path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.digest()


def _read(cache: Path | None) -> dict[str, Table]:
    """What was written; nothing where that is damaged."""
    if cache is None:
        return {}
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            parts = {name.partition("/")[0] for name in arrays}
            tables = {p: tuple(arrays[f"{p}/{k}"] for k in ("size", "time", "digest")) for p in parts}
    except Exception:  # a damaged file may raise anything
        return {}
    return {part: (table[0], table[1], table[2]) for part, table in tables.items()}


def _write(cache: Path, tables: Mapping[str, Table]) -> None:
    arrays = {
        f"{part}/{name}": array
        for part, table in tables.items()
        for name, array in zip(("size", "time", "digest"), table, strict=True)
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own annotation of it
