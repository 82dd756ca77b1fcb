"""``vit-cls verify``: its JSON, its table, its file and its exit codes."""

from __future__ import annotations

import json
import re

import pytest
import torch

from vit_cls import create_model
from vit_cls.lab.verify import IDENTITIES
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier


@pytest.fixture
def classifier(tiny):
    torch.manual_seed(0)
    model = create_model("vit_pico_patch7_28", num_classes=2, **tiny)
    return ImageClassifier(model, Preprocess((16, 16)), ["cat", "dog"])


@pytest.fixture
def model(classifier, tmp_path):
    return str(save_classifier(classifier, tmp_path / "model.safetensors"))


def test_json_lists_every_identity_and_the_file_says_the_same(model, tmp_path, json_of):
    data = json_of("verify", "--model", model, "--device", "cpu", "--output", tmp_path / "out")
    assert [row["name"] for row in data["identities"]] == list(IDENTITIES)
    keys = {"name", "what", "kind", "residual", "tolerance", "ok", "applies", "reason"}
    assert all(set(row) == keys for row in data["identities"])
    assert data["ok"] is True
    assert (data["checked"], data["failed"], data["not_applicable"]) == (len(IDENTITIES), 0, 0)
    assert (data["precision"], data["images"], data["seed"], data["device"]) == (64, 2, 0, "cpu")
    assert json.loads((tmp_path / "out" / "verify.json").read_text()) == data


def test_fresh_weights_of_a_class_token_are_exact_where_exactness_is_claimed(model, json_of):
    data = json_of("verify", "--model", model, "--device", "cpu", "--images", "4")
    rows = {row["name"]: row for row in data["identities"]}
    exact = {name for name, row in rows.items() if row["kind"] == "exact"}
    assert {"shuffle-at-input", "shuffle-at-output", "block-1-query-constant"} <= exact
    assert {"causal-prepend-no-gradient", "gradient-at-last-patches"} <= exact
    assert all(rows[name]["residual"] == 0 for name in exact)


def test_the_table_has_a_line_for_each_identity_and_a_reason_where_one_does_not_apply(
    classifier, tmp_path, cli, tiny
):
    model = create_model("vit_pico_patch7_28", num_classes=2, class_token=False, pool="gap", **tiny)
    classifier = ImageClassifier(model, Preprocess((16, 16)), ["cat", "dog"])
    path = save_classifier(classifier, tmp_path / "gap.safetensors")
    code, out, _ = cli("verify", "--model", path, "--device", "cpu", "--precision", "32")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(IDENTITIES)
    table = {line.split()[0]: line for line in lines[1:-1]}
    assert table["prepend-equals-append"].endswith("does not apply: the model has no class token")
    assert table["evaluation-is-deterministic"].split()[1:] == ["0", "=", "0", "ok"]
    assert lines[-1].startswith("10 identities checked, 0 do not hold; 9 do not apply; float32 on cpu")


def test_an_identity_that_does_not_hold_is_exit_code_1_and_is_said_again_in_words(classifier, tmp_path, cli):
    with torch.no_grad():
        classifier.model.blocks[0].attn.proj.weight.zero_()
    path = save_classifier(classifier, tmp_path / "blind.safetensors")
    code, text, _ = cli("verify", "--model", path, "--device", "cpu")
    assert code == 1
    name = "class-token-sees-image-in-block-1"
    assert next(line for line in text.splitlines() if line.startswith(name)).endswith("FAILED")
    assert f"does not hold: {name}. After block 1 the class token differs between images" in text
    assert "1 do not hold" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "1"], "--images must be at least 2"),
        (["--precision", "bf16"], "--precision must be one of auto, 64, 32; got 'bf16'"),
        (["--device", "tpu"], "--device must be one of"),
        (["--seeds", "3"], "unknown key --seeds. Did you mean `seed`?"),
    ],
)
def test_bad_requests_are_exit_code_2_and_one_paragraph(words, message, model, refused):
    refused(["verify", "--model", model, *words], re.escape(message))
