"""Pages for people: one self-contained HTML file each, to read, print and send."""

from __future__ import annotations

import base64
import csv
import io
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined
from markupsafe import Markup

from vit_cls import formatting as fmt
from vit_cls.errors import RunError
from vit_cls.evaluation.results import Evaluation, ImageCase
from vit_cls.files import write_text
from vit_cls.reports.figures import Series, coverage_chart, line_chart, reliability_diagram, write_figures

DASH = "–"  # noqa: RUF001, a dash stands where there is no value
MATRIX_CLASSES = 30
"""Up to here the confusion matrix is drawn; beyond, cells would be too small to read."""
MOST_PAIRS = 20
MOST_FAILURES = 500
MOST_PICTURES = 12
"""Of the worst images, and of the most uncertain ones."""

CURVES = (
    ("loss", "Loss", {"val/loss": "validation", "train/loss": "training"}, False),
    ("accuracy", "Validation accuracy", {"val/acc1": "top-1", "val/acc5": "top-{k}"}, True),
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
    "data_wait": ("waiting for images", "percent"),
    "val/correct": ("correct", "count"),
    "val/images": ("images", "count"),
    "seconds": ("time", "duration"),
    "train_images_per_second": ("training images/s", "count"),
}
"""Heading and form of the columns of the epoch table; another one keeps its name."""

# A control character would vanish or be an error in HTML; it is shown as Python would write it.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), 127) if chr(i) not in "\n\t"}


@dataclass(frozen=True)
class ImageCases:
    """Images to look at.

    Args:
        worst: Given a wrong class, the most confident first.
        uncertain: The least confident ones.
        thumbnails: A small JPEG by path; a file without one is shown by its name.
    """

    worst: Sequence[ImageCase] = ()
    uncertain: Sequence[ImageCase] = ()
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)


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
    """
    if "result" not in record:
        raise RunError(
            f"a report needs a finished run, whose record has a result; this one's status is "
            f"{record.get('status', 'unknown')!r}. Continue it with --resume."
        )
    result = record["result"]
    counts: Mapping[str, int] = record.get("data", {}).get("train_counts", {})
    k = min(5, len(counts)) if counts else 5
    columns = []
    for name in dict.fromkeys(name for row in history for name in row):
        heading, form = EPOCH_COLUMNS.get(name, (name, "significant"))
        columns.append((name, heading.replace("{k}", str(k)), FORMS[form]))
    context = {
        "record": record,
        "result": result,
        "bounds": top1_ci95,
        "charts": _charts(history, k, result.get("best_epoch")),
        "columns": columns,
        "history": history,
        "counts": counts,
        "most": max(counts.values(), default=0) or 1,
        "run": shlex.quote(str(path.parent)),
        "words": [shlex.quote(word) for word in record.get("command") or []],
    }
    write_text(path, render("fit.html", context))
    write_figures(path.parent / "figures", context["charts"])


def write_evaluation_report(
    path: Path,
    result: Evaluation,
    *,
    model: str,
    data: str,
    failures: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
    cases: ImageCases | None = None,
    licence: str | None = None,
    source: str | None = None,
) -> None:
    """Write the page of an evaluation.

    Args:
        path: The file; its folder exists. It is replaced if it is there.
        result: The counts and metrics.
        model: The model as the user named it.
        data: The image folder as the user named it.
        failures: Path and reason of each image that could not be read; the first 500 are shown.
        versions: Version by package.
        cases: Images to show; None shows none.
        licence: Of the weights; a dash where it is not known.
        source: What the weights were fine-tuned from, if from any.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.
    """
    pairs = result.confused_pairs()
    calibration, cases = result.calibration, cases or ImageCases()
    charts = [
        ("Reliability", Markup(reliability_diagram("reliability", calibration.bins))),
        ("Accuracy at coverage", Markup(coverage_chart("coverage", calibration.curve.tolist()))),
    ]
    context = {
        "result": result,
        "model": model,
        "data": data,
        "scoring": result.scoring,
        "calibration": calibration,
        "charts": charts,
        "cases": cases,
        "pictures": embedded(cases.thumbnails),
        "licence": licence,
        "source": source,
        "matrix": _matrix(result) if len(result.per_class) <= MATRIX_CLASSES else None,
        "turned": max(len(row.name) for row in result.per_class) > 3,
        "matrix_classes": MATRIX_CLASSES,
        "pairs": pairs[:MOST_PAIRS],
        "num_pairs": len(pairs),
        "failures": failures[:MOST_FAILURES],
        "versions": versions,
    }
    write_text(path, render("evaluation.html", context))
    write_figures(path.parent / "figures", charts)


def _charts(history: Sequence[Mapping[str, float]], k: int, mark: int | None) -> list[tuple[str, Markup]]:
    """Title and chart of each of `CURVES` that the history has values for."""
    charts = []
    for name, title, labels, percent in CURVES:
        points = {c: [(row["epoch"], row[c]) for row in history if c in row] for c in labels}
        series = [Series(labels[c].format(k=k), points[c]) for c in labels if points[c]]
        if series:
            charts.append((title, Markup(line_chart(name, title, series, percent=percent, mark=mark))))
    return charts


def _matrix(result: Evaluation) -> list[list[tuple[int, str, float]]]:
    """Count, kind and strength of the tint of each cell; one mistake among many images must be seen too."""
    return [
        [
            (int(count), "hit" if i == j else "miss", 0.22 + 0.33 * math.sqrt(count / max(row.support, 1)))
            for j, count in enumerate(counts)
        ]
        for i, (row, counts) in enumerate(zip(result.per_class, result.confusion, strict=True))
    ]


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill a template; the page is valid UTF-8 whatever the names in it are.

    Args:
        template: A file of ``templates/``.
    """
    page = PAGES.get_template(template).render(context)
    # A path that is not valid UTF-8 holds lone surrogates; the page must be valid all the same.
    return page.translate(CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")


def embedded(thumbnails: Mapping[str, bytes]) -> dict[str, str]:
    """JPEG files by path as the text of a ``data:`` address."""
    return {path: base64.b64encode(jpeg).decode() for path, jpeg in thumbnails.items()}


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file; a file that is there is replaced as a whole."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def _absent(value: Any) -> bool:
    return value is None or isinstance(value, Undefined)


def _or_dash(write: Callable[[float], str]) -> Callable[[Any], str]:
    """A number, or the page's dash where there is none."""
    return lambda x: DASH if _absent(x) or not math.isfinite(x) else write(x)


def _minute(moment: str | None) -> str:
    text = moment or DASH
    return f"{text[:16].replace('T', ' ')} UTC" if text.endswith("+00:00") else text


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items()) or DASH


FORMS: dict[str, Callable[[Any], str]] = {
    "percent": _or_dash(lambda share: fmt.percent(share, 2, unit="\u00a0%")),
    "decimals": _or_dash(fmt.decimals),
    "significant": _or_dash(fmt.significant),
    "count": _or_dash(fmt.count),
    "p_value": _or_dash(fmt.p_value),
    "duration": _or_dash(fmt.duration),
    "minute": _minute,
    "versions": _versions,
}
"""How values are written, by the name that templates and tables use."""

PAGES = Environment(
    loader=PackageLoader("vit_cls.reports"),
    autoescape=True,
    undefined=ChainableUndefined,
    finalize=lambda value: DASH if _absent(value) else value,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= FORMS
