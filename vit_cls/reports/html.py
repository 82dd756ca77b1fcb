"""Pages for people: one self-contained HTML file each, to read, print and send."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup

from vit_cls.errors import RunError
from vit_cls.evaluation.intervals import wilson_interval
from vit_cls.evaluation.metrics import ECE_BINS, Evaluation
from vit_cls.files import write_text
from vit_cls.reports.figures import Series, line_chart

DASH = "–"  # noqa: RUF001, a dash stands where there is no value
MATRIX_CLASSES = 30
"""Up to here the confusion matrix is drawn; beyond, cells would be too small to read."""
MOST_PAIRS = 20
MOST_FAILURES = 500

CURVES = (
    ("loss", "Loss", {"val/loss": "validation", "train/loss": "training"}, False),
    ("accuracy", "Validation accuracy", {"val/acc1": "top-1", "val/acc5": "top-{k}"}, True),
    ("lr", "Learning rate at the end of the epoch", {"lr": "learning rate"}, False),
)
"""Name, title, column of each line with its label, whether they are shares."""

# A control character would vanish or be an error in HTML; it is shown as Python would write it.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), 127) if chr(i) not in "\n\t"}


def write_fit_report(
    path: Path,
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    top1_ci95: tuple[float, float],
) -> None:
    """Write the page of a finished training run.

    Args:
        path: The file, in the run folder: the page tells how to use the model that lies beside it. It is
            replaced if it is there.
        record: What ``run.json`` holds; a value that it lacks is shown as a dash.
        history: The rows of ``metrics.csv``, one an epoch, shares in [0, 1].
        top1_ci95: 95 % interval of the best epoch's top-1 accuracy, in [0, 1].

    Raises:
        RunError: If the run has no result, for it has not finished.
        OSError: If the file cannot be written; a file that was there stays.

    Example:
        >>> import tempfile
        >>> result = {"epochs": 1, "best_epoch": 0, "correct": 9, "images": 12, "top5": 1.0, "seconds": 3.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder) / "report.html"
        ...     write_fit_report(page, {"result": result}, [{"epoch": 0, "val/acc1": 0.75}], (0.468, 0.911))
        ...     "9 of 12" in page.read_text(encoding="utf-8")
        True
    """
    if "result" not in record:
        raise RunError(
            f"a report needs a finished run, whose record has a result; this one's status is "
            f"{record.get('status', 'unknown')!r}. Continue it with --resume."
        )
    result, data, model = record["result"], record.get("data", {}), record.get("model", {})
    counts: Mapping[str, int] = data.get("train_counts", {})
    k = min(5, len(counts)) if counts else 5
    columns = dict.fromkeys(name for row in history for name in row)
    charts = [
        (title, chart)
        for name, title, labels, percent in CURVES
        if (chart := _curve(name, title, labels, percent, history, k, result["best_epoch"]))
    ]
    context = {
        "record": record,
        "data": data,
        "model": model,
        "result": result,
        "k": k,
        "bounds": top1_ci95,
        "charts": charts,
        "columns": [(name, *_column(name, k)) for name in columns],
        "history": history,
        "counts": counts,
        "most": max(counts.values(), default=0) or 1,
        "run": shlex.quote(str(path.parent)),
        "command": shlex.join(record.get("command") or []),
    }
    write_text(path, _render("fit.html", context))


def write_evaluation_report(
    path: Path,
    result: Evaluation,
    *,
    model: str,
    data: str,
    failures: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
) -> None:
    """Write the page of an evaluation.

    Args:
        path: The file; its folder exists. It is replaced if it is there.
        result: The counts and metrics.
        model: The model as the user named it.
        data: The image folder as the user named it.
        failures: Path and reason of each image that could not be read; the first 500 are shown.
        versions: Version by package.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.

    Example:
        >>> import tempfile
        >>> from vit_cls.evaluation.metrics import ClassMetrics
        >>> rows = [ClassMetrics("cat", 3, 3, 4), ClassMetrics("dog", 2, 1, 1)]
        >>> counts = np.array([[3, 0], [1, 1]])
        >>> result = Evaluation(5, 0, 4, 0.8, (0.376, 0.964), 1.0, 0.75, 0.4, 0.1, rows, counts, 0.2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder) / "report.html"
        ...     write_evaluation_report(
        ...         page, result, model="runs/a", data="pets/test", failures=[], versions={}
        ...     )
        ...     "4 of 5" in page.read_text(encoding="utf-8")
        True
    """
    intervals = [
        wilson_interval(row.correct, row.support) if row.support else None for row in result.per_class
    ]
    pairs = _confused_pairs(result)
    context = {
        "result": result,
        "model": model,
        "data": data,
        "k": min(5, len(result.per_class)),
        "metrics": _metrics(result),
        "classes": list(zip(result.per_class, intervals, strict=True)),
        "matrix": _matrix(result) if len(result.per_class) <= MATRIX_CLASSES else None,
        "matrix_classes": MATRIX_CLASSES,
        "pairs": pairs[:MOST_PAIRS],
        "num_pairs": len(pairs),
        "failures": failures[:MOST_FAILURES],
        "versions": versions,
    }
    write_text(path, _render("evaluation.html", context))


def _curve(
    name: str,
    title: str,
    labels: Mapping[str, str],
    percent: bool,
    history: Sequence[Mapping[str, float]],
    k: int,
    mark: int,
) -> Markup | None:
    """One chart of the columns that the history has; None where it has none of them."""
    series = []
    for column, label in labels.items():
        points = [(row["epoch"], row[column]) for row in history if column in row]
        if points:
            series.append(Series(label.format(k=k), points))
    return Markup(line_chart(name, title, series, percent=percent, mark=mark)) if series else None


def _column(name: str, k: int) -> tuple[str, Callable[[float | None], str]]:
    """Heading and form of a column of the epoch table; one that is not known keeps its name."""
    if name not in FIT_COLUMNS:
        return name, _general
    heading, form = FIT_COLUMNS[name]
    return heading.format(k=k), form


def _metrics(result: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each metric."""
    k = min(5, len(result.per_class))
    speed = result.images / result.seconds if result.seconds else None
    low, high = result.top1_ci95
    return [
        (
            "top-1",
            _percent(result.top1),
            f"correct over scored; 95 % interval {_percent(low)} to {_percent(high)}",
        ),
        (f"top-{k}", _percent(result.top5), f"the true class is among the first {k} predictions"),
        ("balanced accuracy", _percent(result.balanced_accuracy), "mean recall of the classes in the folder"),
        (
            "NLL",
            _decimals(result.nll),
            "mean negative log likelihood of the true class, in nats; lower is better",
        ),
        (
            "ECE",
            _decimals(result.ece),
            f"expected calibration error, the mean gap of confidence and accuracy, {ECE_BINS} bins; best: 0",
        ),
        ("time", _duration(result.seconds), "loading and predicting"),
        ("speed", f"{_count(speed)} images/s", "files that could not be read included"),
    ]


