"""What ``evaluate`` found, as tables and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from vit_cls.evaluation.predictions import Predictions
from vit_cls.evaluation.results import Evaluation, tables, uncertain_images, worst_images
from vit_cls.reports.figures import coverage_chart, reliability_diagram
from vit_cls.reports.html import Files, Thumbnails, embedded, figure_files, no_pictures, render

MATRIX_CLASSES = 30
"""Up to here the confusion matrix is drawn; beyond, cells would be too small to read."""
MOST_PAIRS = 20
MOST_FAILURES = 500
MOST_PICTURES = 12
"""Of the worst images, and of the most uncertain ones."""


def evaluation_files(
    result: Evaluation,
    *,
    versions: Mapping[str, str],
    predictions: Predictions,
    model: str,
    data: str,
    thumbnails: Thumbnails = no_pictures,
    licence: str | None = None,
    source: str | None = None,
) -> Files:
    """``predictions.csv``, ``per_class.csv``, the page and its charts.

    Args:
        model: The model as the user named it.
        data: The images, in words.
        licence: Of the weights; a dash where it is not known.
        source: What the weights were fine-tuned from, if from any.
    """
    yield from tables(predictions, result)
    worst = worst_images(predictions, MOST_PICTURES)
    uncertain = uncertain_images(predictions, MOST_PICTURES)
    failures = [(predictions.index.paths[i], reason) for i, reason in predictions.errors.items()]
    pairs, calibration = result.confused_pairs(), result.calibration
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
        "worst": worst,
        "uncertain": uncertain,
        "pictures": embedded(thumbnails(list(dict.fromkeys(case.path for case in (*worst, *uncertain))))),
        "licence": licence,
        "source": source,
        "matrix": _matrix(result) if len(result.per_class) <= MATRIX_CLASSES else None,
        "turned": max(len(row.name) for row in result.per_class) > 3,
        "matrix_classes": MATRIX_CLASSES,
        "pairs": pairs[:MOST_PAIRS],
        "num_pairs": len(pairs),
        "failures": failures[:MOST_FAILURES],
    }
    yield "report.html", render("evaluation.html", context, versions)
    yield from figure_files(charts)


def _matrix(result: Evaluation) -> list[list[tuple[int, str, float]]]:
    """Count, kind and strength of the tint of each cell; one mistake among many images must be seen too."""
    return [
        [
            (int(count), "hit" if i == j else "miss", 0.22 + 0.33 * math.sqrt(count / max(row.support, 1)))
            for j, count in enumerate(counts)
        ]
        for i, (row, counts) in enumerate(zip(result.per_class, result.confusion, strict=True))
    ]
