"""No flipped bit of a model file is computed with."""

from __future__ import annotations

import contextlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import make_vit
from vit_cls.errors import ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.verification import VERIFY
from vit_cls.weights.bundle import (
    METADATA_KEY,
    load_classifier,
    read_metadata,
    read_own_file,
    save_classifier,
)
from vit_cls.weights.digest import digest_of

FLIPS = int(os.environ.get("BIT_FLIPS", 80))


@pytest.fixture
def saved(tiny, tmp_path):
    model = make_vit({**tiny, "embed_dim": 8, "depth": 1}, num_classes=2)
    classifier = ImageClassifier(model, Preprocess((16, 16)), ["a", "b"])
    return save_classifier(classifier, tmp_path / "model.safetensors")


def flipped(content: bytes, draws: random.Random, end: int | None = None) -> bytes:
    changed = bytearray(content)
    changed[draws.randrange(end or len(content))] ^= 1 << draws.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("where", ["anywhere", "header"])
def test_a_flipped_bit_is_told_or_changes_nothing(where, saved):
    good, content = read_own_file(saved), saved.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if where == "header" else None
    told, draws = 0, random.Random(0)
    for _ in range(FLIPS):
        saved.write_bytes(flipped(content, draws, end))
        with contextlib.suppress(ModelFileError):
            assert read_metadata(saved) == good[0]
        try:
            metadata, state = read_own_file(saved)
        except ModelFileError:
            told += 1
            continue
        assert (metadata, state.keys()) == (good[0], good[1].keys())
        assert all(torch.equal(state[name], tensor) for name, tensor in good[1].items())
    assert told > 0.9 * FLIPS


def test_the_damaged_tensors_are_named(saved):
    text = read_metadata(saved)
    content = saved.read_bytes()
    head = load_file(saved)["head.weight"].numpy().tobytes()
    saved.write_bytes(content.replace(head, bytes(len(head)), 1))
    with pytest.raises(ModelFileError, match=r"model\.safetensors is damaged: head\.weight is not what was"):
        load_classifier(saved)
    token = VERIFY.set(False)
    assert not load_classifier(saved).model.head.weight.any()
    VERIFY.reset(token)
    assert text["format_version"] == 2


def test_a_file_of_now_without_digests_is_refused_and_an_old_one_read(saved):
    tensors, metadata = load_file(saved), read_metadata(saved)
    save_file(tensors, saved, metadata={METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(ModelFileError, match="damaged: its metadata"):
        load_classifier(saved)
    save_file(tensors, saved, metadata={METADATA_KEY: json.dumps({**metadata, "format_version": 1})})
    assert load_classifier(saved).class_names == ["a", "b"]


def test_a_digest_tells_names_kinds_dtypes_shapes_and_order():
    contents = [
        {},
        [],
        (),
        None,
        0,
        0.0,
        False,
        "0",
        b"0",
        {"a": 1},
        {"b": 1},
        {1: 1},
        {"1": 1},
        [[1], 2],
        [[1, 2]],
        ["ab", "c"],
        ["a", "bc"],
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(1, 2),
        torch.zeros(0),
        -torch.zeros(2),
        [torch.zeros(2)],
    ]
    assert len({digest_of(content) for content in contents}) == len(contents)
    assert digest_of(torch.arange(6).reshape(2, 3).t()) == digest_of(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert digest_of(torch.arange(6).reshape(2, 3)[:1, 0]) == digest_of(
        torch.tensor([0])
    )  # one value, stride 3
