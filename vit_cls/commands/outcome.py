"""What a verb hands back to the command line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vit_cls.reports.terminal import render, terminal
from vit_cls.texts import printable

if TYPE_CHECKING:
    from vit_cls.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say.

    Args:
        data: The JSON object of ``--json``.
        shown: The same for people: lines and tables for `vit_cls.reports.terminal.render`.
        code: 0 done; 1 the work ran and the answer is bad.
        silent: Whether to print neither: another process of the same run speaks.
    """

    data: dict[str, Any]
    shown: Sequence[Any]
    code: int = 0
    silent: bool = False

    @classmethod
    def of(
        cls,
        result: Any,
        told: dict[str, Any],
        output: Path | None = None,
        *,
        above: Sequence[str] = (),
        below: Sequence[str] = (),
        code: int = 0,
    ) -> Outcome:
        """A result, with what the verb knows besides.

        Args:
            result: Has ``to_dict``, and is one of `vit_cls.reports.terminal.SHOWN`.
            told: More keys of the JSON object.
            output: Where its files are, if there are any.
            above: Lines before the result.
            below: Lines after it.
            code: See `Outcome`.
        """
        files = [] if output is None else [f"files in {output}"]
        return cls(result.to_dict() | told, [*above, *terminal(result), *below, *files], code)

    @property
    def text(self) -> str:
        """What people are told, as it stands in a pipe."""
        return render(self.shown, io.StringIO())

    def print(self, stream: TextIO, *, as_json: bool) -> None:
        """Say it, unless another process does."""
        if not self.silent:
            print(json.dumps(self.data) if as_json else render(self.shown, stream), file=stream)


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


def path_or_none(output: Path | None) -> str | None:
    """A folder as JSON has it."""
    return None if output is None else str(output)


def tell_unreadable(predictions: Predictions) -> None:
    """Name on stderr the first images that could not be read."""
    for position, reason in list(predictions.errors.items())[:MOST_TOLD]:
        text = f"could not be read: {predictions.index.path(position)}: {reason}"
        print(printable(text.replace("\n", "\\n")), file=sys.stderr)
