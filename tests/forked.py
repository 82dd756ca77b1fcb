"""Programs in processes of their own that have the heavy libraries already, and so begin in a moment.

A server imports them once and forks off one process for each program. It runs as ``python -m MODULE`` or
``python FILE`` would, in a session of its own, until Python's own end.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERBS = ("fit", "evaluate", "predict", "probe", "study", "export")
IMPORTED = ("lightning.pytorch", "torchmetrics", "torchvision", "timm", "sklearn", "scipy.stats")
IMPORTED += tuple(f"vit_cls.commands.{verb}" for verb in VERBS)
SECONDS = 0.01
"""Between two looks at what has ended."""


class Forked:
    """One program, with what the tests need of `subprocess.Popen`."""

    def __init__(self, pid: int, place: Path) -> None:
        self.pid, self.place = pid, place
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None and (self.place / "code").is_file():
            self.returncode = int((self.place / "code").read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        end = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(SECONDS)
        return code

    def output(self) -> tuple[bytes, bytes]:
        """What it has written until now."""
        return (self.place / "out").read_bytes(), (self.place / "err").read_bytes()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        self.wait(timeout)
        out, err = self.output()
        return out.decode(), err.decode()

    def left(self) -> list[str]:
        """Command lines of processes that can still write to its stderr."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.readlink(folder / "fd/2") == str(self.place / "err"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def send_signal(self, signum: int) -> None:
        """As it says."""
        os.kill(self.pid, signum)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Server:
    """Starts programs; for a ``with`` block."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, bufsize=1, **pipes)
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0

    def start(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        stdin: str = os.devnull,
        cwd: Path | None = None,
    ) -> Forked:
        """``python WORDS``, in the working folder of now unless another is given.

        Args:
            words: ``-m`` and a module, or a file; then its arguments.
            env: The whole environment; None takes that of now.
            stdin: A file or a named pipe.
        """
        place = Path(self.folder.name, str(self.count))
        place.mkdir()
        self.count += 1
        request: dict[str, Any] = {
            "words": list(map(str, words)),
            "env": dict(os.environ if env is None else env),
        }
        request |= {"cwd": str(cwd or os.getcwd()), "place": str(place), "stdin": stdin}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        return Forked(int(self.process.stdout.readline()), place)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
        self.folder.cleanup()


def _serve() -> dict[str, Any] | None:
    """Fork for each line, and note how each process ended; in the process itself, gives its request."""
    running: dict[int, Path] = {}
    is_open = True
    while is_open:
        if select.select([sys.stdin], [], [], SECONDS)[0]:
            line = sys.stdin.readline()
            is_open = bool(line)
            if line:
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    return request
                running[pid] = Path(request["place"])
                print(pid, flush=True)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = running.pop(pid) / "code"
                code.with_suffix(".tmp").write_text(str(os.waitstatus_to_exitcode(status)))
                code.with_suffix(".tmp").rename(code)
    return None


def _become(request: dict[str, Any]) -> None:
    """The program that is asked for."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    place = Path(request["place"])
    flags = os.O_WRONLY | os.O_CREAT
    for number, file in ((1, os.open(place / "out", flags)), (2, os.open(place / "err", flags))):
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)
    tempfile.tempdir = None
    sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    first, *rest = request["words"]
    if first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the tests' own business
    for name in IMPORTED:
        importlib.import_module(name)
    if asked := _serve():
        _become(asked)
