"""What a probe or a study found, in words for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vit_cls import formatting as fmt
from vit_cls.lab.results import Table, plain
from vit_cls.reports.text import clean
from vit_cls.stats.verdicts import Finding, in_points

MOST_LISTED = 20
"""Items of a list in the settings or the data that are written out; results.json has them all."""


def finding_facts(finding: Finding) -> list[tuple[str, str]]:
    """Label and value of every number that a finding has."""
    signed = finding.margin is not None or finding.smallest_detectable is not None  # then it is a difference
    percent, unit = in_points(finding.unit), clean(finding.unit)

    def written(value: float | None, sign: bool = False) -> str:
        return fmt.percent(value, 2, unit="", signed=sign) if percent else fmt.significant(value, signed=sign)

    facts = []
    if finding.estimate is not None or finding.ci95 is not None:
        text = f"{written(finding.estimate, signed)} {unit}"
        if finding.ci95 is not None:
            text += f", {fmt.interval(finding.ci95, lambda bound: written(bound, signed))}"
        facts.append(("estimate", text))
    if finding.p is not None:
        null = f"a difference of {written(finding.null, True)} {unit}" if finding.null else "no difference"
        facts.append((f"p of {null}", fmt.p_value(finding.p)))
    if finding.p_holm is not None:
        facts.append(("p, Holm-adjusted", fmt.p_value(finding.p_holm)))
    if finding.p_equivalence is not None:
        facts.append(("p of equivalence", fmt.p_value(finding.p_equivalence)))
    if finding.margin is not None:
        facts.append(("margin", f"{written(finding.margin)} {unit}"))
    if finding.smallest_detectable is not None:
        least = written(finding.smallest_detectable)
        facts.append(("smallest detectable", f"{least} {unit}, with a power of 80 %"))
    if finding.needed:
        facts.append(("needed to tell", clean(finding.needed)))
    if finding.counts:
        facts.append(
            ("counts", ", ".join(f"{fmt.significant(n)} {clean(name)}" for name, n in finding.counts.items()))
        )
    return facts


def table_cells(table: Table) -> tuple[list[list[str]], list[bool]]:
    """Every cell of a table as it is written, and for each column whether it holds text.

    Raises:
        ValueError: If a row has more or fewer cells than there are columns.

    Example:
        >>> table_cells(Table("t", ["head", "top-1 (%)", "n"], [["cls", 0.9321, 540], ["gap", None, 5400]]))
        ([['cls', '93.21', '540'], ['gap', '-', '5,400']], [True, False, False])
    """
    rows = [[plain(cell) for cell in row] for row in table.rows]
    for row in rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"each row of the table {table.title!r} must have {len(table.columns)} cells, one a column; "
                f"got {len(row)}: {row!r}."
            )
    shares = [str(name).endswith("(%)") for name in table.columns]
    texts = [any(isinstance(row[i], (str, bool)) for row in rows) for i in range(len(shares))]
    columns = [_column([row[i] for row in rows], share) for i, share in enumerate(shares)]
    return [list(row) for row in zip(*columns, strict=True)] if rows else [], texts


def _column(cells: Sequence[Any], share: bool) -> list[str]:
    """Cells of a column; numbers of like size get the same number of decimals."""
    sizes = [abs(one) for one in cells if isinstance(one, float)]
    if share or not sizes or min((s for s in sizes if s), default=0.0) < 1e-3 or max(sizes) >= 1e3:
        return [_cell(one, share) for one in cells]
    decimals = max(len(f"{size:.4g}".partition(".")[2]) for size in sizes)
    form = f".{min(decimals, 4)}f"
    return [format(one, form) if isinstance(one, float) else _cell(one, share) for one in cells]


def _cell(cell: str | int | float | None, share: bool) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if cell is None or isinstance(cell, (int, float)):
        return fmt.percent(cell, 2, unit="") if share else fmt.significant(cell)
    return clean(cell) or fmt.DASH


def facts(given: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings or data as names and texts; what lies deeper has a dot in its name."""
    found: list[tuple[str, str]] = []
    for key, value in plain(given).items():
        name = f"{prefix}{clean(key)}"
        if isinstance(value, Mapping) and value:
            found += facts(value, f"{name}.")
        elif isinstance(value, list):
            shown = ", ".join(_fact(one) for one in value[:MOST_LISTED])
            rest = len(value) - MOST_LISTED
            found.append(
                (
                    name,
                    (shown or "none") + (f", and {fmt.count(rest)} more in results.json" if rest > 0 else ""),
                )
            )
        else:
            found.append((name, _fact(value)))
    return found


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k)} {_fact(one)}" for k, one in value.items()) or "none"
    if isinstance(value, list):
        return "[" + ", ".join(_fact(one) for one in value) + "]"
    # Settings are to be typed again: no comma between thousands, no digit lost.
    return fmt.DASH if value is None else repr(value) if isinstance(value, float) else clean(value)
