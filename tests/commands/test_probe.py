"""``vit-cls probe``: every probe as a stranger runs it, its files, its cache, its refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

import vit_cls.lab.features as features
from vit_cls.commands.words import comma_lists
from vit_cls.data.partition import partition_data
from vit_cls.lab.probes.head_fits import LEARNING_RATES, HeadRecipe
from vit_cls.lab.probes.overlap import UNKNOWN, find_record, overlap_note
from vit_cls.lab.probes.table import PROBES
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.weights.architecture import build_model
from vit_cls.weights.bundle import save_classifier

QUICK = {"attentive": ["--recipe.epochs", "2", "--recipe.learning_rates", "1e-2,.03"]}
KEYS = {"kind", "headline", "findings", "values", "settings", "data", "output"}
CLASSES = ("blue", "green", "red")
A_CLASS = 18


def _save(path, *, classes=CLASSES, seed=7, **changes):
    """An untrained model, saved: what its tokens know does not matter here."""
    torch.manual_seed(seed)
    settings = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 8, "patch_size": 4}
    model = build_model(ViTConfig.from_dict({**settings, "num_classes": len(classes), **changes}))
    return save_classifier(ImageClassifier(model, Preprocess((8, 8)), list(classes)), path)


def _photos(root):
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for i in range(A_CLASS):
            pixels = rng.integers(0, 90, (12, 9, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    _photos(tmp_path / "photos")
    _save(tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def forward_passes(monkeypatch):
    """Names of the sources whose tokens were computed."""
    seen = []
    compute = features.batches

    def counted(classifier, source, *args):
        seen.append(source.index.root.name)
        return compute(classifier, source, *args)

    monkeypatch.setattr(features, "batches", counted)
    return seen


def _words(name, *more, model="model.safetensors", data="photos"):
    return ["probe", name, "--model", model, "--data", data, "--num_workers", "0", *more]


def test_every_probe_is_tried_here_and_all_but_one_with_all_of_its_defaults():
    assert len(PROBES) == 8
    assert list(QUICK) == ["attentive"]


def test_the_attentive_probe_trains_its_default_heads_by_its_default_recipe(json_of):
    found = json_of(*_words("attentive"))
    # Queries that do not divide the width of 16 are left out.
    assert found["settings"]["heads"] == ["cls", "gap", "ep:1", "ep:2", "ep:4", "ep:8", "ep:16"]
    assert found["settings"]["epochs"] == HeadRecipe().epochs
    assert found["settings"]["learning_rates"] == list(LEARNING_RATES)
    assert "ep:32" in " ".join(found["notes"])


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_says_one_object_writes_its_files_and_computes_nothing_twice(
    name, place, json_of, forward_passes
):
    words = _words(name, *QUICK.get(name, ()))
    found = json_of(*words, "--output", "out")
    assert set(found) >= KEYS
    assert found["kind"] == f"probe {name}"
    assert found["output"] == "out"
    assert found["findings"]
    assert found["settings"]["model"] == "model.safetensors"
    assert found["settings"]["architecture"].startswith(
        "2 blocks, width 16, 2 heads, 8x8 pixels in 2x2 patches"
    )
    assert found["data"]["origin"].startswith("0.25 of each class of photos is the test part")
    for file in ("results.json", "report.html"):
        assert found["headline"] in (place / "out" / file).read_text().replace("&#39;", "'"), file
    assert json.loads((place / "out/results.json").read_text())["predictions"]
    assert list((place / "out/figures").iterdir())
    assert forward_passes

    kept = {path: path.stat().st_mtime_ns for path in (place / "xdg/vit_cls/tokens").rglob("*")}
    assert kept
    forward_passes.clear()
    again = json_of(*words)
    assert not forward_passes
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again["output"] is None
    assert again["values"] == found["values"]
    assert again["findings"] == found["findings"]


@pytest.mark.parametrize("name", PROBES)
def test_tokens_go_to_the_cache_that_was_named_and_nowhere_else(name, place, json_of):
    json_of(*_words(name, *QUICK.get(name, ()), "--cache", "kept"))
    assert any((place / "kept").iterdir())
    assert not (place / "xdg").exists()


@pytest.mark.parametrize("name", ["linear", "layers"])
def test_another_model_and_other_files_are_not_taken_from_the_cache(name, place, json_of, forward_passes):
    json_of(*_words(name))
    assert len(forward_passes) == 3
    _save(place / "other.safetensors", seed=8)
    json_of(*_words(name, model="other.safetensors"))
    assert len(forward_passes) == 6
    (place / "photos/red/0.png").write_bytes((place / "photos/blue/0.png").read_bytes())
    json_of(*_words(name))
    assert len(forward_passes) == 7  # the part that the file is in


def test_the_random_encoder_is_not_mistaken_for_the_model(place, json_of):
    values = json_of(*_words("invert"))["values"]
    again = json_of(*_words("invert", "--seed", "0"))["values"]
    other = json_of(*_words("invert", "--cache", "empty"))["values"]
    assert values == again == other
    assert values["random"] != values["cls"]


def test_a_cache_that_cannot_be_written_by_default_is_a_warning_and_no_end(place, json_of, caplog):
    (place / "xdg").write_text("a file")
    assert json_of(*_words("tokens"))["kind"] == "probe tokens"
    assert "tokens are not kept" in caplog.text


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("kind", ["other classes", "no head", "no class token"])
def test_the_classes_are_those_of_the_data_whatever_the_model_has(name, kind, place, json_of):
    changes = {
        "other classes": {"classes": [str(i) for i in range(10)]},
        "no head": {"classes": ()},
        "no class token": {"class_token": False, "pool": "gap"},
    }[kind]
    _save(place / "other.safetensors", **changes)
    words = _words(name, *QUICK.get(name, ()), "--output", "out", model="other.safetensors")
    found = json_of(*words)
    results = json.loads((place / "out/results.json").read_text())["predictions"]
    if "class_names" in results:
        assert results["class_names"] == sorted(CLASSES)
    if name == "invert":
        told = {found["values"][read]["same_class"] for read in ("gap", "tokens", "label")}
        assert (told == {None}) == (kind != "no class token")
        assert ("classes of the model are not those" in " ".join(found["notes"])) == (told == {None})
    if kind == "no class token" and name in ("linear", "knn", "retrieval", "layers", "tokens"):
        assert "for the model has no class token" in " ".join(found["notes"])


@pytest.mark.parametrize("name", PROBES)
def test_a_broken_file_is_a_reason_in_the_result_and_no_row(name, place, json_of):
    parts = partition_data("photos")
    broken = parts.train.index.paths[3]
    (place / "photos" / broken).write_bytes((place / "photos" / broken).read_bytes()[:40])
    found = json_of(*_words(name, *QUICK.get(name, ())))
    assert re.search(rf'"{broken}": "[^"]+"', json.dumps(found["data"]))
    assert "Files that could not be read are in no number here: 1 of train;" in " ".join(found["notes"])
    counts = found["data"].get("images", found["data"])
    assert counts["train"] == len(parts.train.index) - 1
    assert counts["test"] == len(parts.test.index)


BASE = _words("linear")
CASES = {
    "no name": (["probe"], r"probe needs a name: linear, .*Example: vit-cls probe linear --model"),
    "an option first": (["probe", "--model", "x"], r"probe needs a name: linear, "),
    "unknown probe": (["probe", "liner"], r"no probe 'liner'.*Did you mean `linear`"),
    "no model": (["probe", "linear", "--data", "photos"], r"model"),
    "no data": (["probe", "linear", "--model", "model.safetensors"], r"data"),
    "missing model": (_words("linear", model="nowhere"), r"no file or folder 'nowhere'"),
    "missing data": (_words("linear", data="nowhere"), r"--data nowhere"),
    "one image a class": (_words("linear", data="few"), r"--data few: too few images for three parts"),
    "unknown pool": (
        [*BASE, "--pools", "cls,gab"],
        r"--pools must be one of .*got 'gab'.*Did you mean `gap`",
    ),
    "class token": (_words("knn", "--pools", "cls", model="gap.safetensors"), r"--pools cls .*has none"),
    "blocks": (
        [*BASE, "--pools", "last:3"],
        r"--pools last:K needs a whole number K of at least 1, at most 2",
    ),
    "blocks by layer": (_words("layers", "--pools", "last:2"), r"--pools last:2 needs 2 blocks"),
    "seed": ([*BASE, "--seed", "-1"], r"--seed must be at least 0; got -1"),
    "seed in words": ([*BASE, "--seed", "one"], r"seed must be a whole number; got 'one'"),
    "output": ([*BASE, "--output", "model.safetensors"], r"--output model.safetensors is a file"),
    "cache": ([*BASE, "--cache", "model.safetensors"], r"--cache model.safetensors .*is a file"),
    "compile": ([*BASE, "--compile"], r"--compile has no effect on a probe"),
    "fraction": ([*BASE, "--val_fraction", "1"], r"--val_fraction must be above 0 and below 1; got 1"),
    "share of a part that is there": (
        _words("linear", "--test_fraction", "0.3", data="digits"),
        r"--test_fraction 0\.3 has no effect.*held-out third",
    ),
    "batch": ([*BASE, "--batch_size", "0"], r"batch_size.*0"),
    "device": ([*BASE, "--device", "tpu"], r"tpu"),
    "typo": ([*BASE, "--poolz", "cls"], r"unknown key --poolz.*Did you mean `pools`"),
    "another probe's option": ([*BASE, "--gallery", "train"], r"unknown key --gallery"),
    "decoder": (_words("invert", "--decoder", "gan"), r"--decoder must be one of ridge, conv; got 'gan'"),
    "tiles": (_words("dense", "--k", "1"), r"--k must be at least 2"),
    "trainings": (_words("attentive", "--num_seeds", "0"), r"--num_seeds must be at least 1; got 0"),
    "head": (_words("attentive", "--heads", "cls,eb:1"), r"eb:1"),
    "recipe": (_words("attentive", "--recipe.epochs", "0"), r"epochs must be at least 1; got 0"),
    "layer of attentive": (_words("attentive", "--layer", "3"), r"layers must be from 0 .* to 2 .*got 3"),
    "layers of dense": (_words("dense", "--layers", "0,3"), r"layers must be from 0 .* to 2 .*got 0, 3"),
    "layers of invert": (_words("invert", "--layers", "-1"), r"layers must be from 0 .* to 2 .*got -1"),
    **{
        f"margin of {name}": (_words(name, "--margin", margin), rf"--margin must be .*; got {margin}")
        for name, margin in zip(PROBES, ["0.0", "1.0", "-0.5", "2.0", "1.5", "7", "3", "5"], strict=True)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_refused_in_one_paragraph_and_leaves_nothing(case, place, refused):
    _save(place / "gap.safetensors", class_token=False, pool="gap")
    for name in CLASSES:
        (place / "few" / name).mkdir(parents=True)
        shutil.copy(place / "photos" / name / "0.png", place / "few" / name)
    refused(*CASES[case])


@pytest.mark.parametrize("name", PROBES)
def test_parts_that_are_too_small_are_refused_by_every_probe(name, place, cli):
    for part, classes in (("train", ("red", "blue")), ("val", ("red",)), ("test", ("red",))):
        for label in classes:
            (place / "split" / part / label).mkdir(parents=True)
            shutil.copy(place / f"photos/{label}/0.png", place / "split" / part / label / f"{part}.png")
    code, _, err = cli(*_words(name, *QUICK.get(name, ()), data="split"))
    assert code == 2
    assert re.search(r"the test part has 1 image; a comparison needs at least two", err), err
    assert len(err.splitlines()) == 1


def test_help_lists_every_probe_and_the_options_of_one(help_of):
    out = help_of("probe")
    for name, probe in PROBES.items():
        assert re.search(rf"^  {name} +{re.escape(probe.question)}$", out, re.MULTILINE)
    out = help_of("probe", "linear")
    for option in ("--model", "--data", "--cache", "--pools", "--protocol", "--margin", "--seed", "--output"):
        assert option in out


class _Options:
    def __init__(self, heads: Sequence[str] | None, layers: Sequence[int], margin: float) -> None:
        """Two lists, and a number."""


def test_lists_with_commas_become_lists_of_numbers_and_texts():
    words = ["--recipe.learning_rates", "1e-3,.5,+2", "--layers=", "--heads", "ep:4", "--margin", "1"]
    expected = ["[0.001, 0.5, 2.0]", "--layers=[]", "--heads", '["ep:4"]', "--margin", "1"]
    assert comma_lists(words, _Options) == [words[0], *expected]
    as_they_are = ["--heads", "null", "--layers", "[1,2]"]
    assert comma_lists(as_they_are, _Options) == as_they_are


def _record(place, root, **more):
    run = place / "run"
    run.mkdir(exist_ok=True)
    _save(run / "model.safetensors")
    record = {"identity": {"train_fingerprint": "a", "val_fingerprint": "b"}, "data": {"root": str(root)}}
    (run / "run.json").write_text(json.dumps(record | more))


@pytest.mark.parametrize(
    ("root", "note"),
    [
        ("photos", "may have been trained on"),
        ("/somewhere/else", None),
        (None, "no record of what the model"),
    ],
)
@pytest.mark.parametrize("model", ["run", "run/model.safetensors"])
def test_the_result_says_whether_the_model_may_have_seen_the_images(root, note, model, place, json_of):
    _record(place, root or "photos")
    if root is None:
        (place / "run/run.json").unlink()
    notes = " ".join(json_of(*_words("linear", model=model))["notes"])
    assert (note in notes) if note else ("trained on this data" not in notes and UNKNOWN not in notes)


def test_a_name_of_a_model_does_not_take_the_record_of_the_folder_one_stands_in(place):
    (place / "run.json").write_text("{}")
    assert find_record("vit_tiny_patch16_224") is None
    (place / "checkpoints").mkdir()
    (place / "checkpoints/last.ckpt").touch()
    assert find_record("checkpoints/last.ckpt") == {}
    (place / "run.json").write_text("{")
    assert find_record(str(place)) is None


def test_a_test_part_that_was_never_trained_on_is_said_to_be():
    parts = partition_data("digits")
    digits = {"data": {"name": "digits", "root": None}}
    (note,) = overlap_note(digits, parts, "digits")
    assert note.endswith("It has not seen the test part.")
    assert overlap_note({"data": {"name": "folder", "root": "photos"}}, parts, "digits") == []
    agreed = {"identity": {"train_fingerprint": parts.train.index.fingerprint()}}
    assert overlap_note(agreed, parts, "digits") == [note]


def test_a_folder_split_into_three_keeps_its_test_part_apart(place):
    for part in ("train", "val", "test"):
        shutil.copytree(place / "photos", place / "split" / part)
    record = {"data": {"root": str(place / "split")}}
    parts = partition_data("split")
    assert "It has not seen the test part." in overlap_note(record, parts, "split")[0]
    record["identity"] = {"val_fingerprint": parts.test.index.fingerprint()}
    assert "may have been trained on" in overlap_note(record, parts, "split")[0]
    assert "may have been trained on" in overlap_note(record, partition_data("split/train"), "split/train")[0]
