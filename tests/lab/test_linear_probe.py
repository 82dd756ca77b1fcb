"""The probe ``linear``: scikit-learn's numbers, choices on validation alone, protocols with an effect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.probes import linear_fits
from vit_cls.lab.probes.base import FrozenParts
from vit_cls.lab.probes.common import POOLS, layers_needed
from vit_cls.lab.probes.linear import LinearProbe
from vit_cls.lab.probes.linear_fits import LinearSettings, fit_linear
from vit_cls.model.config import ViTConfig
from vit_cls.model.token_reader import TokenReader
from vit_cls.model.vit import VisionTransformer
from vit_cls.stats.intervals import wilson_interval


def _linear(*parts, origin="", **options):
    return LinearProbe(**options).analyse(FrozenParts(*parts, origin=origin))


def _reader(depth, **settings):
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 1}
    return TokenReader(VisionTransformer(ViTConfig(**tiny, depth=depth, **settings)))


def _data(rows=60, dim=8, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    x = rng.standard_normal((rows, dim)) * np.arange(1, dim + 1) + 3
    x[:, :classes] += 2.0 * np.eye(classes)[labels]
    return x.astype(np.float32), labels


@pytest.mark.parametrize("dim", [8, 100])  # fewer features than rows, and more
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_ridge_scores_are_those_of_scikit_learn(dim, penalty, monkeypatch):
    x, y = _data(dim=dim)
    monkeypatch.setattr(linear_fits, "chosen_classifier", _only(penalty))
    fit = fit_linear((x, y), (x[:9], y[:9]), num_classes=4, settings=LinearSettings())
    z = StandardScaler().fit(x.astype(np.float64))
    alpha = penalty * len(x)  # the mean eigenvalue of the sum of products of standardised features
    queries = _data(dim=dim, seed=1)[0].astype(np.float64)
    reference = Ridge(alpha=alpha).fit(z.transform(x.astype(np.float64)), 2.0 * np.eye(4)[y] - 1)
    np.testing.assert_allclose(
        queries @ fit.weight + fit.bias, reference.predict(z.transform(queries)), rtol=0, atol=1e-8
    )
    classifier = RidgeClassifier(alpha=alpha).fit(z.transform(x.astype(np.float64)), y)
    assert fit.predict(queries).tolist() == classifier.predict(z.transform(queries)).tolist()


def _only(penalty):
    from vit_cls.stats.least_squares import chosen_classifier

    def chosen(*data, num_classes):
        return chosen_classifier(*data, num_classes=num_classes, penalties=[penalty])

    return chosen


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_scikit_learns_on_standardised_features(classes):
    x, y = _data(classes=classes)
    val = _data(classes=classes, seed=1)
    fit = fit_linear((x, y), val, num_classes=classes, settings=LinearSettings(solver="logistic"))
    z = StandardScaler().fit(x.astype(np.float64))
    reference = LogisticRegression(C=fit.strength, max_iter=5000, tol=1e-8)
    reference.fit(z.transform(x.astype(np.float64)), y)
    queries = _data(classes=classes, rows=200, seed=2)[0].astype(np.float64)
    scores = queries @ fit.weight + fit.bias
    found = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, reference.predict_proba(z.transform(queries)), atol=5e-3)
    assert fit.converged


def test_the_strength_with_the_most_validation_images_right_is_chosen():
    x, y = _data(rows=40, dim=30, seed=3)
    val = _data(rows=200, dim=30, seed=4)
    for solver in ("ridge", "logistic"):
        settings = LinearSettings(solver=solver)
        fit = fit_linear((x, y), val, num_classes=4, settings=settings)
        z = StandardScaler().fit(x.astype(np.float64))
        counts = {}
        for strength in settings.strengths:
            if solver == "ridge":
                model = RidgeClassifier(alpha=strength * len(x))
            else:
                model = LogisticRegression(C=strength, max_iter=5000)
            model.fit(z.transform(x.astype(np.float64)), y)
            counts[strength] = int((model.predict(z.transform(val[0].astype(np.float64))) == val[1]).sum())
        assert counts[fit.strength] >= max(counts.values()) - (solver == "logistic")  # to solver tolerance
        assert abs(fit.val_right - counts[fit.strength]) <= (solver == "logistic")
        assert len(set(counts.values())) > 1


def test_a_class_without_training_images_is_never_predicted_by_logistic_regression():
    x, y = _data(classes=3)
    fit = fit_linear((x, y), (x, y), num_classes=5, settings=LinearSettings(solver="logistic"))
    assert set(fit.predict(1e6 * _data(rows=300, seed=5)[0])) <= {0, 1, 2}


def test_a_refit_uses_train_and_validation_with_the_strength_chosen_before():
    x, y = _data(rows=30)
    val = _data(rows=30, seed=1)
    once = fit_linear((x, y), val, num_classes=4, settings=LinearSettings())
    again = fit_linear((x, y), val, num_classes=4, settings=LinearSettings(refit=True))
    assert (again.strength, again.val_right) == (once.strength, once.val_right)
    both = np.concatenate([x, val[0]]).astype(np.float64)
    z = StandardScaler().fit(both)
    reference = Ridge(alpha=once.strength * 60).fit(
        z.transform(both), 2.0 * np.eye(4)[np.concatenate([y, val[1]])] - 1
    )
    queries = _data(seed=7)[0].astype(np.float64)
    np.testing.assert_allclose(
        queries @ again.weight + again.bias, reference.predict(z.transform(queries)), atol=1e-8
    )


@pytest.mark.parametrize("protocol", ["ours", "dinov2"])
def test_choices_ignore_the_test_part(noisy_parts, relabelled, protocol):
    train, val, test = noisy_parts()
    one = _linear(train, val, test, protocol=protocol)
    other = _linear(train, val, relabelled(test), protocol=protocol)
    for name in ("strength", "val_right", "best_on_val"):
        assert one.values[name] == other.values[name]
    assert one.values["top1"] != other.values["top1"]
    changed = _linear(train, relabelled(val), test, protocol=protocol)
    assert changed.values["val_right"] != one.values["val_right"]


def test_the_result_has_counts_intervals_and_predictions_that_give_the_numbers_again(noisy_parts):
    result = _linear(*noisy_parts(), origin="made here")
    table = result.tables[0]
    preds, labels = result.predictions["preds"], result.predictions["labels"]
    assert list(preds) == ["cls", "gap", "max", "gem:3", "gem:4", "cls+gap", "cls+gem:4", "last:4"]
    for row in table.rows:
        right = int((preds[row[0]] == labels).sum())
        assert row[1:6] == [right / 80, *wilson_interval(right, 80), right, 80]
        assert result.values["top1"][row[0]] == right / 80
    assert [finding.counts["images"] for finding in result.findings] == [80] * 7
    gap = result.findings[0]
    assert gap.estimate == pytest.approx(result.values["top1"]["gap"] - result.values["top1"]["cls"])
    assert result.figures[0].rows[0][:2] == ("gap", gap.estimate)
    assert gap.verdict == "supported"  # one patch of four carries the class
    assert gap.estimate < -0.1
    assert result.data["images"] == {"train": 90, "val": 60, "test": 80}
    assert result.data["origin"] == "made here"
    assert result.settings["seed"] == 0
    assert f"{int((preds[result.values['best_on_val']] == labels).sum())} of 80 right" in result.headline
    json.dumps(result.to_dict(predictions=True))


def test_the_dinov2_protocol_tests_the_class_token_and_the_read_that_validation_chose(noisy_parts):
    result = _linear(*noisy_parts(), protocol="dinov2")
    assert result.settings["ways"] == ["cls", "cls+gap", "last:4", "last:4+gap"]
    best = result.values["best_on_val"]
    assert result.values["val_right"][best] == max(result.values["val_right"].values())
    assert set(result.predictions["preds"]) == {"cls", best}
    untested = [row for row in result.tables[0].rows if row[0] not in ("cls", best)]
    assert all(row[1] is None and row[7] is not None for row in untested)
    assert any("val-selected" in note for note in result.notes)


def test_the_dinov2_protocol_takes_the_blocks_that_there_are():
    pools, _ = LinearProbe(protocol="dinov2").chosen(_reader(2))
    assert pools == ["cls", "cls+gap", "last:2", "last:2+gap"]
    assert LinearProbe(protocol="dinov2").chosen(_reader(1))[0] == [
        "cls",
        "cls+gap",
    ]
    with pytest.raises(ConfigError, match="reads the class token, but the model has none"):
        LinearProbe(protocol="dinov2").chosen(_reader(4, class_token=False, pool="gap"))


@pytest.mark.parametrize(("depth", "last"), [(12, "last:4"), (4, "last:4"), (3, "last:3"), (2, "last:2")])
def test_the_class_tokens_of_the_last_blocks_are_read_by_default_as_far_as_there_are_blocks(depth, last):
    reader = _reader(depth)
    pools, notes = LinearProbe().chosen(reader)
    assert (pools[:-1], pools[-1], notes) == (list(POOLS), last, [])
    assert layers_needed(pools, reader) == list(range(depth + 1))[-min(4, depth) :]


def test_one_block_has_no_earlier_class_token_to_read():
    assert LinearProbe().chosen(_reader(1))[0] == list(POOLS)


def test_the_mae_protocol_is_a_batch_norm_without_parameters_then_cross_entropy():
    x, y = _data(dim=5)
    x[:, 4] = 1e-4 * (np.arange(60) % 7)  # so narrow that the eps counts
    fit = fit_linear((x, y), (x, y), num_classes=4, settings=LinearSettings(protocol="mae"))
    wide = x.astype(np.float64)
    z = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-6)
    reference = LogisticRegression(C=fit.strength, max_iter=5000, tol=1e-8).fit(z, y)
    scores = wide @ fit.weight + fit.bias
    expected = reference.decision_function(z)
    centred = scores - scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(axis=1, keepdims=True), atol=0.05)
    plain = fit_linear((x, y), (x, y), num_classes=4, settings=LinearSettings(solver="logistic"))
    assert np.abs(plain.weight[4]).max() > 2 * np.abs(fit.weight[4]).max()


def test_a_solver_that_stops_too_early_is_named_in_the_notes(noisy_parts):
    result = _linear(*noisy_parts(), solver="logistic", pools=("cls",), max_steps=1)
    assert any("L-BFGS had not converged after 1 steps for cls" in note for note in result.notes)
    calm = _linear(*noisy_parts(), solver="logistic", pools=("cls",))
    assert not any("converged" in note for note in calm.notes)


def test_ways_are_those_named_and_the_reference_is_the_mean_where_the_class_token_is_not_read(noisy_parts):
    result = _linear(*noisy_parts(), pools=("max", "gap", "token:1"))
    assert result.settings["reference"] == "gap"
    assert list(result.predictions["preds"]) == ["max", "gap", "token:1"]
    assert len(result.findings) == 2
    alone = _linear(*noisy_parts(), pools=("token:1",))
    assert (alone.findings, alone.figures) == ([], [])
    assert "of 80 right" in alone.headline


def test_without_a_class_token_the_ways_that_read_it_are_left_out_with_a_note(frozen_part):
    rng = np.random.default_rng(0)
    parts = [
        frozen_part({4: rng.standard_normal((12, 4, 3))}, np.arange(12) % 2, classes=2, class_token=False)
        for _ in range(3)
    ]
    result = _linear(*parts)
    assert result.settings["ways"] == ["gap", "max", "gem:3", "gem:4"]
    assert "Not read: cls, cls+gap, cls+gem:4, last:4, for the model has no class token." in result.notes


def test_impossible_settings_and_parts_are_refused(noisy_parts, frozen_part):
    with pytest.raises(ConfigError, match="--protocol must be one of ours, dinov2, mae; got 'moco'"):
        LinearProbe(protocol="moco")
    with pytest.raises(ConfigError, match="--solver must be one of ridge, logistic; got 'svm'"):
        LinearProbe(solver="svm")
    with pytest.raises(ConfigError, match=r"--margin must be above 0 and below 1; got 1\.0"):
        LinearProbe(margin=1.0)
    train, val, test = noisy_parts()
    other = frozen_part({4: np.zeros((2, 5, 6))}, np.array([0, 1]), classes=2)
    with pytest.raises(DataError, match="the val part has classes class 0, class 1, but the train part has"):
        _linear(train, other, test)
    one_class = frozen_part({4: np.zeros((4, 5, 6))}, np.zeros(4), classes=3)
    with pytest.raises(DataError, match=r"the train part has 4 image\(s\), all of one class"):
        _linear(one_class, val, test)
