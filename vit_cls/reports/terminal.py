"""Results as a terminal shows them: the answer first; wrapped where a person reads, whole lines in a pipe."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from vit_cls import formatting as fmt
from vit_cls.reports.text import clean
from vit_cls.texts import printable

# Rooms of results are imported where they are needed, or not at all: some load for seconds.

UNLIMITED = 100_000
"""Columns of what is no terminal: nothing is wrapped there."""
MOST_MISSING = 20

# Keys of the catalogue, and what stands above them.
MODEL_KEYS = "name kind parameters img_size patch_size tokens pool normalisation tags licence"
MODEL_HEADS = "name kind params     input    patch      tokens pool mean/std      tags licence"
TAG_KEYS = "tag img_size head normalisation crop_pct crop_mode family licence"
TAG_HEADS = "tag input   head mean/std      crop     mode      family licence"
NO_LICENCE = "not stated"


def render(shown: Sequence[RenderableType], stream: TextIO) -> str:
    """What to print.

    Args:
        shown: Tables, and lines of text, in which nothing is markup.
        stream: Where it goes: a terminal gets its own width and bold headlines, anything else whole lines
            without trailing spaces; what its encoding lacks is escaped.
    """
    on_terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else UNLIMITED
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=on_terminal, highlight=False, emoji=False)
    for part in shown:
        console.print(_line(part) if isinstance(part, str) else part)
    lines = "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return lines.encode(encoding, "backslashreplace").decode(encoding)


def terminal(result: Any) -> list[RenderableType]:
    """A result for people.

    Args:
        result: Of one of the classes of `SHOWN`.

    Returns:
        Lines and tables for `render`, the answer first.
    """
    return list(SHOWN[type(result).__name__](result))


def text(result: Any) -> str:
    """`terminal` as it stands in a pipe."""
    return render(terminal(result), io.StringIO())


def _line(words: str, style: str = "") -> Text:
    return Text(printable(words), style=style)


def _grid(
    rows: Sequence[Sequence[str]], gap: int = 2, justify: str = "", min_widths: Sequence[int] = ()
) -> Table:
    """Columns without lines or heads."""
    grid = Table.grid(padding=(0, gap, 0, 0))
    for i, side in enumerate(justify or "l" * len(rows[0])):
        least = min_widths[i] if i < len(min_widths) else None
        grid.add_column(justify="right" if side == "r" else "left", overflow="fold", min_width=least)
    for row in rows:
        grid.add_row(*map(_line, row))
    return grid


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[bool]) -> Table:
    """Columns with a head each; numbers stand right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, is_text in zip(columns, texts, strict=True):
        table.add_column(_line(clean(name)), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_line(clean(cell)) for cell in row))
    return table


def _fit(result: Any) -> Iterator[RenderableType]:
    averaged = ", averaged weights" if result.weights == "ema" else ""
    yield _line(
        f"{result.correct} of {result.images} validation images right: top-1 {fmt.decimals(result.top1)} "
        f"({fmt.interval(result.top1_ci95)}), best of {result.epochs} epochs "
        f"(epoch {result.best_epoch}, counted from 0{averaged}).",
        "bold",
    )
    if not result.kept:
        yield "This was trainer.fast_dev_run: nothing is kept."
        return
    yield f"Run folder: {result.folder.path}"
    yield f"Next: vit-cls evaluate --model {result.folder.path} --data FOLDER"


def _evaluation(result: Any) -> Iterator[RenderableType]:
    scoring, calibration = result.scoring, result.calibration
    missing = [row.name for row in result.per_class if not row.support]
    coverage = f"; {result.classes_present} of the model's {len(result.per_class)} classes" if missing else ""
    yield _line(
        f"{result.correct} of {result.scored} images right ({result.failed} could not be read{coverage})",
        "bold",
    )
    rows = [
        (title, fmt.decimals(estimate.value), fmt.interval(estimate.ci95) if estimate.ci95 else "")
        for _, title, _, estimate in result.named_metrics()
    ]
    yield _grid(rows, gap=3)
    points = (f"{100 * p.coverage:g} %: {p.accuracy:.4f}" for p in calibration.coverage)
    yield f"accuracy of the most confident: {', '.join(points)}"
    if pairs := result.confused_pairs()[:3]:
        told = (f"{pair.label} taken for {pair.prediction} {pair.images}x" for pair in pairs)
        yield f"most confused: {', '.join(told)}"
    yield (
        f"probabilities are {'' if scoring.calibrated else 'not '}calibrated"
        + (f", temperature {scoring.temperature:.4f}" if scoring.calibrated else "")
        + ("; predictions restricted to the folder's classes" if scoring.restricted else "")
        + ("" if scoring.tta == "none" else f"; test-time augmentation: {scoring.tta}")
        + ("; resized by Pillow" if scoring.exact else "")
    )
    yield f"{result.images / result.seconds:.0f} images/s{scoring.computed and ', ' + scoring.computed}"
    if missing:
        more = " ..." if len(missing) > MOST_MISSING else ""
        yield f"no images of: {', '.join(missing[:MOST_MISSING])}{more}"


