"""Signals in every phase of every verb, and a disk, a folder or a terminal that fails it.

Run:    .venv/bin/python scripts/fault_cases.py [--kind signals] [--only fit] [--output FILE.json]
Expect: a second or two a case on two cores; a table of cases, and exit 1 if one did not end as documented.
        Needs Linux; cases that mount a small disk need root.

Each case is one command in a process group of its own, forked off here, in which something is disturbed at
a stated place. It must end with the documented exit code and one paragraph, without a traceback, leave no
process and no temporary file, and, where it was to be stopped, keep what was done.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PATIENCE_SECONDS = 120.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
MODEL = ("--model", "model.safetensors", "--device", "cpu", "--num_workers")
FIT = (
    *("fit", "--model.name", "vit_pico_patch7_28", "--model.depth", "1", "--model.embed_dim", "12"),
    *(
        "--model.num_heads",
        "1",
        "--data.root",
        "images",
        "--data.batch_size",
        "4",
        "--trainer.max_epochs",
        "2",
    ),
    *("--trainer.accelerator", "cpu", "--logger", "csv", "--run_dir", "run", "--data.num_workers"),
)
STUDY = (
    *("study", "heads", "--data", "images", "--heads", "cls,gap", "--lr_grid", "1", "--seeds", "1"),
    *("--recipe.epochs", "1", "--recipe.embed_dim", "8", "--recipe.depth", "1", "--recipe.num_heads", "2"),
    *("--output", "out", "--device", "cpu", "--jobs"),
)
VERBS: dict[str, tuple[str, ...]] = {
    "fit": (*FIT, "0"),
    "fit, 2 loading": (*FIT, "2"),
    "evaluate": ("evaluate", *MODEL, "0", "--data", "images", "--output", "out"),
    "evaluate, 2 loading": (
        "evaluate",
        *MODEL,
        "2",
        "--batch_size",
        "2",
        "--data",
        "images",
        "--output",
        "out",
    ),
    "compare": (
        "compare",
        *MODEL,
        "0",
        "--model",
        "model.safetensors",
        "--data",
        "images",
        "--output",
        "out",
    ),
    "predict": ("predict", *MODEL, "0", "--batch_size", "2", "images", "--output", "out"),
    "predict to stdout": ("predict", *MODEL, "0", "--batch_size", "2", "images"),
    "doctor": ("doctor", "--data", "images", "--num_workers", "0", "--output", "out"),
    "probe": ("probe", "knn", *MODEL, "0", "--data", "images", "--output", "out", "--cache", "cache"),
    "study": (*STUDY, "1"),
    "study, 2 jobs": (*STUDY, "2"),
    "verify": ("verify", "--model", "model.safetensors", "--device", "cpu", "--output", "out"),
    "export": ("export", "--model", "model.safetensors", "--format", "safetensors", "--output", "out"),
}
PHASES: dict[str, tuple[str, int]] = {
    "imports": ("vit_cls.cli:importlib.import_module", 1),
    "files are found": ("vit_cls.data.index:ImageIndex.__init__", 1),
    "model is made": ("vit_cls.model.vit:VisionTransformer.__init__", 1),
    "image is read": ("PIL.Image:open", 3),
    "step": ("vit_cls.training.task:ClassificationTask.training_step", 3),
    "validation": ("vit_cls.training.task:ClassificationTask.validation_step", 2),
    "checkpoint is written": ("torch:save", 1),
    "model file is written": ("vit_cls.weights.bundle:save_file", 1),
    "file is written": ("vit_cls.files:os.replace", 1),
    "report is written": ("vit_cls.reports.folder:replacing", 1),
    "result is printed": ("vit_cls.commands.outcome:Outcome.print", 1),
}
"""The function whose call it is, and the how manieth."""


@dataclass
class Ended:
    """How a process ended."""

    code: int | None
    out: str
    err: str
    left: list[str] = field(default_factory=list)

    def faults(self, codes: Collection[int], *, ours: bool = False) -> list[str]:
        """What is not as documented."""
        said = [line for line in self.err.splitlines() if line.startswith("vit-cls: ")]
        wrong = [] if self.code in codes else [f"exit {self.code} and not {sorted(codes)}"]
        wrong += [f"{len(said)} paragraphs: {said}"] if len(said) != 1 and self.code not in (0, 1) else []
        wrong += ["a traceback"] if "Traceback" in self.err or "Exception ignored" in self.err else []
        wrong += ["taken for a fault of ours"] if "fault of vit-cls" in self.err and not ours else []
        wrong += ["advice of torch"] if "weights_only" in self.err else []
        return wrong + [f"left: {name}" for name in self.left]


def at(place: str, number: int, act: Callable[[], object]) -> None:
    """Do something when a function is called for the ``number``-th time, before and within it."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def disturbed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, disturbed)


