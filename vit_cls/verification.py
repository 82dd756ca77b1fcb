"""Whether files are compared with the digests in them, told where nothing is imported for it."""

from __future__ import annotations

from contextvars import ContextVar

VERIFY: ContextVar[bool] = ContextVar("VERIFY", default=True)
"""False saves the time, a second for 1.5 GB: ``--no_verify``."""
