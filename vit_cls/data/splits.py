"""Which images are held out where the data has no parts: a share of each class, in whole groups."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vit_cls.checks import check_range
from vit_cls.data.index import ImageIndex, PathTable, iter_bytes
from vit_cls.errors import ConfigError, DataError


def held_out_images(
    index: ImageIndex, *, val_fraction: float, seed: int, group_by: str | None = None
) -> np.ndarray:
    """Choose a share of every class to hold out, the same files on every machine: a truth value an image.

    Each file's place is a hash of its relative path and the seed, so adding files moves few others. Where
    images have groups, whole groups are held out, and the same is true of them: their sizes play no part, so
    files added to a group, in a class it has, move nothing.

    Args:
        val_fraction: Share of each class's images, or of its groups, rounded; at least one where a class has
            two or more, and never the last one.
        group_by: A regular expression with one capture group, found anywhere in the relative path. None keeps
            the groups of the index together.

    Raises:
        ConfigError: If ``val_fraction`` is out of range, or ``group_by`` is no usable pattern.
        DataError: If nothing can be held out, or ``group_by`` does not match a path.

    Source:
        Groups of the rarest class first: Sechidis et al. 2011, "On the stratification of multi-label data".
    """
    check_range("data.val_fraction", val_fraction, above=0, below=1)
    groups = index.groups if group_by is None else groups_by_pattern(index, group_by)
    if groups is not None:
        return _hold_out_groups(index, groups, val_fraction=val_fraction, seed=seed)
    held_out = np.zeros(len(index), dtype=bool)
    place = _places(iter_bytes(index.paths), seed, len(index))
    order = np.lexsort((place, index.labels))
    start = 0
    for count in index.counts().tolist():
        share = min(max(1, round(val_fraction * count)), count - 1)
        held_out[order[start : start + max(share, 0)]] = True
        start += count
    if not held_out.any():
        raise DataError(
            f"{index.root} has one image a class, so none can be held out for validation. "
            "Add images or a val/ folder."
        )
    return held_out


def _places(names: Iterable[bytes], seed: int, count: int) -> np.ndarray:
    """Where each of ``count`` names stands in an order that looks random: uint64, a hash of seed and name."""
    salt = f"{seed}\0".encode()
    digest = hashlib.blake2b
    number = int.from_bytes
    hashes = (number(digest(salt + name, digest_size=8).digest(), "big") for name in names)
    return np.fromiter(hashes, dtype=np.uint64, count=count)


def groups_by_pattern(index: ImageIndex, group_by: str) -> Sequence[str]:
    """The group of each image: what a pattern finds in its path; DataError where that is nothing."""
    if index.groups is not None:
        raise ConfigError(
            f"data.group_by {group_by!r} has no effect: the manifest has a group column. Remove one of them."
        )
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ConfigError(f"data.group_by {group_by!r} is not a regular expression: {error}.") from None
    if pattern.groups != 1:
        raise ConfigError(
            f"data.group_by {group_by!r} must have one capture group, the part of the path that names the "
            f"group; it has {pattern.groups}. Example: (patient_\\d+). Other parentheses are written (?:...)."
        )
    unmatched: list[int] = []
    names = PathTable(_captured(pattern, index.paths, unmatched))
    if unmatched:
        examples = ", ".join(index.paths[i] for i in unmatched[:3])
        failing = (
            f"matches none of the {len(index)} paths"
            if len(unmatched) == len(index)
            else f"finds no group in {len(unmatched)} of {len(index)} paths"
        )
        raise DataError(
            f"data.group_by {group_by!r} {failing} below {index.root}, such as {examples}. It is looked for "
            "in the path relative to that folder, and must capture something in each."
        )
    return names


def _captured(pattern: re.Pattern[str], paths: Iterable[str], unmatched: list[int]) -> Iterator[str]:
    """What the pattern captures in each path; positions where that is nothing are noted."""
    for i, path in enumerate(paths):
        match = pattern.search(path)
        name = (match[1] or "") if match else ""
        if not name:
            unmatched.append(i)
        yield name


def refuse_shared_groups(
    train_groups: Sequence[str], val_groups: Sequence[str], *, where: str, parts: tuple[str, str]
) -> None:
    """Raise DataError if a group is both trained on and validated on; ``where`` is what the user called the
    data.
    """
    shared = sorted(set(iter_bytes(train_groups)) & set(iter_bytes(val_groups)))
    if shared:
        examples = ", ".join(name.decode("utf-8", "surrogateescape") for name in shared[:5])
        raise DataError(
            f"{where}: {len(shared)} group(s) are in {parts[0]} and in {parts[1]}: {examples}"
            f"{', ...' if len(shared) > 5 else ''}. Images of one group must all be in one of them, or the "
            "score is about images that the model knows in part."
        )


def _hold_out_groups(
    index: ImageIndex, groups: Sequence[str], *, val_fraction: float, seed: int
) -> np.ndarray:
    """`held_out_images` for images in groups; the classes with the fewest groups are served first."""
    number: dict[bytes, int] = {}
    codes = np.fromiter(
        (number.setdefault(name, len(number)) for name in iter_bytes(groups)), np.int64, len(index)
    )
    # groups as numbers in the order of their places; the name decides where two places are one
    ordered = sorted(zip(_places(number, seed, len(number)).tolist(), number, strict=True))
    rank = np.empty(len(number), dtype=np.int64)
    rank[[number[name] for _, name in ordered]] = np.arange(len(number))
    held_out = _choose(index.labels, rank[codes], index.class_names, val_fraction)
    if not held_out.any():
        too_few = f"one group ({groups[0]})" if len(number) == 1 else "one group a class"
        raise DataError(
            f"{index.root} has {too_few}, so none can be held out for validation. Check data.group_by, "
            "or add a val/ folder."
        )
    return held_out[rank[codes]]


def _choose(labels: np.ndarray, ranks: np.ndarray, class_names: list[str], val_fraction: float) -> np.ndarray:
    """Whether each group, numbered by its place, is held out."""
    num_groups, num_classes = int(ranks.max()) + 1, len(class_names)
    pairs = np.unique(labels * num_groups + ranks)
    members = np.split(pairs % num_groups, np.searchsorted(pairs, num_groups * np.arange(1, num_classes)))
    pairs = np.unique(ranks * num_classes + labels)
    bounds = np.searchsorted(pairs, num_classes * np.arange(num_groups + 1)).tolist()
    classes = (pairs % num_classes).tolist()
    left = [len(groups) for groups in members]  # groups of each class that are not held out
    order = sorted(range(num_classes), key=lambda label: (left[label], class_names[label]))
    held_out = np.zeros(num_groups, dtype=bool)
    decided = np.zeros(num_groups, dtype=bool)
    for label in order:
        groups = members[label]
        wanted = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
        wanted -= int(held_out[groups].sum())
        for group in groups[~decided[groups]].tolist() if wanted > 0 else ():
            its_classes = classes[bounds[group] : bounds[group + 1]]
            if all(left[each] > 1 for each in its_classes):
                held_out[group] = True
                for each in its_classes:
                    left[each] -= 1
                wanted -= 1
                if not wanted:
                    break
        decided[groups] = True
    return held_out
