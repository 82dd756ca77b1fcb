"""Ranking: average precision by hand and by scikit-learn, chance by enumeration."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vit_cls.stats import ranking
from vit_cls.stats.ranking import average_precision, chance_precision, rank


def _data(rows=60, dim=7, classes=4, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    x = rng.standard_normal((rows, dim))
    x[np.arange(rows), labels] += signal
    return x, labels


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


def test_random_features_give_the_precision_that_chance_expects():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    found = rank(rng.standard_normal((400, 64)), labels)
    assert found.average_precision.mean() == pytest.approx(found.chance.mean(), abs=0.01)
    assert found.chance.mean() == pytest.approx(0.2, abs=0.02)  # about the prevalence


def test_the_expectation_of_chance_is_the_mean_over_all_orders():
    for positives in (1, 2, 3):
        hits = np.array(sorted(set(permutations([True] * positives + [False] * (5 - positives)))))
        expected = average_precision(hits).mean()
        assert chance_precision(np.array([positives]), 5)[0] == pytest.approx(expected)
