"""What became of every key when weights were loaded: loaded, resized, moved, dropped or fresh."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vit_cls import formatting as fmt

FATES = ("loaded", "resized", "moved", "dropped", "fresh")
"""In the order of the table. Loaded: as it was. Resized: interpolated or cut to a new shape. Moved: to
another place in the model. Dropped: of the checkpoint alone. Fresh: of the model alone, initialised anew."""


@dataclass(frozen=True)
class KeyFate:
    """The fate of one key."""

    key: str  # of the model; of the checkpoint where it was dropped
    fate: str  # one of `FATES`
    note: str = ""  # how it was resized, where it came from, how it was initialised


@dataclass(frozen=True)
class LoadReport:
    """The fate of every key of the checkpoint and of the model.

    Args:
        source: Where the weights came from, as a person would say it.
        fresh_share: Share of the encoder's parameters that the checkpoint did not hold, in [0, 1].
        notes: What else a user should know: where the norm went, which activation was chosen.
        licence: Of the weights; None where the source states none.
        class_names: Of the checkpoint's head, in order; None where it has none or they are unknown.
    """

    source: str
    keys: tuple[KeyFate, ...]
    fresh_share: float
    notes: tuple[str, ...] = ()
    licence: str | None = None
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    def counts(self) -> dict[str, int]:
        """How many keys had each fate."""
        counts = Counter(row.fate for row in self.keys)
        return {fate: counts[fate] for fate in FATES}

    def of(self, fate: str) -> dict[str, str]:
        """The keys of one of the `FATES`, with their notes."""
        return {row.key: row.note for row in self.keys if row.fate == fate}

    def rows(self) -> list[dict[str, Any]]:
        """What was not simply loaded; keys that differ only in the number of their block share a row."""
        return [
            {"fate": fate, "keys": name, "count": count, "note": note}
            for fate in FATES
            if fate != "loaded"
            for name, count, note in _grouped(self.of(fate).items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the run record: counts, rows, and every key that was not simply loaded."""
        return {
            "source": self.source,
            "counts": self.counts(),
            "fresh_share_of_encoder": self.fresh_share,
            "notes": list(self.notes),
            "licence": self.licence,
            "rows": self.rows(),
            "changed": {fate: self.of(fate) for fate in FATES if fate != "loaded" and self.of(fate)},
        }

    def table(self) -> str:
        """The report for people."""
        total = ", ".join(f"{count} {fate}" for fate, count in self.counts().items() if count)
        lines = [f"weights from {self.source}: {total}"]
        for row in self.rows():
            times = f" ({row['count']} keys)" if row["count"] > 1 else ""
            note = f": {row['note']}" if row["note"] else ""
            lines.append(f"  {row['fate']:<8} {row['keys']}{times}{note}")
        lines += [f"  {note}" for note in self.notes]
        if self.fresh_share:
            lines.append(f"  {fmt.percent(self.fresh_share)} of the encoder's parameters are fresh")
        return "\n".join(lines)


def _grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Rows of one pattern and one note together; many of one first word (another tower) as one."""
    groups: dict[tuple[str, str], int] = {}
    for key, note in rows:
        pattern = re.sub(r"\.\d+\.", ".*.", key)
        groups[(pattern, note)] = groups.get((pattern, note), 0) + 1
    if len(groups) <= 12:
        return [(name, count, note) for (name, note), count in groups.items()]
    merged: dict[tuple[str, str], int] = {}
    for (name, note), count in groups.items():
        first = name.partition(".")
        shown = f"{first[0]}.*" if first[1] else name
        merged[(shown, note)] = merged.get((shown, note), 0) + count
    return [(name, count, note) for (name, note), count in merged.items()]
