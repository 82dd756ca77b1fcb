"""What a verb hands back to the command line."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from vit_cls.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say.

    Args:
        data: The JSON object of ``--json``.
        text: The same for people.
        code: 0 done; 1 the work ran and the answer is bad.
        silent: Whether to print neither: another process of the same run speaks.
    """

    data: dict[str, Any]
    text: str
    code: int = 0
    silent: bool = False


@dataclass(frozen=True)
class Caller:
    """Where results go, for a verb that writes them as they come instead of at the end.

    Args:
        stdout: The real one; while a verb runs, ``sys.stdout`` is stderr.
        as_json: Whether ``--json`` was given: then nothing but the outcome may go there.
    """

    stdout: TextIO
    as_json: bool = False


CALLER: ContextVar[Caller] = ContextVar("caller")

MOST_TOLD = 5
"""Files that could not be read which stderr names; reports list them all."""


def with_files(text: str, output: Path | None) -> str:
    """The text for people, and where the files are if there are any."""
    return text if output is None else f"{text}\nfiles in {output}"


def tell_unreadable(predictions: Predictions) -> None:
    """Name on stderr the first images that could not be read."""
    for position, reason in list(predictions.errors.items())[:MOST_TOLD]:
        print(f"could not be read: {predictions.index.path(position)}: {reason}", file=sys.stderr)