def _confused_pairs(result: Evaluation) -> list[tuple[str, str, int, int]]:
    """True class, predicted class, images, support; the most frequent first, then in class order."""
    wrong = result.confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    order = np.argsort(-wrong[rows, columns], kind="stable")
    classes = result.per_class
    return [
        (classes[i].name, classes[j].name, int(wrong[i, j]), classes[i].support)
        for i, j in zip(rows[order], columns[order], strict=True)
    ]


def _matrix(result: Evaluation) -> list[list[tuple[int, str, float]]]:
    """Count, kind and strength of the tint of each cell; one mistake among many images must be seen too."""
    return [
        [
            (int(count), "hit" if i == j else "miss", 0.12 + 0.43 * math.sqrt(count / max(row.support, 1)))
            for j, count in enumerate(counts)
        ]
        for i, (row, counts) in enumerate(zip(result.per_class, result.confusion, strict=True))
    ]


def _render(template: str, context: Mapping[str, Any]) -> str:
    page = PAGES.get_template(template).render(context)
    # A path that is not valid UTF-8 holds lone surrogates; the page must be valid all the same.
    return page.translate(CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")


def _written(value: float | None, form: str) -> str:
    absent = value is None or isinstance(value, Undefined) or not math.isfinite(value)
    return DASH if absent else form.format(value)


def _percent(value: float | None) -> str:
    return _written(None if value is None else 100 * value, "{:.2f} %")


def _decimals(value: float | None, places: int = 4) -> str:
    return _written(value, f"{{:.{places}f}}")


def _count(value: float | None) -> str:
    return _written(value, "{:,.0f}")


def _general(value: float | None) -> str:
    return _written(value, "{:.4g}")


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds) or seconds < 60:
        return _written(seconds, "{:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _versions(versions: Mapping[str, str] | None) -> str:
    parts: Iterable[str] = (f"{name} {version}" for name, version in (versions or {}).items())
    return ", ".join(parts) or DASH


FIT_COLUMNS = {
    "epoch": ("epoch", _count),
    "step": ("step", _count),
    "lr": ("learning rate", _general),
    "train/loss": ("training loss", _decimals),
    "val/loss": ("validation loss", _decimals),
    "val/acc1": ("top-1", _percent),
    "val/acc5": ("top-{k}", _percent),
    "val/correct": ("correct", _count),
    "val/images": ("images", _count),
    "seconds": ("time", _duration),
    "train_images_per_second": ("training images/s", _count),
}
"""Heading and form of the columns of the epoch table; another one keeps its name."""

PAGES = Environment(
    loader=PackageLoader("vit_cls.reports"),
    autoescape=True,
    finalize=lambda value: DASH if value is None or isinstance(value, Undefined) else value,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= {
    "percent": _percent,
    "decimals": _decimals,
    "count": _count,
    "general": _general,
    "duration": _duration,
    "versions": _versions,
}
