"""The one finder of images: a folder, a manifest or the embedded digits to train, val and test parts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vit_cls.data.dataset import FolderSource, ImageSource
from vit_cls.data.digits import load_digits
from vit_cls.data.index import index_folder
from vit_cls.data.manifest import Manifest, is_manifest, read_manifest
from vit_cls.data.parts import ALL, PART_OF, SPELLINGS, class_folders, part_folders
from vit_cls.errors import ConfigError, DataError

log = logging.getLogger("vit_cls")

DIGITS = "digits"
SCORED = ("test", "val", ALL, "train")
"""What is scored where nobody chose: the first of these that the data has."""


@dataclass(frozen=True)
class FoundParts:
    """The parts that some data has; the images of a part are listed when it is read.

    Args:
        name: What the user calls the data, for error messages.
        places: By part, in the order of `PARTS`: the name of its folder, empty where it has none of its own.
            Undivided data is one part, ``all``.
        manifest: The rows, where it is a manifest.
    """

    data: str
    name: str
    kind: Literal["folder", "manifest", "digits"]
    places: Mapping[str, str]
    manifest: Manifest | None = None

    def choose(self, split: str | None, order: Sequence[str] = SCORED) -> str:
        """The part that is scored: the one named, in any spelling, or the first of ``order`` that there is.

        Raises:
            ConfigError: If the data has no such part.
        """
        if split is None:
            part = next((part for part in order if part in self.places), None)
            if part is None:
                raise ConfigError(
                    f"{self.name} {self.data} has no {order[0]} part, only {', '.join(self.places)}. Name "
                    "a folder or a manifest that is all of that part."
                )
            return part
        part = PART_OF.get(split.lower(), split.lower())
        if part not in self.places:
            has = "no parts, so leave --split out" if ALL in self.places else f"only {', '.join(self.places)}"
            raise ConfigError(f"--split {split}: {self.name} {self.data} has {has}.")
        return part

    def where(self, part: str) -> str:
        """Where the images of a part are, in words."""
        if self.kind == "folder":
            return str(Path(self.data, self.places[part]))
        if self.kind == "digits":
            return (
                f"the {'held-out third' if part == 'test' else 'training two thirds'} of the embedded digits"
            )
        return f"{self.data}" if part == ALL else f"the {part} rows of {self.data}"

    def read(self, part: str, class_names: list[str] | None = None, *, training: bool = False) -> ImageSource:
        """List the images of a part, by the classes given or its own; ``training`` takes two classes.

        Raises:
            DataError: If the images cannot be used, or have a class that ``class_names`` lacks.
        """
        if self.kind == "digits":
            return load_digits(part)
        if self.manifest is not None:
            return FolderSource(self.manifest.index(part, class_names, training=training))
        folder = self.places[part]
        name = f"{folder}/ of {self.name}" if folder else self.name
        index = index_folder(Path(self.data, folder), name=name, min_classes=2 if training else 1)
        return FolderSource(index if class_names is None else index.with_class_names(class_names))

    def training_part(self) -> str:
        """The part to fit on: train, or all where the data is undivided; DataError if there is none."""
        part = next((part for part in ("train", ALL) if part in self.places), None)
        if part is not None:
            return part
        if self.manifest is not None:
            raise DataError(
                f"{self.name} {self.data} has no row to train on: none has train in its split column."
            )
        looked_for = " or ".join(f"{name}/" for name in SPELLINGS["train"])
        first, *_ = self.places.values()
        raise DataError(
            f"{self.name} {self.data} has {', '.join(f'{name}/' for name in self.places.values())} but no "
            f"folder to train on; looked for {looked_for}. Add one, or give {Path(self.data, first)} itself, "
            "which is then divided."
        )


def find_parts(
    data: str | Path, *, name: str = "--data", class_names: Collection[str] = (), embedded: bool = False
) -> FoundParts:
    """Find the parts of a data root; names are read, no images.

    Args:
        data: A folder of parts (``train/``, ``val/``, ``test/`` and their other spellings), one folder of
            class folders, a manifest (see `read_manifest`), or ``digits``, the embedded ones, unless there is
            a folder of that name.
        name: What the user calls it, for error messages.
        class_names: Classes that are known already: a folder of such a name without folders inside is one.
        embedded: Whether ``digits`` means the embedded ones although there is a folder of that name.

    Raises:
        DataError: If it is none of these, or cannot be read.

    Example:
        >>> list(find_parts("digits").places)
        ['train', 'test']
    """
    root = Path(data)
    if str(data) == DIGITS and (embedded or not root.is_dir()):
        return FoundParts(DIGITS, name, "digits", {"train": "", "test": ""})
    if is_manifest(data):
        manifest = read_manifest(data, name=name)
        return FoundParts(str(data), name, "manifest", dict.fromkeys(manifest.parts, ""), manifest)
    if root.is_file():
        raise DataError(
            f"{name} {data} is a file, but no manifest. Give a folder of class folders, a folder with "
            "train/, val/ and test/, a manifest (.csv, .tsv, .parquet), or the word digits."
        )
    folders = class_folders(root, name=name)
    places = part_folders(
        folders,
        has_folders=lambda folder: bool(class_folders(root / folder, name=name)),
        class_names=class_names,
    )
    for folder in folders:
        part = PART_OF.get(folder.lower())
        if part in places and folder != places[part]:
            _warn_once(
                f"{name} {data}: {folder}/ is not read, for {places[part]}/ is the {part} part already. "
                "Put their images together, or rename one."
            )
    return FoundParts(str(data), name, "folder", places or {ALL: ""})


@functools.cache  # a study finds its data many times
def _warn_once(text: str) -> None:
    log.warning(text)
