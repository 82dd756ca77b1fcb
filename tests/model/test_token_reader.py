"""Frozen tokens are read as the model's own head would get them with that pooling."""

from __future__ import annotations

import pytest
import torch

from tests.models import POOLS, make_vit, perturbed
from vit_cls.errors import ConfigError
from vit_cls.model.pooling import POOLINGS, Pooling, make_pooling, pool_names, register_pooling
from vit_cls.model.token_reader import TokenReader

SPECS = [*POOLS, "gap+last:2", "avgmax+token:1"]
TRAINED = {"gem", "lse", "seqpool", "abmil", "simpool", "ep:2", "map", "cait:2", "multicls-diverse:2"}
TRAINED |= {"gem+last:2+token:1"}


def _model(tiny, **settings):
    return perturbed(make_vit({**tiny, "reg_tokens": 1}, **settings), scale=0.2)


@torch.inference_mode()
def _tokens(model, images):
    """By layer, before the first block and after each."""
    found = [model.embed_tokens(images)]
    for block in model.blocks:
        found.append(block(found[-1]))
    return dict(enumerate(found))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "classtok"])
@pytest.mark.parametrize("fc_norm", [None, False])
def test_the_models_own_pooling_is_read_with_its_weights(spec, fc_norm, tiny, generator):
    model = _model(tiny, pool=spec, fc_norm=fc_norm)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    read = TokenReader(model).on_cpu().read(spec, _tokens(model, images), 2)
    torch.testing.assert_close(read, model.forward_features(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in TRAINED | {"classtok"}])
def test_a_pooling_without_weights_reads_any_model_as_a_head_with_it_would(spec, tiny, generator):
    count = 2 if spec.startswith("multicls") else 1
    own = _model(tiny, pool="cls" if count == 1 else "multicls:2")
    other = _model(tiny, pool=spec, fc_norm=False)
    weights = {key: value for key, value in own.state_dict().items() if not key.startswith("head.")}
    other.load_state_dict(weights, strict=False)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    read = TokenReader(own).read(spec, _tokens(own, images), 2)
    torch.testing.assert_close(read, other.forward_features(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", sorted(TRAINED))
def test_weights_that_the_model_has_not_trained_are_not_made_up(spec, tiny):
    with pytest.raises(ConfigError, match=r"has weights of its own.*probe attentive --heads"):
        TokenReader(_model(tiny)).poolings(spec)


def test_the_sweep_knows_which_poolings_have_weights(tiny):
    context = _model(tiny, pool="multicls:2").pooling_context
    with_weights = {spec for spec in SPECS if any(True for _ in make_pooling(spec, context).parameters())}
    assert with_weights == TRAINED


def test_reading_a_layer_needs_the_blocks_before_it(tiny):
    reader = TokenReader(_model(tiny))
    assert (reader.layers("last:2+gap", 2), reader.layers("cls", 0)) == ([1, 2], [0])
    with pytest.raises(ConfigError, match="--pools last:2 needs 2 blocks, but layer 1 comes after 1"):
        reader.layers("last:2", 1)


class Corner(Pooling):
    """The last patch."""

    def forward(self, tokens, mask=None):
        return tokens[:, -1]


@pytest.fixture
def corner():
    register_pooling("corner", Corner)
    yield
    del POOLINGS["corner"]


@pytest.mark.usefixtures("corner")
def test_a_registered_pooling_is_a_pooling_like_any_other(tiny, generator):
    assert "corner" in pool_names()
    model = _model(tiny, pool="corner")
    images = torch.randn(2, 3, 16, 16, generator=generator)
    tokens = _tokens(model, images)
    features = model.forward_features(images)
    torch.testing.assert_close(features, model.norm(tokens[2][:, -1].clone()))
    read = TokenReader(_model(tiny, pool="gap")).read("cls+corner", tokens, 2)
    assert read.shape == (2, 2 * model.config.embed_dim)
    register_pooling("corner", Corner)  # again: a module may be imported twice
    with pytest.raises(ConfigError, match="corner is there already"):
        register_pooling("corner", type("Other", (Corner,), {}))


@pytest.mark.parametrize("name", ["a+b", "k:3", "top5", "Top", "", "-"])
def test_a_name_that_could_not_be_written_is_refused(name):
    with pytest.raises(ConfigError, match="the name of a pooling must be"):
        register_pooling(name, Corner)
