"""What the parts of some data are called, and which folders of a root are parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from vit_cls.errors import DataError

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
"""What the folder of a part may be called, and the split column of a manifest may say, in any case."""
PARTS = tuple(SPELLINGS)
PART_OF = {spelling: part for part, spellings in SPELLINGS.items() for spelling in spellings}
ALL = "all"
"""The one part of data that has none: class folders, or a manifest without a split column."""


def class_folders(root: Path, *, name: str) -> list[str]:
    """Visible sub-folders of ``root``, in lexicographic order; DataError, under the user's ``name``, if
    unreadable.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except FileNotFoundError:
        raise DataError(f"{name} {root} does not exist. Give a folder with one sub-folder a class.") from None
    except OSError as error:
        raise DataError(f"{name} {root} cannot be read as a folder: {error.strerror}.") from error


def part_folders(
    folders: Sequence[str], *, has_folders: Callable[[str], bool], class_names: Collection[str] = ()
) -> dict[str, str]:
    """Folder names by part, in the order of `PARTS`, the only place that decides it; empty where folders are
    classes.

    A class may be called train, as CIFAR-100 has one: such a folder has no folders inside.
    """
    by_lower = {name.lower(): name for name in sorted(folders, reverse=True)}
    parts = {
        part: next(by_lower[name] for name in spellings if name in by_lower)
        for part, spellings in SPELLINGS.items()
        if not by_lower.keys().isdisjoint(spellings)
    }
    others = any(name.lower() not in PART_OF for name in folders)
    if others and "train" not in parts:
        return {}
    suspects = [name for part, name in parts.items() if name in class_names or (others and part == "train")]
    return {} if any(not has_folders(name) for name in suspects) else parts