def run(words: tuple[str, ...], place: Path, before: Callable[[], object] = lambda: None) -> Ended:
    """`vit-cls` with some words in a folder, and a process group, of its own."""
    logs = [place.with_suffix(".out"), place.with_suffix(".err")]
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _be(words, place, logs, before)
    code, end = None, time.monotonic() + PATIENCE_SECONDS
    while code is None and time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.005)
    left = ["a process"] if code is None or not _is_gone(pid) else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    out, err = (log.read_text(errors="replace") for log in logs)
    return Ended(code, out, err, left)


def _be(words: tuple[str, ...], place: Path, logs: list[Path], before: Callable[[], object]) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the script runs under nohup
    os.chdir(place)
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    tempfile.tempdir = None
    sys.argv = ["vit-cls", *words]
    code = 99
    try:
        before()
        from vit_cls.cli import main

        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as Python's own end
        os._exit(code)


def _is_gone(group: int, seconds: float = 8.0) -> bool:
    """Whether no process of a group is left; loading processes see within 5 seconds that theirs is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def temporary_files(place: Path) -> list[str]:
    """Files that belong to a write that did not come to its end."""
    places = [place / name for name in ("run", "out", "cache")]
    hidden = [
        path for one in places for path in one.rglob(".*") if path.is_file() and ".part" not in str(path)
    ]
    return [str(path.relative_to(place)) for path in hidden]


@dataclass
class Fault:
    """What goes wrong, where, and how a verb must end then.

    Args:
        act: Does it, in the process itself.
        phase: A key of `PHASES`; None is before everything.
        codes: Exit codes that are documented for it.
        words: Makes other words of a verb's, or the same where they do not suit.
        goes_on: Whether a training that met it can be resumed when it is gone.
    """

    act: Callable[[], object]
    phase: str | None = None
    codes: frozenset[int] = frozenset({2})
    words: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
    goes_on: bool = True


def fill(room: int = 0) -> None:
    """Leave so many bytes on the disk of the working directory."""
    with contextlib.suppress(OSError), open("filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open("filler", "r+b") as file:
        file.truncate(max(0, os.path.getsize("filler") - room))


def limit(number: int, value: int) -> None:
    """A limit on what the process may have."""
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def remount() -> None:
    """Make the disk of the working directory read-only."""
    subprocess.run(["mount", "-o", "remount,ro", os.getcwd()], check=True, capture_output=True)


def take(name: str, *, to: str | None = None) -> None:
    """Move a folder of the verb's output away, or delete it."""
    for place in ("run", "out"):
        path = Path(place, name)
        if path.exists():
            shutil.rmtree(path) if to is None else path.rename(to)


def in_the_way() -> None:
    """A folder where the checkpoint belongs."""
    Path("run/checkpoints/last.ckpt/inside").mkdir(parents=True)


