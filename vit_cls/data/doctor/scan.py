"""Every file of a data folder, by what training would do with it; no image is opened."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vit_cls.data.doctor.issues import Finding, Offender
from vit_cls.data.index import EXTENSIONS
from vit_cls.data.parts import class_folders, part_folders

JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
JUNK_FOLDERS = frozenset(("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin"))
OTHER_IMAGES = frozenset(
    (
        *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".tga", ".pcx", ".psd", ".exr"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm", ".dds", ".hdr", ".eps"),
    )
)
"""Endings of image formats that `vit_cls.data.decode` does not read."""
IMAGE_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|P[1-6]\s+\d+\s", re.DOTALL)
"""How images begin, of the formats that the first bytes tell; not TIFF, which raw files are inside."""


@dataclass(frozen=True)
class FoundImage:
    """A file that training would read as an image; its split is ``""`` where there are none, its size None if
    unknown.
    """

    path: str
    split: str
    label: str
    size: int | None


@dataclass
class Scan:
    """What lies in a data folder, the training split first; splits are ``[""]`` where there are none."""

    root: str
    splits: list[str]
    training: str | None
    classes: dict[str, list[str]] = field(default_factory=dict)
    images: list[FoundImage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, path: str, detail: str = "") -> None:
        """Note a problem of a file or folder."""
        self.findings.append((kind, Offender(path, detail)))

    def note_lack_of_training(self) -> None:
        """Say that there is nothing to train on."""
        self.add("no_training_split", ".", f"there are {', '.join(self.splits)}")

    def check_classes(self, split: str, noun: str) -> None:
        """Note a split with too few classes: training takes two."""
        number = len(self.classes[split])
        if number < (2 if split == self.training else 1):
            self.add("too_few_classes", split or ".", f"{number} {noun}")


Identity = tuple[int, int] | None
"""Device and number of a folder, the same by whatever path; None where it cannot be known."""


@dataclass(frozen=True)
class _Entry:
    name: str
    path: str
    """Relative to the data folder."""
    is_folder: bool
    identity: Identity
    size: int | None


def scan_folder(root: str | Path, *, trained: bool = True) -> Scan:
    """List a data folder: splits and classes as training takes them, and what it would pass over.

    Class folders without a part are a training split, unless they are not to be ``trained`` on.
    """
    try:
        with os.scandir(root):
            pass
    except OSError:
        class_folders(Path(root), name="--data")  # raises, in words
        raise
    scan = Scan(str(root), [""], "" if trained else None)
    top = _list(scan, "")
    folders = [entry.name for entry in top if entry.is_folder]
    parts = part_folders(folders, has_folders=lambda name: _has_folders(os.path.join(scan.root, name)))
    if parts:
        scan.splits, scan.training = list(parts.values()), parts.get("train")
        _note_loose_files(scan, top)
        for name in folders:
            if name not in scan.splits:
                kind = "hidden_junk" if name.lower() in JUNK_FOLDERS else "ignored_folder"
                scan.add(kind, f"{name}/")
    if scan.training is None and trained:
        scan.note_lack_of_training()
    for split in scan.splits:
        _scan_split(scan, split, _list(scan, split) if split else top)
    return scan


def _has_folders(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(_is_folder(entry) and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return True  # it exists and cannot be read: a split with a problem


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _scan_split(scan: Scan, split: str, entries: list[_Entry]) -> None:
    _note_loose_files(scan, entries)
    scan.classes[split] = []
    above = frozenset((_identity(scan.root), _identity(os.path.join(scan.root, split))))
    for entry in entries:
        if not entry.is_folder:
            continue
        if entry.name.lower() in JUNK_FOLDERS:
            scan.add("junk_class", f"{entry.path}/")
            continue
        scan.classes[split].append(entry.name)
        before = len(scan.images)
        _scan_class(scan, split, entry, above)
        if len(scan.images) == before:
            scan.add("empty_class", f"{entry.path}/")
    scan.check_classes(split, "class folder(s)")


def _scan_class(scan: Scan, split: str, top: _Entry, above: frozenset[Identity]) -> None:
    """All files below a class folder; a stack, for a folder can be deeper than Python's recursion."""
    images: list[FoundImage] = []
    stack = [(top, above)]
    while stack:
        folder, above = stack.pop()
        if folder.identity is not None and folder.identity in above:
            scan.add("link_loop", f"{folder.path}/", "leads back to a folder above it")
            continue
        entries = _list(scan, folder.path)
        inside = above | {folder.identity}
        stack += [(e, inside) for e in reversed(entries) if e.is_folder]
        for entry in entries:
            if entry.is_folder:
                continue
            kind = _passed_over(scan.root, entry)
            if kind is not None:
                scan.add(kind, entry.path)
                continue
            images.append(FoundImage(entry.path, split, top.name, entry.size))
            if folder is not top:
                scan.add("nested", entry.path, f"its class is {top.name}")
    scan.images += sorted(images, key=lambda image: image.path)


def _passed_over(root: str, entry: _Entry) -> str | None:
    """The kind of a file in a class folder that is not read as an image; None where it is."""
    ending = os.path.splitext(entry.name)[1].lower()
    if entry.name.lower() in JUNK_FILES:
        return "hidden_junk"
    if ending in EXTENSIONS:
        return None
    if ending in OTHER_IMAGES:
        return "unsupported_format"
    return "unread_name" if _begins_like_an_image(os.path.join(root, entry.path)) else "not_image"


def _begins_like_an_image(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False  # to open a pipe would wait for ever
        with open(path, "rb") as file:
            return IMAGE_START.match(file.read(32)) is not None
    except OSError:
        return False


def _note_loose_files(scan: Scan, entries: list[_Entry]) -> None:
    """Images beside the class folders; other files there are nobody's concern."""
    for entry in entries:
        if not entry.is_folder and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            scan.add("loose_image", entry.path)


def _list(scan: Scan, folder: str) -> list[_Entry]:
    """Sorted visible entries of a folder; hidden ones become notes, what cannot be read becomes an error."""
    try:
        entries = sorted(_entries(scan, folder), key=lambda entry: entry.name)
    except OSError as error:
        scan.add("no_access", f"{folder}/", error.strerror or str(error))
        return []
    for entry in entries:
        if entry.name.startswith("."):
            scan.add("hidden_junk", entry.path + "/" * entry.is_folder)
    return [entry for entry in entries if not entry.name.startswith(".")]


def _entries(scan: Scan, folder: str) -> Iterator[_Entry]:
    with os.scandir(os.path.join(scan.root, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                scan.add("link_loop", path, error.strerror or str(error))
                continue
            try:
                size = entry.stat().st_size
            except OSError:  # a link to nowhere: reading it will say so
                yield _Entry(entry.name, path, is_folder, None, None)
                continue
            identity = _identity(entry.path) if is_folder else None
            yield _Entry(entry.name, path, is_folder, identity, size)


def _identity(folder: str) -> Identity:
    try:
        status = os.stat(folder)  # the entry's own has no numbers on Windows
    except OSError:
        return None
    return status.st_dev, status.st_ino
