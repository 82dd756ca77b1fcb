"""The page of ``vit-cls doctor``: pictures of the offenders, safe, readable aloud and on a phone."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from tests.reports.outline import Outline
from vit_cls.data.decode import read_file
from vit_cls.data.doctor.issues import ISSUE_TYPES, DatasetReport, Offender, Problem
from vit_cls.data.thumbnails import SIDE, thumbnails
from vit_cls.reports.doctor import MOST_SHOWN, pictures_wanted, write_doctor_report, write_problems_table


def _jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def diagnosis(hostile_names):
    """Every kind of problem at once, with names that do their worst."""
    problems = []
    for kind in ISSUE_TYPES:
        paths = [f"{kind}/{name}.jpg" for name in hostile_names]
        other = "train/other.jpg" if kind.startswith("near_") else None
        problems.append(Problem(kind, [Offender(path, hostile_names[2], other) for path in paths]))
    problems[0].offenders.extend(Offender(f"{i}.jpg", "reason") for i in range(MOST_SHOWN))
    classes = dict.fromkeys([*hostile_names, *(f"class {i}" for i in range(30))], 7)
    return DatasetReport(
        hostile_names[0] + hostile_names[2], 999, 31, {"train": classes, "val": {"one": 3}}, problems, 61
    )


@pytest.fixture
def page_of(tmp_path):
    """A page as text, from a diagnosis; every second picture is there."""

    def write(diagnosis, **changes):
        wanted = pictures_wanted(diagnosis)[::2]
        given = {
            "thumbnails": dict.fromkeys(wanted, _jpeg("teal")),
            "versions": {"vit_cls": "0.1.0"},
        } | changes
        write_doctor_report(tmp_path / "report.html", diagnosis, **given)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def _tiny(**changes) -> DatasetReport:
    given = {
        "images": 5,
        "unreadable": 1,
        "classes": {"": {"cat": 3, "dog": 2}},
        "problems": [],
        "seconds": 1.5,
    }
    return DatasetReport("pets", **(given | changes))


def test_page_is_well_formed_and_fetches_nothing(diagnosis, page_of):
    page = page_of(diagnosis)
    outline = Outline(page)
    names = {name for name, _ in outline.elements}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for name, attrs in outline.elements:
        assert not [a for a in attrs if a.startswith("on")], (name, attrs)
        assert name == "img" or "src" not in attrs
    assert all(re.match("data:image/jpeg;base64,[A-Za-z0-9+/=]+$", i["src"]) for i in outline.all("img"))
    (policy,) = (m["content"] for m in outline.all("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "url(" not in page
    assert "@import" not in page


def test_hostile_text_stays_text(diagnosis, page_of):
    page = page_of(diagnosis)
    assert "<script" not in page.replace("&lt;script", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    page = page_of(_tiny(problems=[Problem("empty_file", [Offender("a\udcff\x01.jpg", "0 bytes")])]))
    assert "a\\udcff\\x01.jpg" in page


def test_page_can_be_read_aloud(diagnosis, page_of):
    outline = Outline(page_of(diagnosis))
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert len(outline.all("figure")) == len(outline.all("figcaption")) > 100
    assert all(image["alt"].startswith("Thumbnail of ") for image in outline.all("img"))
    missing = [s for s in outline.all("span") if s.get("class") == "none"]
    assert missing
    assert all(s["role"] == "img" and s["aria-label"].startswith("No picture of ") for s in missing)
    assert len(outline.all("table")) == len(outline.all("caption"))
    boxes = [attrs for attrs in outline.all("div") if "scroll" in (attrs.get("class") or "").split()]
    assert all(box["role"] == "region" and box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_every_problem_has_a_section_that_the_summary_links(diagnosis, page_of):
    outline = Outline(page_of(diagnosis))
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert ids == list(ISSUE_TYPES)
    assert [attrs["href"] for attrs in outline.all("a")] == [f"#{kind}" for kind in ISSUE_TYPES]
    for kind in ISSUE_TYPES.values():
        assert kind.advice in outline.words


def test_page_has_the_numbers(page_of):
    problems = [
        Problem("empty_file", [Offender("cat/1.jpg", "0 bytes")]),
        Problem("few_images", [Offender("cat/", "3 images"), Offender("dog/", "2 images")]),
    ]
    words = Outline(page_of(_tiny(problems=problems), thumbnails={})).words
    assert "pets 1 error, 1 warning 5 images of 2 classes; 1 could not be read." in words
    assert "empty files error 1 classes with few images to train on warning 2" in words
    assert "Empty files error 1 found. There is nothing in the file. Fetch it again or remove it." in words
    assert "remove it. 0 bytes cat/1.jpg" in words
    assert "where what cat/ 3 images dog/ 2 images" in words
    assert "class images images, relative to the largest cat 3 dog 2" in words
    assert "Read in 1.5 s." in words
    assert "vit_cls 0.1.0" in words


def test_titles_keep_their_capitals(page_of):
    words = Outline(page_of(_tiny(problems=[Problem("cmyk", [Offender("cat/1.jpg", "CMYK")])]))).words
    assert "Images in printing colours (CMYK) note 1 found." in words


def test_page_of_a_clean_folder_says_so(page_of):
    words = Outline(page_of(_tiny(unreadable=0))).words
    assert "pets Nothing is wrong 5 images of 2 classes; 0 could not be read." in words
    assert "Summary" not in words


def test_class_that_a_split_lacks_is_a_dash(page_of):
    words = Outline(page_of(_tiny(classes={"train": {"cat": 3, "dog": 2}, "val": {"cat": 1}}))).words
    assert "class train val train, relative to the largest cat 3 1 dog 2 –" in words  # noqa: RUF001


def test_long_group_shows_some_and_says_how_many_more(page_of):
    offenders = [Offender(f"cat/{i}.jpg", "reason") for i in range(MOST_SHOWN + 5)]
    for kind in ("unreadable", "empty_class"):  # pictures, and a table
        page = page_of(_tiny(problems=[Problem(kind, offenders)]))
        assert "and 5 more in problems.csv" in page
        assert f"cat/{MOST_SHOWN - 1}.jpg" in page
        assert f"cat/{MOST_SHOWN}.jpg" not in page
    assert "more in" not in page_of(_tiny(problems=[Problem("unreadable", offenders[:MOST_SHOWN])]))


def test_pictures_that_are_wanted_are_shown_beside_the_image_that_they_repeat(page_of):
    near = Problem("near_leakage", [Offender("val/a.jpg", "similarity 0.990 to train/b.jpg", "train/b.jpg")])
    folders = Problem("empty_class", [Offender("train/eel/")])
    diagnosis = _tiny(problems=[near, folders])
    assert pictures_wanted(diagnosis) == ["val/a.jpg", "train/b.jpg"]
    pictures = {"val/a.jpg": _jpeg("red"), "train/b.jpg": _jpeg("blue")}
    alts = [image["alt"] for image in Outline(page_of(diagnosis, thumbnails=pictures)).all("img")]
    assert alts == ["Thumbnail of val/a.jpg", "Thumbnail of train/b.jpg"]


def test_file_without_a_picture_shows_why(page_of):
    problems = [
        Problem("truncated", [Offender("cat/a/1.jpg", "image file is truncated")]),
        Problem("nested", [Offender("cat/a/1.jpg", "its class is cat")]),
    ]
    words = Outline(page_of(_tiny(problems=problems), thumbnails={})).words
    assert "image file is truncated cat/a/1.jpg" in words
    assert "image file is truncated cat/a/1.jpg its class is cat" in words


def test_thumbnails_are_small_upright_jpegs_and_leave_out_what_cannot_be_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 400), "red").save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    made = thumbnails(lambda path: read_file(tmp_path / path), ["a.jpg", "b.jpg", "gone.jpg"])
    assert list(made) == ["a.jpg"]
    with Image.open(io.BytesIO(made["a.jpg"])) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE * 2 // 3, SIDE))
    assert len(made["a.jpg"]) < 10_000


def test_table_has_every_offender(tmp_path, diagnosis):
    write_problems_table(tmp_path / "problems.csv", diagnosis)
    lines = (tmp_path / "problems.csv").read_text().splitlines()
    assert lines[0] == "path,kind,severity,detail"
    assert len(lines) == 1 + sum(problem.count for problem in diagnosis.problems)


@pytest.mark.parametrize("which", ["everything", "nothing"])
def test_page_fits_a_phone_and_a_screen_shows_its_pictures_and_logs_nothing(
    which, diagnosis, page_of, in_browser
):
    page = page_of(diagnosis if which == "everything" else _tiny())
    pictures = len(Outline(page).all("img"))
    sizes = in_browser(page, height=400)
    assert all(size["height"] > 400 for size in sizes)
    assert all(size["images"] == size["shown"] == pictures for size in sizes), sizes
    assert (pictures > 50) == (which == "everything")
