"""What is wrong with an image folder, as a table and as a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_cls.data.doctor.issues import ISSUE_TYPES, SEVERITIES, UNREADABLE, DatasetReport
from vit_cls.reports.html import Files, Thumbnails, csv_text, embedded, no_pictures, render

MOST_SHOWN = 24
"""Offenders of one kind on the page; the table has all of them."""
COLUMNS = ("path", "kind", "severity", "detail")


def dataset_files(
    diagnosis: DatasetReport, *, versions: Mapping[str, str], thumbnails: Thumbnails = no_pictures
) -> Files:
    """``problems.csv`` with every offender, and the page; a file without a picture is shown by its reason."""
    rows = [
        (offender.path, problem.kind, problem.severity, offender.detail)
        for problem in diagnosis.problems
        for offender in problem.offenders
    ]
    yield "problems.csv", csv_text(COLUMNS, rows)
    shown = (
        path
        for problem in diagnosis.problems
        if ISSUE_TYPES[problem.kind].pictures
        for offender in problem.offenders[:MOST_SHOWN]
        for path in (offender.path, offender.other)
        if path is not None
    )
    severities = [problem.severity for problem in diagnosis.problems]
    context: dict[str, Any] = {
        "diagnosis": diagnosis,
        "kinds": ISSUE_TYPES,
        "tally": [(severities.count(severity), severity) for severity in SEVERITIES],
        "splits": list(diagnosis.classes),
        "most": max((n for counts in diagnosis.classes.values() for n in counts.values()), default=0) or 1,
        "most_shown": MOST_SHOWN,
        "reasons": {path: detail for path, kind, _, detail in rows if kind in UNREADABLE},
        "pictures": embedded(thumbnails(list(dict.fromkeys(shown)))),
    }
    yield "report.html", render("doctor.html", context, versions)
