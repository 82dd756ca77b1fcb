"""Output that any name and any locale goes through: before a verb begins."""

from __future__ import annotations

import logging
import os
import sys

from vit_cls.texts import printable

AGAIN = "VIT_CLS_UTF8"
"""In the environment of a program that has started over."""


class _Printable(logging.Formatter):
    """Messages hold names of files and classes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def begin(*, is_program: bool) -> None:
    """Let the streams escape what their encoding lacks, and log messages to stderr.

    Where the locale has another encoding than UTF-8 for the names of files (``LC_ALL=C``), the program starts
    over in Python's UTF-8 mode: else names that are UTF-8 could be neither found nor written.

    Args:
        is_program: Whether this process is ours, and may be replaced by itself.
    """
    if (
        is_program
        and os.name == "posix"
        and sys.getfilesystemencoding() != "utf-8"
        and AGAIN not in os.environ
    ):
        os.environ |= {"PYTHONUTF8": "1", AGAIN: "1"}  # once: what Python was given may come before both
        os.execv(sys.executable, [sys.executable, "-X", "utf8=1", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's may be something else
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Printable("%(message)s"))
    logging.getLogger("vit_cls").setLevel(logging.INFO)
