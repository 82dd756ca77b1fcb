"""The page of a finished training run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vit_cls.errors import RunError
from vit_cls.lab.results import Line, LineChart
from vit_cls.reports.figures import line_chart
from vit_cls.reports.html import FORMS, Files, figure_files, render

CURVES = (
    ("loss", "Loss", {"val/loss": "validation", "train/loss": "training"}, False),
    (
        "accuracy",
        "Validation accuracy",
        {
            "val/acc1": "top-1",
            "val/acc5": "top-{k}",
            "val/raw_acc1": "top-1, weights as they are",
            "val/ema_acc1": "top-1, averaged weights",
        },
        True,
    ),
    ("lr", "Learning rate at the end of the epoch", {"lr": "learning rate"}, False),
)
"""Name, title, column of each line with its label, whether they are shares."""

EPOCH_COLUMNS = {
    "epoch": ("epoch", "count"),
    "step": ("step", "count"),
    "lr": ("learning rate", "significant"),
    "train/loss": ("training loss", "decimals"),
    "val/loss": ("validation loss", "decimals"),
    "val/acc1": ("top-1", "percent"),
    "val/acc5": ("top-{k}", "percent"),
    "val/balanced_acc1": ("balanced accuracy", "percent"),
    "val/raw_acc1": ("top-1, raw", "percent"),
    "val/raw_loss": ("loss, raw", "decimals"),
    "val/ema_acc1": ("top-1, averaged", "percent"),
    "val/ema_loss": ("loss, averaged", "decimals"),
    "val/kept_ema": ("averaged kept", "count"),
    "data_wait": ("waiting for images", "percent"),
    "val/correct": ("correct", "count"),
    "val/images": ("images", "count"),
    "seconds": ("time", "duration"),
    "train_images_per_second": ("training images/s", "count"),
}
"""Heading and form of the columns of the epoch table; another one keeps its name."""


def fit_files(result: Any, *, versions: Mapping[str, str], record: Mapping[str, Any]) -> Files:
    """The page for the run folder, which tells how to use the model that lies beside it, and its curves.

    Args:
        record: What ``run.json`` holds, the versions included; a value that it lacks is shown as a dash.

    Raises:
        RunError: If the run has no result, for it has not finished.
    """
    if "result" not in record:
        raise RunError(
            f"a report needs a finished run, whose record has a result; this one's status is "
            f"{record.get('status', 'unknown')!r}. Continue it with --resume."
        )
    counts: Mapping[str, int] = record.get("data", {}).get("train_counts", {})
    k = min(5, len(counts)) if counts else 5
    columns = []
    whole_epochs_first = sorted(result.history, key=lambda row: "seconds" not in row)
    for name in dict.fromkeys(name for row in whole_epochs_first for name in row):
        heading, form = EPOCH_COLUMNS.get(name, (name, "significant"))
        columns.append((name, heading.replace("{k}", str(k)), FORMS[form]))
    best = _best(result.history, record["result"])
    charts = _charts(result.history, k, best)
    context = {
        "record": record,
        "result": record["result"],
        "bounds": result.top1_ci95,
        "charts": charts,
        "columns": columns,
        "history": result.history,
        "best": best,
        "counts": counts,
        "most": max(counts.values(), default=0) or 1,
        "run": shlex.quote(str(result.folder.path)),
        "words": [shlex.quote(word) for word in record.get("command") or []],
    }
    yield "report.html", render("fit.html", context, versions)
    yield from figure_files(charts)


def _best(history: Sequence[Mapping[str, float]], result: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The row of the model that was kept."""
    rows = [row for row in history if row["epoch"] == result.get("best_epoch")]
    at_step = [row for row in rows if row.get("step") == result.get("best_step")]
    return next(iter(at_step or rows), None)


def _charts(
    history: Sequence[Mapping[str, float]], k: int, best: Mapping[str, float] | None
) -> list[tuple[str, Markup]]:
    """Title and chart of each of `CURVES` that the history has values for."""
    charts = []
    places = _places(history)
    mark = next((place for place, row in zip(places, history, strict=True) if row is best), None)
    for name, title, labels, percent in CURVES:
        points = {
            c: [(place, row[c]) for place, row in zip(places, history, strict=True) if c in row]
            for c in labels
        }
        lines = [Line(labels[c].format(k=k), points[c]) for c in labels if points[c]]
        chart = line_chart(name, LineChart(title, "epoch", "", lines, percent=percent), mark=mark)
        if chart is not None:
            charts.append((title, Markup(chart)))
    return charts


def _places(history: Sequence[Mapping[str, float]]) -> list[float]:
    """Where rows stand on the axis of epochs: at their number, a validation within an epoch by its steps."""
    ends = [row for row in history if row.get("step") and "seconds" in row]
    steps = ends[0]["step"] / (ends[0]["epoch"] + 1) if ends else 1
    within = ["step" in row and "seconds" not in row for row in history]
    return [
        row["step"] / steps - 1 if part else row["epoch"] for row, part in zip(history, within, strict=True)
    ]
