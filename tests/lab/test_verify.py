"""Identities hold for every kind of model, and each notices the model that breaks it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit_cls import create_model
from vit_cls.errors import ConfigError
from vit_cls.lab.verify import IDENTITIES, verify, what
from vit_cls.lab.verify.subject import EXACT, GREATER, RELATIVE, Check
from vit_cls.model.attention import Attention
from vit_cls.model.block import Block
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.encoder import Encoder
from vit_cls.model.vit import VisionTransformer

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 24, "patch_size": 8, "num_classes": 4}
ADAPTED = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 4}


def _classifier(name="vit_pico_patch7_28", **settings):
    """No weight is zero, none is one, and the channels are normalised differently."""
    generator = torch.Generator().manual_seed(5)
    model = create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (1 if parameter.ndim == 1 else 0))
    pre = Preprocess(model.config.image_hw, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    names = [f"class {i}" for i in range(model.config.num_classes)]
    return ImageClassifier(model, pre, names).eval()


def _native(**settings):
    return _classifier(**{**TINY, **settings})


CLASS_TOKEN = {
    *("prepend-equals-append", "class-token-anywhere", "identical-class-tokens-stay-identical"),
    *("shuffle-at-input", "shuffle-at-output", "block-1-query-constant"),
    *("class-token-sees-image-in-block-1", "causal-prepend-no-gradient", "causal-append-has-gradient"),
}
PERMUTING = {
    *("prepend-equals-append", "class-token-anywhere", "patch-permutation-equivariance"),
    "identical-class-tokens-stay-identical",
}
MANY_READ = {"shuffle-at-output"}
NOT_SMOOTH = {"integrated-gradients-completeness"}
LEARNED = {"lens-equals-logits"}

# settings: the identities that make no statement about such a model
CONFIGURATIONS = [
    ({}, set()),
    ({"reg_tokens": 3, "no_embed_class": True, "qk_norm": True, "init_values": 1e-5}, set()),
    ({"pre_norm": True, "mlp": "swiglu_packed", "act": "silu", "qkv_bias": False}, set()),
    ({"pos_embed": "none", "final_norm": False, "depth": 1, "img_size": (16, 24)}, set()),
    ({"num_classes": 0, "drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}, set()),
    ({"pool": "gap"}, MANY_READ),
    ({"pool": "gap", "class_token": False, "pool_include_prefix": True, "reg_tokens": 2}, CLASS_TOKEN),
    ({"pool": "max"}, MANY_READ | NOT_SMOOTH),
    ({"pool": "token:3"}, MANY_READ),
    ({"pool": "cls+gap"}, MANY_READ),
    ({"pool": "map"}, MANY_READ | LEARNED),
    ({"causal": True, "class_position": "last"}, PERMUTING),
    (
        {"causal": True},
        PERMUTING | {"class-token-sees-image-in-block-1", *NOT_SMOOTH},
    ),
]


@pytest.mark.parametrize(("settings", "skipped"), CONFIGURATIONS, ids=str)
def test_every_identity_holds_or_says_why_not(settings, skipped):
    found = verify(_native(**settings), seed=1)
    assert list(found.checks) == list(IDENTITIES)
    assert found.ok, {name: found.checks[name] for name in found.failed}
    assert {name for name, check in found.checks.items() if not check.applies} == skipped
    assert all(check.reason for check in found.checks.values() if not check.applies)


TIMM = {"causal-prepend-no-gradient", "causal-append-has-gradient", "last-block-class-token-only"}
ATTENTION = {
    *("block-1-query-constant", "attention-rows-sum-to-one", "value-contributions"),
}
ADAPTERS = [
    ("beit_base_patch16_224", {"pool": "cls"}, TIMM | PERMUTING),
    ("vit_small_patch16_dinov3", {"pool": "cls"}, TIMM | PERMUTING),
    ("deit_tiny_distilled_patch16_224", {}, TIMM | MANY_READ | LEARNED),
    ("vit_base_patch16_xp_224", {"pool": "cls"}, TIMM | ATTENTION),
]


@pytest.mark.parametrize(("name", "settings", "skipped"), ADAPTERS)
def test_adapted_models_pass_what_makes_sense_for_them(name, settings, skipped):
    found = verify(_classifier(name, **ADAPTED, **settings))
    assert found.ok, {name: found.checks[name] for name in found.failed}
    assert {name for name, check in found.checks.items() if not check.applies} == skipped


def test_float32_is_held_to_its_own_tolerance():
    found = verify(_native(), precision="32")
    assert found.ok, found.failed
    assert found.settings["precision"] == 32
    rounded = found.checks["prepend-equals-append"]
    assert 1e-10 < rounded.residual <= rounded.tolerance == 1e-4


def test_results_repeat_under_a_seed_and_differ_under_another():
    first, again, other = (verify(_native(), seed=seed, images=3).checks for seed in (0, 0, 1))
    assert first == again
    name = "class-token-sees-image-in-block-1"
    assert first[name].residual != other[name].residual


def test_the_classifier_and_the_global_generator_stay_as_they_are():
    classifier = _native().train()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    state = torch.get_rng_state()
    verify(classifier)
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.training
    assert classifier.model.head.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert {value.dtype for value in classifier.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 1}, "--images must be at least 2.*got 1"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"precision": "16"}, "--precision must be one of auto, 64, 32; got '16'"),
        ({"precision": "64", "device": "mps"}, "--precision 64 is not available on mps"),
    ],
)
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        verify(_native(), **settings)


@pytest.mark.parametrize(
    ("check", "ok"),
    [
        (Check(0.0, EXACT, 0.0), True),
        (Check(1e-300, EXACT, 0.0), False),
        (Check(1e-10, RELATIVE, 1e-10), True),
        (Check(2e-10, RELATIVE, 1e-10), False),
        (Check(0.0, GREATER, 0.0), False),
        (Check(1e-30, GREATER, 0.0), True),
        (Check(float("nan"), RELATIVE, 1.0), False),
        (Check(float("inf"), GREATER, 0.0), False),
        (Check(None, RELATIVE, 1.0, reason="no class token"), True),
        (Check(None, RELATIVE, 1.0), False),
    ],
)
def test_a_check_is_ok_only_on_the_right_side_of_its_bound(check, ok):
    assert check.ok is ok


def test_weights_that_diverged_do_not_pass():
    classifier = _native()
    with torch.no_grad():
        classifier.model.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    found = verify(classifier)
    assert not found.ok
    assert "normalisation" in found.failed
    row = next(row for row in found.to_dict()["identities"] if row["name"] == "normalisation")
    assert (row["residual"], row["ok"]) == (None, False)


# From here on: models, or tools, that are broken on purpose.


class PlaceKnowingBlock(Block):
    """Adds something that depends on the place of a token."""

    def forward(self, tokens, read=None, mask=None):
        tokens = super().forward(tokens, read, mask)
        return tokens + 0.01 * torch.arange(tokens.shape[1]).to(tokens)[:, None]


class ImageInClassToken(VisionTransformer):
    """The class token starts with the mean of the image."""

    def embed_tokens(self, images):
        tokens = super().embed_tokens(images)
        return torch.cat([tokens[:, :1] + images.mean(dim=(1, 2, 3))[:, None, None], tokens[:, 1:]], dim=1)


class SigmoidAttention(Attention):
    """Weights each on their own, which do not sum to 1."""

    def forward(self, tokens, read=None, mask=None):
        q, k, v = self._project(tokens, read)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = scores.sigmoid() if mask is None else scores.sigmoid() * mask
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class UnbiasedAttention(Attention):
    """Drops the bias of the projection."""

    def forward(self, tokens, read=None, mask=None):
        return super().forward(tokens, read, mask) - getattr(self.proj, "bias", 0)


# What is recognised as an ordinary attention goes by its name.
SigmoidAttention.__name__ = UnbiasedAttention.__name__ = "Attention"


class OffByOneEncoder(Encoder):
    """Reads the neighbours of the tokens it was asked for."""

    def forward(self, tokens, read=None, *settings):
        if read is not None:
            read = slice(read.start + 1, read.stop + 1)
        return super().forward(tokens, read, *settings)


class ImageInLogits(VisionTransformer):
    """Logits know the image from elsewhere than the read token."""

    def forward(self, images):
        return super().forward(images) + images.mean(dim=(1, 2, 3))[:, None]


class BatchNorm(nn.LayerNorm):
    """Takes something of the mean of the batch away, also in evaluation."""

    def forward(self, x):
        return super().forward(x - 0.5 * x.mean(dim=0, keepdim=True))


class WrongGradient(torch.autograd.Function):
    """The identity, with half of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class HalfGradientNorm(nn.LayerNorm):
    """Right values, wrong gradients."""

    def forward(self, x):
        return WrongGradient.apply(super().forward(x))


