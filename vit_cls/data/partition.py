"""The images of a finder divided for a use: two parts for a training run, three for a probe or a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.checks import check_range
from vit_cls.data.dataset import ArraySource, FolderSource, ImageSource
from vit_cls.data.folders import FoundParts, find_parts
from vit_cls.data.parts import ALL, PARTS, SPELLINGS
from vit_cls.data.splits import groups_by_pattern, held_out_images, refuse_shared_groups
from vit_cls.errors import ConfigError, DataError

TEST_SEED = 0
"""The test images are the same whatever the seed, so that results of several seeds can be paired."""


@dataclass(frozen=True)
class Split:
    """What is trained on, what is validated on by the same classes, and where both came from."""

    train: ImageSource
    val: ImageSource
    origin: str
    made_here: bool = False


def split_for_training(
    parts: FoundParts, *, val_fraction: float, seed: int, group_by: str | None = None
) -> Split:
    """The images that ``fit`` trains on and validates on; the test part is not touched.

    Raises:
        DataError: If the images are not usable, validation has a class that training lacks, or images or
            groups (see `held_out_images`) would be trained on and validated on.
        ConfigError: If ``val_fraction`` is out of range, or ``group_by`` is no usable pattern.
    """
    part = parts.training_part()
    train = parts.read(part, training=True)
    if "val" in parts.places:
        val = parts.read("val", train.index.class_names)
        _refuse_shared_folders(parts, (train, val))
        if parts.manifest is None:
            origin = f"{parts.where(part)} and {parts.where('val')}"
        else:
            origin = (
                f"{len(train.index)} rows to train on and {len(val.index)} to validate on of {parts.data}"
            )
        if group_by is not None:
            groups, val_groups = (groups_by_pattern(source.index, group_by) for source in (train, val))
            where = f"data.group_by {group_by!r}"
            refuse_shared_groups(groups, val_groups, where=where, parts=("train", "val"))
            origin += f", no group of {group_by!r} in both"
        return Split(train, val, origin)
    train, val, share = _hold_out(train, val_fraction, seed, group_by)
    if parts.kind == "digits":
        origin = f"embedded digits, {val_fraction:g} of the training two thirds for validation"
    elif parts.kind == "folder" and part == "train":
        looked_for = ", ".join(f"{name}/" for name in SPELLINGS["val"])
        origin = (
            f"no validation folder beside {parts.where('train')} (looked for {looked_for}): "
            f"{share} of {parts.places['train']}/ held out, seed {seed}"
        )
    else:
        origin = f"{share} of {parts.where(part)} held out for validation, seed {seed}"
    if "test" in parts.places and parts.kind != "digits":
        origin += f"; {parts.where('test')}: not touched"
    return Split(train, val, origin, made_here=True)


@dataclass(frozen=True)
class Partition:
    """Images to fit on, to choose by and to report on; no image is in two parts.

    Args:
        val: Every choice (a penalty, a number of neighbours) is made on these.
        test: Touched once, with what was chosen.
        origin: One sentence: where each part came from.
        made_here: Which of ``val`` and ``test`` were split off here; the others were there already.
        split: The part of the data that ``test`` is of.
    """

    train: ImageSource
    val: ImageSource
    test: ImageSource
    origin: str
    made_here: tuple[str, ...] = ()
    split: str = ALL

    @property
    def sources(self) -> tuple[ImageSource, ImageSource, ImageSource]:
        """The three parts, in the order of `PARTS`."""
        return self.train, self.val, self.test

    @property
    def class_names(self) -> list[str]:
        """The classes of the training part, by which all parts are labelled."""
        return self.train.index.class_names

    def counts(self) -> dict[str, int]:
        """Images of each part, by its name."""
        return {part: len(getattr(self, part).index) for part in PARTS}

    def refuse_unused(self, fractions: Mapping[str, float]) -> None:
        """Raise ConfigError for a share that the user asked for, of a part that is there already."""
        for label, fraction in fractions.items():
            part = label.removesuffix("_fraction")
            if part not in self.made_here:
                raise ConfigError(
                    f"--{label} {fraction:g} has no effect, for the {part} part is not split off here "
                    f"({self.origin}). Leave it out."
                )


def partition_data(
    data: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
    split: str | None = None,
    name: str = "--data",
) -> Partition:
    """Find or make three parts of some data: to fit on, to choose by, and to report on once.

    Args:
        data: See `find_parts`. Where it has no test part, the validation part is reported on, and where it
            has neither, both are split off from what there is.
        seed: Which validation images are held out, where there are none.
        val_fraction: Share of each class to validate on, in (0, 1), where that is split here.
        test_fraction: Likewise to test on; the same images whatever ``seed``.
        split: The part that is reported on instead; ``train`` splits all three off from it.

    Raises:
        DataError: If there is no such folder, a part has a class that training lacks, two parts share a
            folder, or there are too few images for three parts.
        ConfigError: If a fraction is out of range, or the data has no such part.

    Example:
        >>> partition_data("digits").counts()
        {'train': 959, 'val': 239, 'test': 599}
    """
    for label, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        check_range(f"--{label}", fraction, above=0, below=1)
    parts = find_parts(data, name=name)
    part, scored = parts.training_part(), parts.choose(split)
    train = parts.read(part, training=True)
    if scored == part:
        rest, test, reported = _hold_out_part(parts, train, test_fraction, TEST_SEED, "test")
        train, val, chosen_by = _hold_out_part(parts, rest, val_fraction, seed, "val")
        origin = (
            f"{reported} of {parts.where(part)} is the test part (the same for every seed); {chosen_by} of "
            f"the rest is for validation, seed {seed}"
        )
        return Partition(train, val, test, origin, made_here=("val", "test"), split=scored)
    test = parts.read(scored, train.index.class_names)
    if scored == "test" and "val" in parts.places:
        val = parts.read("val", train.index.class_names)
        _refuse_shared_folders(parts, (train, val, test))
        names = [f"{parts.places[each]}/" if parts.kind == "folder" else each for each in PARTS]
        kind = "folders" if parts.kind == "folder" else "parts"
        origin = f"the {kind} {names[0]}, {names[1]} and {names[2]} of {parts.data}"
        return Partition(train, val, test, origin, split=scored)
    _refuse_shared_folders(parts, (train, test))
    train, val, share = _hold_out_part(parts, train, val_fraction, seed, "val")
    if parts.kind == "digits":
        origin = (
            f"embedded digits: their held-out third is the test part; {share} of the other two thirds is for "
            f"validation, seed {seed}"
        )
    elif parts.kind == "folder":
        origin = (
            f"{parts.places[scored]}/ of {parts.data} is the test part; {share} of {parts.places[part]}/ is "
            f"for validation, seed {seed}"
        )
    else:
        origin = f"{parts.where(scored)} are the test part; {share} of {part} is for validation, seed {seed}"
    return Partition(train, val, test, origin, made_here=("val",), split=scored)


def _hold_out(
    source: ImageSource, fraction: float, seed: int, group_by: str | None = None
) -> tuple[ImageSource, ImageSource, str]:
    """What is kept, what is held out of each class, and the share that this is, in words for the log."""
    held_out = held_out_images(source.index, val_fraction=fraction, seed=seed, group_by=group_by)
    train, val = _subset(source, ~held_out), _subset(source, held_out)
    if group_by is None and source.index.groups is None:
        return train, val, f"{fraction:g} of each class"
    by = "the manifest's" if group_by is None else f"by {group_by!r}"
    lacking = int(np.count_nonzero((val.index.counts() == 0) & (train.index.counts() > 0)))
    without = f"; {lacking} class(es) could give none" if lacking else ""
    images = f"{len(val.index)} of {len(source.index)} images"
    return train, val, f"{fraction:g} of the groups of each class ({by}; {images}{without})"


def _subset(source: ImageSource, chosen: np.ndarray) -> ImageSource:
    """The images for which ``chosen`` is true."""
    index = source.index.subset(np.flatnonzero(chosen))
    return (
        ArraySource(index, source.images[chosen]) if isinstance(source, ArraySource) else FolderSource(index)
    )


def _hold_out_part(
    parts: FoundParts, source: ImageSource, fraction: float, seed: int, part: str
) -> tuple[ImageSource, ImageSource, str]:
    index = source.index
    if int(np.max(index.counts())) < 2:
        raise DataError(
            f"{parts.name} {parts.data}: too few images for three parts (train, val, test): {len(index)} "
            f"images of {len(index.class_names)} classes are left, at most one a class, so none can be held "
            f"out as the {part} part. Give at least three images a class, or folders train/, val/ and test/."
        )
    return _hold_out(source, fraction, seed)


def _refuse_shared_folders(parts: FoundParts, sources: Sequence[ImageSource]) -> None:
    """Links can make one folder a part of two."""
    if parts.kind != "folder":
        return
    owners: dict[tuple[int, int], tuple[int, Path]] = {}
    for number, index in enumerate(source.index for source in sources):
        classes = [index.class_names[label] for label in np.flatnonzero(index.counts()).tolist()]
        for folder in (index.root, *(index.root / name for name in classes)):
            status = folder.stat()
            owner, other = owners.setdefault((status.st_dev, status.st_ino), (number, folder))
            if owner != number:
                raise DataError(
                    f"{parts.name}: {folder} is the same folder as {other}, so images would be in two parts, "
                    "and the model scored on what it was trained on. Put other images there, or remove it."
                )