def _comparison(result: Any) -> Iterator[RenderableType]:
    letters = result.letters
    yield _line(result.sentence, "bold")
    for model in result.models:
        yield (
            f"{letters[model.name]}  {model.correct} of {model.scored} images right, top-1 "
            f"{fmt.decimals(model.top1)}, {fmt.interval(model.top1_ci95)}: {model.name}"
        )
    for pair in result.pairs:
        yield ""
        yield from _pair(pair, letters[pair.a], letters[pair.b], len(result.pairs))


def _pair(pair: Any, a: str, b: str, num_pairs: int) -> Iterator[RenderableType]:
    if num_pairs > 1:
        yield pair.sentence
    yield (
        f"{pair.images} images that both could read ({pair.failed} left out): both right {pair.both_right}, "
        f"only {a} {pair.only_a}, only {b} {pair.only_b}, both wrong {pair.both_wrong}"
    )
    low, high = (fmt.decimals(bound, signed=True) for bound in pair.difference_ci95)
    adjusted = f"; {fmt.p_value(pair.p_holm)} adjusted over {num_pairs} pairs" if num_pairs > 1 else ""
    difference, least = fmt.decimals(pair.difference, signed=True), fmt.decimals(pair.smallest_detectable)
    rows = (
        (f"difference {b} - {a}", difference, f"95 % {pair.interval} interval {low} to {high}"),
        ("p of equal accuracy", fmt.p_value(pair.p_mcnemar_mid), f"McNemar mid-p{adjusted}"),
        (
            "p of equivalence",
            fmt.p_value(pair.p_equivalence),
            f"two one-sided tests of the margin {pair.margin:g}",
        ),
        ("smallest detectable", least, "by this many images, with a power of 80 %"),
    )
    yield _grid(rows, gap=3, justify="lrl")


def _dataset(report: Any) -> Iterator[RenderableType]:
    from vit_cls.data.doctor.issues import SEVERITIES

    totals = {split: sum(counts.values()) for split, counts in report.classes.items() if split}
    splits = ", ".join(f"{split} {fmt.count(total)}" for split, total in totals.items())
    names = len(report.class_names)
    yield _line(
        f"{fmt.count(report.images)} images of {names} class{'es' * (names != 1)}"
        f"{f' ({splits})' if splits else ''}; {fmt.count(report.unreadable)} could not be read",
        "bold",
    )
    rows = []
    for problem in report.problems:  # what and how many, one example, what to do
        first = problem.offenders[0]
        example = clean(f"{first.path}: {first.detail}".removesuffix(": "))
        lines = (problem.title, f"{example}{' ...' if problem.count > 1 else ''}", problem.advice)
        rows.append((problem.severity, fmt.count(problem.count), "\n".join(lines)))
    if rows:
        yield _grid(rows, justify="lrl", min_widths=(7, 6))
    tally = [(sum(problem.severity == s for problem in report.problems), s) for s in SEVERITIES]
    counted = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in tally if count)
    yield f"{counted or 'nothing is wrong'}; {fmt.duration(report.seconds)}"


def _lab(result: Any) -> Iterator[RenderableType]:
    """The verdict, the findings, and the first table."""
    from vit_cls.reports.words import finding_facts, table_cells

    yield _line(clean(result.headline), "bold")
    for finding in result.findings:
        told = finding_facts(finding)
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(min_width=12)
        grid.add_column(overflow="fold")
        grid.add_row(_line(finding.verdict), _line(clean(finding.sentence)))
        if told:
            grid.add_row("", _grid(told, min_widths=(19,)))
        yield ""
        yield grid
    if result.tables:
        table = result.tables[0]
        rows, texts = table_cells(table)
        yield ""
        yield clean(table.title)
        yield _table(table.columns, rows, texts)
        if table.note:
            yield clean(table.note)


