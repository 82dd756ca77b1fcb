"""Charts fit any page: told apart without colour, spoken aloud, the same whatever the labels are."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from vit_cls.lab.results import ForestChart, HeatMap, Line, LineChart, Pictures, ScatterChart
from vit_cls.reports.figures import BRIGHT, DARK, draw, line_chart, pareto_front
from vit_cls.reports.lab import check_pictures, magnification, picture_sheet
from vit_cls.reports.svg import COLOURS, svg_file, wrap, written

NAMES = [f"head {i}" for i in range(8)]
EIGHT = LineChart(
    "Accuracy",
    "layer",
    "top-1",
    [Line(name, [(x, 0.1 * i + 0.01 * x) for x in range(4)]) for i, name in enumerate(NAMES)],
)
SCATTER = ScatterChart(
    "Cost",
    "parameters",
    "top-1",
    [("small", 10, 0.5, (0.4, 0.6)), ("bad", 900, 0.4, None), ("big", 1e5, 0.9, None)],
)
HEAT = HeatMap("Entropy", [[0.25, 0.5], [math.nan, 1.0]], ["layer 1", "layer 2"], ["head 1", "head 2"])
FOREST = ForestChart(
    "Difference", [("b minus a", 0.02, (0.01, 0.03)), ("c minus a", -0.01, (-0.03, 0.01))], 0.01
)
CHARTS = {"lines": EIGHT, "scatter": SCATTER, "heat": HEAT, "forest": FOREST}
HOSTILE = ["<script>&", "a$b$ \\frac", "\udcff\x01\ufffe", "_hidden", "שלום 🐱 中文", "w" * 300, ""]


def _parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def _texts(svg: str) -> list[str]:
    return ["".join(e.itertext()).strip() for e in _parse(svg).iter() if e.tag == "text"]


@pytest.mark.parametrize("kind", CHARTS)
def test_a_chart_is_the_same_twice_and_uses_the_colours_of_the_page(kind):
    svg = draw("a", CHARTS[kind])
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "image.cmap": "gray"}):
        assert draw("a", CHARTS[kind]) == svg
    assert not any(drawn in svg for drawn in COLOURS)
    assert "font-family" not in svg
    assert "http" not in svg
    assert _parse(svg).get("aria-label").startswith(f"{CHARTS[kind].title}: ")
    assert all(e.get("id").startswith("a-") for e in _parse(svg).iter() if e.get("id"))
    alone = svg_file(svg)
    assert ET.fromstring(alone).tag == "{http://www.w3.org/2000/svg}svg"
    assert "background: #fff" in alone
    assert "var(" not in alone
    assert "currentColor" not in alone


@pytest.mark.parametrize("kind", CHARTS)
def test_a_chart_writes_its_labels(kind):
    wanted = {
        "lines": {*NAMES, "layer", "top-1"},
        "scatter": {"small", "bad", "big", "parameters", "top-1"},
        "heat": {"layer 1", "layer 2", "head 1", "head 2"},
        "forest": {"b minus a", "c minus a", "percentage points"},
    }
    assert wanted[kind] <= set(_texts(draw("a", CHARTS[kind])))


def test_eight_lines_have_eight_colours_dashes_and_markers():
    svg = draw("a", EIGHT)
    paths = re.findall(r'<path d="[^"]*"[^>]*style="fill: none; ([^"]*stroke: var\(--series[^"]*)"', svg)
    curves = [style for style in paths if "stroke-width: 1.6" in style]
    assert len(curves) == 16  # in the axes and in the legend
    assert len({re.search(r"--series-\d", style)[0] for style in curves}) == 8
    dashes = [re.search(r"stroke-dasharray: ([^;]*)", style) for style in curves]
    assert len({found and found[1] for found in dashes}) == 8
    used = set(re.findall(r'<use xlink:href="#(a-\w+)"[^>]*fill: var\((--series-\d)', svg))
    assert len(used) == len({marker for marker, _ in used}) == len({colour for _, colour in used}) == 8


def test_more_than_eight_lines_are_refused():
    with pytest.raises(ValueError, match=r"at most 8 lines.*got 9. Make two charts"):
        draw("a", replace(EIGHT, lines=[*EIGHT.lines, EIGHT.lines[0]]))


def test_several_labels_are_a_legend_and_bands_and_marks_are_drawn():
    long = [Line("the class token of the last block", [(1, 0.2), (8, 0.9)], [(0.1, 0.3), (0.8, 1.0)])]
    svg = draw("a", LineChart("t", "x", "y", long, log_x=True, marks={"chance": 0.1}))
    assert {"the class token of the last block", "chance"} <= set(_texts(svg))
    assert 'id="a-legend_1"' in svg
    assert 'id="a-FillBetweenPolyCollection_1"' in svg
    assert "chance at 10 %" in _parse(svg).get("aria-label")
    assert 'id="a-legend_1"' not in draw("a", LineChart("t", "x", "y", long))


def test_a_logarithmic_axis_has_its_ticks_at_the_points():
    line = Line("cls", [(2**i, 0.5) for i in range(6)])
    assert {"1", "2", "4", "8", "16", "32"} <= set(
        _texts(draw("a", LineChart("t", "x", "y", [line], log_x=True)))
    )
    zero = replace(line, points=[(0, 0.5), (1, 0.6)])  # has no logarithm; the axis is linear then
    assert "10⁻¹" not in draw("a", LineChart("t", "x", "y", [zero], log_x=True))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_labels_are_text(hostile):
    other = Line("b", [(0, 1.0), (1, 0.5)])
    for chart in (
        LineChart(
            hostile, hostile, hostile, [Line(hostile, [(0, 0.5), (1, 1.0)]), other], marks={hostile: 0.7}
        ),
        ScatterChart(hostile, hostile, hostile, [(hostile, 1, 0.5, None), (hostile, 2, 0.5, (0.4, 0.6))]),
        HeatMap(hostile, [[1.0]], [hostile], [hostile]),
        ForestChart(hostile, [(hostile, 0.1, (0.0, 0.2))], 0.01),
    ):
        svg = draw("a", chart)
        _parse(svg)
        svg.encode()
        assert "<script" not in svg
        if hostile.startswith(("a$b", "_")):
            assert any(hostile in text for text in _texts(svg))


def test_nothing_finite_is_no_chart():
    nan = math.nan
    assert draw("a", LineChart("t", "x", "y", [Line("a", [(0, nan)]), Line("b", [])])) is None
    assert draw("a", ScatterChart("t", "x", "y", [("a", 1, nan, None)])) is None
    assert draw("a", HeatMap("t", [[nan]])) is None
    assert draw("a", HeatMap("t", [])) is None
    assert draw("a", ForestChart("t", [], 0.01)) is None


def test_heat_map_writes_finite_values_in_ink_that_stands_out():
    svg = draw("a", HEAT)
    assert {"25.0", "50.0", "100.0"} <= set(_texts(svg))
    assert "nan" not in svg
    pairs = {value: ink for ink, value in re.findall(r'fill: (#\w{6})[^"]*"[^>]*>([\d.]+)<', svg)}
    assert pairs == {"25.0": BRIGHT, "50.0": BRIGHT, "100.0": DARK}  # violet, blue, yellow
    assert _parse(svg).get("aria-label") == (
        "Entropy: layer 1, head 1: 25 %; layer 1, head 2: 50 %; "
        "layer 2, head 1: no value; layer 2, head 2: 100 %"
    )


def test_heat_map_beyond_twenty_columns_has_colours_alone_and_says_its_ends():
    values = np.arange(42).reshape(2, 21) / 100
    svg = draw("a", HeatMap("t", values.tolist(), percent=False))
    assert "0.17" not in _texts(svg)
    assert _parse(svg).get("aria-label") == (
        "t: 2 rows, 21 columns; smallest 0 at row 1, column 1; largest 0.41 at row 2, column 21"
    )
    assert "0.17" in _texts(draw("a", HeatMap("t", values[:, :20].tolist(), percent=False)))
    assert _texts(draw("a", HeatMap("t", [[0.5] * 21]))) == ["50 %"]  # of one value the bar has one tick
    large = draw("a", HeatMap("t", np.zeros((60, 60)).tolist()))
    assert len(large) < 200_000
    assert large.count("data:image/png") == 2  # the map and the bar of its colours


def test_heat_map_refuses_rows_of_different_length_and_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one length; got \[1, 2\]. Fill cells"):
        draw("a", HeatMap("t", [[1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="row_labels of the heat map 't' must be 1; got 2"):
        draw("a", HeatMap("t", [[1.0]], ["a", "b"]))


def test_pareto_front_is_what_no_point_beats():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (40, 2))]
    beaten = {
        i
        for i, (x, y) in enumerate(points)
        if any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) or (x, y) in points[:i]
    }
    assert pareto_front(points) == set(range(40)) - beaten
    assert "big 90 % at 100k, on the front" in draw("a", SCATTER)
    assert "bad 40 % at 900;" in draw("a", SCATTER)


def test_points_that_coincide_are_told_apart_by_the_legend():
    points = [(f"head {i}", 1.0, 0.5, None) for i in range(20)]
    svg = draw("a", ScatterChart("t", "x", "y", points, log_x=False))
    assert {label for label, *_ in points} <= set(_texts(svg))
    style = r'<use xlink:href="#(a-\w+)"[^>]*style="([^"]*)"'
    drawn = {
        (marker, re.search(r"--series-\d", look)[0])
        for marker, look in re.findall(style, svg)
        if "series" in look
    }
    assert len(drawn) == 20


@pytest.mark.parametrize("values", [[0.5], [math.nan, 1.0], [0.5, math.inf, 0.25], [0.0, 0.0]])
def test_a_line_of_odd_values_is_drawn_and_may_have_a_mark(values):
    chart = LineChart("Loss", "epoch", "", [Line("loss", list(enumerate(values)))], percent=False)
    svg = line_chart("a", chart, mark=0)
    _parse(svg)
    assert svg != line_chart("a", chart)


def test_what_is_spoken_is_escaped():
    chart = LineChart('Loss "<now>"', "x", "y", [Line("<b>&", [(0, 0.5), (1, 0.25)])])
    assert _parse(draw("a", chart)).get("aria-label") == 'Loss "<now>": <b>& from 50 % at 0 to 25 % at 1'


def test_drawing_does_not_load_pyplot():
    code = (
        "import sys; from vit_cls.reports.figures import coverage_chart; coverage_chart('a', [1.0]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_are_written_for_people():
    assert [written(v, False) for v in (999, 1300, 52_000, 2_500_000, -3e9)] == [
        "999",
        "1300",
        "52k",
        "2.5M",
        "-3G",
    ]
    assert wrap("short", 20) == "short"


def _picture(side: int, value: int) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_picture_sheet_shows_every_image_and_nothing_in_empty_cells():
    pictures = Pictures(
        "t", ["a", "b"], [[_picture(28, 7), None], [_picture(28, 9), _picture(14, 200)]], ["x", "y"]
    )
    assert magnification(pictures) == 3
    sheet = picture_sheet(pictures)
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    counts = [int((pixels == value).all(axis=2).sum()) for value in (7, 9, 200)]
    assert min(counts) > 50**2
    assert max(counts) - min(counts) < 0.05 * max(counts)  # however many pixels an image has
    assert picture_sheet(pictures) == sheet
    assert picture_sheet(replace(pictures, row_labels=["x", "z"])) != sheet


@pytest.mark.parametrize("hostile", HOSTILE)
def test_picture_sheet_takes_hostile_labels(hostile):
    assert picture_sheet(Pictures(hostile, [hostile], [[_picture(4, 0)]], [hostile]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [[np.zeros((4, 4, 3))]]}, r"uint8 of shape \(height, width, 3\); got float64"),
        ({"rows": [[np.zeros((3, 4, 4), np.uint8)]]}, r"uint8 of shape \(3, 4, 4\)"),
        ({"columns": ["a", "b"]}, r"got 2 columns, rows of \[1\] images"),
        ({"row_labels": ["a", "b"]}, "1 rows, 2 labels"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(changes, message):
    pictures = Pictures("t", ["a"], [[_picture(4, 0)]])
    assert check_pictures(pictures)
    with pytest.raises(ValueError, match=message):
        check_pictures(replace(pictures, **changes))
