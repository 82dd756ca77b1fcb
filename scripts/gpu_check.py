"""What only a GPU can show: the tests marked `gpu`, real runs, evaluation in bf16, and speed beside timm.

Run: ``bash scripts/gpu_check.sh``; see there. A step that fails does not stop the others; one for which no
time is left is stopped or skipped, and said to be. On a GPU a record of every figure goes to `RECORD`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if importlib.util.find_spec("vit_cls") is None:  # run from a checkout, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # the files beside this one, if it is imported

import benchmark
import lightning
import timm
import torch
from gpu_runs import MOST_BATCHES, Failed, NoWait, make_photos, told_of_run, train
from pairs import Row, Settings, check_target, cpu_name, heading

import vit_cls
from vit_cls.data.decode import FAST_JPEG
from vit_cls.errors import ConfigError, VitClsError
from vit_cls.evaluation.predictions import images_for_model, predict_index
from vit_cls.files import write_text
from vit_cls.inference import InferenceConfig
from vit_cls.model.token_model import TokenModel
from vit_cls.weights.factory import load

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "scripts/results/gpu_check.json"
MINUTES = 8.0
GPU_TESTS = ("tests/test_devices.py", "tests/model/test_init.py", "tests/training/test_fit.py")
COMPILED_AGREES = 0.1
"""Largest relative difference of the last training loss with and without ``--compile``."""
CHANGED = 0.02
"""Largest share of the predictions that bf16 may change; a model of a few epochs is unsure of many images."""
STRICT_STEPS = 50
NO_TIME = "no time was left"
EVERYTHING = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "erase_prob": 0.25}

Step = Callable[[Settings], Row]


def run_options(settings: Settings, name: str, **more: Any) -> Row:
    """Keys of `fit` for one run, dotted: a ViT-S of 224 pixels, or a tiny one where it must be quick."""
    size: Row = {"model.name": "vit_small_patch16_224", "data.batch_size": 64, "trainer.max_epochs": 3}
    if settings.quick:
        size = {"model.name": "vit_pico_patch7_28", "model.depth": 1, "data.batch_size": 8}
        size |= {"trainer.max_epochs": 2, "data.num_workers": 0}
    if settings.photos is not None:  # there may be very many
        size |= {f"trainer.limit_{part}_batches": MOST_BATCHES for part in ("train", "val")}
    return {
        **size,
        "data.root": str(settings.root),
        "run_dir": str(settings.work / name),
        "trainer.accelerator": {"cpu": "cpu", "cuda": "gpu"}[settings.device],
        "trainer.devices": 1,
        "trainer.enable_progress_bar": False,
        **more,
    }


def check_photos(settings: Settings) -> Row:
    """The photos of ``--photos``, or made ones."""
    if settings.photos is not None:
        return {"said": f"given: {settings.photos}"}
    settings.root = settings.work / "photos"
    size: Row = {"classes": 10, "counts": (128, 32), "side": 400}
    if settings.quick:
        size = {"classes": 3, "counts": (8, 4), "side": 40}
    made = make_photos(settings.root, **size)
    return {
        "images": made,
        "said": f"{made} JPEGs of {size['classes']} classes, about {size['side']} pixels a side",
    }


def check_tests(settings: Settings) -> Row:
    """The tests that need a GPU, in a process of their own; without one, a few of those bodies on the CPU."""
    report = settings.work / "tests.xml"
    chosen = (
        ["-m", "gpu", *GPU_TESTS] if settings.device == "cuda" else [GPU_TESTS[0], "-k", "mixing and cpu"]
    )
    # Our filters make errors of warnings, which other versions have, and name a package that may be absent.
    options = ["-q", "-o", "filterwarnings=default", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if not report.is_file():
        raise Failed(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if done.returncode or not passed:
        raise Failed(f"{counts}; failed: {', '.join(map(str, wrong))}; {done.stdout[-300:]}")
    return {**counts, "passed": passed, "said": f"{passed} passed, {counts['skipped']} skipped"}


def check_fit(settings: Settings) -> Row:
    """From JPEG to report, as users train: with the default precision and loading processes."""
    return _run_row(train(run_options(settings, "fit")), falls=True)


def check_compile(settings: Settings) -> Row:
    """The same run with ``--compile``, whose last loss must be about that of the plain one."""
    plain = settings.work / "fit"
    if not plain.is_dir():
        train(run_options(settings, "fit"))
    row = _run_row(train(run_options(settings, "compiled", compile=True)), falls=True)
    last, expected = row["losses"][-1], told_of_run(plain)["losses"][-1]
    row["relative_difference"] = abs(last / expected - 1)
    if row["relative_difference"] > COMPILED_AGREES:
        raise Failed(f"the last training loss is {last:.4f} compiled and {expected:.4f} plain")
    row["said"] += f"; last loss {last:.4f}, plain {expected:.4f}"
    return row


def check_no_wait(settings: Settings) -> Row:
    """Steps in which waiting for the GPU is an error, with everything on that a step can do."""
    watch, batch = NoWait(), 4 if settings.quick else 32
    more: Row = {"data.mix": EVERYTHING, "optim.ema_decay": 0.99, "trainer.log_every_n_steps": 10_000}
    run_dir = train(run_options(settings, "no_wait", **more, **{"data.batch_size": batch}), [watch])
    needed = 0 if settings.quick else STRICT_STEPS
    if watch.steps < needed:
        raise Failed(f"only {watch.steps} steps of {needed} were watched: give more photos")
    waits = "nothing to wait for on a CPU" if settings.device == "cpu" else "none waits"
    return {"steps": watch.steps, "said": f"{watch.steps} steps: {waits}", **told_of_run(run_dir)}


def check_everything(settings: Settings) -> Row:
    """An average of the weights, mixup, CutMix and erasing, validated and kept as the record says."""
    more: Row = {"data.mix": EVERYTHING, "optim.ema_decay": "auto"}
    row = _run_row(train(run_options(settings, "everything", **more)))
    header = (settings.work / "everything/metrics.csv").read_text().splitlines()[0]
    if "val/ema_acc1" not in header or "val/raw_acc1" not in header:
        raise Failed(f"the average was not validated beside the raw weights: {header}")
    row["said"] += f"; kept: {row['kept']}"
    return row


def check_evaluate(settings: Settings) -> Row:
    """The validation images in fp32 and in bf16: images a second, and predictions that change."""
    run_dir = settings.work / "fit"
    if not run_dir.is_dir():
        train(run_options(settings, "fit"))
    classifier, row = load(run_dir), {}
    images = images_for_model(str(settings.root), classifier, split=None)
    blank = torch.zeros(64, 3, *classifier.preprocess.img_size, dtype=torch.uint8, device=settings.device)
    probs = {}
    for precision in ("32", "bf16"):
        config = InferenceConfig(settings.device, precision, num_workers=0 if settings.quick else None)
        with torch.inference_mode(), config.computes_in.autocast(blank.device):  # once, to warm up
            classifier.to(blank.device).eval()(blank).cpu()
        started = time.perf_counter()
        probs[precision] = predict_index(classifier, images.source, config).probs
        row[f"images_per_second_{precision}"] = len(probs[precision]) / (time.perf_counter() - started)
    changed = int((probs["32"].argmax(axis=1) != probs["bf16"].argmax(axis=1)).sum())
    count = len(probs["32"])
    row |= {"images": count, "changed": changed, "largest": float(abs(probs["32"] - probs["bf16"]).max())}
    said = f"{changed} of {count} predictions change in bf16, probabilities by {row['largest']:.1e} at most"
    if changed > max(1, CHANGED * count):
        raise Failed(said)
    speeds = ", ".join(f"{row[f'images_per_second_{name}']:.0f} in {name}" for name in probs)
    return {**row, "said": f"{said}; images/s {speeds}"}


def check_speed(settings: Settings) -> Row:
    """Training of ViT-S and ViT-B beside timm's, uncompiled; `benchmark` checks first that they are equal."""
    return _speed(settings, compile=False)


