"""Which folders are parts, and how images are divided where they are not: by class, in whole groups."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from vit_cls.data.index import ImageIndex, PathTable, iter_bytes
from vit_cls.errors import ConfigError, DataError

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
"""What the folder of a part may be called, and the split column of a manifest may say, in any case."""
PARTS = tuple(SPELLINGS)
PART_OF = {spelling: part for part, spellings in SPELLINGS.items() for spelling in spellings}


def part_folders(
    folders: Sequence[str], *, has_folders: Callable[[str], bool], class_names: Collection[str] = ()
) -> dict[str, str]:
    """Which of some folders are parts; the only place that decides it.

    A class may be called train, as CIFAR-100 has one: such a folder has no folders inside.

    Args:
        folders: Names of the visible folders of a data root.
        has_folders: Whether the folder of a name has folders inside.
        class_names: Classes that are known already, such as a model's.

    Returns:
        The folder's name by part, in the order of `PARTS`; empty where the folders are classes.

    Example:
        >>> part_folders(["Test", "extra", "train"], has_folders=lambda name: True)
        {'train': 'train', 'test': 'Test'}
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


def stratified_split(
    index: ImageIndex, *, val_fraction: float, seed: int, group_by: str | None = None
) -> tuple[ImageIndex, ImageIndex]:
    """The images that `held_out_images` leaves, and those that it takes."""
    held_out = held_out_images(index, val_fraction=val_fraction, seed=seed, group_by=group_by)
    return index.subset(np.flatnonzero(~held_out)), index.subset(np.flatnonzero(held_out))


