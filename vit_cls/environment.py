"""The machine and its software: what a result was made with, and how many cores there are."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from vit_cls import __version__

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "numpy", "pillow", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for the run record."""
    versions = {"vit_cls": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "commit": _commit(), "platform": platform.platform()}


def cpu_count() -> int:
    """Cores that this process may use, as joblib says: by its affinity, and by the quota of its container."""
    import joblib  # here: half a second, which a listing of a small folder saves

    return int(joblib.cpu_count())


def _commit() -> str | None:
    """The commit of this package's checkout, with ``+`` where files differ from it; None if installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        inside = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or inside.returncode:
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
