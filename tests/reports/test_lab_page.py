"""What a probe or a study leaves behind: the verdict first, everything readable, nothing lost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.reports.conftest import HOSTILE, lab_result
from tests.reports.outline import Outline
from vit_cls.lab.results import ForestChart, HeatMap, LabResult, Line, LineChart, ScatterChart
from vit_cls.reports.folder import write_folder
from vit_cls.reports.lab import WIDE_COLUMNS
from vit_cls.stats.verdicts import VERDICTS


def test_json_holds_everything_and_no_nan(folder_of):
    def refuse(word):
        raise AssertionError(word)

    found = json.loads((folder_of(lab_result()) / "results.json").read_text("ascii"), parse_constant=refuse)
    assert found["headline"] == "cls beats gap"
    assert found["predictions"] == {"cls": [1.0, None], "path": ["max"]}
    assert found["values"] == {"x": None, "seeds": [0, 1, 2]}
    assert found["versions"]["vit_cls"] == "0.1.0"
    assert [finding["verdict"] for finding in found["findings"]] == list(VERDICTS)
    assert [figure["kind"] for figure in found["figures"]].count("HeatMap") == 3
    text = (folder_of(lab_result([HOSTILE[7]] * 3)) / "results.json").read_text("ascii")
    assert json.loads(text)["predictions"]["path"] == [HOSTILE[7]]


def test_the_page_opens_with_the_question_and_the_headline(outline_of):
    words = outline_of(lab_result()).words
    main = words[words.rindex("study heads: Which of cls, gap?") :]
    assert main.startswith("study heads: Which of cls, gap? cls beats gap Findings")


def test_each_finding_has_its_verdict_in_words_and_its_numbers(outline_of):
    words = outline_of(lab_result()).words
    for verdict in VERDICTS:
        assert f"{verdict} cls against gap: {verdict}, so it is. Claim: cls and gap differ" in words
    assert (
        "estimate +0.40 points, 95 % interval -0.90 to +1.70 p of no difference 0.4100 "
        "p, Holm-adjusted 1.0000 p of equivalence < 0.0001 margin 1.00 points "
        "smallest detectable 2.10 points, with a power of 80 % needed to tell about 4,300 images of max "
        "counts 5,400 images, 5 seeds"
    ) in words


def test_shares_are_percentages_and_none_is_a_dash(outline_of):
    words = outline_of(lab_result()).words
    assert "head top-1 (%) images ece cls 93.21 5,400 0.020 gap - 7 0.123" in words


def test_every_figure_is_on_the_page_and_a_file(folder_of):
    folder = folder_of(lab_result())
    names = [
        "1_by_layer_cls.svg",
        "2_difference_cls.svg",
        "3_cost.svg",
        "4_entropy.svg",
        "5_tokens.svg",
        "7_images_of_cls.png",
    ]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == names
    outline = Outline((folder / "report.html").read_text("utf-8"))
    charts = [attrs["aria-label"] for attrs in outline.all("svg")]
    titles = ["By layer cls", "Difference cls", "Cost", "Entropy", "Tokens"]
    assert [label.split(":")[0] for label in charts] == titles
    assert charts[0].startswith("By layer cls: cls 0 from 50 % at 0 to 90 % at 2; gap 1")
    assert "Nothing Nothing to draw: no value is a number." in outline.words
    assert sum(attrs.get("class") == "scroll whole pan" for attrs in outline.all("div")) == 1  # 20 columns
    assert WIDE_COLUMNS < 20


def test_what_a_chart_leaves_out_is_named(outline_of):
    nan = math.nan
    figures = [
        LineChart("Lines", "x", "y", [Line("cls", [(0, 0.5)]), Line("gap", [(0, nan)])], note="Bands."),
        ForestChart("Forest", [("max", nan, (nan, nan)), ("map", 0.1, (0.0, 0.2))], 0.01),
        ScatterChart("Points", "x", "y", [("gem3", 1, nan, None), ("ep8", 1, 0.5, None)]),
    ]
    words = outline_of(replace(lab_result(), figures=figures)).words
    assert re.findall("Not drawn, for lack of a value: (.*?)\\.", words) == ["gap", "max", "gem3"]
    assert "Bands. Not drawn" in words


def test_pictures_have_words_and_keep_their_pixels(folder_of):
    folder = folder_of(lab_result())
    images = Outline((folder / "report.html").read_text("utf-8")).all("img")
    assert [image["alt"] for image in images] == ["cls, cls", "max, cls", "max, gap"]
    assert all(image["class"] == "small" and image["width"] == image["height"] == "84" for image in images)
    with Image.open(folder / "figures/7_images_of_cls.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels == 90).all(axis=2).sum() > 3 * 50**2


def test_a_figure_that_contradicts_itself_costs_no_number(tmp_path):
    bad = replace(lab_result(), figures=[HeatMap("t", [[1.0], [1.0, 2.0]])])
    with pytest.raises(ValueError, match="one length"):
        write_folder(tmp_path, bad, versions={})
    assert json.loads((tmp_path / "results.json").read_text())["headline"] == "cls beats gap"


def test_a_bare_result_is_a_report_too(outline_of):
    assert outline_of(LabResult("probe linear", "What?", "Nothing is known.")).all("h2") == []
