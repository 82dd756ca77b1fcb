"""Spoiled files of every kind, about a minute of them: an answer or a refusal, and no fault is overlooked."""

from __future__ import annotations

import json
import random
import sys

import pytest

from tests.scripts.conftest import SCRIPTS
from vit_cls.errors import DataError

CASES = {
    "images": 4000,
    "tables": 4000,
    "records": 4000,
    "metadata": 800,
    "model files": 3000,
    "configs": 80,
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script needs Linux")


@pytest.fixture(scope="module")
def fuzz(load_script):
    return load_script("fuzz")


@pytest.mark.parametrize("kind", CASES)
def test_a_spoiled_file_is_read_as_it_was_or_refused_in_words(kind, python):
    with python.start(SCRIPTS / "fuzz.py", "--serve", kind, 0, CASES[kind], "") as process:
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, (out[-300:], err[-1000:])
    ready, *lines = out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert ready == "ready"
    assert len(rows) == CASES[kind]
    assert [row for row in rows if row[1] == "faults"] == []
    assert {row[1] for row in rows} == {"answers", "refusals"}  # neither all sound nor all nonsense


def test_every_kind_has_cases(fuzz):
    assert set(CASES) == set(fuzz.KINDS)


def _outcome(fuzz, read):
    return fuzz.outcome_of(fuzz.Kind(lambda draw: draw.randbytes(4), read), "any", 7)


def test_what_is_not_ours_is_a_fault_and_so_are_no_words_and_the_address_of_an_object(fuzz):
    def raises(error):
        def read(_):
            raise error

        return read

    assert _outcome(fuzz, lambda _: None) == ("answers", "")
    assert _outcome(fuzz, raises(DataError("rows.csv has no rows."))) == ("refusals", "rows.csv has no rows.")
    assert _outcome(fuzz, raises(KeyError("x")))[0] == "faults"
    assert _outcome(fuzz, raises(AssertionError("other pixels")))[0] == "faults"
    assert _outcome(fuzz, raises(DataError("")))[0] == "faults"
    assert _outcome(fuzz, raises(DataError(f"cannot be read: {object()}")))[0] == "faults"


def test_a_case_follows_from_its_kind_and_number(fuzz, tmp_path):
    for kind in ("images", "tables", "records", "model files", "metadata", "configs"):
        places = [tmp_path / f"{kind} {i}" for i in range(2)]
        for place in places:
            place.mkdir()
        first, again = (fuzz.KINDS[kind](place) for place in places)
        for number in range(20):
            one, other = (made.spoil(random.Random(f"{kind} {number}")) for made in (first, again))
            if kind == "records":  # by the path of their file
                one, other = list(one.values()), list(other.values())
            assert repr(one) == repr(other)


def test_a_case_that_ends_its_process_is_a_fault_and_the_others_are_made(fuzz, monkeypatch, tmp_path):
    lines = [
        "import json, os, sys",
        "print('ready', flush=True)",
        "for number in range(int(sys.argv[3]), int(sys.argv[4])):",
        "    if number == 6:",
        "        os._exit(9)",
        "    print(json.dumps([number, 'answers', '']), flush=True)",
    ]
    (tmp_path / "ends.py").write_text("\n".join(lines))
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "ends.py"))
    counts, faults = fuzz.fuzz("images", 5, 3)
    assert counts == {"answers": 2, "faults": 1}
    assert faults == {6: "the process ended with 9"}
