"""What a verb hands back to the command line."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO


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
