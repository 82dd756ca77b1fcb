"""What a probe or a study found: findings, tables and figures as plain data, for JSON and for pages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vit_cls.stats.verdicts import Finding

MOST_LINES = 8
"""Lines that a chart can draw so that they can be told apart."""


@dataclass(frozen=True)
class Table:
    """Rows to be read by people.

    Args:
        title: What the table shows.
        columns: A header for each column; ``(%)`` at its end writes shares as percentages.
        rows: Texts, counts and numbers; None is a dash.
        note: How to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    note: str = ""


class Estimated(Protocol):
    """What a forest draws: a `Finding`, or a difference or a mean of `vit_cls.lab.statistics`."""

    @property
    def estimate(self) -> float | None:
        """A share."""

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Its 95 % interval."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: What it is.
        points: ``(x, y)`` from left to right.
        bands: Lower and upper bound of each ``y``; None draws none.
    """

    label: str
    points: Sequence[tuple[float, float]]
    bands: Sequence[tuple[float, float]] | None = None

    @classmethod
    def of(cls, label: str, estimates: Mapping[Any, Estimated]) -> Line:
        """A line with the intervals of its points as a band.

        Args:
            label: What it is.
            estimates: By ``x``; each has an estimate and an interval.
        """
        found = [(float(x), one.estimate, one.ci95) for x, one in estimates.items()]
        points = [(x, y) for x, y, _ in found if y is not None]
        return cls(label, points, [bounds for _, _, bounds in found if bounds is not None])


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis.

    Args:
        title: What the chart shows.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        lines: At most eight.
        percent: Whether ``y`` are shares, written as percentages.
        log_x: Whether the horizontal axis is logarithmic.
        marks: Horizontal lines to compare with, by label.
        note: How to read it.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    percent: bool = True
    log_x: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ForestChart:
    """Differences below each other, with intervals.

    Args:
        title: What the chart shows.
        rows: Label, difference as a share, and its interval.
        margin: Half the width of the band around zero, as a share.
        note: How to read it.
    """

    title: str
    rows: Sequence[tuple[str, float, tuple[float, float]]]
    margin: float
    note: str = ""


def forest(
    title: str, estimates: Mapping[str, Estimated], margin: float, note: str = ""
) -> list[ForestChart]:
    """Estimates with their intervals below each other, those that have both.

    Args:
        title: What the chart shows.
        estimates: By label.
        margin: The largest difference that does not matter.
        note: How to read it.

    Returns:
        One chart, or none where there is nothing to show.
    """
    rows = [
        (label, one.estimate, one.ci95)
        for label, one in estimates.items()
        if one.estimate is not None and one.ci95 is not None
    ]
    return [ForestChart(title, rows, margin, note)] if rows else []


@dataclass(frozen=True)
class ScatterChart:
    """Named points; the Pareto front of ``y`` high and ``x`` low is marked.

    Args:
        title: What the chart shows.
        x_label: Name of the horizontal axis, the cost.
        y_label: Name of the vertical axis.
        points: Label, ``x``, ``y`` and the interval of ``y``.
        percent: Whether ``y`` are shares.
        log_x: Whether the horizontal axis is logarithmic.
        note: How to read it.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[tuple[str, float, float, tuple[float, float] | None]]
    percent: bool = True
    log_x: bool = True
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A grid of values.

    Args:
        title: What the map shows.
        values: Rows of values; NaN leaves a cell empty.
        row_labels: A label for each row; None numbers none.
        column_labels: A label for each column; None numbers none.
        percent: Whether values are shares.
        limits: Ends of the colour scale; None takes those of the values.
        note: How to read it.
    """

    title: str
    values: Sequence[Sequence[float]]
    row_labels: Sequence[str] | None = None
    column_labels: Sequence[str] | None = None
    percent: bool = True
    limits: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """A grid of small images.

    Args:
        title: What the pictures show.
        columns: A header for each column.
        rows: Images, uint8, shape ``(height, width, 3)``; None leaves a cell empty.
        row_labels: A label for each row.
        note: How to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[np.ndarray | None]]
    row_labels: Sequence[str] | None = None
    note: str = ""


Figure = LineChart | ForestChart | ScatterChart | HeatMap | Pictures


@dataclass(frozen=True)
class LabResult:
    """Everything that one probe or study has to say.

    Args:
        kind: The words that were typed, such as ``probe linear`` or ``study heads``.
        question: What was asked, as a question.
        headline: The verdict in one sentence; the first line of every report.
        findings: Claims and verdicts, the most important first.
        tables: In reading order.
        figures: In reading order.
        settings: Everything that the numbers depend on: model, options, margin, seeds.
        data: Where the images came from, with the counts of each part and of failures.
        values: Numbers for scripts, by name; plain data.
        predictions: Raw per-image predictions, from which the statistics can be done again; plain data.
        notes: Sentences a reader needs to judge the numbers.
        seconds: Wall time.
    """

    kind: str
    question: str
    headline: str
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0

    def to_dict(self, *, predictions: bool = False) -> dict[str, Any]:
        """The result as plain data that JSON can hold: no pictures, and None for numbers that are not finite.

        Args:
            predictions: Whether the per-image predictions come along.
        """
        names = ["kind", "question", "headline", "settings", "data", "values", "notes", "seconds"]
        found = {name: getattr(self, name) for name in names}
        found |= {
            name: [dataclasses.asdict(one) for one in getattr(self, name)] for name in ("findings", "tables")
        }
        drawn = [one for one in self.figures if not isinstance(one, Pictures)]
        found["figures"] = [{"kind": type(one).__name__, **dataclasses.asdict(one)} for one in drawn]
        if predictions:
            found["predictions"] = self.predictions
        return {key: plain(value) for key, value in found.items()}


def plain(value: Any) -> Any:
    """The same as data that JSON can hold.

    Args:
        value: Numbers, texts, arrays, and containers of them.

    Example:
        >>> plain({"a": np.float32(0.5), "b": (1, math.nan), "c": np.arange(2)})
        {'a': 0.5, 'b': [1, None], 'c': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
