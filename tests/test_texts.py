"""Names of all kinds go through files and streams, and come back as they were."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forked import Server
from vit_cls.evaluation.row_formats import csv_line, read_predictions
from vit_cls.texts import csv_row, csv_text

NAMES = [
    "plain",
    "\x1b[31mred\x1b[0m",
    "bell\x07",
    "=1+1",
    "+1",
    "-1",
    "@sum",
    "\tt",
    "\rr",
    "'quote",
    "''",
    "'=1",
    'com,"ma',
    "new\nline",
    "cr\rin",
    "\u202ertl",
    "ünï",
    "bad\udcff",
]
CONTROLS = frozenset(range(32)) - {9, 10, 13}


def test_a_line_of_csv_is_read_back_exactly_and_begins_no_formula():
    text = csv_row(NAMES)
    (cells,) = csv.reader(io.StringIO(text, newline=""))
    assert [csv_text(cell) for cell in cells] == NAMES
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]
    assert csv_row([-1, -0.5, None, True]) == "-1,-0.5,,True\n"
    assert csv_line([-0.5, "-0.5", None]) == "-0.500000,'-0.5,\n"


def test_predictions_are_read_back_exactly(tmp_path):
    names = [name for name in NAMES if name]
    rows = [csv_line(["path", "label", "prediction", "probability", "correct", "error"])]
    rows += [csv_line([name, name, name, 0.5, 1, None]) for name in names]
    (tmp_path / "predictions.csv").write_bytes("".join(rows).encode("utf-8", "surrogateescape"))
    read = read_predictions(str(tmp_path))
    assert [(row.path, row.label, row.best[0][0]) for row in read] == [(n, n, n) for n in names]


LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
}


def _vit_cls(place: Path, locale: str, *words: object, python: Server | None = None) -> bytes:
    """What the command says on stdout; nothing that commands a terminal is on either stream."""
    command = ["-m", "vit_cls", *(os.fspath(word) for word in words)]  # type: ignore[call-overload]
    env = {**os.environ, **LOCALES[locale]}
    if python is None:  # what follows from the locale before anything is imported
        done = subprocess.run([sys.executable, *command], cwd=place, env=env, capture_output=True)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        with python.start(*command, env=env, cwd=place) as process:
            code = process.wait(timeout=250)
            out, err = process.output()
    assert code == 0, err.decode(errors="replace")
    assert not CONTROLS & set(out + err), words
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory, python) -> Path:
    """Images whose names other programs stumble over, and a model trained on them."""
    here, draws = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    for part in (b"train", b"val"):
        for name in (b"a\x1b[5m", b"=\xff"):
            folder = os.path.join(os.fsencode(here), b"data", part, name)
            os.makedirs(folder)
            for file in (b"\x1b]0;t\x07.png", b"caf\xff.png", "ü\u202e.png".encode(), b"=1\r.png"):
                pixels = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(os.path.join(folder, file))
            with open(os.path.join(folder, b"\x1bbad.png"), "wb") as bad:
                bad.write(folder)  # no image, and no copy of another file
    model = ["--model.name", "vit_pico_patch7_28", "--model.embed_dim", "12", "--model.num_heads", "2"]
    data = ["--data.root", here / "data", "--data.max_bad_images", "9", "--data.num_workers", "0"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    words = [*model, "--model.depth", "1", *data, *trainer, "--run_dir", "run"]
    _vit_cls(here, "cp1252", "fit", *words, python=python)
    return here


def test_any_name_goes_through_any_locale_and_commands_no_terminal(place, python):
    val = place / "data/val"
    told = _vit_cls(place, "C", "evaluate", "--model", "run", "--data", val, "--output", "out", "--json")
    assert json.loads(told)["failed"] == 2
    words = ["predict", "--model", "run", val, "--format", "table"]
    table = _vit_cls(place, "cp1252", *words, python=python)
    assert len(table.splitlines()) == 1 + 10
    rows = read_predictions(str(place / "out"))
    named = {(val / row.path).resolve() for row in rows}
    assert named == {path.resolve() for path in val.rglob("*.png")}
