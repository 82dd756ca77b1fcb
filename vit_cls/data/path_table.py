"""Many strings as a few arrays, so that a million paths cost little and worker processes share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CHUNK = 16_384
"""Strings that are handled at once: large enough for numpy, small enough to be forgotten."""


class PathTable(Sequence[str]):
    """Strings in a few arrays: a million paths are one object, so worker processes share their memory.

    A path is stored as the number of its beginning (its folder, as a rule) and the rest.

    Args:
        paths: The strings, in order.

    Example:
        >>> PathTable(["a/1.png", "b/2.png"])[1]
        'b/2.png'
    """

    _beginnings: _Texts
    _beginning: np.ndarray
    _rests: _Texts

    def __init__(self, paths: Iterable[str]) -> None:
        numbers: dict[bytes, int] = {}
        rests: list[bytes] = []
        beginning: list[int] = []
        for path in paths:
            # surrogateescape: file names need not be valid UTF-8
            encoded = path.encode("utf-8", "surrogateescape")
            cut = encoded.rfind(b"/") + 1
            beginning.append(numbers.setdefault(encoded[:cut], len(numbers)))
            rests.append(encoded[cut:])
        self._beginnings = _Texts.of(list(numbers))
        self._beginning = _small(np.array(beginning, dtype=np.int64))
        self._rests = _Texts.of(rests)

    @classmethod
    def from_runs(cls, runs: Sequence[tuple[bytes, int, bytes]]) -> PathTable:
        """Build from runs of paths that begin alike.

        Args:
            runs: The common beginning, how many paths, and their rests, each closed by a NUL byte.

        Example:
            >>> list(PathTable.from_runs([(b"a/", 2, b"1.png" + bytes(1) + b"2.png" + bytes(1))]))
            ['a/1.png', 'a/2.png']
        """
        table = cls(())
        counts = np.array([count for _, count, _ in runs], dtype=np.int64)
        joined = b"".join([rests for _, _, rests in runs])
        ends = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == 0)
        assert len(ends) == counts.sum()
        ends -= np.arange(len(ends))
        table._beginnings = _Texts.of([beginning for beginning, _, _ in runs])
        table._beginning = np.repeat(_small(np.arange(len(runs))), counts)
        table._rests = _Texts(joined.replace(b"\0", b""), _small(ends))
        return table

    def __len__(self) -> int:
        return len(self._beginning)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        encoded = self._beginnings[int(self._beginning[index])] + self._rests[index]
        return encoded.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for encoded in self.iter_bytes():
            yield encoded.decode("utf-8", "surrogateescape")

    def iter_bytes(self) -> Iterator[bytes]:
        """The strings as bytes: UTF-8, and what is not UTF-8 as it is on the disk."""
        for start in range(0, len(self), CHUNK):
            numbers = self._beginning[start : start + CHUNK].tolist()
            beginnings = {number: self._beginnings[number] for number in set(numbers)}
            rests = self._rests.between(start, start + CHUNK)
            for number, rest in zip(numbers, rests, strict=True):
                yield beginnings[number] + rest

    def take(self, indices: np.ndarray) -> PathTable:
        """The strings at some positions.

        Args:
            indices: Positions, or a truth value for each string.
        """
        positions = np.arange(len(self))[indices]
        table = PathTable(())
        table._beginnings = self._beginnings
        table._beginning = self._beginning[positions]
        table._rests = self._rests.take(positions)
        return table


def iter_bytes(strings: Sequence[str]) -> Iterator[bytes]:
    """Strings as bytes, fast where they are a `PathTable`.

    Args:
        strings: File names may hold surrogates for bytes that are not UTF-8.
    """
    if isinstance(strings, PathTable):
        return strings.iter_bytes()
    return (string.encode("utf-8", "surrogateescape") for string in strings)


class _Texts:
    """Byte strings, one after the other in one, and where each ends."""

    def __init__(self, data: bytes, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> _Texts:
        return cls(b"".join(texts), _small(np.cumsum([len(text) for text in texts], dtype=np.int64)))

    def __getitem__(self, index: int) -> bytes:
        return self.data[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def between(self, start: int, stop: int) -> list[bytes]:
        ends = self.ends[start:stop].tolist()
        starts = [int(self.ends[start - 1]) if start else 0, *ends[:-1]]
        return [self.data[first:last] for first, last in zip(starts, ends, strict=True)]

    def take(self, positions: np.ndarray) -> _Texts:
        starts = np.concatenate([np.zeros(1, self.ends.dtype), self.ends[:-1]])[positions].astype(np.int64)
        lengths = self.ends[positions] - starts
        ends = np.cumsum(lengths)
        source = np.frombuffer(self.data, dtype=np.uint8)
        taken = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        for first in range(0, len(positions), CHUNK):
            length, end = lengths[first : first + CHUNK], ends[first : first + CHUNK]
            begin = int(end[0] - length[0])
            # byte j of the result is byte (start of its string there - start here + j) of the source
            shift = np.repeat(starts[first : first + CHUNK] - (end - length), length)
            taken[begin : int(end[-1])] = source[shift + np.arange(begin, int(end[-1]))]
        return _Texts(taken.tobytes(), _small(ends))


def _small(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 in the smallest of three types that holds them."""
    largest = int(numbers.max()) if len(numbers) else 0
    for dtype in (np.uint16, np.uint32):
        if largest <= np.iinfo(dtype).max:
            return numbers.astype(dtype)
    return numbers
