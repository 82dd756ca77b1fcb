"""Names of the image files below class folders; a long listing is shared with helper processes.

This file is the program of the helpers too, so it imports only what Python loads for itself: a helper is at
work some 15 ms after its start, where a process of a `WorkerPool` needs as long as most listings take.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # typing's own would triple the start of a helper
if TYPE_CHECKING:
    import subprocess

EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    )
)

Run = tuple[bytes, int, bytes]
"""How paths in one folder begin (``class/IMG_``), their number, and their rests, each closed by a NUL."""

LONG_SECONDS = 0.04
"""A listing that takes longer in one process is shared."""
START_SECONDS = 0.012
"""Until a helper is at work; this process lists that much more."""
MAX_HELPERS = 7


def list_images(root: str, folders: list[str]) -> list[Run]:
    """Runs of the images below some sub-folders of ``root``, in lexicographic order within each; OSError if
    unreadable.
    """
    runs: list[Run] = []
    started = time.perf_counter()
    for done, folder in enumerate(folders, start=1):
        _scan(root, folder, runs)
        seconds = time.perf_counter() - started
        if seconds >= LONG_SECONDS / 8:  # seen enough to judge by
            expected = seconds / done * (len(folders) - done)
            if expected <= LONG_SECONDS:
                continue
            from vit_cls.environment import cpu_count  # here: a helper is this file alone

            helpers = min(cpu_count() - 1, MAX_HELPERS, int(2 * expected / LONG_SECONDS))
            if helpers:
                own = (expected + helpers * START_SECONDS) / ((helpers + 1) * expected)
                return runs + _list_shared(root, folders[done:], helpers, own)
    return runs


def _list_shared(root: str, folders: list[str], num_helpers: int, own_share: float) -> list[Run]:
    """List a share of the folders in this process, and the others in helper processes."""
    mine = round(own_share * len(folders))
    size = max(1, -(-(len(folders) - mine) // max(1, num_helpers)))
    own, shares = folders[:mine], [folders[i : i + size] for i in range(mine, len(folders), size)]
    helpers = [_start_helper(root, share) for share in shares]
    runs: list[Run] = []
    try:
        for folder in own:
            _scan(root, folder, runs)
        for helper, share in zip(helpers, shares, strict=True):
            answer = None if helper is None else _answer(helper)
            if answer is not None:
                runs += answer
                continue
            for folder in share:  # the error that stopped the helper is raised here, or does not come back
                _scan(root, folder, runs)
    finally:
        for helper in helpers:
            if helper is not None:
                _end(helper)
    return runs


def _start_helper(root: str, folders: list[str]) -> subprocess.Popen[bytes] | None:
    import subprocess

    flags = ("-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}")  # a bare interpreter that reads names as we do
    try:
        helper = subprocess.Popen(
            [sys.executable, *flags, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:  # no room for a process, or no interpreter of its own
        return None
    assert helper.stdin is not None
    try:
        helper.stdin.write(os.fsencode("\0".join([root, *folders])))
        helper.stdin.close()
    except OSError:
        pass  # it has ended already; its exit status will tell
    return helper


def _end(helper: subprocess.Popen[bytes]) -> None:
    import contextlib

    helper.kill()
    assert helper.stdin is not None
    assert helper.stdout is not None
    helper.stdout.close()
    with contextlib.suppress(OSError):  # the rest of what it was not there to read
        helper.stdin.close()
    helper.wait()


def _answer(helper: subprocess.Popen[bytes]) -> list[Run] | None:
    """What a helper has found, or None if it failed."""
    assert helper.stdout is not None
    answer = helper.stdout.read()
    if helper.wait() != 0:
        return None
    runs: list[Run] = []
    position = 0
    while position < len(answer):
        end = answer.index(b"\n", position)
        count, begins, rests = map(int, answer[position:end].split())
        middle = end + 1 + begins
        runs.append((answer[end + 1 : middle], count, answer[middle : middle + rests]))
        position = middle + rests
    return runs


def _help() -> None:
    """The program of a helper: root and folders come in, runs go out."""
    root, *folders = os.fsdecode(sys.stdin.buffer.read()).split("\0")
    runs: list[Run] = []
    for folder in folders:
        _scan(root, folder, runs)
    for begin, count, rests in runs:
        sys.stdout.buffer.write(b"%d %d %d\n%b%b" % (count, len(begin), len(rests), begin, rests))


def _scan(root: str, folder: str, runs: list[Run]) -> None:
    """Add the images below ``root/folder`` to ``runs``."""
    path = os.path.join(root, folder)
    # Without a look at the type of each entry a listing takes a sixth less: where the number of links says
    # that there is no folder inside (two: its name, and its own dot), and all names are those of images.
    # A link to a folder, if it is called x.png, is taken for an image then.
    if os.stat(path).st_nlink == 2:
        names = sorted(os.listdir(path))
        joined = _joined_images(names)
        if joined is not None:
            _add_run(folder, names, joined, runs)
            return
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] != ".":
                if entry.is_dir():
                    folders.append(f"{name}/")  # sorts among the files as the paths below it do
                elif _ending(name).lower() in EXTENSIONS:
                    files.append(name)
    before: list[str] = []
    for name in sorted(files + folders):
        if name[-1] == "/":
            _add_run(folder, before, "", runs)
            before = []
            _scan(root, f"{folder}/{name[:-1]}", runs)
        else:
            before.append(name)
    _add_run(folder, before, "", runs)


def _joined_images(names: list[str]) -> str | None:
    """Sorted names, each closed by a NUL, if all are visible and of images."""
    if not names or (names[0] < "/" and any(name[0] == "." for name in names)):
        return None
    joined = "\0".join(names) + "\0"
    ending = _ending(names[0])
    if joined.count(f"{ending}\0") == len(names):  # the usual case, in a quarter of the time
        return joined if ending.lower() in EXTENSIONS else None
    return joined if all(_ending(name).lower() in EXTENSIONS for name in names) else None


def _add_run(folder: str, names: list[str], joined: str, runs: list[Run]) -> None:
    """Add sorted images of one folder."""
    if not names:
        return
    joined = joined or "\0".join(names) + "\0"
    rests = joined.encode("utf-8", "surrogateescape")
    ends = (names[0], names[-1])
    common = os.path.commonprefix(ends) if len(names) > 1 else ""  # noqa: RUF071  # of characters
    if common:
        begin = common.encode("utf-8", "surrogateescape")
        rests = rests[len(begin) :].replace(b"\0" + begin, b"\0")
    runs.append((f"{folder}/{common}".encode("utf-8", "surrogateescape"), len(names), rests))


def _ending(name: str) -> str:
    return name[name.rfind(".") :]


if __name__ == "__main__":
    _help()
