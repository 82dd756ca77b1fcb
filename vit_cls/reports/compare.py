"""A comparison of models as text, as a page with pictures, and the images they disagree on as a table."""

from __future__ import annotations

import math
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from vit_cls import formatting as fmt
from vit_cls.evaluation.comparison import EQUIVALENT, Comparison, Disagreement, Pair
from vit_cls.files import write_text
from vit_cls.lab.results import ForestChart
from vit_cls.reports.figures import forest_chart, write_figures
from vit_cls.reports.html import embedded, render, write_rows
from vit_cls.stats.paired import FEW_DISCORDANT
from vit_cls.stats.verdicts import CANNOT_TELL

MOST_SHOWN = 24
"""Images on the page; the table has all of them."""
MOST_PAIRS = 30
"""Pairs in the chart, and pairs with a table of counts; all are in the table of pairs."""


def comparison_text(result: Comparison) -> str:
    """What the terminal shows: the verdict first."""
    letters = dict(zip((model.name for model in result.models), string.ascii_uppercase, strict=False))
    lines = [headline(result)]
    for model in result.models:
        lines.append(
            f"{letters[model.name]}  {model.correct} of {model.scored} images right, top-1 "
            f"{fmt.decimals(model.top1)}, {fmt.interval(model.top1_ci95)}: {model.name}"
        )
    for pair in result.pairs:
        lines += ["", *_pair_lines(pair, letters[pair.a], letters[pair.b], len(result.pairs))]
    # A name that is not valid UTF-8 holds lone surrogates, which no terminal takes.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def _pair_lines(pair: Pair, a: str, b: str, num_pairs: int) -> list[str]:
    low, high = (fmt.decimals(bound, signed=True) for bound in pair.difference_ci95)
    adjusted = f"; {fmt.p_value(pair.p_holm)} adjusted over {num_pairs} pairs" if num_pairs > 1 else ""
    rows = (
        (
            f"difference {b} - {a}",
            fmt.decimals(pair.difference, signed=True),
            f"95 % {pair.interval} interval {low} to {high}",
        ),
        ("p of equal accuracy", fmt.p_value(pair.p_mcnemar_mid), f"McNemar mid-p{adjusted}"),
        (
            "p of equivalence",
            fmt.p_value(pair.p_equivalence),
            f"two one-sided tests of the margin {pair.margin:g}",
        ),
        (
            "smallest detectable",
            fmt.decimals(pair.smallest_detectable),
            "by this many images, with a power of 80 %",
        ),
    )
    return [
        *([pair.sentence] if num_pairs > 1 else []),
        f"{pair.images} images that both could read ({pair.failed} left out): both right {pair.both_right}, "
        f"only {a} {pair.only_a}, only {b} {pair.only_b}, both wrong {pair.both_wrong}",
        *(f"{label:<20}  {value:>8}   {meaning}" for label, value, meaning in rows),
    ]


def headline(result: Comparison) -> str:
    """The verdict in one sentence."""
    if len(result.pairs) == 1:
        return result.pairs[0].sentence
    for model in result.models:
        own = [pair for pair in result.pairs if model.name in (pair.a, pair.b)]
        if all(pair.verdict == f"{model.name} is better" for pair in own):
            return f"{model.name} is better than each of the others."
    verdicts = [pair.verdict for pair in result.pairs]
    same, unknown = verdicts.count(EQUIVALENT), verdicts.count(CANNOT_TELL)
    return (
        f"None is better than all others: of {len(verdicts)} pairs, {len(verdicts) - same - unknown} differ, "
        f"{same} {'is' if same == 1 else 'are'} equivalent within the margin, {unknown} cannot be told apart."
    )


def pictures_wanted(found: Sequence[Disagreement]) -> list[str]:
    """Paths of the images that the page shows.

    Args:
        found: All images that models disagree on.
    """
    return [one.path for one in _shown(found)]


def _shown(found: Sequence[Disagreement]) -> list[Disagreement]:
    """As many of each kind of disagreement, the most confident mistakes first; those all got wrong last."""
    kinds: dict[tuple[bool, ...], list[Disagreement]] = defaultdict(list)
    for one in found:
        kinds[one.right].append(one)
    ranked = []
    for right, members in kinds.items():
        members.sort(key=lambda one: (-_confidence_in_mistake(one), one.path))
        ranked += [(not any(right), rank, right, one) for rank, one in enumerate(members[:MOST_SHOWN])]
    ranked.sort(key=lambda row: row[:3])
    chosen = sorted(ranked[:MOST_SHOWN], key=lambda row: (row[0], row[2], row[1]))
    return [row[3] for row in chosen]


def _confidence_in_mistake(one: Disagreement) -> float:
    answers = zip(one.right, one.probabilities, strict=True)
    return max((p for right, p in answers if not right and math.isfinite(p)), default=0.0)


def write_compare_report(
    path: Path,
    result: Comparison,
    found: Sequence[Disagreement],
    *,
    data: str | None,
    thumbnails: Mapping[str, bytes],
    versions: Mapping[str, str],
) -> None:
    """Write the page of a comparison.

    Args:
        data: The image folder as the user named it, or None where the answers came from files.
        thumbnails: A small JPEG for each of `pictures_wanted`; without any, they are a table.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.
    """
    letters = dict(zip((model.name for model in result.models), string.ascii_uppercase, strict=False))
    drawn = result.pairs[:MOST_PAIRS]
    rows = [
        (f"{letters[pair.b]} minus {letters[pair.a]}", pair.difference, pair.difference_ci95)
        for pair in drawn
    ]
    chart = forest_chart("forest", ForestChart("Difference of accuracies", rows, drawn[0].margin))
    context = {
        "result": result,
        "headline": headline(result),
        "letters": letters,
        "drawn": drawn,
        "chart": Markup(chart),
        "found": found,
        "shown": _shown(found),
        "data": data,
        "pictures": embedded(thumbnails),
        "few": FEW_DISCORDANT,
        "versions": versions,
    }
    write_text(path, render("compare.html", context))
    write_figures(path.parent / "figures", [("Differences", chart)])


def write_disagreements(path: Path, found: Sequence[Disagreement], num_models: int) -> None:
    """Write the images that models disagree on as rows of a CSV file.

    Args:
        num_models: At most 26: their columns begin with ``a_``, ``b_`` and so on.

    Raises:
        OSError: If the file cannot be written; a file that was there stays.
    """
    letters = string.ascii_lowercase[:num_models]
    columns = [f"{letter}_{name}" for name in ("prediction", "probability") for letter in letters]
    rows = [
        [
            one.path,
            one.label,
            *one.predictions,
            *(f"{p:.6f}" if math.isfinite(p) else "" for p in one.probabilities),
        ]
        for one in found
    ]
    write_rows(path, ["path", "label", *columns], rows)