def held_out_images(
    index: ImageIndex, *, val_fraction: float, seed: int, group_by: str | None = None
) -> np.ndarray:
    """Choose a share of every class to hold out, the same files on every machine.

    Each file's place is a hash of its relative path and the seed, so adding files moves few others. Where
    images have groups, the same is true of groups: see `hold_out_groups`.

    Args:
        index: All images.
        val_fraction: Share of each class to hold out, in (0, 1), rounded; at least one image where a class
            has two or more, and never the last one. With groups, the share of each class's groups.
        seed: Which choice.
        group_by: A regular expression with one capture group, found anywhere in the relative path: images
            of which it captures the same are never split. None keeps the groups of the index, if it has
            some, together.

    Returns:
        Whether each image is held out, bool, shape ``(images,)``.

    Raises:
        ConfigError: If ``val_fraction`` is out of range, or ``group_by`` is no usable pattern.
        DataError: If nothing can be held out, or ``group_by`` does not match a path.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ConfigError(f"data.val_fraction must be between 0 and 1 (both excluded); got {val_fraction:g}.")
    groups = name_groups(index, group_by)
    if groups is not None:
        return hold_out_groups(index, groups, val_fraction=val_fraction, seed=seed)
    held_out = np.zeros(len(index), dtype=bool)
    place = places(iter_bytes(index.paths), seed, len(index))
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


def held_out_share(train: ImageIndex, val: ImageIndex, val_fraction: float, group_by: str | None) -> str:
    """What `stratified_split` has held out, in words for the log.

    Args:
        train: The images it kept.
        val: The images it held out.
        val_fraction: What it was asked for.
        group_by: What it was asked for.
    """
    if group_by is None and train.groups is None:
        return f"{val_fraction:g} of each class"
    by = "the manifest's" if group_by is None else f"by {group_by!r}"
    lacking = int(np.count_nonzero((val.counts() == 0) & (train.counts() > 0)))
    without = f"; {lacking} class(es) could give none" if lacking else ""
    images = f"{len(val)} of {len(train) + len(val)} images"
    return f"{val_fraction:g} of the groups of each class ({by}; {images}{without})"


def match_classes(index: ImageIndex, class_names: list[str], *, where: str = "") -> ImageIndex:
    """Label an index by another class list, by name; the index may lack classes but not add any.

    Args:
        index: Images of a validation or test folder.
        class_names: The classes of the training data or the model.
        where: Where the images are, in words; empty names the root.

    Raises:
        DataError: If the index has a class that ``class_names`` lacks; both lists are shown.
    """
    unknown = sorted(set(index.class_names) - set(class_names))
    if unknown:
        raise DataError(
            f"{where or index.root} has {len(unknown)} class(es) that are not known: {_listed(unknown)}. "
            f"Its classes: {_listed(index.class_names)}. Known classes: {_listed(class_names)}. "
            "Classes are matched by name, of folders or of labels; rename or remove the unknown ones."
        )
    return index.with_class_names(class_names)


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def places(names: Iterable[bytes], seed: int, count: int) -> np.ndarray:
    """Where each name stands in an order that looks random and is the same on every machine.

    Args:
        names: Paths or group names.
        seed: Which order.
        count: How many names there are.

    Returns:
        uint64, shape ``(count,)``: a hash of seed and name, without regard to the other names.
    """
    salt = f"{seed}\0".encode()
    digest = hashlib.blake2b
    number = int.from_bytes
    hashes = (number(digest(salt + name, digest_size=8).digest(), "big") for name in names)
    return np.fromiter(hashes, dtype=np.uint64, count=count)


def name_groups(index: ImageIndex, group_by: str | None) -> Sequence[str] | None:
    """The group of each image, from the index or from its path.

    Args:
        index: The images.
        group_by: A regular expression with one capture group, found anywhere in the relative path; what it
            captures is the name. None takes the groups of the index, if it has some.

    Raises:
        ConfigError: If the expression does not compile, has another number of capture groups, or the index
            has groups of its own.
        DataError: If a path does not match.
    """
    if group_by is None:
        return index.groups
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
        what = (
            f"matches none of the {len(index)} paths"
            if len(unmatched) == len(index)
            else f"finds no group in {len(unmatched)} of {len(index)} paths"
        )
        raise DataError(
            f"data.group_by {group_by!r} {what} below {index.root}, such as {examples}. It is looked for "
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
    """Check that no group is both trained on and validated on.

    Args:
        train_groups: The group of each training image.
        val_groups: The group of each other image.
        where: What the user called the data, for the message.
        parts: Names of the two parts, for the message.

    Raises:
        DataError: If a group is in both.
    """
    shared = sorted(set(iter_bytes(train_groups)) & set(iter_bytes(val_groups)))
    if shared:
        examples = ", ".join(name.decode("utf-8", "surrogateescape") for name in shared[:5])
        raise DataError(
            f"{where}: {len(shared)} group(s) are in {parts[0]} and in {parts[1]}: {examples}"
            f"{', ...' if len(shared) > 5 else ''}. Images of one group must all be in one of them, or the "
            "score is about images that the model knows in part."
        )


def hold_out_groups(
    index: ImageIndex, groups: Sequence[str], *, val_fraction: float, seed: int
) -> np.ndarray:
    """Choose whole groups to validate on, a share of the groups of every class.

    The classes are served from the one with the fewest groups to the one with the most. Which groups a class
    gives is decided by a hash of seed and group name, so the sizes of groups play no part: files added to a
    group, in a class it has, move nothing.

    Args:
        index: The images.
        groups: The group of each image.
        val_fraction: Share of each class's groups, in (0, 1), rounded; at least one where a class has two or
            more groups, and never the last one of any class.
        seed: Which choice.

    Returns:
        Whether each image is held out, bool, shape ``(images,)``.

    Raises:
        DataError: If no group can be held out.

    Source:
        Rarest class first: Sechidis et al. 2011, "On the stratification of multi-label data", of which this
        keeps the order of the classes.
    """
    number: dict[bytes, int] = {}
    codes = np.fromiter(
        (number.setdefault(name, len(number)) for name in iter_bytes(groups)), np.int64, len(index)
    )
    # groups as numbers in the order of their places; the name decides where two places are one
    ordered = sorted(zip(places(number, seed, len(number)).tolist(), number, strict=True))
    rank = np.empty(len(number), dtype=np.int64)
    rank[[number[name] for _, name in ordered]] = np.arange(len(number))
    held_out = _choose(index.labels, rank[codes], index.class_names, val_fraction)
    if not held_out.any():
        one = f"one group ({groups[0]})" if len(number) == 1 else "one group a class"
        raise DataError(
            f"{index.root} has {one}, so none can be held out for validation. Check data.group_by, "
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
