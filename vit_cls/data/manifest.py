"""A table of images instead of folders: CSV or Parquet with a path and a label in every row."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.data.grouping import name_groups, refuse_shared_groups
from vit_cls.data.index import ImageIndex
from vit_cls.data.path_table import PathTable
from vit_cls.data.splits import (
    OPTIMISTIC,
    TRAIN_FOLDERS,
    VAL_FOLDERS,
    Split,
    held_out_share,
    stratified_split,
)
from vit_cls.data.table import ENDINGS, Table, listed, read_table
from vit_cls.errors import DataError

COLUMNS = ("path", "label")
MORE_COLUMNS = ("split", "group", "weight")
PARTS = {
    **dict.fromkeys(TRAIN_FOLDERS, "train"),
    **dict.fromkeys(VAL_FOLDERS, "val"),
    "test": "test",
}
"""What the split column may say: the names of split folders."""


@dataclass(frozen=True)
class Manifest:
    """The images of a table, by what they are for.

    Args:
        train: Rows to train on; all rows where there is no split column.
        val: Rows to validate on, labelled by the training classes, if there are any.
        test: Rows for a test, labelled by the training classes, if there are any.
    """

    train: ImageIndex
    val: ImageIndex | None
    test: ImageIndex | None


def is_manifest(path: str | Path) -> bool:
    """Whether a path has the ending of a table and is no folder.

    Args:
        path: What the user gave as data.

    Example:
        >>> is_manifest("images.csv"), is_manifest("images")
        (True, False)
    """
    return Path(path).suffix.lower() in ENDINGS and not os.path.isdir(path)


def split_manifest(
    path: str | Path,
    *,
    val_fraction: float,
    seed: int,
    group_by: str | None = None,
    root: str | Path | None = None,
    name: str = "data.manifest",
    check_files: bool = True,
) -> Split:
    """Training and validation images of a table: as its split column says, or split here.

    Args:
        path: The table, see `read_manifest`.
        val_fraction: See `vit_cls.data.splits.stratified_split`; has no effect where the table has rows to
            validate on.
        seed: Which split is made.
        group_by: Pattern that names the group of a path, where the table has no group column.
        root: The folder that relative paths start from; None means the table's.
        name: What the user called the table, for error messages.
        check_files: Whether every file is looked for.

    Raises:
        DataError: If the table cannot be used, or no split can be made.
        ConfigError: If ``val_fraction`` or ``group_by`` cannot be used.
    """
    manifest = read_manifest(path, root=root, name=name, check_files=check_files)
    train = manifest.train
    val = manifest.test if manifest.val is None else manifest.val
    if val is None:
        train, val = stratified_split(train, val_fraction=val_fraction, seed=seed, group_by=group_by)
        share = held_out_share(train, val, val_fraction, group_by)
        origin = f"{share} of {path} held out for validation, seed {seed}"
        return Split(train, val, origin, made_here=True)
    origin = f"{len(train)} rows to train on and {len(val)} to validate on of {path}"
    if manifest.val is None:
        origin += (
            f" (no rows to validate on: {OPTIMISTIC.replace('the test folder selects', 'test rows select')})"
        )
    if group_by is not None:
        groups, val_groups = name_groups(train, group_by), name_groups(val, group_by)
        assert groups is not None
        assert val_groups is not None
        where = f"data.group_by {group_by!r}"
        refuse_shared_groups(groups, val_groups, where=where, parts=("train", "validation"))
        origin += f", no group of {group_by!r} in both"
    return Split(train, val, origin)


def read_manifest(
    path: str | Path,
    *,
    root: str | Path | None = None,
    name: str = "data.manifest",
    check_files: bool = True,
) -> Manifest:
    """Read a table with the columns ``path`` and ``label``, and maybe ``split``, ``group`` and ``weight``.

    Column names may be in any case and order; other columns are passed over. ``split`` has the names of split
    folders (train, val, validation, test, ...), ``group`` says which images belong together, and ``weight``
    how often an image is drawn in training, relative to the others. Images are sorted by class and path: the
    order of the rows has no effect.

    Args:
        path: Parquet (``.parquet``, needs pyarrow), or text with commas, semicolons or tabs, in UTF-8.
        root: The folder that relative paths start from, and that all images are in; None means the table's.
        name: What the user called it, for error messages.
        check_files: Whether every file is looked for; that takes some seconds a million.

    Returns:
        An index for each part, with groups and weights where the table has them.

    Raises:
        DataError: Says what is wrong, in how many rows, and in which.
    """
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    table = read_table(path, name=name, required=COLUMNS, optional=MORE_COLUMNS)
    for column, cells in table.columns.items():
        if column != "path":
            cells[:] = [cell.strip() for cell in cells]
        table.refuse(f"an empty {column}", [i for i, cell in enumerate(cells) if not cell])
    paths = _relative_paths(table, folder)
    weights = _weights(table)
    parts = _parts(table)
    if check_files:
        _refuse_absent(table, paths, folder)
    return _manifest(table, paths, weights, parts, folder)


def _relative_paths(table: Table, folder: Path) -> list[str]:
    """The paths below ``folder``, each spelled in one way."""
    above = [f"{absolute(folder).rstrip(os.sep)}{os.sep}" for absolute in (os.path.abspath, os.path.realpath)]
    paths: list[str] = []
    outside: list[int] = []
    for i, path in enumerate(table.columns["path"]):
        if os.path.isabs(path):
            path = next((path[len(start) :] for start in above if path.startswith(start)), "..")
        if os.sep != "/":
            path = path.replace(os.sep, "/")
        if path[0] == "." or "//" in path or "/." in path:
            path = posixpath.normpath(path)
            if path == ".." or path.startswith("../"):
                outside.append(i)
        paths.append(path)
    table.refuse(
        f"a path outside {folder}", outside, column="path", hint="All images must be below one folder."
    )
    if len(set(paths)) < len(paths):
        _refuse_twice(table, paths)
    return paths


def _refuse_twice(table: Table, paths: list[str]) -> None:
    first: dict[str, int] = {}
    again = [i for i, path in enumerate(paths) if first.setdefault(path, i) != i]
    examples = [f"{paths[i]} (rows {table.rows[first[paths[i]]]} and {table.rows[i]})" for i in again[:5]]
    raise DataError(
        f"{table.where}: {len(again)} of {len(table)} rows have a path that is there already: "
        f"{listed(examples)}{' and more' if len(again) > 5 else ''}. Each image may have one row."
    )


def _weights(table: Table) -> np.ndarray | None:
    cells = table.columns.get("weight")
    if cells is None:
        return None
    weights = np.array([_number(cell) for cell in cells])
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0))).tolist()
    table.refuse("a weight that is not a number from 0 on", wrong, column="weight")
    return weights


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parts(table: Table) -> np.ndarray:
    """What each row is for."""
    cells = table.columns.get("split")
    if cells is None:
        return np.full(len(table), "train")
    parts = [PARTS.get(cell.lower(), "") for cell in cells]
    unknown = [i for i, part in enumerate(parts) if not part]
    known = f"Known: {listed(list(PARTS))}."
    table.refuse("a split that is not known", unknown, column="split", hint=known)
    return np.array(parts)


def _refuse_absent(table: Table, paths: list[str], folder: Path) -> None:
    start = os.path.join(folder, "")
    absent = [i for i, path in enumerate(paths) if not os.path.isfile(start + path)]
    hint = f"Relative paths start from {folder}."
    if absent and "\\" in paths[absent[0]] and os.sep == "/":
        hint += " Folders are separated by / here."
    table.refuse("a path where there is no file", absent, column="path", hint=hint)


def _manifest(
    table: Table, paths: Sequence[str], weights: np.ndarray | None, parts: np.ndarray, folder: Path
) -> Manifest:
    names = table.columns["label"]
    train = parts == "train"
    if not train.any():
        raise DataError(f"{table.where} has no row to train on: none has train in its split column.")
    class_names = sorted({names[i] for i in np.flatnonzero(train).tolist()})
    if len(class_names) < 2:
        raise DataError(
            f"{table.where} has only one label to train on ({class_names[0]}); "
            "a classifier needs at least two."
        )
    number = {name: i for i, name in enumerate(class_names)}
    unknown = [i for i, name in enumerate(names) if name not in number]
    table.refuse("a label that no training row has", unknown, column="label")
    if weights is not None and not weights[train].any():
        raise DataError(f"{table.where}: all rows to train on have weight 0, so nothing would be drawn.")
    labels = np.array([number[name] for name in names], dtype=np.int64)
    order = np.array(sorted(range(len(paths)), key=lambda i: (labels[i], paths[i])))
    groups = table.columns.get("group")
    everything = ImageIndex(
        folder,
        PathTable(paths[i] for i in order.tolist()),
        labels[order],
        class_names,
        None if groups is None else PathTable(groups[i] for i in order.tolist()),
        None if weights is None else weights[order],
    )
    parts = parts[order]
    train_index, *others = (
        everything.subset(np.flatnonzero(parts == part)) for part in ("train", "val", "test")
    )
    for part, other in zip(("val", "test"), others, strict=True):
        if train_index.groups is not None and other.groups is not None:
            refuse_shared_groups(train_index.groups, other.groups, where=table.where, parts=("train", part))
    val, test = (other if len(other) else None for other in others)
    return Manifest(train_index, val, test)