def check_compiled_speed(settings: Settings) -> Row:
    """The same, both compiled."""
    return _speed(settings, compile=True)


def _speed(settings: Settings, *, compile: bool) -> Row:
    models = ["vit_small_patch16_224", "vit_base_patch16_224"]
    words = [
        "train",
        "--device",
        settings.device,
        "--rounds",
        "5",
        "--compile" if compile else "--no-compile",
    ]
    if settings.quick:
        models, words = ["vit_pico_patch7_28"], [*words, "--batch_size", "2", "--rounds", "2"]
    sides = {"cpu": 64, "cuda": 1024} if settings.quick else benchmark.GEMM_SIDE
    with mock.patch.object(benchmark, "GEMM_SIDE", sides):
        report = benchmark.run(benchmark.parse([*words, "--models", *models]))
    rows = [
        (row["model"], *(row[side]["images_per_second"] for side in ("ours", "timm")))
        for row in report["rows"]
    ]
    said = "; ".join(f"{name} {ours:.0f} images/s, timm {theirs:.0f}" for name, ours, theirs in rows)
    return {"report": report, "said": said}


def _run_row(run_dir: Path, *, falls: bool = False) -> Row:
    row = told_of_run(run_dir, falls=falls)
    speed = statistics.median(row["images_per_second"])
    waiting = f"{row['data_wait'][-1]:.0%} of the time waiting for images"
    said = f"{row['precision']}, {speed:.0f} images/s, {waiting}, top-1 {row['top1']:.1%}"
    return {**row, "said": said}


