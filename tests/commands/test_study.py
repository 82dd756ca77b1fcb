"""``vit-cls study``: refusals in one paragraph, one JSON object, signals that leave work and no process."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.commands.conftest import until
from vit_cls.lab.studies.table import STUDIES

QUICK = ["--recipe.epochs", "1", "--recipe.embed_dim", "8", "--recipe.depth", "1", "--recipe.num_heads", "2"]
HEADS = ["study", "heads", "--data", "digits", "--heads", "cls,gap", "--lr_grid", "1", "--seeds", "1"]
SMALL = [*HEADS, *QUICK, "--jobs", "1"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = {
    "no name": (["study"], r"study needs a name: heads, .*vit-cls study heads --data digits"),
    "an option first": (["study", "--data", "digits"], r"study needs a name: heads, "),
    "unknown study": (["study", "haeds", "--data", "digits"], r"no study 'haeds'.*Did you mean `heads`"),
    "no data": (["study", "heads"], r"data"),
    "missing folder": (["study", "heads", "--data", "nowhere"], r"--data nowhere"),
    "no seeds": ([*SMALL, "--seeds", "0"], r"--seeds must be at least 1; got 0"),
    "bad shard": ([*SMALL, "--shard", "3/2"], r"--shard i/n needs i from 1 to n; got 3/2"),
    "shard in words": ([*SMALL, "--shard", "half"], r"--shard must be written i/n, such as 1/4; got 'half'"),
    "no device": ([*SMALL, "--device", "tpu"], r"--device must be one of auto, cpu, cuda, mps; got 'tpu'"),
    "no jobs": ([*SMALL, "--jobs", "0"], r"--jobs must be at least 1; got 0"),
    "unknown head": ([*SMALL, "--heads", "cls,gab"], r"--heads must be one of .*gab.*Did you mean `gap`"),
    "head that does not fit": ([*SMALL, "--heads", "cls,last:7"], r"last:K .* at most 1 .*; got 7"),
    "head that does not fit the width": ([*SMALL, "--heads", "cls,ep:3"], r"ep:Q needs a Q that divides"),
    "one head": ([*SMALL, "--heads", "cls"], r"--heads needs two or more.*got cls"),
    "grid": ([*SMALL, "--lr_grid", "4"], r"--lr_grid must be one of 1, 2, 3, 5; got 4"),
    "margin": ([*SMALL, "--margin", "1"], r"--margin must be above 0 and below 1"),
    "fraction": ([*SMALL, "--val_fraction", "1"], r"--val_fraction must be above 0 and below 1; got 1"),
    "recipe": ([*SMALL, "--recipe.epochs", "0"], r"--recipe.epochs must be above 0; got 0"),
    "recipe's model": ([*SMALL, "--recipe.num_heads", "3"], r"3 heads and width 8"),
    "weights": ([*SMALL, "--recipe.pretrained", "nowhere.safetensors"], r"nowhere.safetensors"),
    "another study's option": ([*SMALL, "--depths", "1,2"], r"unknown key --depths"),
    "typo": ([*SMALL, "--seedz", "2"], r"unknown key --seedz. Did you mean `seed`"),
    "depth of weights": (
        ["study", "depth", "--data", "digits", "--recipe.pretrained", "x"],
        r"fresh weights.*depth of their own; got --recipe.pretrained x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_refused_in_one_paragraph_and_leaves_nothing(case, place, refused):
    (place / "studies").mkdir()  # the folder of all studies
    refused(*CASES[case])


@pytest.mark.parametrize("taken", ["a folder of something else", "a file", "a damaged record"])
def test_an_output_taken_by_something_else_is_left_alone(taken, place, refused):
    output = place / "taken"
    file = {"a file": output, "a damaged record": output / "study.json"}.get(taken, output / "thesis.tex")
    file.parent.mkdir(exist_ok=True)
    file.write_text("{")
    refused([*SMALL, "--output", "taken"], "taken.*Give a new")


def test_a_study_prints_one_json_object_goes_on_and_refuses_other_settings(place, json_of, refused):
    words = [*SMALL, "--output", "out"]
    first = json_of(*words, "--shard", "1/2")
    assert (first["left"], first["trainings"]) == (1, 2)
    assert not (place / "out/results.json").exists()
    done = {path: path.stat().st_mtime_ns for path in place.rglob("trial.json")}
    assert len(done) == 1

    found = json_of(*words)
    assert found["kind"] == "study heads"
    assert found["settings"]["heads"] == ["cls", "gap"]
    assert found["settings"]["recipe"]["epochs"] == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done
    results = json.loads((place / "out/results.json").read_text())
    assert set(results["predictions"]["predictions"]) == {"cls", "gap"}
    assert (place / "out/report.html").is_file()

    for change, other in (
        (["--recipe.epochs", "2"], "another recipe.epochs: 1 there, 2 now"),
        (["--seeds", "2"], "another seeds: [0] there, [0, 1] now"),
        (["--heads", "gap,cls"], "another heads: ['cls', 'gap'] there, ['gap', 'cls'] now"),
    ):
        refused([*words, *change], re.escape(f"--output out holds a study with {other}"))
    causal = ["study", "causal", "--data", "digits", "--output", "out"]
    refused(causal, "another study: 'heads' there, 'causal' now")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_trains_answers_and_reports_with_all_of_its_own_defaults(name, place, json_of):
    """The models are small, trained in two steps under one seed; all else is what a user gets."""
    sizes = {"epochs": 1, "batch_size": 512, "embed_dim": 8, "depth": 1, "num_heads": 2}
    if name == "depth":
        del sizes["depth"]
    small = [word for key, size in sizes.items() for word in (f"--recipe.{key}", str(size))]
    found = json_of("study", name, "--data", "digits", "--seeds", "1", "--jobs", "1", *small)
    assert found["kind"] == f"study {name}"
    assert found["output"] == f"studies/{name}_digits"
    assert found["findings"]
    assert all(finding["claim"] and finding["verdict"] for finding in found["findings"])
    notes = [json.loads(path.read_text()) for path in place.rglob("trial.json")]
    assert notes
    assert [note["error"] for note in notes if "error" in note] == []
    assert all(note["macs"] > note["head_macs"] > 0 for note in notes)
    for file in ("results.json", "report.html"):
        text = (place / found["output"] / file).read_text().replace("&#39;", "'")
        assert found["headline"] in text, file


def test_commas_make_a_list_of_each_option_of_a_study_that_is_one(cli):
    found = 0
    for name, kind in STUDIES.items():
        for option, parameter in inspect.signature(kind).parameters.items():
            if str(parameter.annotation).startswith("Sequence"):
                ran = cli("study", name, "--data", "nowhere", f"--{option}", "1,2")
                assert "Expected a" not in ran.err, (name, option)
                found += 1
    assert found >= 8


def test_help_lists_every_study_and_the_options_of_one(help_of):
    out = help_of("study")
    assert len(STUDIES) >= 4
    for name, kind in STUDIES.items():
        assert f"  {name} " in out
        assert kind.question in out
    out = help_of("study", "heads")
    for option in ("--heads", "--lr_grid", "--seeds", "--margin", "--recipe.lr", "--jobs", "--shard"):
        assert option in out


def _processes_of(session: int) -> list[str]:
    """Command lines of the processes of a session that are still there."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else []
            if fields and int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("to_group", "signum"), [(True, signal.SIGINT), (False, signal.SIGKILL)], ids=["group", "parent killed"]
)
def test_a_signal_ends_a_study_keeps_its_work_and_leaves_no_process(place, python, to_group, signum):
    words = [*HEADS, *QUICK, "--recipe.epochs", "100000", "--jobs", "2", "--output", "out"]
    with python.start("-m", "vit_cls", *words) as process:
        until(lambda: len(list(place.glob("out/trials/*/run/checkpoints/last.ckpt"))) >= 2, process)
        assert len(_processes_of(process.pid)) >= 2
        (os.killpg if to_group else os.kill)(process.pid, signum)
        out, errors = process.communicate(timeout=100)
    until(lambda: not _processes_of(process.pid), seconds=10)
    assert out == ""
    assert len(list(place.glob("out/trials/*/run/checkpoints/last.ckpt"))) == 2
    if signum == signal.SIGKILL:
        return
    assert process.returncode == 130, errors
    assert "stopped by SIGINT; 0 of 2 trainings are done, and the same command goes on from here." in errors
    assert "Traceback" not in errors


def test_a_study_does_not_go_on_with_other_images(place, image_root, cli, refused):
    shutil.copytree(image_root, place / "photos")
    quick = [*QUICK, "--recipe.img_size", "16", "--recipe.patch_size", "8"]
    words = ["photos" if word == "digits" else word for word in [*HEADS, *quick]]
    assert cli(*words).code == 0
    first = json.loads((place / "studies" / "heads_photos" / "results.json").read_text())
    rows = next(table for table in first["tables"] if table["title"] == "Every pair")["rows"]
    assert [row[:2] for row in rows] == [["gap", "cls"]]
    again = cli(*words)  # the same images: nothing to train
    assert again.code == 0
    assert "trainings to do" not in again.err
    (place / "photos/train/red/0.png").rename(place / "photos/train/red/other.png")
    refused(words, "holds a study of other images: in the train part")
