"""What can go wrong through no fault of our code; the command line prints the message and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitClsError(Exception):
    """A request that cannot be carried out. The message is one paragraph: given, required, next step."""

    exit_code = 2
    """Of the command line."""


class ConfigError(VitClsError, ValueError):
    """A setting, or a combination of settings, is not possible."""


class DataError(VitClsError, ValueError):
    """An image folder, a split or a class list is not usable."""


class ImageError(DataError):
    """One image file cannot be turned into pixels. Holds the reason alone; the caller knows the path."""


class ModelFileError(VitClsError, ValueError):
    """A model file is missing, damaged, or not one of ours."""


class RunError(VitClsError, RuntimeError):
    """A run folder cannot be used, or a run ended before it could finish."""


class DivergedError(RunError):
    """A training came to numbers that are not finite: no wrong request, but a bad answer."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name, or an empty string where nothing known is near.

    Args:
        known: The words that would have been accepted.

    Example:
        >>> did_you_mean("model.pol", ["model.pool", "data.root"])
        ' Did you mean `model.pool`?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