STEPS: dict[str, Step] = {
    "photos": check_photos,
    "fit": check_fit,
    "compile": check_compile,
    "no_wait": check_no_wait,
    "everything": check_everything,
    "evaluate": check_evaluate,
    "tests": check_tests,
    "speed": check_speed,
    "compiled_speed": check_compiled_speed,
}
"""What is done, in this order; the slowest last."""


def run(settings: Settings) -> Row:
    """Every step that was asked for, and what became of it."""
    started, rows = time.perf_counter(), []
    for name in ["photos", *(step for step in settings.steps if step != "photos")]:
        left = 60 * settings.minutes - (time.perf_counter() - started)
        row: Row = {"step": name, "what": " ".join((STEPS[name].__doc__ or "").split())}
        row |= _done(STEPS[name], settings, left) if left > 0 else {"outcome": "skipped", "said": NO_TIME}
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
    cuda = settings.device == "cuda"
    modules = (torch, timm, lightning, vit_cls)
    shown = {key: str(value) for key, value in vars(settings).items() if key not in ("work", "root", "json")}
    return {
        **heading(
            {m.__name__: m.__version__ for m in modules}, torch.cuda.get_device_name() if cuda else cpu_name()
        ),
        "cuda": torch.version.cuda,
        "by": "command line" if importlib.util.find_spec("jsonargparse") else "Python",
        "jpeg": "Pillow" if FAST_JPEG is None else f"simplejpeg {FAST_JPEG}",
        "seconds": time.perf_counter() - started,
        "settings": shown,
        "ok": all(row["outcome"] == "ok" for row in rows),
        "rows": rows,
    }


def _done(step: Step, settings: Settings, left: float) -> Row:
    """What a step found, how long it took and how much memory, or why it failed; ``left`` is in seconds."""

    def stop(*_: Any) -> None:
        raise Failed(f"it was stopped: {NO_TIME}")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    cuda, started = settings.device == "cuda", time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with _quick_compiling(settings):
            row = {"outcome": "ok", **step(settings)}
    except (Exception, SystemExit) as error:  # one step must not hide the others
        if not isinstance(error, (Failed, VitClsError)):
            traceback.print_exc()
        row = {"outcome": "FAILED", "said": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    row["seconds"] = time.perf_counter() - started
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


@contextlib.contextmanager
def _quick_compiling(settings: Settings) -> Iterator[None]:
    """Where it must be quick on a CPU, graphs are made but run as they are: a C++ compiler takes a minute."""
    if not settings.quick or settings.device == "cuda":
        yield
        return
    compile_encoder, compile = TokenModel.compile_encoder, torch.compile
    eager = mock.patch.object(TokenModel, "compile_encoder", lambda model: compile_encoder(model, "eager"))
    whole = mock.patch.object(
        torch, "compile", lambda model, **own: compile(model, **{**own, "backend": "eager"})
    )
    with eager, whole:
        yield


def line(row: Row) -> str:
    """A step as a row of the table."""
    seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
    memory = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
    return f"{row['step']:<15}{row['outcome']:<9}{seconds:>7}{memory:>7}  {row['said']}"


def table(report: Row) -> str:
    """The report as text."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['date']}: {report['device_name']}, {versions}; by {report['by']}, JPEG by {report['jpeg']}"
    ]
    lines.append(f"{'step':<15}{'outcome':<9}{'s':>7}{'GiB':>7}")
    lines += [line(row) for row in report["rows"]]
    failed = [row["step"] for row in report["rows"] if row["outcome"] != "ok"]
    verdict = "everything holds" if not failed else f"not ok: {', '.join(failed)}"
    return "\n".join([*lines, f"{report['seconds']:.0f} s: {verdict}"])


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read and check the command line.

    Args:
        argv: Arguments after the program's name; None means those of this process.

    Raises:
        ConfigError: If the device is not there, or the photos or the place of the record are not.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--quick", action="store_true", help="tiny models and images: whether the script runs")
    add(
        "--photos",
        type=Path,
        metavar="DIR",
        help="train/ and val/ with a folder a class (default: made here)",
    )
    add(
        "--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS), metavar="STEP", help=", ".join(STEPS)
    )
    add(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"what is not done by then is stopped (default: {MINUTES:g})",
    )
    add("--json", type=Path, metavar="FILE", help="where the record goes (default, on a GPU alone: there)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here that torch can use. To see that the script runs: --device cpu --quick."
        )
    if args.photos is not None and not args.photos.is_dir():
        raise ConfigError(f"--photos {args.photos} is no folder.")
    check_target("json", args.json)
    args.root = args.photos
    args.json = args.json or (RECORD if args.device == "cuda" else None)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 all holds, 1 a step failed or was skipped, 2 bad input."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    try:
        settings = parse(argv)
    except ConfigError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        settings.work = Path(folder)
        report = run(settings)
    print(table(report))
    if settings.json is not None:
        write_text(settings.json, json.dumps(report, indent=1) + "\n")
        print(f"record: {settings.json}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
