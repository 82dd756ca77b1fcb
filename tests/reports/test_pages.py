"""What holds for the page of every kind of result: safe, self-contained, readable aloud and on a phone."""

from __future__ import annotations

import re

import pytest

from tests.reports.conftest import HOSTILE_CASES, VERSIONS, WIDTHS, evaluation_case, predictions_of
from tests.reports.outline import Outline
from vit_cls.reports.folder import FILES, write_folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of every kind, from a folder that stays for this file."""
    root = tmp_path_factory.mktemp("pages")
    for kind, case in HOSTILE_CASES.items():
        write_folder(root / kind, case().result, versions=VERSIONS, **case().about)
    return {kind: root / kind / "report.html" for kind in HOSTILE_CASES}


@pytest.fixture(params=HOSTILE_CASES)
def page(request, pages):
    return pages[request.param].read_text("utf-8")


def test_every_class_of_results_that_has_a_page_is_tried_here():
    assert {type(case().result).__name__ for case in HOSTILE_CASES.values()} == {*FILES} - {"Verification"}


def test_a_page_is_well_formed_and_fetches_nothing(page):
    outline = Outline(page)
    assert outline.elements[0] == ("html", {"lang": "en"})
    assert not {name for name, _ in outline.elements} & {"script", "link", "iframe", "object", "base", "form"}
    for name, attrs in outline.elements:
        assert not [a for a in attrs if a.startswith("on")], (name, attrs)
        assert "src" not in attrs or re.match("data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+$", attrs["src"])
        assert (attrs.get("href") or "#").startswith("#")
        assert (attrs.get("xlink:href") or "#").startswith(("#", "data:image/png;base64,"))
    (policy,) = (m["content"] for m in outline.all("meta") if "http-equiv" in m)
    strict = "default-src 'none'; style-src 'unsafe-inline'"
    assert policy == f"{strict}; img-src data:" or (policy == strict and not outline.all("img"))
    assert "@import" not in page
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_resolve(page):
    ids = [attrs["id"] for _, attrs in Outline(page).elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:[" ]href="|xlink:href="|url\()#([^")]*)', page)) <= set(ids)


def test_a_page_can_be_read_aloud(page):
    outline = Outline(page)
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert all(len(outline.all(name)) == 1 for name in ("header", "main", "footer", "title"))
    tables = [table for table in outline.all("table") if table.get("class") != "pictures"]
    assert len(tables) == len(outline.all("caption")) > 0
    assert all(attrs["scope"] in ("col", "row") for attrs in outline.all("th"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in outline.all("svg"))
    assert all(image["alt"] for image in outline.all("img"))
    missing = [span for span in outline.all("span") if span.get("class") == "none" and "role" in span]
    assert all(s["role"] == "img" and s["aria-label"].startswith("No picture of ") for s in missing)
    boxes = [attrs for attrs in outline.all("div") if "scroll" in (attrs.get("class") or "").split()]
    assert boxes
    assert all(box["role"] == "region" and box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all("meta")


def test_hostile_text_stays_text(page):
    assert "<script" not in page
    if "&lt;script" in page:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    page.encode("utf-8")  # no lone surrogate
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    spoken = re.sub(r"<p>None\.</p>|None is better than all others|base64,[^\"]*", "", page)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", spoken)


def test_the_same_result_gives_the_same_bytes(pages, tmp_path):
    for kind in ("fit", "2 classes", "files", "dataset", "lab"):
        result, about = HOSTILE_CASES[kind]()
        files = write_folder(tmp_path / kind, result, versions=VERSIONS, **about)
        assert len(files) >= 2
        for file in files:
            before = pages[kind].parent / file.relative_to(tmp_path / kind)
            assert file.read_bytes() == before.read_bytes(), before
            assert file.suffix != ".svg" or "<script" not in file.read_text("utf-8")


def test_in_a_browser_nothing_scrolls_sideways_is_logged_or_is_not_shown(pages, in_browser):
    texts = [page.read_text("utf-8") for page in pages.values()]
    pictures = [len(Outline(text).all("img")) for text in texts for _ in WIDTHS]
    sizes = in_browser(*texts)
    assert all(size["height"] > 400 for size in sizes)
    assert [size["images"] for size in sizes] == [size["shown"] for size in sizes] == pictures


@pytest.mark.parametrize(("scheme", "ground"), [("light", 255), ("dark", 20)])
def test_a_page_is_light_or_dark_as_the_reader_has_it(scheme, ground, folder_of, in_browser):
    page = (folder_of(evaluation_case(predictions_of(2))) / "report.html").read_text("utf-8")
    assert {size["ground"] for size in in_browser(page, scheme=scheme)} == {ground}


def test_colours_have_contrast_in_both_schemes(folder_of):
    page = (folder_of(evaluation_case(predictions_of(2))) / "report.html").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(themes) == 2
    series = [f"series-{i}" for i in range(1, 9)]
    for theme in themes:
        colour = dict(re.findall(r"--([\w-]+): ([^;]+);", theme))
        assert len({colour[name] for name in series}) == 8
        for text in ("text", "muted", *series):  # labels are written in the colours of series too
            assert _contrast(_hex(colour[text]), _hex(colour["bg"])) >= 4.5, text
        for text in ("text", "muted", "series-1"):
            assert _contrast(_hex(colour[text]), _hex(colour["panel"])) >= 4.5, text
        for tint in ("hit", "miss"):  # as strong as a cell can be
            rgb = [int(part) for part in colour[tint].split()]
            cell = [0.55 * t + 0.45 * b for t, b in zip(rgb, _hex(colour["bg"]), strict=True)]
            assert _contrast(_hex(colour["text"]), cell) >= 4.5


def _hex(colour: str) -> list[float]:
    digits = colour.strip("# ")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def _contrast(one: list[float], other: list[float]) -> float:
    """Ratio of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(rgb):
        parts = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)
