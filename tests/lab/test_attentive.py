"""Heads on frozen tokens: identities of their formula, what they can and cannot find, fair training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vit_cls.data.partition import Partition, partition_data
from vit_cls.errors import ConfigError, DivergedError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import freeze
from vit_cls.lab.probes import attentive as attentive_module
from vit_cls.lab.probes.attentive import AttentiveProbe, ridge_preds
from vit_cls.lab.probes.base import Subject
from vit_cls.lab.probes.head_fits import (
    HeadRecipe,
    NormedTokens,
    ProbeHead,
    fit_head,
    heads_that_fit,
    token_statistics,
)
from vit_cls.lab.probes.patch_tasks import subset
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import make_pooling
from vit_cls.model.pooling_base import PoolingContext
from vit_cls.model.tokens import TokenLayout
from vit_cls.model.vit import VisionTransformer
from vit_cls.stats.least_squares import chosen_classifier

CONFIG = InferenceConfig(device="cpu", precision="32")
SHORT = HeadRecipe(epochs=3, batch_size=32, learning_rates=(1e-2,))
LAYOUT = TokenLayout(True, 0, (2, 4))
CONTEXT = PoolingContext(LAYOUT, embed_dim=8, num_heads=2, mlp_dim=16)


class _Memory:
    def __init__(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        self.tokens, self.labels = torch.from_numpy(tokens).float(), labels

    def rows(self, rows):
        return self.tokens[rows]


def _attentive(classifier, parts, **options):
    return AttentiveProbe(**options).run(Subject(classifier, parts, CONFIG))


def _needle(count: int, seed: int) -> _Memory:
    """One patch of eight is marked and carries the label; the others carry labels at random. CLS is noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    tokens = 0.1 * rng.normal(size=(count, 9, 8))
    carried = rng.integers(0, 2, (count, 8))
    marked = rng.integers(0, 8, count)
    carried[np.arange(count), marked] = labels
    tokens[:, 1:, 0] += 2.0 * carried - 1
    tokens[np.arange(count), 1 + marked, 1] += 3
    return _Memory(tokens, labels)


