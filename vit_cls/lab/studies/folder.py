"""The folder of a study: what it says of itself, so that the same command goes on and another is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_cls.errors import RunError
from vit_cls.files import write_text, writing
from vit_cls.lab.results import plain
from vit_cls.lab.studies.study import Study
from vit_cls.locks import is_lock

RECORD = "study.json"


def claim_folder(folder: Path, study: Study, images: dict[str, str]) -> bool:
    """Begin a study in a folder, or go on where the same study began.

    Args:
        images: A fingerprint of the images of each part.

    Returns:
        Whether it begins.

    Raises:
        RunError: If the folder holds something else, or a study of other settings or images.
        ConfigError: If it cannot be written.
    """
    record = {"study": study.name, "images": images, **plain(study.settings())}
    file = folder / RECORD
    if file.is_file():
        before, now = _flat(_read(file)), _flat(record)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            if key.startswith("images."):
                raise RunError(
                    f"--output {folder} holds a study of other images: in the {key.partition('.')[2]} part "
                    f"of {study.setup.data} files were added, removed or renamed since. Give a new folder."
                )
            raise RunError(
                f"--output {folder} holds a study with another {key}: {before.get(key)!r} there, "
                f"{now.get(key)!r} now. Give another folder, or the same settings to go on."
            )
        return False
    if folder.exists() and (not folder.is_dir() or not all(map(is_lock, folder.iterdir()))):
        raise RunError(f"--output {folder} is not empty, and holds no study. Give a new folder.")
    with writing(folder):
        write_text(file, json.dumps(record, indent=1) + "\n")
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({error}); it says what the study in that folder is. Give a new --output."
        ) from error


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings, and the images, by their dotted names."""
    nested = ("recipe", "images")
    dotted = {f"{name}.{key}": value for name in nested for key, value in record.get(name, {}).items()}
    return {key: value for key, value in record.items() if key not in nested} | dotted