class AlwaysDropout(nn.Dropout):
    """Drops in evaluation too."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


def _class_of(thing, kind):
    thing.__class__ = kind


def _zero(parameter):
    with torch.no_grad():
        parameter.zero_()


def _swap_statistics(classifier):
    classifier.mean, classifier.std = classifier.std, classifier.mean


def _all_attention(classifier, kind):
    for block in classifier.model.blocks:
        _class_of(block.attn, kind)


# what is broken: (how, the identities that must fail, no others)
BROKEN = {
    "place in a block": (lambda c: _class_of(c.model.blocks[0], PlaceKnowingBlock), PERMUTING),
    "image in the class token": (
        lambda c: _class_of(c.model, ImageInClassToken),
        {"shuffle-at-input", "block-1-query-constant", "causal-prepend-no-gradient"},
    ),
    "sigmoid attention": (
        lambda c: _all_attention(c, SigmoidAttention),
        {"attention-rows-sum-to-one", "value-contributions"},
    ),
    "dropped bias": (lambda c: _all_attention(c, UnbiasedAttention), {"value-contributions"}),
    "neighbour read": (
        lambda c: _class_of(c.model.blocks, OffByOneEncoder),
        {"last-block-class-token-only", "lens-equals-logits"},
    ),
    "patch instead of class token": (
        lambda c: setattr(c.model.pool, "read", slice(1, 2)),
        {"gradient-at-last-patches", "lens-equals-logits"},
    ),
    "image in the logits": (
        lambda c: _class_of(c.model, ImageInLogits),
        {"shuffle-at-output", "lens-equals-logits"},
    ),
    "mean of the batch": (
        lambda c: _class_of(c.model.norm, BatchNorm),
        {"batch-independence", "integrated-gradients-completeness"},
    ),
    "wrong gradient": (
        lambda c: _class_of(c.model.norm, HalfGradientNorm),
        {"integrated-gradients-completeness"},
    ),
    "swapped mean and std": (_swap_statistics, {"normalisation"}),
    "blind block 1": (
        lambda c: (_zero(c.model.blocks[0].attn.proj.weight), _zero(c.model.blocks[1].attn.proj.weight)),
        {"class-token-sees-image-in-block-1", "causal-append-has-gradient"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_fails_what_it_breaks_and_nothing_else(name):
    breaks, expected = BROKEN[name]
    classifier = _native()
    breaks(classifier)
    assert set(verify(classifier).failed) == expected


def test_dropout_in_evaluation_is_noticed():
    classifier = _native()
    _class_of(classifier.model.head_drop, AlwaysDropout)
    assert "evaluation-is-deterministic" in verify(classifier).failed


def test_a_gap_head_that_reads_no_patch_is_noticed():
    classifier = _native(pool="gap")
    classifier.model.pool.forward = lambda tokens, mask=None: tokens.mean(dim=1) * 0
    assert {"gradient-at-last-patches", "lens-equals-logits"} <= set(verify(classifier).failed)


def _shifted(layout, class_position, device=None):
    """Each token also sees the next one."""
    count = layout.num_tokens
    return torch.ones(count, count, dtype=torch.bool, device=device).tril(1)


def _itself(layout, class_position, device=None):
    return torch.eye(layout.num_tokens, dtype=torch.bool, device=device)


# where, what, put in its place, the identities that must fail
TOOLS = [
    ("vit_cls.model.encoder.causal_mask", _shifted, {"causal-prepend-no-gradient"}),
    ("vit_cls.model.encoder.causal_mask", _itself, {"causal-append-has-gradient"}),
]


@pytest.mark.parametrize(("where", "wrong", "expected"), TOOLS)
def test_a_broken_tool_fails_what_it_breaks_and_nothing_else(where, wrong, expected, monkeypatch):
    monkeypatch.setattr(where, wrong)
    assert set(verify(_native()).failed) == expected


def test_every_identity_has_a_model_or_a_tool_that_fails_it():
    seen = {"evaluation-is-deterministic"}.union(*(e for _, e in BROKEN.values()), *(e for *_, e in TOOLS))
    assert seen == set(IDENTITIES)


def test_every_identity_says_in_one_sentence_what_must_hold():
    sentences = [what(name) for name in IDENTITIES]
    assert len(set(sentences)) == len(IDENTITIES) == 19
    assert all(one.endswith(".") for one in sentences)
