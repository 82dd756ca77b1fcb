"""What is wrong with an image folder, as a page with pictures and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vit_cls.data.doctor.issues import ISSUE_TYPES, SEVERITIES, UNREADABLE, DatasetReport
from vit_cls.files import write_text
from vit_cls.reports.html import embedded, render, write_rows

MOST_SHOWN = 24
"""Offenders of one kind on the page; the table has all of them."""
COLUMNS = ("path", "kind", "severity", "detail")


def pictures_wanted(diagnosis: DatasetReport) -> list[str]:
    """Paths of the images that the page shows, each once.

    Args:
        diagnosis: What was found.
    """
    shown = (
        path
        for problem in diagnosis.problems
        if ISSUE_TYPES[problem.kind].pictures
        for offender in problem.offenders[:MOST_SHOWN]
        for path in (offender.path, offender.other)
        if path is not None
    )
    return list(dict.fromkeys(shown))


def write_doctor_report(
    path: Path, diagnosis: DatasetReport, *, thumbnails: Mapping[str, bytes], versions: Mapping[str, str]
) -> None:
    """Write the page of a diagnosis.

    Args:
        path: The file; its folder exists. It is replaced if it is there.
        diagnosis: What was found.
        thumbnails: A small JPEG for each of `pictures_wanted`; a file without one is shown by its reason.
        versions: Version by package.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.
    """
    severities = [problem.severity for problem in diagnosis.problems]
    context = {
        "diagnosis": diagnosis,
        "kinds": ISSUE_TYPES,
        "tally": [(severities.count(severity), severity) for severity in SEVERITIES],
        "splits": list(diagnosis.classes),
        "most": max((n for counts in diagnosis.classes.values() for n in counts.values()), default=0) or 1,
        "most_shown": MOST_SHOWN,
        "reasons": {
            offender.path: offender.detail
            for problem in diagnosis.problems
            if problem.kind in UNREADABLE
            for offender in problem.offenders
        },
        "pictures": embedded(thumbnails),
        "versions": versions,
    }
    write_text(path, render("doctor.html", context))


def write_problems_table(path: Path, diagnosis: DatasetReport) -> None:
    """Write every offender as a row of a CSV file.

    Args:
        path: The file; its folder exists. It is replaced if it is there.
        diagnosis: What was found.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.
    """
    rows = [
        (offender.path, problem.kind, problem.severity, offender.detail)
        for problem in diagnosis.problems
        for offender in problem.offenders
    ]
    write_rows(path, COLUMNS, rows)
