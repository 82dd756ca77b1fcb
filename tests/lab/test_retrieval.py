"""The probe ``retrieval``: average precision by hand and by scikit-learn, chance, rotations, exclusions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.probes import ranking
from vit_cls.lab.probes.retrieval import RetrievalSettings, rank_changed, retrieval
from vit_cls.stats.ranking import average_precision, chance_precision, fit_whitening, rank


def _data(rows=60, dim=7, classes=4, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    x = rng.standard_normal((rows, dim))
    x[np.arange(rows), labels] += signal
    return x, labels


def _noise(rng, images):
    return {layer: rng.standard_normal((images, 5, 6)) for layer in (1, 2, 3, 4)}


def test_a_case_worked_by_hand():
    hits = np.array([[True, False, True, False, True]])
    assert average_precision(hits)[0] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    # angles 0, 10, 20, 40 degrees of classes a b a a; each image searches the other three
    angles = np.deg2rad([0.0, 10.0, 20.0, 40.0])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [5.0], [0.1], [2.0]])
    found = rank(x, np.array([0, 1, 0, 0]))
    # from 0 and from 20 degrees: b a a, so (1/2 + 2/3) / 2; from 40: a b a; from 10 there is no other b
    assert found.queries.tolist() == [0, 2, 3]
    np.testing.assert_allclose(found.average_precision, [7 / 12, 7 / 12, (1 + 2 / 3) / 2])
    np.testing.assert_allclose(found.r_precision, [0.5, 0.5, 0.5])
    assert found.recall[:, 0].tolist() == [False, False, True]
    assert found.recall[:, 1:].all()
    assert found.without_positive == 1


@pytest.mark.parametrize("own", [True, False])
def test_average_precision_is_scikit_learns_for_every_query(own, monkeypatch):
    x, labels = _data()
    gallery, known = (x, labels) if own else _data(rows=90, seed=1)
    found = rank(x, labels) if own else rank(x, labels, gallery, known)
    unit, other = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, gallery))
    expected = []
    for i in range(len(x)):
        searched = np.arange(len(gallery)) != (i if own else -1)
        expected.append(average_precision_score(known[searched] == labels[i], (unit[i] @ other.T)[searched]))
    np.testing.assert_allclose(found.average_precision, expected, atol=1e-12)
    monkeypatch.setattr(ranking, "AT_ONCE", 7 * len(gallery))
    again = rank(x, labels) if own else rank(x, labels, gallery, known)
    np.testing.assert_allclose(again.average_precision, expected, atol=1e-12)
    assert again.queries.tolist() == found.queries.tolist()


def test_r_precision_and_recall_are_those_of_a_naive_loop():
    x, labels = _data(signal=0.3)
    found = rank(x, labels)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for row, i in enumerate(found.queries):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i]
        hits = [labels[j] == labels[i] for j in order]
        positives = sum(hits)
        assert found.r_precision[row] == pytest.approx(sum(hits[:positives]) / positives)
        assert found.recall[row].tolist() == [any(hits[:k]) for k in (1, 5, 10)]
    assert 0 < found.recall[:, 0].mean() < 1


def test_rotating_and_scaling_the_features_changes_no_average_precision():
    x, labels = _data(rows=200)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    for change in ("raw", "centred", "whitened"):
        one, other = (
            rank_changed(train, test, (labels, labels), gallery="test")[change]
            for train, test in ((x[:100], x), (3 * x[:100] @ rotation, 3 * x @ rotation))
        )
        np.testing.assert_allclose(one.average_precision, other.average_precision, atol=1e-6)


def test_random_features_give_the_precision_that_chance_expects():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    found = rank(rng.standard_normal((400, 64)), labels)
    assert found.average_precision.mean() == pytest.approx(found.chance.mean(), abs=0.01)
    assert found.chance.mean() == pytest.approx(0.2, abs=0.02)  # about the prevalence


def test_the_expectation_of_chance_is_the_mean_over_all_orders():
    from itertools import permutations

    for positives in (1, 2, 3):
        hits = np.array(sorted(set(permutations([True] * positives + [False] * (5 - positives)))))
        expected = average_precision(hits).mean()
        assert chance_precision(np.array([positives]), 5)[0] == pytest.approx(expected)


def test_whitening_is_scikit_learns_and_is_fitted_on_the_training_part_alone():
    train, test = _data(seed=1)[0], _data(seed=2)[0]
    whitening = fit_whitening(train)
    expected = PCA(whiten=True).fit(train)
    ours, theirs = whitening(test), expected.transform(test)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-9)  # but for order and signs
    flat = np.concatenate([train, train[:, :1]], axis=1)  # a direction without variance is left out
    assert fit_whitening(flat)(flat).shape[1] == 7
    np.testing.assert_allclose(np.cov(fit_whitening(flat)(flat), rowvar=False), np.eye(7), atol=1e-9)
    labels = _data(seed=1)[1], _data(seed=2)[1]
    found = rank_changed(train + 5.0, test, labels, gallery="test")
    moved = test - 5.0 - train.mean(axis=0)
    for change, changed in (
        ("centred", moved),
        ("whitened", moved @ expected.components_.T / np.sqrt(expected.explained_variance_)),
    ):
        by_hand = rank(changed, labels[1]).average_precision
        np.testing.assert_allclose(found[change].average_precision, by_hand, atol=1e-9)


def test_queries_without_a_positive_are_left_out_and_counted(noisy_parts, frozen_part):
    train = noisy_parts()[0]
    rng = np.random.default_rng(0)
    test = frozen_part(_noise(rng, 5), np.array([0, 0, 0, 1, 2]), classes=3)
    result = retrieval(train, test)
    assert result.data["queries_without_positive"] == 2
    assert any("2 of 5 test images have no other image of their class" in note for note in result.notes)
    assert {row[-1] for row in result.tables[0].rows} == {3}
    assert result.predictions["paths"] == ["0.png", "1.png", "2.png"]
    assert (
        retrieval(train, test, settings=RetrievalSettings(gallery="train")).data["queries_without_positive"]
        == 0
    )
    lonely = frozen_part(_noise(rng, 3), np.arange(3), classes=3)
    with pytest.raises(DataError, match="only 0 of 3 test images have another image of their class"):
        retrieval(train, lonely)


def test_the_result_compares_every_read_with_the_class_token_over_the_same_queries(noisy_parts):
    train, _, test = noisy_parts()
    result = retrieval(train, test)
    scores = result.predictions["average_precision"]
    assert len(result.findings) == 7 + 2  # the other reads, then the class token centred and whitened
    labels = [row[0] for row in result.figures[0].rows]
    reads = ["gap", "max", "gem", "gem4", "cls+gap", "cls+gem4", "last:4"]
    assert labels == [*reads, "cls, centred", "cls, whitened"]
    gap = result.findings[0]
    assert gap.estimate == pytest.approx(np.mean(scores["gap raw"] - scores["cls raw"]))
    assert gap.ci95[0] < gap.estimate < gap.ci95[1] < 0
    assert gap.verdict == "supported"
    rows = {(row[0], row[1]): row for row in result.tables[0].rows}
    assert rows["cls", "raw"][2] == pytest.approx(scores["cls raw"].mean())
    assert rows["cls", "raw"][3] < rows["cls", "raw"][2] < rows["cls", "raw"][4]
    assert rows["random order", "expected"][2] == result.values["map_by_chance"]
    assert len(rows) == 8 * 3 + 1
    json.dumps(result.to_dict(predictions=True))


def test_it_is_said_that_queries_in_each_others_galleries_are_not_independent(noisy_parts):
    train, _, test = noisy_parts(counts=(20, 3, 12))
    said = {
        gallery: "not independent"
        in " ".join(retrieval(train, test, settings=RetrievalSettings(("cls", "gap"), gallery)).notes)
        for gallery in ("test", "train")
    }
    assert said == {"test": True, "train": False}


def test_an_unknown_gallery_is_refused():
    with pytest.raises(ConfigError, match="--gallery must be one of test, train; got 'val'"):
        RetrievalSettings(gallery="val")
