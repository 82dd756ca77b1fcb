"""A comparison of models as a page with pictures, and the images they disagree on as a table."""

from __future__ import annotations

import math
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from vit_cls.evaluation.comparison import Comparison, Disagreement
from vit_cls.lab.results import ForestChart
from vit_cls.reports.figures import forest_chart
from vit_cls.reports.html import Files, Thumbnails, csv_text, embedded, figure_files, no_pictures, render
from vit_cls.stats.paired import FEW_DISCORDANT

MOST_SHOWN = 24
"""Images on the page; the table has all of them."""
MOST_PAIRS = 30
"""Pairs in the chart, and pairs with a table of counts; all are in the table of pairs."""


def comparison_files(
    result: Comparison,
    *,
    versions: Mapping[str, str],
    found: Sequence[Disagreement],
    data: str | None,
    computed: str = "",
    thumbnails: Thumbnails = no_pictures,
) -> Files:
    """``comparison.csv`` with every image that models disagree on, the page and its chart.

    Args:
        found: All images that models disagree on.
        data: The image folder as the user named it, or None where the answers came from files.
        computed: On which device and in which precision, where that is known.
        thumbnails: Where it gives none, the images are a table.
    """
    yield "comparison.csv", _disagreements(found, len(result.models))
    letters, drawn, shown = result.letters, result.pairs[:MOST_PAIRS], _shown(found)
    rows = [
        (f"{letters[pair.b]} minus {letters[pair.a]}", pair.difference, pair.difference_ci95)
        for pair in drawn
    ]
    chart = forest_chart("forest", ForestChart("Difference of accuracies", rows, drawn[0].margin))
    assert chart is not None
    context = {
        "result": result,
        "drawn": drawn,
        "chart": Markup(chart),
        "found": found,
        "shown": shown,
        "data": data,
        "computed": computed,
        "pictures": embedded(thumbnails([image.path for image in shown])),
        "few": FEW_DISCORDANT,
    }
    yield "report.html", render("compare.html", context, versions)
    yield from figure_files([("Differences", chart)])


def _shown(found: Sequence[Disagreement]) -> list[Disagreement]:
    """As many of each kind of disagreement, the most confident mistakes first; those all got wrong last."""
    kinds: dict[tuple[bool, ...], list[Disagreement]] = defaultdict(list)
    for image in found:
        kinds[image.right].append(image)
    ranked = []
    for right, members in kinds.items():
        members.sort(key=lambda image: (-_confidence_in_mistake(image), image.path))
        ranked += [(not any(right), rank, right, image) for rank, image in enumerate(members[:MOST_SHOWN])]
    ranked.sort(key=lambda row: row[:3])
    chosen = sorted(ranked[:MOST_SHOWN], key=lambda row: (row[0], row[2], row[1]))
    return [row[3] for row in chosen]


def _confidence_in_mistake(image: Disagreement) -> float:
    answers = zip(image.right, image.probabilities, strict=True)
    return max((p for right, p in answers if not right and math.isfinite(p)), default=0.0)


def _disagreements(found: Sequence[Disagreement], num_models: int) -> str:
    """A row an image; columns of the models, at most 26, begin with ``a_``, ``b_`` and so on."""
    letters = string.ascii_lowercase[:num_models]
    columns = [f"{letter}_{name}" for name in ("prediction", "probability") for letter in letters]
    rows = []
    for image in found:
        probabilities = [f"{p:.6f}" if math.isfinite(p) else "" for p in image.probabilities]
        rows.append([image.path, image.label, *image.predictions, *probabilities])
    return csv_text(["path", "label", *columns], rows)
