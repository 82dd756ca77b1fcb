"""What is not ours, in one paragraph: a full disk, a folder that is gone, no memory, a terminal that left."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vit_cls.environment import is_out_of_memory, start_of
from vit_cls.errors import RunError, VitClsError

ROOM = "Make room, or choose a folder on another disk."
ADVICE: dict[int, str] = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: f"The quota is used up. {ROOM}",
    errno.EFBIG: "A limit on the size of files is in force; see `ulimit -f`.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EACCES: "Ask for the right to it, or choose another place.",
    errno.EPERM: "Ask for the right to it, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOENT: "Was it moved or deleted meanwhile?",
    errno.ENOTDIR: "A part of the path is a file.",
    errno.EISDIR: "There is a folder where a file belongs: move it away.",
    errno.ENOTEMPTY: "There is a folder where a file belongs: move it away.",
    errno.EMFILE: "Raise the limit, `ulimit -n`, or use fewer loading processes.",
    errno.ENFILE: "The whole machine has too many files open.",
    errno.EAGAIN: "The limit on processes is reached; see `ulimit -u`, or use fewer loading processes.",
    errno.EIO: "The disk or the network drive does not answer; see the system's log.",
    errno.ESTALE: "The network drive has been mounted anew: start again.",
    errno.ELOOP: "Links lead in a circle.",
}
"""What to do, by the number of the system's error."""


LONG = 250
"""Characters of a path, of which a longer one is shown in part."""


class ReaderGone(VitClsError):
    """Nobody reads what is printed any more, as after `| head`: no fault."""

    exit_code = 0


def paragraph(error: BaseException, place: str = "") -> str | None:
    """What the system or the machine refused, and what to do; None for anything that may be a fault of ours.

    Args:
        error: Of any library; its cause is looked at too.
        place: What is written to, where the error does not say it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (told := _told(seen, place)) is not None:
            return told
        seen = seen.__cause__
    return None


def _told(error: BaseException, place: str) -> str | None:
    if is_out_of_memory(error):
        said = start_of(error)
        return (
            f"the memory is not enough{f' ({said})' if said else ''}. Take smaller batches, smaller images "
            "or fewer loading processes, or end what else takes memory."
        )
    if isinstance(error, RecursionError):
        return (
            "folders or settings are nested too deeply to be followed. Give a folder nearer to the images, "
            "or less nested settings."
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "there is no home directory to keep files in: set HOME, or name a folder (--cache)."
    if isinstance(error, OSError) or "os error" in str(error):
        return _of_the_system(error, place)
    return None


def _of_the_system(error: BaseException, place: str) -> str:
    written = re.search(r"os error (\d+)", str(error))  # how libraries in Rust say it
    number = getattr(error, "errno", None) or (int(written[1]) if written else None)
    name = getattr(error, "filename", None)
    place = _final_name(name) if name not in (None, "") and not isinstance(name, int) else place
    place = place and f"{place}: "
    if number is None:
        said = start_of(error).partition(": [enforce fail")[0].rstrip(".")  # of torch's writer
        return f"{place}{said}. Look at the free space, the quota and the rights there."
    advice = ADVICE.get(number, "Look at the disk and the rights there.")
    return f"{place}{os.strerror(number)}. {advice}"


def _final_name(name: Any) -> str:
    """That of the file which a temporary one was to become."""
    path = Path(os.fsdecode(name))
    match = re.fullmatch(r"\.(.+)\.\w{8}\.tmp", path.name)
    text = str(path.with_name(match[1]) if match else path)
    return (
        text if len(text) < LONG else f"{text[: LONG // 2]}...{text[-LONG // 2 :]} ({len(text)} characters)"
    )


def fault(error: BaseException) -> str:
    """One paragraph for what nobody foresaw."""
    if "weights_only" in str(error):  # torch's advice is to let a file run code
        return "a file is damaged, or holds more than tensors and plain data, and is not opened."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "vit_cls" in frame.filename]
    where = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return (
        f"a fault of vit-cls itself ({type(error).__name__}: {start_of(error, 1)[:300]}{where}). Please "
        "report it with what --debug shows."
    )


@contextlib.contextmanager
def printing(stream: TextIO) -> Iterator[None]:
    """Write results to stdout in the block.

    Raises:
        ReaderGone: If nobody reads on.
        RunError: If they cannot be written: stdout is a file on a full disk, say.
    """
    try:
        try:
            yield
        finally:
            stream.flush()
    except OSError as error:
        let_go(stream)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone("nobody reads on.") from error
        raise RunError(
            f"stdout cannot be written: {error.strerror or error}. {ADVICE.get(error.errno or 0, '')} Files "
            "that are complete are kept."
        ) from error


def let_go(stream: Any) -> None:
    """Lead what is still to be written into nothing: Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Sturdy:
    """A stream for words by the way, whose loss stops no work: the terminal is gone, or a disk is full.

    Args:
        stream: What it writes to as long as that can be done.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        try:
            return self._stream.write(text)
        except OSError:
            let_go(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        try:
            self._stream.flush()
        except OSError:
            let_go(self._stream)

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own."""
        return getattr(self._stream, name)


@contextlib.contextmanager
def sturdy_streams(*, is_program: bool) -> Iterator[None]:
    """Let no stream that is closed, full or left end the work in the block.

    Args:
        is_program: Whether the process is there for the block alone: closed descriptors then get a place of
            their own, which else the next file that is opened would take; and threads and destructors that
            fail for the same reason as the program say nothing of their own.
    """
    before = sys.stderr
    if is_program:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        hook, ignored = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda args: None if paragraph(args.exc_value or OSError()) else hook(args)
        sys.unraisablehook = lambda args: None if paragraph(args.exc_value or OSError()) else ignored(args)
    sys.stderr = Sturdy(sys.stderr)
    try:
        yield
    finally:
        if not is_program:
            sys.stderr = before
