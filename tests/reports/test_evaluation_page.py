"""The page of ``vit-cls evaluate`` with everything on it: confidence, pictures, and what was asked for."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reports.outline import Outline
from vit_cls.data.index import ImageIndex
from vit_cls.evaluation.predictions import Predictions, Scoring
from vit_cls.evaluation.results import evaluate_predictions, uncertain_images, worst_images
from vit_cls.reports.figures import coverage_chart, reliability_diagram
from vit_cls.reports.html import DASH, MOST_PICTURES, ImageCases, write_evaluation_report
from vit_cls.stats.metrics import METRICS

SCORING = Scoring(temperature=1.5, restricted=True, tta="flip", exact=True)


def _predictions(names, images=120, seed=0, scoring=SCORING):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(names), images)
    logits = rng.normal(size=(images, len(names)))
    logits[np.arange(images), labels] += 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = ImageIndex(Path("p"), [f"{names[k]}/{i}.png" for i, k in enumerate(labels)], labels, list(names))
    return Predictions(index, probs, {}, 2.0, scoring)


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def page_of(tmp_path):
    """A page as text, from predictions; every second picture is there."""

    def write(predictions, **changes):
        worst, uncertain = (f(predictions, MOST_PICTURES) for f in (worst_images, uncertain_images))
        paths = list(dict.fromkeys(case.path for case in (*worst, *uncertain)))
        given = {
            "model": "runs/a",
            "data": "photos/test",
            "failures": [],
            "versions": {"vit_cls": "0.1.0"},
            "cases": ImageCases(worst, uncertain, dict.fromkeys(paths[::2], _jpeg())),
            "licence": "Apache-2.0",
            "source": "vit_small.tag",
        } | changes
        write_evaluation_report(tmp_path / "report.html", evaluate_predictions(predictions), **given)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_the_page_says_how_it_was_scored_and_with_which_weights(page_of):
    words = Outline(page_of(_predictions(["cat", "dog"]))).words
    for part in (
        "Probabilities are calibrated: logits are divided by the temperature 1.5000, fitted on validation",
        "Predictions are restricted to the 2 classes of the folder, which makes the task easier.",
        "each prediction is the mean of an image and its mirror image.",
        "Images were resized by Pillow",
        "Weights from vit_small.tag: licence Apache-2.0.",
        "bootstrap over images for the rest (seed 0)",
    ):
        assert part in words
    plain = Outline(page_of(_predictions(["cat", "dog"], scoring=Scoring()), licence=None, source=None)).words
    assert "Probabilities are not calibrated." in plain
    assert "restricted" not in plain
    assert "mirror" not in plain
    assert f"Weights: licence {DASH}." in plain


def test_the_page_has_every_score_with_its_interval(page_of):
    predictions = _predictions(["cat", "dog", "owl"])
    result = evaluate_predictions(predictions)
    words, found = Outline(page_of(predictions)).words, result.calibration
    for key in ("nll", "brier", "ece", "ece_equal_mass"):
        one = result.metrics[key]
        assert f"{METRICS[key].title} {one.value:.4f} {one.ci95[0]:.4f} to {one.ci95[1]:.4f}" in words
    assert f"AURC {result.metrics['aurc'].value:.4f} {DASH}" in words
    for point in found.coverage:
        assert f"{100 * point.coverage:g}\u00a0% {point.images}" in words.replace(" %", "\u00a0%")
    for b in found.bins:
        assert (f"{100 * b.lower:.1f} to {100 * b.upper:.1f}" in words) == (b.images > 0)


def test_pictures_are_the_worst_and_the_least_sure_and_say_what_they_are(page_of):
    predictions = _predictions(["cat", "dog", "owl"])
    worst, uncertain = worst_images(predictions, 12), uncertain_images(predictions, 12)
    top, labels = predictions.probs.max(axis=1), predictions.index.labels
    wrong = predictions.probs.argmax(axis=1) != labels
    assert worst[0].confidence == top[wrong].max()
    assert uncertain[0].confidence == top.min()
    assert all(case.label != case.prediction for case in worst)
    assert [c.confidence for c in worst] == sorted((c.confidence for c in worst), reverse=True)
    page = Outline(page_of(predictions))
    for case in (*worst, *uncertain):
        assert case.path in page.words
    alts = [image["alt"] for image in page.all("img")]
    first = worst[0]
    assert alts[0] == f"Thumbnail of {first.path}: {first.label}, predicted {first.prediction}"
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    jpeg = base64.b64decode(page.all("img")[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    missing = [s for s in page.all("span") if (s.get("aria-label") or "").startswith("No picture of ")]
    assert missing


def test_a_page_without_mistakes_or_pictures_has_no_empty_gallery(page_of):
    predictions = _predictions(["cat", "dog"])
    predictions.probs[:] = np.eye(2)[predictions.index.labels]
    page = Outline(page_of(predictions))
    assert "Confident and wrong" not in page.words
    assert "No scored image was given a wrong class." in page.words
    assert "Most uncertain" not in Outline(page_of(predictions, cases=None)).words


def test_hostile_names_stay_text_and_the_page_needs_nothing_from_outside(page_of, hostile_names):
    text = page_of(_predictions(hostile_names), licence=hostile_names[0], source=hostile_names[2])
    page = Outline(text)
    assert not {name for name, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for _, attrs in page.elements:
        assert not [a for a in attrs if a.startswith("on")]
        assert all((attrs.get(key) or "#").startswith("#") for key in ("href", "xlink:href"))
        assert (attrs.get("src") or "data:").startswith("data:")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"<p>None\.</p>|base64,[^\"]*", "", text))


def test_the_page_can_be_read_aloud(page_of, hostile_names):
    page = Outline(page_of(_predictions(hostile_names)))
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert len(page.all("table")) == len(page.all("caption")) >= 6
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == 2
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.all("svg"))


def test_same_predictions_give_the_same_page(page_of):
    assert page_of(_predictions(["cat", "dog"])) == page_of(_predictions(["cat", "dog"]))


@pytest.mark.parametrize("many", [False, True])
def test_every_picture_is_shown_and_nothing_scrolls_sideways(page_of, hostile_names, in_browser, many):
    names = [*hostile_names, *(f"class {i}" for i in range(40 if many else 0))]
    text = page_of(_predictions(names, images=300))
    shown = len(Outline(text).all("img"))
    assert shown > 0
    assert all(size["images"] == size["shown"] == shown for size in in_browser(text))


@pytest.mark.parametrize("images", [1, 2, 7, 1000])
def test_charts_of_few_and_of_many_images_are_drawn(images):
    result = evaluate_predictions(_predictions(["cat", "dog"], images=images)).calibration
    for svg in (
        reliability_diagram("a", result.bins),
        coverage_chart("b", result.curve.tolist()),
    ):
        assert len(svg) < 60_000
        label = _parse(svg).get("aria-label")
        assert label is not None
        assert "nan" not in label


def test_the_reliability_diagram_says_each_bin():
    result = evaluate_predictions(_predictions(["cat", "dog"])).calibration
    label = _parse(reliability_diagram("a", result.bins)).get("aria-label")
    assert label is not None
    full = [b for b in result.bins if b.images]
    assert label.count(" are right") == len(full)
    assert f"of {full[-1].images} are right" in label


def _parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
