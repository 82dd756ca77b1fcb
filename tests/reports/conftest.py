"""Results for the pages, tame and hostile, and a browser to look at the pages with."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.reports.outline import Outline
from vit_cls.data.doctor.issues import ISSUE_TYPES, DatasetReport, Offender, Problem
from vit_cls.data.index import ImageIndex
from vit_cls.evaluation.comparison import Comparison, Disagreement, ModelScore, Pair
from vit_cls.evaluation.predictions import Predictions, Scoring
from vit_cls.evaluation.results import evaluate_predictions
from vit_cls.lab.results import (
    ForestChart,
    HeatMap,
    LabResult,
    Line,
    LineChart,
    Pictures,
    ScatterChart,
    Table,
)
from vit_cls.reports.folder import write_folder
from vit_cls.stats.verdicts import CANNOT_TELL, VERDICTS, Finding
from vit_cls.training.result import FitResult
from vit_cls.training.runs import RunFolder

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quote' & <b>bold",
    "x" * 200,
    "🐱 cat",
    "שלום עולם",
    "many words in one name " * 8,
    "turned \u202e round",
    "not utf-8: \udcff, control: \x01.jpg",
]
REASONS = ("image file is truncated", "cannot identify image file " + "z" * 150, "empty")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=2000", "--enable-logging=stderr", "--window-size=1400,900", "--dump-dom"),
]
WIDTHS = (360, 1280)
# A window cannot be narrower than 500 px; a frame can. The page in it is untouched, its own policy included.
FRAME = '<iframe srcdoc="{}" style="border:0;width:{}px;height:{}px"></iframe>'
MEASURE = """
<!doctype html><meta name="color-scheme" content="{scheme}"><title></title>{frames}
<script>onload = () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
frame => {{
  const page = frame.contentDocument, root = page.documentElement;
  return {{
    inner: frame.contentWindow.innerWidth, width: root.scrollWidth, height: root.scrollHeight,
    images: page.images.length, shown: [...page.images].filter(image => image.naturalWidth > 0).length,
    ground: +frame.contentWindow.getComputedStyle(page.body).backgroundColor.match(/\\d+/)[0],
  }};
}}))</script>
"""
VERSIONS = {"vit_cls": "0.1.0", "torch": "2.15.0"}


class Case(NamedTuple):
    """A result, and what its files need besides."""

    result: Any
    about: dict[str, Any]


def jpeg(colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def every_second(paths) -> dict[str, bytes]:
    """Pictures of half of the images."""
    return dict.fromkeys(paths[::2], jpeg())


def predictions_of(classes, images=120, *, failed=0, scoring=Scoring()) -> Predictions:  # noqa: B008, frozen
    """Of three classes or more the second has no images, and the last is never predicted."""
    names = [f"class {i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    rng, n = np.random.default_rng(0), len(names)
    labels = rng.choice([i for i in range(n) if i != 1 or n < 3], images)
    logits = rng.normal(size=(images, n))
    logits[np.arange(images), labels] += 1.5
    logits[:, -1] -= 20 * (n > 2)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    errors = {i: REASONS[i % len(REASONS)] for i in range(failed)}
    probs[list(errors)] = np.nan
    paths = [f"{names[k]}/{i}.png" for i, k in enumerate(labels)]
    return Predictions(ImageIndex(Path("p"), paths, labels, names), probs, errors, 75.4, scoring)


def evaluation_case(predictions: Predictions, **changes) -> Case:
    about = {"predictions": predictions, "model": "runs/a", "data": "photos/test"} | changes
    return Case(evaluate_predictions(predictions), about)


def comparison_of(names: list[str], verdict: str = CANNOT_TELL) -> Comparison:
    models = [ModelScore(name, 80 + i, 100, 0.8 + i / 100, (0.7, 0.9)) for i, name in enumerate(names)]
    needed = 812 if verdict == CANNOT_TELL else None
    numbers = (100, 3, 70, 8, 12, 10, 0.04, (-0.05, 0.13), 0.39, 1.0, 0.74, 0.01, 0.12, verdict, needed)
    return Comparison(models, [Pair(a, b, *numbers) for a, b in itertools.combinations(names, 2)], 7)


def disagreements_of(count: int, num_models: int = 2) -> list[Disagreement]:
    """Kinds in turn: the first model alone right, the last alone, none."""
    others = ["dog"] * (num_models - 1)
    kinds = [("cat", *others), (*others, "cat"), ("owl", *others)]
    return [
        Disagreement(f"cat/{i}.jpg", "cat", kinds[i % 3], (0.5 + i / 1000,) * num_models)
        for i in range(count)
    ]


def lab_result(names: list[str] | None = None) -> LabResult:
    """All verdicts, two tables, every kind of figure; names go wherever a name can."""
    a, b, c, *_ = names or ["cls", "gap", "max"]
    findings = [
        Finding(f"{a} and {b} differ: {verdict}", verdict, f"{a} against {b}: {verdict}, so it is.")
        for verdict in VERDICTS
    ]
    findings[3] = replace(
        findings[3],
        estimate=0.004,
        ci95=(-0.009, 0.017),
        p=0.41,
        p_holm=1.0,
        p_equivalence=1e-7,
        margin=0.01,
        smallest_detectable=0.021,
        needed=f"about 4,300 images of {c}",
        counts={"images": 5400, "seeds": 5},
    )
    lines = [Line(f"{name} {i}", [(0, 0.5), (1, math.nan), (2, 0.9)]) for i, name in enumerate([a, b, c] * 2)]
    image = np.full((28, 28, 3), 90, np.uint8)
    figures = [
        LineChart(f"By layer {a}", a, b, lines, marks={c: 0.1}, note=f"note on {a}"),
        ForestChart(f"Difference {a}", [(f"{a} minus {b}", 0.01, (-0.01, 0.03))], 0.01),
        ScatterChart("Cost", "x", "y", [(a, 10, 0.5, (0.4, 0.6)), (b, 1e6, 0.9, None)]),
        HeatMap("Entropy", [[0.5, math.nan]], [a], [b, c]),
        HeatMap("Tokens", [[0.5] * 20] * 3),
        HeatMap("Nothing", [[math.nan]]),
        Pictures(f"Images of {a}", [a, b], [[image, None], [image, image]], [a, c]),
    ]
    wide = [f"{b} column {i} (%)" for i in range(12)]
    heads = [[a, 0.93214, 5400, 0.02], [b, None, 7, 0.123]]
    tables = [
        Table(f"Heads {a}", ["head", "top-1 (%)", "images", "ece"], heads),
        Table("Wide", ["head", *wide], [[name, *([0.5] * 12)] for name in (a, b, c)], f"{a} is read so."),
    ]
    return LabResult(
        "study heads",
        f"Which of {a}, {b}?",
        f"{a} beats {b}",
        findings,
        tables,
        figures,
        settings={"model": {"name": a, "pool": "cls"}, "lr": 1e-3, "grid": list(range(100))},
        data={"root": b, "test": 540, "failed": 0},
        values={"x": math.inf, "seeds": np.arange(3)},
        predictions={"cls": np.array([1.0, math.nan]), "path": [c]},
        notes=[f"{a} was seen once."],
        seconds=61.0,
    )


def history_of_four_epochs() -> list[dict[str, float]]:
    return [
        {
            "epoch": float(i),
            "step": 17.0 * (i + 1),
            "lr": 0.002 / (i + 1),
            "train/loss": 2.5 / (i + 1),
            "val/loss": 2.25 / (i + 1),
            "val/acc1": 0.25 * (i + 1),
            "val/acc5": 0.9,
            "val/correct": 30.0 * (i + 1),
            "val/images": 120.0,
            "seconds": 65.0,
            "train_images_per_second": 1763.9,
        }
        for i in range(4)
    ]


def record_of_a_run() -> dict[str, Any]:
    return {
        "format_version": 1,
        "command": ["vit-cls", "fit", "--data.root", "my photos"],
        "started": "2026-11-20T11:46:34+00:00",
        "finished": "2026-11-20T11:48:38+00:00",
        "versions": {"vit_cls": "0.1.0", "python": "3.11.7", "torch": "2.15.0"},
        "commit": "3505d532f5a09fa4ace7e9b060d4b8bf18418305+",
        "platform": "Linux-6.18",
        "seed": 42,
        "data": {
            "name": "folder",
            "root": "my photos",
            "split": "0.1 of each class of my photos held out for validation, seed 42",
            "train_images": 1078,
            "val_images": 120,
            "train_counts": {"cat": 700, "dog": 350, "owl": 28},
        },
        "model": {
            "name": "vit_pico_patch7_28",
            "pool": "cls",
            "parameters": 464458,
            "tokens": 17,
            "preprocess": {"img_size": [28, 42]},
            "weights_licence": "the licence is yours to choose",
        },
        "optim": {"peak_lr": 0.002},
        "device": "cuda:0",
        "device_name": "NVIDIA H200",
        "precision": "bf16-mixed",
        "processes": 1,
        "status": "finished",
        "result": {
            "epochs": 4,
            "best_epoch": 3,
            "correct": 113,
            "images": 120,
            "top5": 1.0,
            "seconds": 4125.2,
            "train_images_per_second": 1763.9,
        },
    }


def fit_case(record=None, history=None) -> Case:
    history = history_of_four_epochs() if history is None else history
    result = FitResult(RunFolder(Path("runs/my run")), 4, 3, 113, 120, 1.0, 4125.2, 1763.9, history)
    return Case(result, {"record": record_of_a_run() if record is None else record})


@pytest.fixture
def history():
    return history_of_four_epochs()


@pytest.fixture
def record():
    return record_of_a_run()


@pytest.fixture
def folder_of(tmp_path):
    """The folder of a result, whose files are those that were announced."""

    def write(case, name="out", **changes) -> Path:
        result, about = case if isinstance(case, Case) else (case, {})
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        files = write_folder(folder, result, **({"versions": VERSIONS} | about | changes))
        assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
        return folder

    return write


@pytest.fixture
def outline_of(folder_of):
    """The page of a result."""
    return lambda case, **changes: Outline((folder_of(case, **changes) / "report.html").read_text("utf-8"))


def _hostile_fit(num_epochs: int) -> Case:
    record = record_of_a_run()
    record["data"]["train_counts"] = {name: 10 + i for i, name in enumerate(HOSTILE)}
    record["data"]["root"] = record["model"]["name"] = HOSTILE[0] + HOSTILE[2]
    record["command"] = ["vit-cls", "fit", "--run_dir", HOSTILE[1], HOSTILE[2]]
    rows = [{"fate": "dropped", "keys": name, "count": 2, "note": name} for name in HOSTILE]
    told = {"source": HOSTILE[2], "counts": {"dropped": 14}, "rows": rows, "notes": HOSTILE}
    record["model"]["load_report"] = told
    return fit_case(record, history_of_four_epochs()[:num_epochs])


def hostile_dataset() -> DatasetReport:
    """Every kind of problem at once, with names that do their worst."""
    problems = []
    for kind in ISSUE_TYPES:
        other = "train/other.jpg" if kind.startswith("near_") else None
        problems.append(
            Problem(kind, [Offender(f"{kind}/{name}.jpg", HOSTILE[2], other) for name in HOSTILE])
        )
    problems[0].offenders.extend(Offender(f"{i}.jpg", "reason") for i in range(24))
    classes = dict.fromkeys([*HOSTILE, *(f"class {i}" for i in range(30))], 7)
    return DatasetReport(
        HOSTILE[0] + HOSTILE[2], 999, 31, {"train": classes, "val": {"one": 3}}, problems, 61
    )


def _hostile_evaluation(names) -> Case:
    given = {
        "model": HOSTILE[0] + HOSTILE[2],
        "data": HOSTILE[4],
        "licence": HOSTILE[0],
        "source": HOSTILE[2],
    }
    return evaluation_case(predictions_of(names, 400, failed=8), thumbnails=every_second, **given)


def _hostile_comparison(names, **given) -> Case:
    answers = ((HOSTILE[0], HOSTILE[1], "") * 3)[: len(names)]
    found = [Disagreement(name, HOSTILE[1], answers, (0.5,) * len(names)) for name in HOSTILE]
    return Case(comparison_of(names), {"found": found} | given)


HOSTILE_CASES = {
    "fit": lambda: _hostile_fit(4),
    "one epoch": lambda: _hostile_fit(1),
    "2 classes": lambda: _hostile_evaluation(HOSTILE[:2]),
    "few classes": lambda: _hostile_evaluation(HOSTILE),
    "many classes": lambda: _hostile_evaluation([*HOSTILE, *(f"class {i}" for i in range(112))]),
    "models": lambda: _hostile_comparison([*HOSTILE, "nine"], data=HOSTILE[2], thumbnails=every_second),
    "files": lambda: _hostile_comparison([HOSTILE[0], HOSTILE[7]], data=None),
    "dataset": lambda: Case(hostile_dataset(), {"thumbnails": every_second}),
    "lab": lambda: Case(lab_result([HOSTILE[0], HOSTILE[7], HOSTILE[3]]), {}),
    "lab of long names": lambda: Case(lab_result([HOSTILE[2], HOSTILE[5], HOSTILE[4]]), {}),
}
"""Every kind of result, filled with names that do their worst."""


@pytest.fixture
def in_browser(tmp_path):
    """Pages in Chromium at the width of a phone and of a screen: none scrolls sideways or logs anything.

    Gives for each page and width its ``height``, its ``images``, how many are ``shown``, and the red of its
    ``ground``.
    """
    if CHROMIUM is None:
        pytest.skip("needs chromium on PATH")

    def measure(*pages, scheme="light", height=400):
        frames = "".join(FRAME.format(html.escape(page), width, height) for page in pages for width in WIDTHS)
        (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames, scheme=scheme), encoding="utf-8")
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [CHROMIUM, *FLAGS, *dark, profile, (tmp_path / "measure.html").as_uri()],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=True,
        )
        title = re.search(r"<title>(.+?)</title>", done.stdout)
        assert title is not None, done.stderr[-2000:]
        sizes = json.loads(title[1])
        assert [size["inner"] for size in sizes] == list(WIDTHS) * len(pages)
        assert all(size["width"] <= size["inner"] for size in sizes), sizes
        assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
        return sizes

    return measure
