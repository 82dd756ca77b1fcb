"""Charts fit any page: their own ids, its colours, words for those who cannot see them."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest

from vit_cls.reports.figures import PAGE_COLOURS, Series, line_chart, write_figures

TWO = [Series("validation", [(0, 0.5), (1, 0.75), (2, 0.9)]), Series("training", [(0, 0.6), (2, 0.8)])]


def test_chart_is_the_same_whatever_the_users_matplotlibrc_says():
    plain = line_chart("a", "Accuracy", TWO)
    with mpl.rc_context({"lines.linewidth": 9, "text.usetex": True, "font.size": 30}):
        assert line_chart("a", "Accuracy", TWO) == plain


def test_charts_of_one_page_share_no_id():
    svgs = [line_chart(name, "Accuracy", TWO) for name in ("a", "b")]
    ids = [{e.get("id") for e in _parse(svg).iter() if e.get("id")} for svg in svgs]
    assert len(ids[0]) > 10
    assert not ids[0] & ids[1]


def test_chart_speaks_and_its_words_are_escaped():
    svg = line_chart("a", 'Loss "<now>"', [Series("<b>&", [(0, 0.5), (1, 0.25)])], percent=True)
    assert _parse(svg).get("aria-label") == 'Loss "<now>": <b>& from 50 % to 25 %'


def test_chart_uses_the_colours_and_font_of_the_page():
    svg = line_chart("a", "Accuracy", TWO, mark=1)
    assert all(f": {colour}" in svg for colour in PAGE_COLOURS.values())
    assert not any(drawn in svg for drawn in PAGE_COLOURS)
    assert "#000000" not in svg
    assert "font-family" not in svg
    assert "http" not in svg


@pytest.mark.parametrize("values", [[0.5], [float("nan")], [0.5, float("inf"), 0.25], [0.0, 0.0]])
def test_chart_of_odd_values_is_drawn(values):
    _parse(line_chart("a", "Loss", [Series("loss", list(enumerate(values)))], mark=0))


def test_drawing_does_not_load_pyplot():
    code = (
        "import sys, vit_cls.reports.figures as f; f.line_chart('a', 'b', [f.Series('c', [(0, 1)])]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def test_a_chart_is_a_file_of_its_own_too(tmp_path):
    chart = line_chart("loss", "Loss", [Series("training", [(0, 2.0), (1, 1.5)])])
    (file,) = write_figures(tmp_path / "figures", [("Loss & more", chart)])
    assert file == tmp_path / "figures/loss_more.svg"
    root = ET.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = file.read_text()
    assert "var(" not in text
    assert "currentColor" not in text
    assert "#0b5cad" in text
