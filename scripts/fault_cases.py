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
import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
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

    def faults(self, codes: set[int], *, lines: int = 1) -> list[str]:
        """What is not as documented."""
        said = [line for line in self.err.splitlines() if line.startswith("vit-cls: ")]
        wrong = [] if self.code in codes else [f"exit {self.code} and not {sorted(codes)}"]
        wrong += [f"{len(said)} paragraphs: {said}"] if len(said) != lines and self.code else []
        wrong += ["a traceback"] if "Traceback" in self.err or "Exception ignored" in self.err else []
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
    hidden = [path for path in place.rglob(".*") if path.is_file() and ".part" not in str(path)]
    return [str(path.relative_to(place)) for path in hidden]


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

    def folder(self) -> Path:
        """A new copy."""
        self.number += 1
        return Path(shutil.copytree(self.sound, self.place / f"case_{self.number}"))

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

    for _, module in COMMANDS.values():
        importlib.import_module(module)


def main() -> int:
    """Play the cases, print what was wrong, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=["signals"], help="one of the tables")
    parser.add_argument("--only", default="", help="verbs, or cases `verb: what`, that begin so, by ;")
    parser.add_argument("--signals", default="INT,TERM,USR1,HUP")
    parser.add_argument("--output", type=Path, help="JSON record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    place = Path(tempfile.mkdtemp(prefix="vit_cls_faults_"))
    cases, rounds = Cases(place), []
    names = [getattr(signal, f"SIG{name}") for name in given.signals.split(",")]
    for verb in VERBS:
        for phase in PHASES:
            if not any(f"{verb}: {phase}".startswith(start) for start in given.only.split(";")):
                continue
            for signum in names:
                found = cases.signal(verb, phase, signum)
                if found is None:
                    break
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
