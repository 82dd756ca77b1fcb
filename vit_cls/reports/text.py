"""Texts that others chose, made fit for any page, any file and any terminal."""

from __future__ import annotations

import unicodedata


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
