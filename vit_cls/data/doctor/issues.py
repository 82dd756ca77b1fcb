"""What can be wrong with an image folder, in plain words, and what was found to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MOST_EXAMPLES = 10


@dataclass(frozen=True)
class IssueType:
    """One thing that can be wrong.

    Args:
        severity: ``error``: training stops at it, or its numbers would be false; ``warning``: look at it;
            ``note``: dealt with, and good to know.
        advice: What it means and what to do.
        pictures: Whether the offenders are images that can be looked at, not folders or other files.
    """

    severity: Severity
    title: str
    advice: str
    pictures: bool = True


_error, _warning, _note = (partial(IssueType, severity) for severity in SEVERITIES)
ISSUE_TYPES: dict[str, IssueType] = {
    "unreadable": _error(
        "files that cannot be read as images",
        "Training stops at such a file, unless data.max_bad_images allows for it. Replace it or remove it.",
    ),
    "truncated": _error(
        "images whose end is missing",
        "The copy or download was cut short. Fetch the file again or remove it; training stops at it.",
    ),
    "empty_file": _error("empty files", "There is nothing in the file. Fetch it again or remove it."),
    "leakage": _error(
        "images that another split has too",
        "The score on such an image measures memory. Keep each image in one split alone.",
    ),
    "label_conflict": _error(
        "the same image in different classes",
        "At most one of the labels is right. Keep the image in its true class and remove the other copies.",
    ),
    "bad_row": _error(
        "rows of the manifest that cannot be used",
        "Training refuses the whole table. Fill in the cell, or remove the row.",
        pictures=False,
    ),
    "missing_file": _error(
        "rows of the manifest whose path leads to no file",
        "Training stops at it. Paths are relative to the manifest, or absolute: correct the path or "
        "remove the row.",
        pictures=False,
    ),
    "repeated_row": _error(
        "files that have several rows in the manifest",
        "Training refuses the whole table. Keep one row for each file.",
    ),
    "shared_group": _error(
        "groups of images that training shares with another part",
        "The score on such an image measures memory in part; training refuses. Keep each group in one part.",
        pictures=False,
    ),
    "no_access": _error(
        "folders that cannot be read",
        "Training stops at such a folder. Give yourself permission to read it, or remove it.",
        pictures=False,
    ),
    "link_loop": _error(
        "links that lead back to themselves",
        "Training stops at such a link. Remove it.",
        pictures=False,
    ),
    "too_few_classes": _error(
        "folders with too few classes",
        "A split holds one sub-folder a class, each with its images; training needs at least two classes. "
        "Check that the right folder was given.",
        pictures=False,
    ),
    "empty_class": _error(
        "class folders without images",
        "Training refuses an empty class. Put images there or remove the folder.",
        pictures=False,
    ),
    "junk_class": _error(
        "folders of other programs that would count as classes",
        "Remove the folder: an unpacker or a file server made it, and each visible folder is a class.",
        pictures=False,
    ),
    "unknown_class": _error(
        "classes that the training split lacks",
        "A model cannot predict a class that it never saw; training refuses. Classes are matched by the "
        "folder's name: rename the folder, add the class to training, or remove it.",
        pictures=False,
    ),
    "similar_class_names": _warning(
        "class names that differ by case, spaces or encoding alone",
        "They count as different classes. If they are one class, move the images into one folder.",
        pictures=False,
    ),
    "missing_class": _warning(
        "classes of the training split that another split lacks",
        "Nothing will be known about such a class there. Add images, or check the folder's name.",
        pictures=False,
    ),
    "no_training_split": _warning(
        "no folder to train on",
        "This can be evaluated on, not trained on. Training looks for train/ or training/.",
        pictures=False,
    ),
    "nested": _warning(
        "images deeper than one level inside a class folder",
        "Their class is the outermost folder. If the inner folders are the classes, move them up.",
    ),
    "loose_image": _warning(
        "images outside any class folder",
        "They have no class, so they are passed over. Move them into class folders.",
    ),
    "unread_name": _warning(
        "images whose file name does not end like an image's",
        "They are passed over. Give them the ending of their format (.jpg, .png, ...).",
    ),
    "unsupported_format": _warning(
        "images in a format that is not read",
        "They are passed over. Convert them to JPEG or PNG.",
        pictures=False,
    ),
    "near_leakage": _warning(
        "images that look like one of another split",
        "If they are the same picture, or frames of one film, the score measures memory. Look at the pairs, "
        "and keep all pictures of one thing in one split.",
    ),
    "near_label_conflict": _warning(
        "images that look like one of another class",
        "If they are the same picture, one label is wrong. Look at the pairs.",
    ),
    "duplicate": _warning(
        "repeated images",
        "A repeated image counts twice, in training and in every score. Keep one.",
    ),
    "near_duplicate": _warning(
        "images that look like another one of their class and split",
        "Near copies count more than once and add little. Look at the pairs, and keep one of each.",
    ),
    "imbalance": _warning(
        "classes much smaller than the largest",
        "A model may do well by forgetting them. Look at balanced accuracy and at the recall of each class; "
        "add images where you can.",
        pictures=False,
    ),
    "few_images": _warning(
        "classes with few images to train on",
        "Such a class is hardly learnt, and its score is left to chance. Add images.",
        pictures=False,
    ),
    "tiny": _warning(
        "very small images",
        "Enlarging them to the model's input adds no detail. Check that they are not thumbnails or icons.",
    ),
    "huge": _warning(
        "very large images",
        "Reading them takes most of the loading time. Make copies of about twice the model's input size.",
    ),
    "wrong_extension": _note(
        "images whose name says another format",
        "They are read by content, so nothing is lost here; other programs may refuse them.",
    ),
    "exif_orientation": _note(
        "images that are stored turned or mirrored",
        "They are turned upright as their EXIF orientation says. Programs that ignore it see them turned.",
    ),
    "sixteen_bit": _note(
        "images with more than 8 bits a channel",
        "They are scaled to 8 bits: 16-bit levels from 0 to 65535, floats from 0 to 1. If yours use another "
        "range (12-bit cameras, medical images), rescale them before.",
    ),
    "transparent": _note(
        "images with transparent pixels",
        "They are laid over the model's background colour, white by default. If that hides something, choose "
        "another one.",
    ),
    "cmyk": _note(
        "images in printing colours (CMYK)",
        "They are converted to RGB without a colour profile, so colours may be off a little.",
    ),
    "animated": _note(
        "files with several pictures",
        "The first one is used. If you need the others, save them as files of their own.",
    ),
    "hidden_junk": _note(
        "hidden files and files of other programs",
        "They are passed over.",
        pictures=False,
    ),
    "not_image": _note(
        "other files in class folders",
        "They are passed over.",
        pictures=False,
    ),
    "ignored_folder": _note(
        "folders beside the splits",
        "Training takes one folder for each part, called train or training; val, validation or valid; test "
        "or testing. These are not read, and were not checked.",
        pictures=False,
    ),
    "partly_checked": _note(
        "a check that would have taken too long was made on a part of the images",
        "`vit-cls doctor` compares all of them.",
        pictures=False,
    ),
}
"""By name; what matters most comes first."""
UNREADABLE = ("unreadable", "truncated", "empty_file")
"""Kinds of files without pixels; the detail is the reason."""


@dataclass(frozen=True)
class Offender:
    """A file or folder that has a problem, and the image it repeats, by paths in the data folder."""

    path: str
    detail: str = ""
    other: str | None = None


Finding = tuple[str, Offender]
"""A key of `ISSUE_TYPES`, and what has that problem."""


@dataclass(frozen=True)
class Problem:
    """A key of `ISSUE_TYPES`, and everything that has that problem: at least one offender."""

    kind: str
    offenders: list[Offender]

    @property
    def severity(self) -> Severity:
        return ISSUE_TYPES[self.kind].severity

    @property
    def title(self) -> str:
        return ISSUE_TYPES[self.kind].title

    @property
    def advice(self) -> str:
        return ISSUE_TYPES[self.kind].advice

    @property
    def count(self) -> int:
        return len(self.offenders)

    @property
    def examples(self) -> list[str]:
        """Paths of the first ten offenders."""
        return [offender.path for offender in self.offenders[:MOST_EXAMPLES]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: getattr(self, key) for key in ("kind", "severity", "count", "examples", "advice")}


def problems_of(findings: Iterable[Finding]) -> list[Problem]:
    """Findings by kind, in the order of `ISSUE_TYPES`; offenders of one kind keep theirs."""
    by_kind: dict[str, list[Offender]] = {kind: [] for kind in ISSUE_TYPES}
    for kind, offender in findings:
        by_kind[kind].append(offender)
    return [Problem(kind, offenders) for kind, offenders in by_kind.items() if offenders]


@dataclass(frozen=True)
class DatasetReport:
    """What `vit_cls.data.doctor.report.examine` found, the most severe problem first.

    Args:
        images: Image files in class folders, the unreadable ones included.
        classes: By split, the number of image files of each class; a folder without splits is the split
            ``""``.
    """

    root: str
    images: int
    unreadable: int
    classes: dict[str, dict[str, int]]
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def readable(self) -> int:
        return self.images - self.unreadable

    @property
    def class_names(self) -> list[str]:
        """Every class of any split, in lexicographic order."""
        return sorted({name for counts in self.classes.values() for name in counts})

    @property
    def ok(self) -> bool:
        """Whether no problem is an error."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": self.images,
            "unreadable": self.unreadable,
            "classes": len(self.class_names),
            "problems": [problem.to_dict() for problem in self.problems],
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
        }
