"""The page and the table of ``vit-cls doctor``: pictures of the offenders, reasons, and what to do."""

from __future__ import annotations

import io

from PIL import Image

from tests.reports.conftest import Case, hostile_dataset, jpeg
from vit_cls.data.decode import read_file
from vit_cls.data.doctor.issues import ISSUE_TYPES, DatasetReport, Offender, Problem
from vit_cls.data.thumbnails import SIDE, thumbnails
from vit_cls.reports.doctor import MOST_SHOWN


def _tiny(*problems: Problem, **changes) -> DatasetReport:
    given = {"images": 5, "unreadable": 1, "classes": {"": {"cat": 3, "dog": 2}}, "seconds": 1.5}
    return DatasetReport("pets", problems=list(problems), **(given | changes))


def test_every_problem_has_a_section_that_the_summary_links(outline_of):
    outline = outline_of(hostile_dataset())
    assert [attrs["id"] for _, attrs in outline.elements if "id" in attrs] == list(ISSUE_TYPES)
    assert [attrs["href"] for attrs in outline.all("a")] == [f"#{kind}" for kind in ISSUE_TYPES]
    for kind in ISSUE_TYPES.values():
        assert kind.advice in outline.words


def test_the_page_has_the_numbers(outline_of):
    few = Problem("few_images", [Offender("cat/", "3 images"), Offender("dog/", "2 images")])
    words = outline_of(_tiny(Problem("empty_file", [Offender("cat/1.jpg", "0 bytes")]), few)).words
    assert "pets 1 error, 1 warning 5 images of 2 classes; 1 could not be read." in words
    assert "empty files error 1 classes with few images to train on warning 2" in words
    assert "Empty files error 1 found. There is nothing in the file. Fetch it again or remove it." in words
    assert "remove it. 0 bytes cat/1.jpg" in words
    assert "where what cat/ 3 images dog/ 2 images" in words
    assert "class images images, relative to the largest cat 3 dog 2" in words
    assert "Read in 1.5 s." in words
    assert "vit_cls 0.1.0" in words


def test_titles_keep_their_capitals(outline_of):
    words = outline_of(_tiny(Problem("cmyk", [Offender("cat/1.jpg", "CMYK")]))).words
    assert "Images in printing colours (CMYK) note 1 found." in words


def test_the_page_of_a_clean_folder_says_so(outline_of):
    words = outline_of(_tiny(unreadable=0)).words
    assert "pets Nothing is wrong 5 images of 2 classes; 0 could not be read." in words
    assert "Summary" not in words


def test_a_class_that_a_split_lacks_is_a_dash(outline_of):
    words = outline_of(_tiny(classes={"train": {"cat": 3, "dog": 2}, "val": {"cat": 1}})).words
    assert "class train val train, relative to the largest cat 3 1 dog 2 –" in words  # noqa: RUF001


def test_a_long_group_shows_some_and_says_how_many_more(outline_of):
    offenders = [Offender(f"cat/{i}.jpg", "reason") for i in range(MOST_SHOWN + 5)]
    for kind in ("unreadable", "empty_class"):  # pictures, and a table
        words = outline_of(_tiny(Problem(kind, offenders))).words
        assert "and 5 more in problems.csv" in words
        assert f"cat/{MOST_SHOWN - 1}.jpg" in words
        assert f"cat/{MOST_SHOWN}.jpg" not in words
    assert "more in" not in outline_of(_tiny(Problem("unreadable", offenders[:MOST_SHOWN]))).words


def test_a_picture_stands_beside_the_image_that_it_repeats(outline_of):
    near = Problem("near_leakage", [Offender("val/a.jpg", "similarity 0.990 to train/b.jpg", "train/b.jpg")])
    case = Case(_tiny(near, Problem("empty_class", [Offender("train/eel/")])), {})
    page = outline_of(case, thumbnails=lambda paths: {path: jpeg() for path in paths})
    alts = [image["alt"] for image in page.all("img")]
    assert alts == ["Thumbnail of val/a.jpg", "Thumbnail of train/b.jpg"]


def test_a_file_without_a_picture_shows_why(outline_of):
    broken = Problem("truncated", [Offender("cat/a/1.jpg", "image file is truncated")])
    nested = Problem("nested", [Offender("cat/a/1.jpg", "its class is cat")])
    words = outline_of(_tiny(broken, nested)).words
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


def test_the_table_has_every_offender(folder_of):
    diagnosis = hostile_dataset()
    lines = (folder_of(diagnosis) / "problems.csv").read_text("utf-8", "surrogateescape").splitlines()
    assert lines[0] == "path,kind,severity,detail"
    assert len(
        [line for line in lines if ",error," in line or ",warning," in line or ",note," in line]
    ) == sum(problem.count for problem in diagnosis.problems)
