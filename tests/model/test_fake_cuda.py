"""Poolings, variants, precisions and adapters on a GPU that is not there: device, dtype, no host read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fake_cuda import PRECISIONS, fake_cuda, moved
from tests.models import POOLS, make_vit
from vit_cls import create_model
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.pooling import needs_class_token

NAMES = list("abcde")
VARIANTS = {
    "plain": {},
    "no class token": {"class_token": False},
    "registers, norms, scales": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.1, "pre_norm": True},
    "causal": {"causal": True, "class_position": "middle", "reg_tokens": 1},
    "dropout": {"drop_path_rate": 0.3, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_rate": 0.1},
    "gated": {"mlp": "swiglu_packed", "act": "silu", "pos_embed": "none"},
}
ADAPTED = [
    *("beit_base_patch16_224", "beit3_base_patch16_224", "eva02_base_patch16_clip_224"),
    *("vit_small_patch16_dinov3", "vit_pe_core_base_patch16_224", "vit_base_patch16_rope_mixed_224"),
]


def _variants():
    """Every pooling, with the next of the variants that it can have."""
    names = list(VARIANTS)
    for i, pool in enumerate(POOLS):
        able = [n for n in names if VARIANTS[n].get("class_token", True) or not needs_class_token(pool)]
        yield pool, able[i % len(able)]


def _classifier(model) -> ImageClassifier:
    return ImageClassifier(model, Preprocess(model.config.image_hw), NAMES)


def _adapted(name: str, **settings) -> ImageClassifier:
    small = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 32, "drop_path_rate": 0.2}
    return _classifier(create_model(name, **small, num_classes=5, **settings))


def _forward(classifier, device, precision, training):
    hw = classifier.preprocess.img_size
    images = torch.empty(3, 3, *hw, dtype=torch.uint8, device=device)
    pixels = classifier.normalise(images)
    assert (pixels.device, pixels.dtype) == (device, torch.float32)
    logits = classifier.train(training)(images)
    assert logits.shape == (3, 5)
    assert logits.device == device
    assert logits.dtype == (PRECISIONS[precision] or torch.float32)


def _backward(classifier, dtype):
    """On ``meta``: every weight's gradient has its dtype."""
    classifier = moved(classifier, "meta", dtype)
    images = torch.empty(3, 3, *classifier.preprocess.img_size, dtype=torch.uint8, device="meta")
    logits = classifier.train()(images)
    assert logits.dtype == dtype
    logits.sum().backward()
    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == dtype for p in trained)


@pytest.mark.parametrize(("pool", "variant"), list(_variants()))
def test_every_pooling_and_variant_stays_on_its_device_in_every_precision(tiny, pool, variant, monkeypatch):
    classifier = _classifier(make_vit({**tiny, "pool": pool, **VARIANTS[variant]}))
    for precision in PRECISIONS:
        with fake_cuda(monkeypatch, precision) as device:
            classifier = moved(classifier, device)
            _forward(classifier, device, precision, training=precision != "fp32")
    _backward(classifier, torch.float32 if variant == "plain" else torch.bfloat16)


@pytest.mark.parametrize("name", ADAPTED)
def test_every_adapter_stays_on_its_device_in_every_precision(name, monkeypatch):
    classifier = _adapted(name)
    for precision in PRECISIONS:
        with fake_cuda(monkeypatch, precision) as device:
            classifier = moved(classifier, device)
            _forward(classifier, device, precision, training=precision != "fp32")
    _backward(classifier, torch.bfloat16)


@pytest.mark.parametrize("pool", ["map", "last:2", "gem+last:2+token:1"])
def test_adapters_read_their_tokens_where_they_are(pool, monkeypatch):
    classifier = _adapted("vit_small_patch16_dinov3", pool=pool)
    with fake_cuda(monkeypatch, "bf16") as device:
        _forward(moved(classifier, device), device, "bf16", training=True)


def test_a_tensor_left_on_the_cpu_and_a_look_from_the_host_would_be_found(tiny, monkeypatch):
    classifier = _classifier(make_vit(tiny))
    with fake_cuda(monkeypatch) as device:
        classifier = moved(classifier, device)
        classifier.mean = torch.empty(classifier.mean.shape)
        with pytest.raises(RuntimeError, match="device"):
            _forward(classifier, device, "fp32", training=False)
        for look in (Tensor.item, bool, torch.nonzero):
            with pytest.raises(RuntimeError):
                look(torch.zeros((), device=device))
