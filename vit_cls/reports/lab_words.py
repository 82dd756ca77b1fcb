"""What a probe or a study found, in words: for the terminal and as Markdown."""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from vit_cls import formatting as fmt
from vit_cls.lab.results import LabResult, Table, plain
from vit_cls.stats.verdicts import Finding, in_points

MOST_LISTED = 20
"""Items of a list in the settings or the data that are written out; results.json has them all."""
LABEL = 21
"""Characters that labels of a finding's numbers take on the terminal, at least."""
WIDEST_CELL = 44
"""Characters of a cell on the terminal."""
MOST_COLUMNS = 10_000
"""A table is as wide as it is; the terminal wraps it."""


def clean(text: object) -> str:
    r"""A text that any file and any terminal takes, on one line.

    Args:
        text: Control characters, lone surrogates and code points that XML refuses are shown by their number.

    Example:
        >>> clean("a\nb\x01\udcff$")
        'a b\\x01\\udcff$'
    """
    line = " ".join(str(text).split())
    shown = (
        f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else "\\uffff" if c in "\ufffe\uffff" else c
        for c in line
    )
    return "".join(shown).encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(text: str, width: int) -> str:
    """The beginning of a text, and an ellipsis where something is missing.

    Example:
        >>> shorten("attention", 6)
        'atten…'
    """
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def finding_facts(finding: Finding) -> list[tuple[str, str]]:
    """Label and value of every number that a finding has.

    Example:
        >>> finding_facts(Finding("a", "cannot tell", "b", estimate=0.01, ci95=(-0.02, 0.04), margin=0.01))
        [('estimate', '+1.00 points, 95 % interval -2.00 to +4.00'), ('margin', '1.00 points')]
    """
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
    """Settings or data as names and texts; what lies deeper has a dot in its name.

    Example:
        >>> facts({"seeds": [0, 1], "model": {"pool": "cls", "depth": None}})
        [('seeds', '0, 1'), ('model.pool', 'cls'), ('model.depth', '-')]
    """
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


def lab_text(result: LabResult) -> str:
    """What the terminal shows: the verdict first, then the findings, then the first table.

    Args:
        result: Of a probe or a study.

    Example:
        >>> finding = Finding("max beats cls", "supported", "max is better than cls by 2.1 points.", p=0.001)
        >>> print(lab_text(LabResult("study heads", "Which head?", "max is best.", [finding])))
        max is best.
        <BLANKLINE>
        supported    max is better than cls by 2.1 points.
                     p of no difference   0.0010
    """
    lines = [clean(result.headline)]
    for finding in result.findings:
        lines += ["", *textwrap.wrap(clean(finding.sentence), 100, initial_indent=f"{finding.verdict:<13}",
                                     subsequent_indent=" " * 13)]  # fmt: skip
        told = finding_facts(finding)
        width = max([LABEL, *(len(label) + 2 for label, _ in told)])
        for label, value in told:
            start, rest = f"{'':<13}{label:<{width}}", " " * (13 + width)
            lines += textwrap.wrap(value, 100, initial_indent=start, subsequent_indent=rest)
    if result.tables:
        lines += ["", *_text_table(result.tables[0])]
    return "\n".join(lines)


def _text_table(table: Table) -> list[str]:
    rows, texts = table_cells(table)
    grid = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, text in zip(table.columns, texts, strict=True):
        cell = shorten(clean(name), WIDEST_CELL)
        grid.add_column(Text(cell), justify="left" if text else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(shorten(clean(cell), WIDEST_CELL)) for cell in row))
    console = Console(file=io.StringIO(), width=MOST_COLUMNS, color_system=None)
    with console.capture() as shown:
        console.print(grid)
    lines = [line.rstrip() for line in shown.get().splitlines()]
    return [clean(table.title), *lines, *textwrap.wrap(clean(table.note), 100)]


def lab_markdown(
    result: LabResult, figures: Sequence[tuple[str, str, str]], versions: Mapping[str, str]
) -> str:
    """The report as Markdown: its first line is the headline.

    Args:
        figures: Title, note and relative path of each figure; one without a path had nothing to draw.
    """
    headline = escape_markdown(result.headline) or fmt.DASH
    lines = [
        headline,
        "=" * min(len(headline), 80),
        "",
        f"{clean(result.kind)}: {escape_markdown(result.question)}",
    ]
    lines += ["", "## Findings", ""] if result.findings else []
    for finding in result.findings:
        lines.append(f"- **{finding.verdict}**: {escape_markdown(finding.sentence)}")
        lines.append(f"  - claim: {escape_markdown(finding.claim)}")
        lines += [f"  - {label}: {escape_markdown(value)}" for label, value in finding_facts(finding)]
    for table in result.tables:
        lines += ["", f"## {escape_markdown(table.title)}", "", *_markdown_table(table)]
        lines += ["", escape_markdown(table.note)] if table.note else []
    lines += ["", "## Figures"] if figures else []
    for title, note, path in figures:
        title = escape_markdown(title)
        lines += ["", f"![{title}]({path})" if path else f"{title}: nothing to draw."]
        lines += ["", f"{title}. {escape_markdown(note)}".rstrip()] if path else []
    for heading, given in (("Settings", result.settings), ("Data", result.data)):
        if given:
            lines += ["", f"## {heading}", ""]
            lines += [f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in facts(given)]
    if result.notes:
        lines += ["", "## Notes", "", *(f"- {escape_markdown(note)}" for note in result.notes)]
    named = ", ".join(f"{name} {version}" for name, version in versions.items()) or fmt.DASH
    lines += ["", f"Took {fmt.duration(result.seconds)}. Versions: {escape_markdown(named)}"]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    rows, texts = table_cells(table)
    head, *body = (
        [cell if cell == fmt.DASH else escape_markdown(cell).replace("|", r"\|") for cell in map(clean, row)]
        for row in (table.columns, *rows)
    )
    rule = [":---" if text else "---:" for text in texts]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]


def escape_markdown(text: object) -> str:
    r"""A text that Markdown shows as it is, and that stays easy to read as text.

    Example:
        >>> escape_markdown("p < 0.05 of <b>weight_decay</b> *and* __init__")
        'p < 0.05 of &lt;b>weight_decay&lt;/b> \\*and\\* \\_\\_init\\_\\_'
    """
    line = re.sub(r"([\\`*\[\]~])", r"\\\1", clean(text))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    return re.sub(r"^([#>+-]|\d+[.)])(?=\s|#|$)", lambda found: re.sub(r"(\W)$", r"\\\1", found[0]), line)
