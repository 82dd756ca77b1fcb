"""The probe ``retrieval``: rotations, whitening, exclusions, what it compares."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.probes.base import FrozenParts
from vit_cls.lab.probes.retrieval import RetrievalProbe, rank_changed
from vit_cls.stats.ranking import fit_whitening, rank


def _retrieval(train, test, **options):
    return RetrievalProbe(**options).analyse(FrozenParts(train, test, test))


def _data(rows=60, dim=7, classes=4, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    x = rng.standard_normal((rows, dim))
    x[np.arange(rows), labels] += signal
    return x, labels


def _noise(rng, images):
    return {layer: rng.standard_normal((images, 5, 6)) for layer in (1, 2, 3, 4)}


def test_rotating_and_scaling_the_features_changes_no_average_precision():
    x, labels = _data(rows=200)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    for change in ("raw", "centred", "whitened"):
        one, other = (
            rank_changed(train, test, (labels, labels), gallery="test")[change]
            for train, test in ((x[:100], x), (3 * x[:100] @ rotation, 3 * x @ rotation))
        )
        np.testing.assert_allclose(one.average_precision, other.average_precision, atol=1e-6)


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
    result = _retrieval(train, test)
    assert result.data["queries_without_positive"] == 2
    assert any("2 of 5 test images have no other image of their class" in note for note in result.notes)
    assert {row[-1] for row in result.tables[0].rows} == {3}
    assert result.predictions["paths"] == ["0.png", "1.png", "2.png"]
    assert _retrieval(train, test, gallery="train").data["queries_without_positive"] == 0
    lonely = frozen_part(_noise(rng, 3), np.arange(3), classes=3)
    with pytest.raises(DataError, match="only 0 of 3 test images have another image of their class"):
        _retrieval(train, lonely)


def test_the_result_compares_every_read_with_the_class_token_over_the_same_queries(noisy_parts):
    train, _, test = noisy_parts()
    result = _retrieval(train, test)
    scores = result.predictions["average_precision"]
    assert len(result.findings) == 7 + 2  # the other reads, then the class token centred and whitened
    labels = [row[0] for row in result.figures[0].rows]
    reads = ["gap", "max", "gem:3", "gem:4", "cls+gap", "cls+gem:4", "last:4"]
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
        in " ".join(_retrieval(train, test, pools=("cls", "gap"), gallery=gallery).notes)
        for gallery in ("test", "train")
    }
    assert said == {"test": True, "train": False}


def test_an_unknown_gallery_is_refused():
    with pytest.raises(ConfigError, match="--gallery must be one of test, train; got 'val'"):
        RetrievalProbe(gallery="val")