def _verification(result: Any) -> Iterator[RenderableType]:
    told = result.to_dict()
    rows = told["identities"]
    yield _table(
        ("identity", "residual", "tolerance", ""),
        [_identity(row) for row in rows],
        (True, False, False, True),
    )
    yield from (f"does not hold: {row['name']}. {row['what']}" for row in rows if not row["ok"])
    yield _line(
        f"{told['checked']} identities checked, {told['failed']} do not hold; "
        f"{told['not_applicable']} do not apply; float{told['precision']} on {told['device']}, "
        f"{told['images']} random images, seed {told['seed']}, {fmt.duration(told['seconds'])}",
        "bold",
    )


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if not row["applies"]:
        return row["name"], fmt.DASH, fmt.DASH, f"does not apply: {row['reason']}"
    residual = "not finite" if row["residual"] is None else f"{row['residual']:.2g}"
    bound = {"exact": "= 0", "relative": f"<= {row['tolerance']:.0e}", "greater": f"> {row['tolerance']:g}"}
    return row["name"], residual, bound[row["kind"]], "ok" if row["ok"] else "FAILED"


SHOWN: dict[str, Callable[[Any], Iterator[RenderableType]]] = {
    "FitResult": _fit,
    "Evaluation": _evaluation,
    "Comparison": _comparison,
    "DatasetReport": _dataset,
    "LabResult": _lab,
    "Verification": _verification,
}
"""By the class of the result."""


def models_table(rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Architectures below each other.

    Args:
        rows: What the catalogue tells of each.
    """
    shown = []
    for row in rows:
        licences = dict.fromkeys(tag["licence"] or NO_LICENCE for tag in row["tags"])
        parameters = f"{fmt.decimals(row['parameters'] / 1e6, 1)} M"
        cells = {"parameters": parameters, "tags": len(row["tags"]), "licence": ", ".join(licences)}
        shown.append({**row, **cells})
    weights = sum(len(row["tags"]) for row in rows)
    return [
        _keyed(shown, MODEL_KEYS, MODEL_HEADS),
        f"{len(rows)} architectures, {weights} tags with weights. native: our "
        "blocks; adapter: timm's, with the same poolings and tokens. `vit-cls models NAME` tells more.",
    ]


def model_details(row: Mapping[str, Any]) -> list[RenderableType]:
    """One architecture and its published weights.

    Args:
        row: What the catalogue tells of it.
    """
    prefix = "class token" if row["class_token"] else "no class token"
    registers = f", {row['reg_tokens']} registers" if row["reg_tokens"] else ""
    lines: list[RenderableType] = [
        f"{row['name']} ({row['kind']}): {fmt.count(row['parameters'])} parameters, {row['img_size']} pixels "
        f"in patches of {row['patch_size']}",
        f"{row['tokens']} tokens ({prefix}{registers}), width {row['embed_dim']}, {row['depth']} blocks of "
        f"{row['num_heads']} heads, pool {row['pool']}",
    ]
    if not row["tags"]:
        return [*lines, "no published weights"]
    shown = []
    for tag in row["tags"]:
        head = f"{tag['num_classes']} {tag['head']}" if tag["num_classes"] else "headless"
        licence = f"{tag['licence'] or NO_LICENCE}{' (non-commercial)' if tag['non_commercial'] else ''}"
        shown.append({**tag, "head": head, "licence": licence})
    lines.append(_keyed(shown, TAG_KEYS, TAG_HEADS))
    if quick := [tag["tag"] for tag in row["tags"] if tag["quick_gelu"]]:
        lines.append(f"loaded with QuickGELU, as they were trained: {', '.join(quick)}")
    return [*lines, f"Use: --model.name {row['name']}.{row['tags'][0]['tag']} --model.pretrained true"]


def _keyed(rows: Sequence[Mapping[str, Any]], keys: str, heads: str) -> Table:
    columns = heads.split()
    return _table(columns, [[str(row[key]) for key in keys.split()] for row in rows], [True] * len(columns))
