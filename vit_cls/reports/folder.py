"""Everything that a result has to show, as files in one folder: tables, a page, figures of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vit_cls.environment import environment
from vit_cls.files import replacing, writing
from vit_cls.reports.compare import comparison_files
from vit_cls.reports.doctor import dataset_files
from vit_cls.reports.evaluation import evaluation_files
from vit_cls.reports.fit import fit_files
from vit_cls.reports.html import Files
from vit_cls.reports.lab import lab_files


def verification_files(result: Any, *, versions: Mapping[str, str], model: str) -> Files:
    """``verify.json``, with the model as the user named it."""
    yield "verify.json", json.dumps(result.to_dict() | {"model": model}, indent=2) + "\n"


FILES: dict[str, Callable[..., Files]] = {
    "FitResult": fit_files,
    "Evaluation": evaluation_files,
    "Comparison": comparison_files,
    "DatasetReport": dataset_files,
    "LabResult": lab_files,
    "Verification": verification_files,
}
"""Name and content of each file, by the class of the result, which this room need not load."""


def write_folder(
    folder: Path,
    result: Any,
    *,
    versions: Mapping[str, str] | None = None,
    option: str = "--output",
    **about: Any,
) -> list[Path]:
    """Write everything about a result.

    Args:
        folder: Is made if it does not exist; files of the same name are replaced, each as a whole.
        result: Of one of the classes of `FILES`; its texts and names may hold anything.
        versions: Version by package; None means those that run.
        option: The option that names the folder, for messages.
        about: What the function of `FILES` takes besides.

    Returns:
        The files. What programs read comes first, so that a figure that cannot be drawn loses no number.

    Raises:
        ConfigError: If the folder cannot be made or written, or the disk is full; complete files stay.
        ValueError: If a table or a figure contradicts itself, such as rows of different lengths.
    """
    versions = environment()["versions"] if versions is None else versions
    files = []
    with writing(folder, option):
        for name, content in FILES[type(result).__name__](result, versions=versions, **about):
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            encoded = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
            with replacing(file) as temporary:
                temporary.write_bytes(encoded)
            files.append(file)
    return files
