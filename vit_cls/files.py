"""Files that are either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vit_cls.errors import ConfigError
from vit_cls.signals import held

TEMPORARY = ".tmp"
"""How the names of files end that are being written."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place, and move it there when it is complete and on the disk.

    Yields:
        Where to write it. If the block raises, the file there goes away and ``path`` stays as it was. A
        signal waits until the file is there.
    """
    with held(), _replacing(Path(path)) as temporary:
        yield temporary


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=TEMPORARY)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out the rest of the team
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a write names none, or the temporary one
        raise


def sync_file(path: Path) -> None:
    """Let the content of a file outlive a power cut."""
    with path.open("r+b") as file:  # Windows syncs no file that is open to be read alone
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Let the names of files in a folder outlive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders; some file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Delete what `replacing` left in a folder when its process was killed; nobody else may write there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a text file.

    Args:
        path: Its folder exists.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def output_folder(folder: str | Path | None, option: str = "--output") -> Path | None:
    """Make sure, before any work, that files can be written to a folder; creates nothing.

    Args:
        folder: As the user wrote it, or None.
        option: The option that names it, for the message.

    Raises:
        ConfigError: If it is a file, or cannot be made or written.
    """
    if folder is None:
        return None
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{option} {folder} is a file. Give a folder; it is made if it does not exist.")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "does not allow it" if nearest.is_dir() else "is a file"
        raise ConfigError(f"{option} {folder} cannot be written: {nearest} {reason}. Choose another folder.")
    return path


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder; after an error it goes again if empty, as do those above it that were made for it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not made, or a file is in it by now
                path.rmdir()
        raise


@contextlib.contextmanager
def write_errors(folder: Path, option: str = "--output") -> Iterator[None]:
    """Turn the system's errors inside the ``with`` block into ConfigError about the option of a folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def writing(folder: Path, option: str = "--output") -> Iterator[None]:
    """Make a folder as `making` does, and write files into it inside the ``with`` block.

    Args:
        option: The option that names it, for the message.

    Raises:
        ConfigError: If the folder cannot be made or written, or the disk is full; complete files stay.

    Example:
        >>> with writing(Path("/dev/null/below")):
        ...     pass
        Traceback (most recent call last):
            ...
        vit_cls.errors.ConfigError: --output /dev/null/below cannot be written: Not a directory.
    """
    with write_errors(folder, option), making(folder):
        yield
