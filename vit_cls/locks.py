"""One process at a time writes into a folder: a file there says which, also after it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from vit_cls.errors import ConfigError
from vit_cls.files import making, write_errors

LOCK = ".lock"
"""How the names of such files begin."""


@dataclass(frozen=True)
class Holder:
    """The process that a folder belongs to; a process id comes again, but not with the same start.

    Args:
        boot: Which start of the machine it is, where the system says so.
        started: When the process began, in the system's own words.
        job: The job of Slurm and how often that was started again; Slurm ends one before it starts the next.
        token: Tells this lock from any other.
    """

    host: str
    boot: str
    pid: int
    started: str
    since: str
    job: str = ""
    token: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        """With a token of its own."""
        job, restarts = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT"))
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=_start_of(os.getpid()) or "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            job=f"{job} {int(restarts) if restarts.isdecimal() else 0}" if job else "",
            token=secrets.token_hex(8),
        )

    def is_gone(self, now: Holder) -> bool | None:
        """Whether the process has ended; None where that cannot be known from here.

        Args:
            now: A process that asks.
        """
        if self.host == now.host:
            return self.boot != now.boot or _start_of(self.pid) != self.started
        (job, restarts), (this_job, this_restarts) = (one.job.split() or ("", "0") for one in (self, now))
        if job and job == this_job and int(restarts) < int(this_restarts):
            return True
        return None


@contextlib.contextmanager
def alone_in(folder: Path | None, option: str = "--output", *, name: str = LOCK) -> Iterator[None]:
    """Let no other process of vit-cls write into a folder until the end of the block.

    It is a file and not a lock of the system, which loading processes would inherit and keep after a kill.

    Args:
        folder: Is made; after an error it goes again as in `making`. None has nothing to lock.
        option: The option that names it, for messages.
        name: Of the file, where several may write into a folder that have their own parts of it.

    Raises:
        ConfigError: If another process writes there, or the folder cannot be written.
    """
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file. Give a new folder.")
    with contextlib.ExitStack() as stack:
        with write_errors(folder, option):
            stack.enter_context(making(folder))
            holder = _take(folder / name, option)
        stack.callback(_release, folder / name, holder)
        yield


def is_lock(path: Path) -> bool:
    """Whether a file in a folder is such a lock, or belongs to one."""
    return path.name.startswith(LOCK)


def _take(path: Path, option: str) -> Holder:
    now = Holder.this_process()
    own = path.with_name(f"{path.name}.{now.token}")
    try:
        own.write_text(json.dumps(asdict(now)))
        while True:
            with contextlib.suppress(FileExistsError):
                _put(own, path)
                return now
            before = _read(path)
            if before is None:  # it has just gone
                continue
            gone = before.is_gone(now)
            if not gone:
                raise ConfigError(_refusal(path, option, before, unknown=gone is None))
            # Only who has the lock of this very lock may replace it, so that none replaces its successor.
            right = _take(path.with_name(f"{path.name}.{before.token}.gone"), option)
            try:
                if _read(path) == before:
                    os.replace(own, path)
                    return now
            finally:
                _release(path.with_name(f"{path.name}.{before.token}.gone"), right)
    finally:
        own.unlink(missing_ok=True)


def _put(own: Path, path: Path) -> None:
    """Give the file its name, complete as it is, unless that is taken."""
    try:
        os.link(own, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(handle, "w") as file:
            file.write(own.read_text())


def _read(path: Path) -> Holder | None:
    """Whose lock it is; a damaged one, as after a power cut, is of a process that is gone."""
    try:
        known = Holder.__dataclass_fields__
        return Holder(**{key: value for key, value in json.loads(path.read_text()).items() if key in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return Holder(socket.gethostname(), "", 0, "?", "?", token="damaged")


def _release(path: Path, holder: Holder) -> None:
    with contextlib.suppress(OSError):  # the folder may have gone; a lock that stays is seen to be stale
        if os.getpid() == holder.pid and _read(path) == holder:
            path.unlink()


def _refusal(path: Path, option: str, holder: Holder, *, unknown: bool) -> str:
    who = f"process {holder.pid}{f' on {holder.host}' if unknown else ''}"
    text = f"{option} {path.parent}: {who} has been writing there since {holder.since}. "
    if unknown:
        return f"{text}If it runs no longer, which cannot be seen from here, remove {path} and try again."
    return f"{text}Wait for its end, or give another folder."


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When a process of this machine began; None where there is none."""
    if sys.platform == "win32":
        return _start_on_windows(pid)
    if Path("/proc/self/stat").is_file():
        try:
            # Its second word is the program's name in brackets, which may hold anything.
            words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if words[0] == "Z" else words[19]
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None


def _start_on_windows(pid: int) -> str | None:
    """From Windows itself: `os.kill` ends a process there, whatever the signal."""
    import ctypes

    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009
    query_limited_information, still_active = 0x1000, 259
    handle = kernel.OpenProcess(query_limited_information, False, pid)
    if not handle:
        return None
    times = [ctypes.c_uint64() for _ in range(4)]
    code = ctypes.c_uint32()
    kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return str(times[0].value) if code.value == still_active else None