def _spread(count: int, seed: int) -> _Memory:
    """Every patch carries a little of the label, alike."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    tokens = rng.normal(size=(count, 9, 8))
    tokens[:, 1:, 0] += 1.2 * (2 * labels[:, None] - 1)
    return _Memory(tokens, labels)


def _accuracy(make, head: str) -> float:
    parts = make(400, 0), make(100, 1), make(300, 2)
    recipe = HeadRecipe(epochs=25, batch_size=100, learning_rates=(3e-2,))
    fit = fit_head(head, CONTEXT, parts, num_classes=2, recipe=recipe, seed=0)
    return float((fit.preds == parts[2].labels).mean())


def test_a_query_finds_the_one_patch_that_counts_and_the_mean_does_not():
    assert _accuracy(_needle, "ep:1") > 0.95
    assert _accuracy(_needle, "gap") < 0.8
    assert _accuracy(_needle, "cls") < 0.6


def test_where_the_mean_says_it_all_a_query_has_no_advantage():
    assert _accuracy(_spread, "gap") > 0.97
    assert _accuracy(_spread, "ep:2") == pytest.approx(_accuracy(_spread, "gap"), abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_queries_of_zero_are_the_values_of_the_mean(count, generator):
    pool = make_pooling(f"ep:{count}", CONTEXT)
    with torch.no_grad():
        pool.value.copy_(torch.randn(8, 8, generator=generator))
        pool.query.zero_()
    tokens = torch.randn(5, 8, 8, generator=generator)
    torch.testing.assert_close(pool(tokens), tokens.mean(dim=1) @ pool.value.T)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_values_after_the_weighted_sum_are_values_before_it(count, generator):
    pool = make_pooling(f"ep:{count}", CONTEXT).double()
    with torch.no_grad():
        pool.value.copy_(torch.randn(8, 8, generator=generator))
        pool.query.copy_(torch.randn(count, 8, generator=generator))
    tokens = torch.randn(5, 8, 8, generator=generator).double()
    values = (tokens @ pool.value.T).unflatten(2, (count, 8 // count))  # of every token: (B, N, Q, D / Q)
    attn = F.softmax(tokens @ pool.query.T / 8**0.5, dim=1)  # (B, N, Q)
    expected = torch.einsum("bnq,bnqe->bqe", attn, values).flatten(1)
    torch.testing.assert_close(pool(tokens), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("head", ["cls", "ep:4", "abmil", "map"])
def test_multiply_adds_are_those_that_torch_counts(head):
    model = ProbeHead(make_pooling(head, CONTEXT), 3, torch.zeros(9, 8), torch.ones(9, 8)).eval()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, 9, 8))
    # Sums of elementwise products, such as that of a gate, are not counted by torch.
    assert counter.get_total_flops() / 2 == pytest.approx(model.macs, rel=0.05)


def test_each_kind_of_token_is_standardised_and_places_are_kept():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(50, 9, 8))
    tokens[:, 0] = 5 + 10 * tokens[:, 0]
    tokens[:, 1:] += 3 * np.arange(8)[None, :, None]
    tokens[:, :, 7] = 2.0
    mean, std = token_statistics(_Memory(tokens, np.zeros(50, dtype=np.int64)), LAYOUT)
    np.testing.assert_allclose(mean[0], tokens[:, 0].mean(0), rtol=1e-4)
    np.testing.assert_allclose(std[0, :7], tokens[:, 0, :7].std(0), rtol=1e-4)
    np.testing.assert_allclose(mean[1:], np.tile(tokens[:, 1:].mean((0, 1)), (8, 1)), rtol=1e-4)
    np.testing.assert_allclose(std[3, :7], tokens[:, 1:, :7].std((0, 1)), rtol=1e-4)
    assert std[:, 7].tolist() == [1.0] * 9


def test_validation_chooses_rate_and_epoch_and_test_labels_have_no_part():
    parts = _spread(200, 0), _spread(60, 1), _spread(80, 2)
    recipe = HeadRecipe(epochs=6, batch_size=50, learning_rates=(1e-7, 1e-2))
    fit = fit_head("gap", CONTEXT, parts, num_classes=2, recipe=recipe, seed=0)
    assert fit.learning_rate == 1e-2
    assert fit.val_accuracy == max(fit.tried.values())
    blind = _Memory(parts[2].tokens.numpy(), 1 - parts[2].labels)
    again = fit_head("gap", CONTEXT, (parts[0], parts[1], blind), num_classes=2, recipe=recipe, seed=0)
    np.testing.assert_array_equal(again.preds, fit.preds)
    assert dataclasses.replace(again, preds=fit.preds) == fit


def test_a_rate_that_diverges_is_never_the_best_though_nan_answers_the_class_that_most_images_have():
    train, val, test = _spread(200, 0), _spread(60, 1), _spread(80, 2)
    mostly_0 = _Memory(val.tokens.numpy(), np.minimum(val.labels, np.arange(60) % 10 == 0).astype(np.int64))
    recipe = HeadRecipe(epochs=3, batch_size=50, learning_rates=(1e-7, 1e36))
    fit = fit_head("gap", CONTEXT, (train, mostly_0, test), num_classes=2, recipe=recipe, seed=0)
    assert fit.learning_rate == 1e-7
    assert fit.tried[1e36] == 0
    with pytest.raises(DivergedError, match=r"gap comes to .* at every learning rate tried \(1e\+36\)"):
        recipe = dataclasses.replace(recipe, learning_rates=(1e36,))
        fit_head("gap", CONTEXT, (train, val, test), num_classes=2, recipe=recipe, seed=0)


@pytest.mark.parametrize("rates", [(1e-7, 1e-2), (1e-2,)])
def test_wrong_labels_of_the_validation_part_change_the_choice_and_those_of_training_do_not_make_it(rates):
    train, val, test = _spread(200, 0), _spread(60, 1), _spread(80, 2)
    wrong = _Memory(val.tokens.numpy(), 1 - val.labels)
    recipe = HeadRecipe(epochs=6, batch_size=50, learning_rates=rates)
    right, misled = (
        fit_head("gap", CONTEXT, (train, one, test), num_classes=2, recipe=recipe, seed=0)
        for one in (val, wrong)
    )
    # Whoever learns the training labels is wrong on these: the least trained is the best.
    assert (right.learning_rate, misled.learning_rate) == (rates[-1], rates[0])
    assert right.val_accuracy > 0.8
    assert misled.epoch < right.epoch or misled.learning_rate < right.learning_rate
    assert misled.val_accuracy < 0.7


def _digits() -> Partition:
    parts, rng = partition_data("digits"), np.random.default_rng(0)
    pairs = ((parts.train, 120), (parts.val, 40), (parts.test, 50))
    return Partition(*(subset(source, count, rng) for source, count in pairs), "a few digits")


def _classifier(class_token: bool = True, embed_dim: int = 12) -> ImageClassifier:
    config = ViTConfig(
        img_size=8,
        patch_size=2,
        num_classes=10,
        embed_dim=embed_dim,
        depth=1,
        num_heads=2,
        class_token=class_token,
        pool="cls" if class_token else "gap",
    )
    with seeded(0):
        model = VisionTransformer(config)
    return ImageClassifier(model, Preprocess.for_size((8, 8)), [str(i) for i in range(10)]).eval()


def test_the_result_pairs_every_head_with_the_class_token_and_repeats_itself():
    def run(**options):
        heads = ["gap", "ep:2", "ep:4"]
        return _attentive(_classifier(), _digits(), heads=heads, recipe=SHORT, **options)

    found = run(num_seeds=2)
    assert list(found.predictions) == ["paths", "targets", "ridge cls", "cls", "gap", "ep:2", "ep:4"]
    assert found.values["chosen"] in ("ep:2", "ep:4")
    assert found.headline.startswith(f"A head {found.values['chosen']} on frozen tokens classifies better")
    right = {
        h: np.stack(found.predictions[h]) == found.predictions["targets"]
        for h in ("cls", found.values["chosen"])
    }
    reference = found.predictions[found.values["compared_with"]] == found.predictions["targets"]
    assert found.findings[0].estimate == pytest.approx(
        right[found.values["chosen"]].mean() - reference.mean()
    )
    assert found.findings[0].counts == {"seeds": 2, "images": 50}
    assert [one.p_holm >= one.p for one in found.findings] == [True] * 3
    assert found.values["ep:2"]["params"] == 12 * 12 + 2 * 12 + 12 * 10 + 10
    assert found.values["cls"]["macs"] == 12 * 10
    assert dataclasses.replace(run(num_seeds=2), seconds=0).to_dict(predictions=True) == dataclasses.replace(
        found, seconds=0
    ).to_dict(predictions=True)
    other = run(seed=1)
    np.testing.assert_array_equal(other.predictions["ep:4"][0], found.predictions["ep:4"][1])


@pytest.mark.parametrize("by_ridge", [True, False])
def test_heads_are_compared_with_the_linear_probe_that_validation_prefers(by_ridge, monkeypatch):
    parts = _digits()
    rng = np.random.default_rng(0)
    preds = np.where(rng.random(50) < 0.5, parts.test.index.labels, 0)
    # Worse on test than AdamW or not: only validation has a say.
    monkeypatch.setattr(attentive_module, "ridge_preds", lambda *_: (preds, 1.0 if by_ridge else 0.0))
    found = _attentive(_classifier(), parts, heads=["gap"], recipe=SHORT, num_seeds=2)
    targets = found.predictions["targets"]
    compared = {True: ("ridge cls", "ridge regression"), False: ("cls", "AdamW")}[by_ridge]
    assert found.values["compared_with"] == compared[0]
    own = np.mean(found.predictions[compared[0]] == targets)
    assert found.findings[0].estimate == pytest.approx(np.mean(found.predictions["gap"] == targets) - own)
    assert found.findings[0].counts == {"seeds": 2, "images": 50}
    assert f"a linear probe of cls by {compared[1]}: " in found.headline
    assert f"cls by {compared[1]} {100 * own:.1f} %" in found.headline
    assert f"compared with cls by {compared[1]}, the linear probe that does no worse" in " ".join(found.notes)


def test_ridge_regression_is_scored_on_validation_images():
    parts = _digits()
    frozen = Subject(_classifier(), parts, CONFIG).freeze()
    preds, share = ridge_preds(frozen, 1, "cls")
    fit = chosen_classifier(
        frozen.train.read("cls"),
        frozen.train.labels,
        frozen.val.read("cls"),
        frozen.val.labels,
        num_classes=10,
    )
    assert share == np.mean(fit(frozen.val.read("cls")).argmax(axis=1) == frozen.val.labels)
    np.testing.assert_array_equal(preds, fit(frozen.test.read("cls")).argmax(axis=1))


def test_tokens_read_from_the_memory_map_are_those_in_memory(monkeypatch):
    frozen = freeze(_classifier(), _digits().test, config=CONFIG)
    kept = NormedTokens(frozen, 1)
    monkeypatch.setattr("vit_cls.lab.probes.head_fits.IN_MEMORY", 0)
    mapped = NormedTokens(frozen, 1)
    rows = np.array([4, 0, 7])
    assert torch.equal(kept.rows(rows), mapped.rows(rows))
    assert torch.equal(kept.rows(slice(2, 9)), mapped.rows(slice(2, 9)))


def test_heads_that_do_not_fit_the_width_are_left_out_and_it_is_said():
    heads, notes = heads_that_fit(None, _classifier())
    assert heads == ["cls", "gap", "ep:1", "ep:2", "ep:4"]
    assert notes == ["Left out: ep:8, ep:16, ep:32, for the number of queries must divide the width, 12."]
    heads, notes = heads_that_fit(["ep:2"], _classifier(class_token=False))
    assert (heads, notes) == (["gap", "ep:2"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["ep:5"]}, r"--heads ep:Q .* divides model.embed_dim; got 5 and 12"),
        ({"heads": ["classtok"]}, r"--heads classtok has a token for each class"),
        ({"heads": ["last:2"]}, r"last"),
        ({"heads": ["multicls:4"]}, r"--heads multicls:4 reads several class tokens"),
        ({"heads": []}, r"--heads must name at least one head"),
        ({"heads": ["eb:1"]}, r"--heads must be one of"),
        ({"num_seeds": 0}, r"--num_seeds must be at least 1; got 0"),
        ({"layer": 2}, r"layers must be from 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _attentive(_classifier(), _digits(), recipe=SHORT, **options)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 1}, {"learning_rates": ()}])
def test_impossible_recipes_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        HeadRecipe(**options)
