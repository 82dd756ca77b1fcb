"""``vit-cls doctor``: a table or one JSON object, an exit code that scripts can use, and two files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import command, loaded_by, until
from vit_cls.cli import COMMANDS

DOCTOR = ("doctor", "--num_workers", "0", "--data")


def _photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder ``data`` in the working folder, where nothing is wrong."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 10), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                file = tmp_path / "data" / split / label / f"{i}.png"
                file.write_bytes(_photo(len(split) * 100 + (label == "dog") * 50 + i))
    return tmp_path / "data"


def test_a_clean_folder_ends_with_0(data, cli):
    code, out, err = cli(*DOCTOR, "data")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "24 images of 2 classes (train 20, val 4); 0 could not be read"
    assert re.fullmatch(r"nothing is wrong; \d+\.\d s", lines[1])
    assert len(lines) == 2
    assert err == ""


def test_a_warning_ends_with_0_and_an_error_with_1(data, cli):
    (data / "train/cat/copy.png").write_bytes((data / "train/cat/1.png").read_bytes())
    code, out, _ = cli(*DOCTOR, "data")
    assert code == 0
    assert "1 warning;" in out
    (data / "train/cat/a.jpg").write_bytes(b"")
    (data / "train/cat/b.jpg").write_bytes(b"")
    code, out, _ = cli(*DOCTOR, "data")
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "27 images of 2 classes (train 23, val 4); 2 could not be read"
    assert lines[1:4] == [
        "error         2  empty files",
        "                 train/cat/a.jpg: 0 bytes ...",
        "                 There is nothing in the file. Fetch it again or remove it.",
    ]
    assert lines[4] == "warning       1  repeated images"
    assert lines[5].strip() == "train/cat/copy.png: same file as train/cat/1.png"
    assert lines[-1].startswith("1 error, 1 warning; ")


def test_json_is_one_object_with_the_documented_keys(data, cli):
    (data / "val/cat/a.png").write_bytes((data / "train/cat/1.png").read_bytes())
    code, out, _ = cli(*DOCTOR, "data", "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer.pop("seconds") > 0
    (problem,) = answer["problems"]
    assert problem.pop("advice").startswith("The score on such an image measures memory.")
    assert answer == {
        "images": 25,
        "unreadable": 0,
        "classes": 2,
        "problems": [{"kind": "leakage", "severity": "error", "count": 1, "examples": ["val/cat/a.png"]}],
        "ok": False,
        "split": None,
        "origin": "train, val of data",
    }


def test_near_duplicates_are_an_option(data, cli):
    with Image.open(data / "train/cat/1.png") as image:
        image.resize((128, 96)).save(data / "val/cat/a.jpg")
    assert json.loads(cli(*DOCTOR, "data", "--json").out)["problems"] == []
    code, out, _ = cli(*DOCTOR, "data", "--near_duplicates", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (problem["kind"], problem["examples"]) == ("near_leakage", ["val/cat/a.jpg"])
    assert code == 0


def test_output_has_a_row_for_every_offender_and_a_page(data, cli):
    for i in range(30):
        (data / f"train/cat/x{i:02d}.jpg").write_bytes(b"")
    (data / 'train/cat/comma, "quote".jpg').write_bytes(b"no image")
    before = sorted(os.listdir("."))
    code, out, _ = cli(*DOCTOR, "data", "--output", "out/doctor")
    assert code == 1
    assert out.splitlines()[-1] == "files in out/doctor"
    assert sorted(os.listdir(".")) == [*before, "out"]
    assert sorted(os.listdir("out/doctor")) == ["problems.csv", "report.html"]
    with open("out/doctor/problems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "kind", "severity", "detail"]
    assert len(rows) == 31
    assert rows[0] == {
        "path": 'train/cat/comma, "quote".jpg',
        "kind": "unreadable",
        "severity": "error",
        "detail": "it is not an image of a known format",
    }
    assert rows[-1] == {
        "path": "train/cat/x29.jpg",
        "kind": "empty_file",
        "severity": "error",
        "detail": "0 bytes",
    }
    page = (data.parent / "out/doctor/report.html").read_text()
    assert "and 6 more in problems.csv" in page
    assert page.count("<figure>") == 24 + 1


def test_page_shows_images_as_small_jpegs_of_what_training_sees(data, cli):
    (data / "val/cat/a.png").write_bytes((data / "train/cat/1.png").read_bytes())
    cli(*DOCTOR, "data", "--output", "out")
    page = (data.parent / "out/report.html").read_text()
    assert re.findall(r'alt="([^"]*)"', page) == ["Thumbnail of val/cat/a.png"]
    assert 'src="data:image/jpeg;base64,/9j/' in page


REFUSED = {
    "no data": ("", r"required.*data"),
    "missing folder": ("--data nowhere", r"--data nowhere does not exist"),
    "a file": ("--data file", r"--data file cannot be read as a folder: Not a directory"),
    "workers": ("--data data --num_workers -1", r"--num_workers must be at least 0; got -1"),
    "workers in words": ("--data data --num_workers two", r"num_workers must be a whole number"),
    "typo": ("--data data --near_duplicate", r"Did you mean `near_duplicates`"),
    "stray word": ("--data data more", r"unexpected word\(s\): more"),
    "output is a file": ("--data data --output file", r"--output file is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_ends_with_2_and_one_paragraph(case, data, refused):
    words, message = REFUSED[case]
    (data.parent / "file").write_text("")
    refused(["doctor", *words.split()], message)


def test_names_that_a_terminal_cannot_show_are_escaped(data, cli):
    for name in ("\x1b[31mred", "new\nline", os.fsdecode(b"not \xff utf-8"), "猫", "\u202eturned"):
        (data / "train" / name).mkdir()
    code, out, _ = cli(*DOCTOR, "data")
    assert code == 1
    assert not [c for c in out if not c.isprintable() and c != "\n"]
    (data / "train/cat" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    code, out, _ = cli(*DOCTOR, "data", "--output", "out")
    assert "train/cat/\\udcff.jpg: 0 bytes" in out
    assert b"train/cat/\xff.jpg,empty_file" in (data.parent / "out/problems.csv").read_bytes()
    (data.parent / "out/report.html").read_text(encoding="utf-8")
    json.loads(cli(*DOCTOR, "data", "--json").out)


def test_command_line_works_in_processes_and_in_a_plain_locale(data):
    (data / "train/cat/猫.jpg").write_bytes(b"")
    done = subprocess.run(
        command("doctor", "--data", "data", "--num_workers", "2"),
        capture_output=True,
        encoding="ascii",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "train/cat/\\u732b.jpg: 0 bytes" in done.stdout
    assert done.stderr == ""


def test_libraries_of_metrics_and_charts_are_loaded_for_files_alone(data):
    assert not {"torchmetrics", "matplotlib", "timm", "torchvision"} & loaded_by("doctor", "--data", "data")


def test_help_and_the_table_of_verbs_name_it(help_of):
    out = help_of("doctor")
    assert out.startswith("usage: vit-cls doctor")
    assert all(f"--{key}" in out for key in ("data", "output", "near_duplicates", "num_workers", "json"))
    assert "doctor" in COMMANDS


def test_the_embedded_digits_are_looked_at_as_files_and_named_as_what_they_are(data, cli):
    code, out, _ = cli(*DOCTOR, "digits", "--split", "test", "--json")
    result = json.loads(out)
    assert (code, result["images"], result["classes"]) == (0, 599, 10)
    assert (result["split"], result["origin"]) == ("test", "digits")


def test_a_manifest_is_examined_and_the_part_stands_in_the_result(data, cli):
    rows = [f"data/train/{label}/{i}.png,{label}" for label in ("cat", "dog") for i in range(10)]
    (data.parent / "m.csv").write_text("\n".join(["path,label", *rows, "data/none.png,cat"]))
    code, out, _ = cli(*DOCTOR, "m.csv", "--output", "out", "--json")
    result = json.loads(out)
    assert (code, result["images"], result["split"], result["origin"]) == (1, 20, None, "m.csv")
    assert [problem["kind"] for problem in result["problems"]] == ["missing_file"]
    assert "data/none.png" in (data.parent / "out/problems.csv").read_text()


def _group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="the children of a process are read from /proc")
def test_sigterm_ends_with_143_and_a_message_and_leaves_no_process(data):
    for i in range(2000):
        os.link(data / "train/cat/1.png", data / f"train/cat/link{i}.png")
    words = command("doctor", "--data", "data", "--num_workers", "2")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: len(children.read_text().split()) >= 3, process)  # two and multiprocessing's own
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "vit-cls: stopped by SIGTERM" in err
    assert "Traceback" not in err
    until(lambda: _group_is_empty(process.pid))
