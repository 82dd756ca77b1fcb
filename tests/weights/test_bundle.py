"""The model file: everything in, everything out, and nothing else opened."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import vit_cls
from tests.models import POOLS, make_vit
from vit_cls.errors import ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import (
    CHECKPOINT_KEY,
    FORMAT_VERSION,
    METADATA_KEY,
    load_classifier,
    read_metadata,
    save_classifier,
)


def _classifier(tiny, **settings) -> ImageClassifier:
    model = make_vit(tiny, num_classes=3, **settings)
    return ImageClassifier(model, Preprocess((16, 16), crop_pct=0.8), ["ä", "b c", "<d>"]).eval()


def _images(generator):
    return torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("spec", POOLS)
def test_a_classifier_is_rebuilt_bit_for_bit_from_the_file_alone(spec, tiny, generator, tmp_path):
    classifier = _classifier(tiny, pool=spec, reg_tokens=1, init_values=0.1)
    path = save_classifier(classifier, tmp_path / "model.safetensors", extra={"metrics": {"val/acc1": 0.5}})
    rebuilt = vit_cls.load(path)
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(rebuilt.model.state_dict()[name], tensor), name
    assert rebuilt.class_names == ["ä", "b c", "<d>"]
    assert rebuilt.preprocess == classifier.preprocess
    images = _images(generator)
    assert torch.equal(rebuilt(images), classifier(images))
    assert not rebuilt.training
    assert read_metadata(path)["metrics"] == {"val/acc1": 0.5}


def test_low_precision_weights_stay_low(tiny, generator, tmp_path):
    classifier = _classifier(tiny).to(torch.bfloat16)
    rebuilt = load_classifier(save_classifier(classifier, tmp_path / "m.safetensors"))
    assert {p.dtype for p in rebuilt.parameters()} == {torch.bfloat16}
    images = _images(generator)
    assert torch.equal(rebuilt(images), classifier(images))


def test_fixed_positions_stay_fixed_after_loading(tiny, tmp_path):
    classifier = _classifier(tiny, pos_embed="sincos2d")
    rebuilt = load_classifier(save_classifier(classifier, tmp_path / "m.safetensors"))
    assert [n for n, p in rebuilt.named_parameters() if not p.requires_grad] == ["model.pos_embed"]


def test_a_run_folder_stands_for_its_model_file(tiny, tmp_path):
    save_classifier(_classifier(tiny), tmp_path / "model.safetensors")
    assert vit_cls.load(tmp_path).class_names == vit_cls.load(str(tmp_path)).class_names


def test_a_save_that_fails_keeps_the_old_file_and_leaves_nothing_else(tiny, tmp_path, monkeypatch):
    path = save_classifier(_classifier(tiny), tmp_path / "m.safetensors")
    before = path.read_bytes()

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save_classifier(_classifier(tiny, depth=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb_went_off",))


def test_a_pickle_is_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(_Bomb()))
    torch.save({"state_dict": _Bomb(), CHECKPOINT_KEY: {}}, tmp_path / "evil2.ckpt")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(_Bomb()))
    for name in ("evil.ckpt", "evil2.ckpt", "evil.safetensors"):
        with pytest.raises(ModelFileError, match=name):
            vit_cls.load(name)
    assert not (tmp_path / "bomb_went_off").exists()


def test_wrong_files_are_named_with_what_is_wrong(tiny, tmp_path):
    good = save_classifier(_classifier(tiny), tmp_path / "good.safetensors")
    cases = {
        "html.safetensors": (b"<!DOCTYPE html><html></html>" * 10, "cannot be read as safetensors"),
        "empty.safetensors": (b"", "cannot be read as safetensors"),
        "cut.safetensors": (good.read_bytes()[:-100], "cannot be read as safetensors"),
        "noise.ckpt": (b"\x00\x01" * 100, "not a training checkpoint"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match=message):
            vit_cls.load(tmp_path / name)


def test_tensors_that_do_not_fit_the_metadata_are_refused(tiny, tmp_path):
    path = save_classifier(_classifier(tiny), tmp_path / "m.safetensors")
    tensors, metadata = load_file(path), read_metadata(path)

    def resaved(**changes) -> str:
        state = {k: v for k, v in tensors.items() if k != changes.get("without")}
        old = {**metadata, "format_version": 1}  # of a time without digests
        text = changes.get("text", json.dumps({**old, **changes.get("metadata", {})}))
        save_file(state, tmp_path / "bad.safetensors", metadata={changes.get("key", METADATA_KEY): text})
        return str(tmp_path / "bad.safetensors")

    with pytest.raises(ModelFileError, match=r"(?s)does not hold the model.*head.bias"):
        load_classifier(resaved(without="head.bias"))
    with pytest.raises(ModelFileError, match="no vit_cls metadata"):
        load_classifier(resaved(key="other"))
    with pytest.raises(ModelFileError, match="damaged metadata"):
        load_classifier(resaved(text="{"))
    with pytest.raises(ModelFileError, match=f"format version {FORMAT_VERSION + 1}"):
        load_classifier(resaved(metadata={"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ModelFileError, match="2 class names"):
        load_classifier(resaved(metadata={"class_names": ["a", "b"]}))
    with pytest.raises(ModelFileError, match="unknown architecture setting `rope`"):
        load_classifier(resaved(metadata={"architecture": {**metadata["architecture"], "rope": True}}))
