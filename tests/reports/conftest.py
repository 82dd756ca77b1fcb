"""Hand-made results for the pages, tame and hostile."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from vit_cls.evaluation.results import ClassMetrics, Evaluation
from vit_cls.reports.html import write_evaluation_report, write_fit_report
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.metrics import Estimate, Scored, calibration_of

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quote' & <b>bold",
    "x" * 200,
    "🐱 cat",
    "שלום עולם",
    "many words in one name " * 8,
    "turned \u202e round",
]
FAILURES = [
    ("cats/<img src=x onerror=alert(1)>.jpg", "image file is truncated"),
    ("d/" + "y" * 200 + ".png", "cannot identify image file " + "z" * 150),
    ("not utf-8: \udcff, control: \x01.jpg", "the file is empty"),
]
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


def _evaluation(num_classes: int, *, failed: int = 0, names: list[str] | None = None) -> Evaluation:
    """Class 1 has no images (where there are three or more), the last one is never predicted."""
    rng = np.random.default_rng(num_classes)
    confusion = np.zeros((num_classes, num_classes), dtype=int)
    for i in range(num_classes):
        if not (i == 1 and num_classes > 2):
            confusion[i, i] = 20 + i
            confusion[i, int(rng.integers(num_classes))] += 3
    confusion[:, -1] = 0
    confusion[-1, 0] = 4
    names = [*(names or []), *(f"class {i}" for i in range(num_classes))][:num_classes]
    images, correct = int(confusion.sum()), int(confusion.trace())
    pairs = np.argwhere(confusion).repeat(confusion[confusion > 0], axis=0)  # true class, prediction
    probs = np.full((images, num_classes), 0.2 / num_classes)
    probs[np.arange(images), pairs[:, 1]] += 0.8
    per_class = [
        ClassMetrics(name, int(row.sum()), int(row[i]), int(confusion[:, i].sum()))
        for i, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]
    return Evaluation(
        images=images + failed,
        failed=failed,
        correct=correct,
        metrics={
            "top1": Estimate(correct / images, wilson_interval(correct, images)),
            "top5": Estimate(0.9876),
            "balanced_accuracy": Estimate(0.8765),
            "nll": Estimate(0.4321),
            "ece": Estimate(0.0567),
        },
        per_class=per_class,
        confusion=confusion,
        calibration=calibration_of(Scored(probs, pairs[:, 0])),
        seconds=75.4,
    )


@pytest.fixture
def evaluation():
    return _evaluation


@pytest.fixture
def hostile_names():
    return HOSTILE


@pytest.fixture
def evaluation_page(tmp_path):
    """A page as text, from an `Evaluation`."""

    def write(result, **changes):
        given = {"model": "runs/a", "data": "photos/test", "failures": [], "versions": VERSIONS} | changes
        write_evaluation_report(tmp_path / "evaluation.html", result, **given)
        return (tmp_path / "evaluation.html").read_text(encoding="utf-8")

    return write


@pytest.fixture
def fit_page(tmp_path):
    """A page as text, from a record and a history."""

    def write(record, history):
        write_fit_report(tmp_path / "report.html", record, history, (0.9012, 0.9634))
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


@pytest.fixture
def history():
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


@pytest.fixture
def record():
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


@pytest.fixture(params=["fit", "one epoch", "2 classes", "30 classes", "120 classes"])
def any_page(request, evaluation, evaluation_page, fit_page, record, history):
    """Every kind of page, filled with names that do their worst."""
    if request.param in ("fit", "one epoch"):
        record["data"]["train_counts"] = {name: 10 + i for i, name in enumerate(HOSTILE)}
        record["data"]["root"] = record["model"]["name"] = HOSTILE[0] + HOSTILE[2]
        record["command"] = ["vit-cls", "fit", "--run_dir", HOSTILE[1], HOSTILE[2]]
        rows = [{"fate": "dropped", "keys": name, "count": 2, "note": name} for name in HOSTILE]
        record["model"]["load_report"] = {"source": HOSTILE[2], "counts": {"dropped": 14}, "rows": rows}
        record["model"]["load_report"]["notes"] = HOSTILE
        return fit_page(record, history if request.param == "fit" else history[:1])
    result = evaluation(int(request.param.split()[0]), failed=len(FAILURES), names=HOSTILE)
    return evaluation_page(result, model=HOSTILE[0] + HOSTILE[2], data=HOSTILE[4], failures=FAILURES)


@pytest.fixture
def in_browser(tmp_path):
    """Pages in Chromium at the width of a phone and of a screen: none scrolls sideways or logs anything.

    Gives for each page and width its ``height``, its ``images``, how many are ``shown``, and the red of its
    ``ground``.
    """
    if CHROMIUM is None:
        pytest.skip("needs chromium on PATH")

    def measure(*pages, scheme="light", height=800):
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
