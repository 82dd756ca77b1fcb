"""How a number is written for people: one function for each kind of number.

Files for programs (CSV, JSON) have formats of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

DASH = "-"
"""Stands for None and for what is not finite."""


def count(value: float | None) -> str:
    """A whole number, thousands apart: 12,345."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.0f}"


def decimals(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """A number with a fixed number of decimals: 0.9321, +0.01."""
    return DASH if value is None or not math.isfinite(value) else f"{value:{_sign(signed)}.{digits}f}"


def percent(share: float | None, digits: int = 1, *, unit: str = " %", signed: bool = False) -> str:
    """A share in percent: 93.2 %, -1.00 points.

    Args:
        share: Between 0 and 1, or a difference of shares.
        unit: Is empty where a heading or an axis says it.
    """
    if share is None or not math.isfinite(share):
        return DASH
    return decimals(100 * share, digits, signed=signed) + unit


def significant(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """A number with that many digits that count; whole ones and those of five digits on as `count`."""
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:{_sign(signed)},.0f}"
    return f"{value:{_sign(signed)}.{digits}g}"


def compact(value: float, digits: int = 4) -> str:
    """A number for an axis, where 1,250,000 has no room: 1.25M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (scale > 1e3 and abs(value) >= scale):
            return f"{value / scale:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def interval(bounds: tuple[float, float], write: Callable[[float], str] = decimals) -> str:
    """A confidence interval, each bound by ``write``: 95 % interval 0.9000 to 0.9500.

    Args:
        write: One of the functions here.
    """
    low, high = bounds
    return f"95 % interval {write(low)} to {write(high)}"


def bare_percent(share: float) -> str:
    """`percent` without its unit, for the bounds of an interval."""
    return percent(share, unit="")


def three_decimals(value: float) -> str:
    """`decimals` for what has no unit and is about 1, as R2 or a cosine."""
    return decimals(value, 3)


def estimate_cell(value: float, bounds: tuple[float, float], write: Callable[[float], str] = percent) -> str:
    """An estimate and its interval for a cell of a table: 93.2 % [90.0 %, 95.0 %].

    Args:
        write: How each of the three is written.
    """
    low, high = bounds
    return f"{write(value)} [{write(low)}, {write(high)}]"


def p_value(p: float) -> str:
    """A p-value: 0.0312, or < 0.0001."""
    return decimals(p) if not p < 1e-4 else "< 0.0001"


def duration(seconds: float | None) -> str:
    """A time in two units at most: 2.0 s, 1 min 30 s, 1 h 2 min."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(num_bytes: float) -> str:
    """An amount of memory or of disk, in powers of 1000: 800 bytes, 1.23 MB."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * scale:  # what three digits round up to the unit
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _sign(signed: bool) -> str:
    return "+" if signed else ""
