"""Disturb a short training at random, and demand the exact end of the one that nobody disturbs.

Run:    .venv/bin/python scripts/chaos.py [--rounds 104] [--seed 0] [--output scripts/results/chaos.json]
        .venv/bin/python scripts/chaos.py --rounds 8 --fault epoch-keys     (a fault put back: it must fail)
Expect: some ten seconds a round on two cores, forty with two processes; a table event x workers x processes
        x place of TMPDIR, exit 1 if a round ended otherwise than the undisturbed run. Needs Linux; as root
        disks are filled for true, else the size of files is limited.

Each round starts the same `vit-cls fit --resume auto`, disturbs it at a random time, and starts it again
until it comes to its end. Compared are weights, averages, optimiser, schedule, the rows of metrics.csv
without times, and the tensors of model.safetensors: one SHA-256 of all.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vit_cls.environment import environment

EVENTS = ("kill", "term", "stop", "disk-full", "nan", "bit-flip", "worker-kill")
STEP_SECONDS = 0.04
"""Of which a step takes at least so many, so that most of a run is training."""
PATIENCE_SECONDS = 180.0
EARLY = 0.25
"""Share of the rounds that are disturbed before the first checkpoint; the others between it and the end."""
STARTS = 6
"""Most starts that a round may take."""
TIMES = ("seconds", "train_images_per_second", "data_wait")
FIT = (
    *("fit", "--model.name", "vit_pico_patch7_28", "--model.img_size", "16", "--model.patch_size", "4"),
    *(
        "--model.embed_dim",
        "24",
        "--model.depth",
        "2",
        "--model.num_heads",
        "2",
        "--model.drop_path_rate",
        "0.2",
    ),
    *("--optim.ema_decay", "0.9", "--optim.max_skipped_steps", "1", "--data.mix.mixup_alpha", "0.8"),
    *("--data.mix.cutmix_alpha", "1", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "4"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "4"),
)


def child(arguments: list[str]) -> None:
    """Be `vit-cls`, with slow steps, and with the fault or the NaN that the environment asks for."""
    from vit_cls.cli import main
    from vit_cls.data.sampler import EvenBatches
    from vit_cls.training.task import ClassificationTask

    os.environ["CHAOS_CHILD"] = "1"
    sys.argv = [__file__, *arguments]  # processes of the same run are started so
    step: Callable[..., Any] = ClassificationTask.training_step
    nan_at = int(os.environ.get("CHAOS_NAN", -1))

    def slow(task: ClassificationTask, batch: Any, batch_index: int) -> Any:
        time.sleep(STEP_SECONDS)
        loss = step(task, batch, batch_index)
        return loss * float("nan") if task.trainer.global_step == nan_at else loss

    ClassificationTask.training_step = slow  # type: ignore
    if os.environ.get("CHAOS_FAULT") == "epoch-keys":
        begin = EvenBatches.__init__

        def from_the_start(batches: EvenBatches, sampler: Any, batch_size: int, begins: Any = None) -> None:
            begin(batches, sampler, batch_size, (0, begins[1] if begins else 0))

        EvenBatches.__init__ = from_the_start  # type: ignore
    sys.exit(main())


class Run:
    """One `vit-cls fit` in a process group of its own, forked off here: imports take longer than training.

    What is imported here is there; a second process of the run is started by Lightning, and imports all.
    """

    def __init__(self, options: list[str], environ: dict[str, str], log: Path) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environ)
        tempfile.tempdir = None
        code = 99
        try:
            child(options)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(code)

    def signal(self, number: int, pid: int | None = None) -> None:
        """To one process, or to all."""
        try:
            if pid is None:
                os.killpg(self.pid, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            pass

    def children(self) -> list[int]:
        """Processes that this one started and that are there: loading processes, and those of the run."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def wait(self, seconds: float, until: Callable[[], bool] = bool) -> int | None:
        """Its exit code, negative for a signal; None where it goes on, also once something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None


def has_begun(folder: Path) -> Callable[[], bool]:
    """Whether a run has its first checkpoint."""
    return lambda: (folder / "checkpoints/last.ckpt").exists()


def end_of(folder: Path) -> str:
    """SHA-256 of all that a run leaves but times."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for inner in value:
                add(inner)
        elif isinstance(value, torch.Tensor):
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    checkpoint = torch.load(folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        add(checkpoint[name])
    add(load_file(folder / "model.safetensors"))
    for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()):
        add({key: value for key, value in row.items() if key not in TIMES})
    return digest.hexdigest()