def stream(number: int, path: str | None) -> None:
    """Let a stream go to a file; None closes it, and `|` is a pipe that nobody reads."""
    name = ("stdin", "stdout", "stderr")[number]
    if path is None:
        os.close(number)
        setattr(sys, name, None)  # as Python finds it
        return
    if path == "|":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(path, os.O_RDWR)
    os.dup2(writer, number)
    os.close(writer)


def tmpdir(path: str, *, full: bool = False, is_new: bool = False) -> None:
    """Another folder for temporary files."""
    os.environ["TMPDIR"] = os.path.abspath(path)
    tempfile.tempdir = None
    if full or is_new:
        os.mkdir(path)
    if full:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", path], check=True)
        with contextlib.suppress(OSError):
            Path(path, "filler").write_bytes(bytes(8192))


def nobody() -> None:
    """A user that the system does not know, without a home; all but the images is theirs."""
    os.environ.pop("HOME", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    for path in (".", "images", "model.safetensors"):
        os.chown(path, 12345, 12345)
    os.setgid(12345)
    os.setuid(12345)


def unreadable() -> None:
    """A folder of images that this user may not open."""
    os.chmod("images/train/a", 0)
    os.chmod("images/test/a", 0)
    nobody()


def nested(depth: int = 3000) -> None:
    """An image folder far down."""
    here = os.getcwd()
    os.chdir("images/test/a")
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)


def fail(error: BaseException) -> None:
    """Raise it."""
    raise error


