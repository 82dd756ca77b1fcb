"""The machine and its software: what a result was made with, and how many cores there are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
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


NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left, by what torch or Python raises."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or any(words in str(error) for words in NO_MEMORY)


def start_of(error: BaseException, sentences: int = 3) -> str:
    """What an error says first; torch goes on for lines."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:sentences])


def free_shared_memory() -> int | None:
    """Bytes that are free where loading processes hand over their images; None where that is not known."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def shared_memory() -> str:
    """Where loading processes hand over their images, its size and what is free; empty if unknown."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return ""
    return f"/dev/shm has {usage.total / 2**20:,.1f} MB, {usage.free / 2**20:,.1f} MB free"


def unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA device that is there, though built to; None where all is well."""
    import torch  # here: what prints a version needs none

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    if torch.version.cuda is None or hidden or torch.cuda.is_available():
        return None
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    else:
        reason = "the driver answers with no device"
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and {reason}"
