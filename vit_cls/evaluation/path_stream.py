"""What a user names (files, folders, globs, stdin) to image paths, one after the other, none kept."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from vit_cls.data.index import EXTENSIONS
from vit_cls.errors import DataError

STDIN = "-"
READ_BYTES = 65536


def iter_paths(words: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    """Paths of images, lazily.

    Args:
        words: Files, which need not exist; folders, of which all visible image files are taken, at any depth
            and in lexicographic order; quoted globs, of which the files that match are taken (``**`` for any
            depth); or ``-``.
        stdin: Read where a word is ``-``: one path a line, or closed by NUL bytes. Paths are taken as they
            are.

    Returns:
        The paths in the order of the words. Of a folder, the names of one sub-folder at a time are held.

    Raises:
        DataError: If a folder holds no image, a glob matches no file, ``-`` is not alone, or there is no
            path; before the first path is handed out.
    """
    if STDIN in words and len(words) > 1:
        raise DataError("PATH - takes the paths from stdin; it cannot be combined with others.")
    parts = [_from_stdin(stdin) if word == STDIN else _expand(word) for word in words]
    paths = itertools.chain.from_iterable(parts)
    first = next(paths, None)
    if first is None:
        given = "stdin holds no path." if words else "PATH is missing."
        raise DataError(f"{given} Give image files, folders, quoted globs, or - for paths on stdin.")
    return itertools.chain([first], paths)


def _expand(word: str) -> Iterator[str]:
    if os.path.isdir(word):
        if next(_walk(word), None) is None:
            raise DataError(
                f"folder {word} holds no image file. Files with these extensions are taken: "
                f"{' '.join(sorted(EXTENSIONS))}."
            )
        return _walk(word)
    if glob.has_magic(word) and not os.path.lexists(word):
        files = sorted(path for path in glob.iglob(word, recursive=True) if not os.path.isdir(path))
        if not files:
            raise DataError(
                f"glob {word} matches no file. Check it with ls; ** matches folders of any depth, and a "
                "folder can be given by its name alone."
            )
        return iter(files)
    return iter([word])


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Image files below a folder, sorted as whole paths; a sub-folder that cannot be read is a path."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted(_name(entry) for entry in entries if entry.name[0] != ".")
    except OSError:
        yield folder
        return
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link that leads back to a folder it is in
        return
    for name in names:
        if name[-1] == "/":
            yield from _walk(os.path.join(folder, name[:-1]), above | {here})
        elif os.path.splitext(name)[1].lower() in EXTENSIONS:
            yield os.path.join(folder, name)


def _name(entry: os.DirEntry[str]) -> str:
    return f"{entry.name}/" if entry.is_dir() else entry.name


def _from_stdin(stdin: BinaryIO) -> Iterator[str]:
    separator, rest = b"", b""
    read = getattr(stdin, "read1", stdin.read)
    while data := read(READ_BYTES):
        separator = separator or (b"\0" if b"\0" in data else b"\n" if b"\n" in data else b"")
        rest += data
        if separator:
            *whole, rest = rest.split(separator)
            yield from filter(None, map(_path, whole))
    yield from filter(None, map(_path, rest.split(separator or b"\n")))


def _path(line: bytes) -> str:
    return os.fsdecode(line.removesuffix(b"\r"))
