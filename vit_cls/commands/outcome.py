"""What a verb hands back to the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