class Chaos:
    """The rounds, in one folder.

    Args:
        place: Where everything goes.
        seed: Of all that is drawn.
        fault: To be put back into what is tested.
    """

    def __init__(self, place: Path, seed: int, fault: str | None) -> None:
        self.place, self.random, self.fault = place, random.Random(seed), fault
        self.images, self.disk, self.other = place / "images", place / "disk", Path("/dev/shm") / place.name
        self.other.mkdir()
        self.disk.mkdir()
        mounted = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.disk)]
        self.is_disk = os.geteuid() == 0 and subprocess.run(mounted, capture_output=True).returncode == 0
        self.whole: dict[tuple[int, int], tuple[str, float, float]] = {}
        draws = np.random.default_rng(seed)
        for part, count in (("train", 20), ("val", 6)):
            for name in ("a", "b"):
                (self.images / part / name).mkdir(parents=True)
                for i in range(count):
                    pixels = draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(self.images / part / name / f"{i}.png")

    def close(self) -> None:
        """Leave nothing."""
        if self.is_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)
        shutil.rmtree(self.other, ignore_errors=True)

    def start(
        self, folder: Path, workers: int, ranks: int, tmp: Path, nan_at: int = -1, *, sound: bool = False
    ) -> Run:
        options = [*FIT, "--data.root", str(self.images), "--data.batch_size", str(5 // ranks)]
        options += ["--run_dir", str(folder), "--resume", "auto", "--data.num_workers", str(workers)]
        options += ["--trainer.devices", str(ranks)]
        environ = {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp), "CHAOS_NAN": str(nan_at)}
        environ["CHAOS_FAULT"] = "" if sound or self.fault is None else self.fault
        return Run(options, environ, self.place / f"{folder.name}.log")

    def undisturbed(self, workers: int, ranks: int) -> tuple[str, float, float]:
        """Its end, and its seconds until its first checkpoint and from there on."""
        key = workers, ranks
        if key not in self.whole:
            folder, began = self.place / f"whole_{workers}_{ranks}", time.monotonic()
            run = self.start(folder, workers, ranks, self.place, sound=True)
            run.wait(PATIENCE_SECONDS, has_begun(folder))
            early = time.monotonic() - began
            if (code := run.wait(PATIENCE_SECONDS)) != 0:
                raise SystemExit(f"the undisturbed run ended with {code}: see {run.log}")
            self.whole[key] = end_of(folder), early, time.monotonic() - began - early
        return self.whole[key]

    def round(self, number: int, event: str, workers: int, ranks: int, tmp: str) -> dict[str, Any]:
        """One run, disturbed once, and started again until its end."""
        end, early, late = self.undisturbed(workers, ranks)
        home = self.disk if event == "disk-full" else self.place
        folder = home / f"round_{number}"
        place = self.other if tmp == "other" else self.place
        is_early = self.random.random() < EARLY
        moment = self.random.uniform(0.1, 1) * early if is_early else self.random.uniform(0, 0.95) * late
        nan_at = self.random.randrange(1, 16) if event == "nan" else -1
        run = self.start(folder, workers, ranks, place, nan_at)
        began = None if is_early else run.wait(PATIENCE_SECONDS, has_begun(folder))
        codes = [began if began is not None else self._disturb(run, event, folder, moment)]
        while codes[-1] != 0 and len(codes) < STARTS:
            if codes[-1] is None:
                break
            run = self.start(folder, workers, ranks, place)
            codes.append(self._code(run))
        found = end_of(folder) if codes[-1] == 0 else None
        traceback = "Traceback" in run.log.read_text(errors="replace")
        if found == end:
            shutil.rmtree(folder, ignore_errors=True)
        elif home == self.disk:
            shutil.move(folder, self.place)
        told = {"event": event, "workers": workers, "ranks": ranks, "tmpdir": tmp, "early": is_early}
        return {**told, "at": round(moment, 2), "codes": codes, "traceback": traceback, "same": found == end}

    def _code(self, run: Run) -> int | None:
        code = run.wait(PATIENCE_SECONDS)
        if code is None:
            run.signal(signal.SIGKILL)
            run.wait(10)
        return code

    def _disturb(self, run: Run, event: str, folder: Path, moment: float) -> int | None:
        code = run.wait(moment)
        if code is not None and event != "nan":
            return code  # it was faster than the moment
        if event in ("kill", "bit-flip"):
            run.signal(signal.SIGKILL)
        elif event == "term":
            run.signal(signal.SIGTERM)
        elif event == "stop":
            run.signal(signal.SIGSTOP)
            time.sleep(1)
            run.signal(signal.SIGCONT)
        elif event == "worker-kill" and (children := run.children()):
            run.signal(signal.SIGKILL, self.random.choice(children))
        filler = folder.parent / "filler"
        if event == "disk-full":
            self._fill(run, filler)
        code = code if code is not None else self._code(run)
        filler.unlink(missing_ok=True)
        last = folder / "checkpoints/last.ckpt"
        if event == "bit-flip" and code != 0 and last.is_file():  # one that ended just then is read no more
            content = bytearray(last.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            last.write_bytes(content)
        return code

    def _fill(self, run: Run, filler: Path) -> None:
        """Leave no room for what is written from now on."""
        if not self.is_disk:
            limit = self.random.randrange(1000, 100_000)
            resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass


def cells() -> Iterator[tuple[str, int, int, str]]:
    """Every event for every number of workers and processes and both places of TMPDIR, over and over.

    Without loading processes there is none to kill.
    """
    every = itertools.product(EVENTS, (0, 2), (1, 2), ("same", "other"))
    yield from itertools.cycle([cell for cell in every if cell[:2] != ("worker-kill", 0)])


def table(rounds: list[dict[str, Any]]) -> str:
    """Rounds that ended as they must, of how many, by cell."""
    columns = list(itertools.product((0, 2), (1, 2), ("same", "other")))
    lines = ["event        " + "".join(f"{f'{w} w {r} p {t}':>14}" for w, r, t in columns)]
    for event in EVENTS:
        line = f"{event:13}"
        for column in columns:
            here = [
                x for x in rounds if (x["event"], x["workers"], x["ranks"], x["tmpdir"]) == (event, *column)
            ]
            none = "none to kill" if event == "worker-kill" and column[0] == 0 else "not run"
            cell = f"{sum(x['same'] for x in here)} of {len(here)}" if here else none
            line += f"{cell:>14}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Play the rounds, print the table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=104)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=["epoch-keys"], help="put a fault back; the rounds must then fail")
    parser.add_argument("--events", help="some of the events, by comma")
    parser.add_argument("--output", type=Path, help="JSON record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for module in ("vit_cls.commands.fit", "torchvision", "matplotlib.figure", "tensorboard", "scipy.stats"):
        importlib.import_module(module)
    wanted = set(given.events.split(",")) if given.events else set(EVENTS)
    place = Path(tempfile.mkdtemp(prefix="vit_cls_chaos_"))
    chaos, rounds = Chaos(place, given.seed, given.fault), []
    order = [cell for cell in itertools.islice(cells(), 520) if cell[0] in wanted]
    if given.rounds < 52:
        random.Random(given.seed).shuffle(order)
    began = time.monotonic()
    try:
        for number, cell in enumerate(itertools.islice(itertools.cycle(order), given.rounds)):
            rounds.append(chaos.round(number, *cell))
            print(json.dumps(rounds[-1]), flush=True)
    finally:
        chaos.close()
    wrong = [x for x in rounds if not x["same"] or x["traceback"]]
    print(table(rounds))
    print(
        f"{len(rounds) - len(wrong)} of {len(rounds)} ended as the undisturbed run, no traceback; "
        f"seed {given.seed}"
    )
    if given.output:
        codes = Counter(str(code) for x in rounds for code in x["codes"])
        record = {**environment(), "seed": given.seed, "fault": given.fault, "exit_codes": dict(codes)}
        record |= {
            "seconds": round(time.monotonic() - began),
            "rounds": rounds,
            "table": table(rounds).split("\n"),
        }
        given.output.write_text(json.dumps(record, indent=1) + "\n")
    if not wrong:
        shutil.rmtree(place, ignore_errors=True)
    else:
        print(f"logs are in {place}")
    return int(bool(wrong))


if __name__ == "__main__":
    if "CHAOS_CHILD" in os.environ:
        child(sys.argv[1:])
    sys.exit(main())