def other(option: str, value: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """Other words, in which an option has another value."""

    def change(words: tuple[str, ...]) -> tuple[str, ...]:
        pairs = zip(("", *words), words, strict=False)
        return tuple(value if before in option.split() else word for before, word in pairs)

    return change


NEED_ROOT = ("disk full", "read-only", "TMPDIR full", "no home", "unreadable")
SOUND: dict[str, set[int]] = {"doctor": {1}, "predict to stdout": {0}, "verify": {0}}
"""How verbs may end too: faults in a folder are an answer, and some write nothing, or little."""
OUTPUT = "--output --run_dir"
NOTHING = functools.partial(int, 0)
EITHER = frozenset({0, 2})
DONE = frozenset({0})
FAULTS: dict[str, Fault] = {
    "disk full": Fault(fill),
    "disk full but for 12 kB": Fault(functools.partial(fill, 12_288)),
    "disk full in a step": Fault(fill, "step"),
    "disk full as a checkpoint is written": Fault(fill, "checkpoint is written"),
    "disk full as the model file is written": Fault(fill, "model file is written"),
    "disk full as the report is written": Fault(fill, "report is written"),
    "disk full as an image is read": Fault(fill, "image is read", EITHER),
    "files of at most 4 kB": Fault(functools.partial(limit, resource.RLIMIT_FSIZE, 4096), codes=EITHER),
    "files of at most 100 bytes": Fault(functools.partial(limit, resource.RLIMIT_FSIZE, 100), codes=EITHER),
    "30 open files": Fault(functools.partial(limit, resource.RLIMIT_NOFILE, 30), codes=EITHER),
    "read-only": Fault(remount, goes_on=False, codes=EITHER),
    "output deleted in a step": Fault(functools.partial(take, ""), "step", goes_on=False),
    "output moved in a step": Fault(functools.partial(take, "", to="moved"), "step", goes_on=False),
    "output deleted as an image is read": Fault(functools.partial(take, ""), "image is read", EITHER),
    "output deleted as the report is written": Fault(
        functools.partial(take, ""), "report is written", EITHER
    ),
    "checkpoints deleted in a step": Fault(functools.partial(take, "checkpoints"), "step", EITHER),
    "checkpoints deleted in the validation": Fault(
        functools.partial(take, "checkpoints"), "validation", EITHER
    ),
    "a folder as last.ckpt": Fault(in_the_way, "step", goes_on=False),
    "TMPDIR missing": Fault(functools.partial(tmpdir, "none"), codes=DONE),
    "TMPDIR full": Fault(functools.partial(tmpdir, "tmp", full=True), codes=EITHER),
    "TMPDIR of 120 characters": Fault(functools.partial(tmpdir, "t" * 120, is_new=True), codes=EITHER),
    "stdout full": Fault(functools.partial(stream, 1, "/dev/full")),
    "stdout's reader gone": Fault(functools.partial(stream, 1, "|"), codes=DONE),
    "stdout closed": Fault(functools.partial(stream, 1, None), codes=DONE),
    "stderr full": Fault(functools.partial(stream, 2, "/dev/full"), codes=DONE),
    "stderr's reader gone": Fault(functools.partial(stream, 2, "|"), codes=DONE),
    "stderr closed": Fault(functools.partial(stream, 2, None), codes=DONE),
    "stdin closed": Fault(functools.partial(stream, 0, None), codes=DONE),
    "no home": Fault(nobody, codes=EITHER),
    "unreadable folder": Fault(unreadable, codes=EITHER),
    "folders nested by the thousand": Fault(nested, codes=EITHER),
    "a name of 300 characters": Fault(NOTHING, words=other(OUTPUT, "n" * 300), goes_on=False),
    "a path of 5,000 characters": Fault(NOTHING, words=other(OUTPUT, "n/" * 2500), goes_on=False),
    "data with a name of 300 characters": Fault(
        NOTHING, words=other("--data --data.root", "n" * 300), goes_on=False
    ),
    "a model with a name of 300 characters": Fault(NOTHING, words=other("--model", "n" * 300)),
    "no memory in a step": Fault(lambda: fail(MemoryError()), "step"),
    "no memory as an image is read": Fault(lambda: fail(MemoryError()), "image is read", EITHER),
    "a fault of ours in a step": Fault(lambda: fail(KeyError("x")), "step"),
    "a fault of ours in the report": Fault(lambda: fail(KeyError("x")), "report is written"),
}


class Cases:
    """All cases, each in a copy of one folder.

    Args:
        place: Where everything goes.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.number = place, 0
        self.sound = place / "sound"
        draws = np.random.default_rng(0)
        for part, count in (("train", 6), ("val", 3), ("test", 3)):
            for name in ("a", "b"):
                (self.sound / "images" / part / name).mkdir(parents=True)
                for i in range(count):
                    pixels = draws.integers(0, 256, (28, 28, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(self.sound / "images" / part / name / f"{i}.png")
        from vit_cls.weights.bundle import save_classifier
        from vit_cls.weights.factory import create_classifier

        torch.manual_seed(0)
        model = create_classifier("vit_pico_patch7_28", ["a", "b"], load_weights=False)
        save_classifier(model, self.sound / "model.safetensors")

    def folder(self, *, is_disk: bool = False) -> Path:
        """A new copy, on a disk of its own if asked for."""
        self.number += 1
        folder = self.place / f"case_{self.number}"
        if is_disk:
            folder.mkdir()
            if os.geteuid() == 0:
                mounted = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
                subprocess.run(mounted, check=False, capture_output=True)
        return Path(shutil.copytree(self.sound, folder, dirs_exist_ok=True))

    def fault(self, verb: str, name: str) -> dict[str, Any] | None:
        """A verb that meets a fault; None where it does not."""
        fault, folder = FAULTS[name], self.folder(is_disk=True)
        if name.startswith(NEED_ROOT) and not os.path.ismount(folder):
            return None
        words = VERBS[verb]
        if fault.words is not None and (words := fault.words(words)) == VERBS[verb]:
            self.close(folder)
            return None
        reached = folder.with_suffix(".reached")

        def disturb() -> None:
            reached.touch()
            fault.act()

        def before() -> None:
            if fault.phase is not None:
                at(*PHASES[fault.phase], disturb)
                return
            disturb()

        ended = run(words, folder, before)
        if not reached.exists():
            self.close(folder)
            return None
        codes_of_verb = fault.codes | SOUND.get(verb, set())
        wrong = ended.faults(codes_of_verb, ours=name.startswith("a fault of ours"))
        with contextlib.suppress(OSError):
            (folder / "filler").unlink()
        wrong += [f"left: {path}" for path in temporary_files(folder)]
        codes = [ended.code]
        if verb.startswith("fit") and fault.goes_on:
            again = run((*VERBS[verb], "--resume", "auto"), folder)
            codes.append(again.code)
            wrong += [f"then {line}" for line in again.faults({0})]
        told = {"verb": verb, "what": name, "codes": codes, "wrong": wrong, "said": _last(ended.err)}
        self.close(folder)
        return told

    def close(self, folder: Path) -> None:
        """Take its disk away."""
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)

    def signal(self, verb: str, phase: str, signum: int) -> dict[str, Any] | None:
        """A signal to the whole group in a phase; None where the verb does not come to the phase."""
        folder = self.folder()
        reached = folder.with_suffix(".reached")

        def disturb() -> None:
            reached.touch()
            os.killpg(0, signum)

        ended = run(VERBS[verb], folder, lambda: at(*PHASES[phase], disturb))
        if not reached.exists():
            return None
        wrong = ended.faults({128 + signum}) + [f"left: {name}" for name in temporary_files(folder)]
        if verb.startswith("fit") and phase in ("step", "validation", "checkpoint is written"):
            wrong += [] if (folder / "run/checkpoints/last.ckpt").is_file() else ["no state is saved"]
        told = {"verb": verb, "what": phase, "signal": signal.Signals(signum).name}
        return {**told, "code": ended.code, "wrong": wrong, "said": _last(ended.err)}


def _last(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("vit-cls: ")]
    return (said or lines or [""])[-1]


def import_all() -> None:
    """What every process needs, so that forked ones need not."""
    from vit_cls.cli import COMMANDS

    for name in ("popen_fork", "popen_spawn_posix", "resource_sharer", "resource_tracker"):
        importlib.import_module(f"multiprocessing.{name}")
    for name in ("unicode-escape", "ascii", "latin-1", "cp1252"):
        codecs.lookup(name)  # another user may not read the interpreter's files
    for _, module in COMMANDS.values():
        importlib.import_module(module)


def main() -> int:
    """Play the cases, print what was wrong, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=["signals", "faults"], help="one of the tables")
    parser.add_argument("--only", default="", help="verbs, or cases `verb: what`, that begin so, by ;")
    parser.add_argument("--signals", default="INT,TERM,USR1,HUP")
    parser.add_argument("--output", type=Path, help="JSON record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    place = Path(tempfile.mkdtemp(prefix="vit_cls_faults_"))
    place.chmod(0o755)  # some cases are another user's
    cases, rounds = Cases(place), []
    names = [getattr(signal, f"SIG{name}") for name in given.signals.split(",")]
    signals = [
        (cases.signal, (verb, phase, signum)) for verb in VERBS for phase in PHASES for signum in names
    ]
    faults = [(cases.fault, (verb, name)) for verb in VERBS for name in FAULTS]
    tables: dict[str, list[Any]] = {"signals": signals, "faults": faults}
    for play, arguments in itertools.chain(*(tables[kind] for kind in tables if given.kind in (None, kind))):
        title = ": ".join(arguments[:2])
        if any(title.startswith(start) for start in given.only.split(";")):
            found = play(*arguments)
            if found is not None:
                rounds.append(found)
                print(json.dumps(found), flush=True)
    wrong = [case for case in rounds if case["wrong"]]
    print(f"{len(rounds) - len(wrong)} of {len(rounds)} ended as documented")
    if given.output:
        from vit_cls.environment import environment

        given.output.write_text(json.dumps({**environment(), "cases": rounds}, indent=1) + "\n")
    if wrong:
        print(f"logs are in {place}")
    else:
        shutil.rmtree(place, ignore_errors=True)
    return int(bool(wrong) or not rounds)


if __name__ == "__main__":
    sys.exit(main())
