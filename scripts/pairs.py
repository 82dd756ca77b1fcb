"""What every benchmark shares: two sides that take turns, ratios within pairs, and one report of both."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_cls.errors import ConfigError
from vit_cls.files import replacing

Row = dict[str, Any]
Settings = argparse.Namespace
SPREAD = "{median:.3f} ({q1:.3f}-{q3:.3f}; {min:.3f}-{max:.3f}; {ours_faster} of {pairs})"
"""How the statistics of pairs read in a table."""


class Mismatch(Exception):
    """Both sides do not compute the same, so their times would mean nothing."""


def paired_stats(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How much faster ours is, from seconds measured in pairs, two at least.

    The ratio is taken within each pair: a slow spell of the machine hits both halves of a pair alike.

    Example:
        >>> paired_stats([1.0, 2.0, 4.0], [2.0, 3.0, 4.0])["median"]
        1.5
    """
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    spread = {"min": min(ratios), "q1": q1, "median": median, "q3": q3, "max": max(ratios)}
    return spread | {"pairs": len(ratios), "ours_faster": sum(ratio > 1 for ratio in ratios)}


def in_turn(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """What both sides return, called in turn; who goes first alternates, so that drift cancels.

    Args:
        ours: One measurement of our side, in seconds; its first is thrown away.
        theirs: The same of the other side.
        pairs: How many measurements of each.
    """
    for measure in (ours, theirs):
        measure()
    gc.collect()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[side].append((ours, theirs)[side]())
    return seconds


def heading(versions: dict[str, Any], device: str) -> Row:
    """What a report begins with: when, on what, and with which versions.

    Args:
        versions: Of each package, by name.
        device: Name of the hardware.
    """
    return {
        "schema_version": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{k: str(v) for k, v in versions.items()}},
        "device_name": device,
    }


def cpu_name() -> str:
    """The model of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.machine()


def check_target(option: str, target: Path | None) -> None:
    """Refuse a folder where a file is to be written.

    Args:
        option: What the user called it.
        target: Where the report goes.

    Raises:
        ConfigError: If it is a folder.
    """
    if target and target.is_dir():
        raise ConfigError(f"--{option} {target} cannot be written: {target} is a folder.")


def command(
    parse: Callable[[], Settings],
    run: Callable[[Settings], Row],
    table: Callable[[Row], str],
    *,
    option: str,
) -> int:
    """Run a benchmark, print its table, write its report, and return the exit status.

    Args:
        parse: Reads the command line; may raise ConfigError.
        run: Measures; may raise ConfigError and `Mismatch`.
        table: The report as text.
        option: Name of the setting that says where the report goes.
    """
    try:
        settings = parse()
        target = getattr(settings, option)
        # The file is begun first: a folder that cannot be written is told before the minutes, not after.
        with replacing(target) if target else contextlib.nullcontext() as scratch:
            report = run(settings)
            if scratch:
                scratch.write_text(json.dumps(report, indent=2) + "\n")
        print(table(report))
    except OSError as error:
        print(f"benchmark: --{option} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 2
    except (ConfigError, Mismatch) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
