"""The probe ``knn``: votes by hand, by a naive loop and by DINOv2's weights; choices on validation alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vit_cls.errors import ConfigError
from vit_cls.lab.probes import knn as knn_module
from vit_cls.lab.probes.base import FrozenParts
from vit_cls.lab.probes.knn import KnnProbe, clipped, knn_predict, votes


def _knn(*parts, **options):
    return KnnProbe(**options).analyse(FrozenParts(*parts))


def _data(rows, dim=5, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    x = rng.standard_normal((rows, dim))
    x[np.arange(rows), labels] += 1.0
    return x.astype(np.float32), labels


def _naive(train, query, neighbours, temperature, classes):
    """One query, one neighbour at a time."""
    x, labels = train
    cosines = [float(q @ query / np.linalg.norm(q) / np.linalg.norm(query)) for q in x.astype(np.float64)]
    weights = [0.0] * classes
    for i in sorted(range(len(x)), key=lambda i: -cosines[i])[:neighbours]:
        weights[labels[i]] += math.exp(cosines[i] / temperature)
    return int(np.argmax(weights))


@pytest.mark.parametrize("neighbours", [1, 3, 20, 50])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_classes_are_those_of_a_naive_loop(neighbours, temperature, monkeypatch):
    train, queries = _data(50), _data(33, seed=1)[0].astype(np.float64)
    expected = [_naive(train, query, neighbours, temperature, 4) for query in queries]
    choice = (neighbours, temperature)
    assert knn_predict(train, queries, [choice], num_classes=4)[choice].tolist() == expected
    monkeypatch.setattr(knn_module, "AT_ONCE", 7 * 50)  # in pieces of seven queries
    assert knn_predict(train, queries, [choice], num_classes=4)[choice].tolist() == expected


def test_two_near_neighbours_outvote_a_nearer_one_unless_the_temperature_is_low():
    angles = np.array([0.1, 0.3, -0.3])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.array([0, 1, 1])
    query = np.array([[5.0, 0.0]])  # its length does not count
    # cosines .995, .955, .955: exp(.04 / T) against 2, so T = .0573 is where they balance
    found = knn_predict(train, query, [(3, 0.07), (3, 0.05), (1, 0.07)], num_classes=2)
    assert [int(one[0]) for one in found.values()] == [1, 0, 0]


def test_votes_are_the_weights_of_each_class_over_that_of_the_nearest():
    similarities, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[2, 0, 2]])
    found = votes(similarities, labels, 0.1, 4)
    torch.testing.assert_close(found, torch.tensor([[math.exp(-1), 0, 1 + math.exp(-2), 0]]))
    assert votes(similarities, labels, 1e-4, 4).isfinite().all()


def test_the_weights_of_dino_and_of_dinov2_vote_for_the_same_classes():
    generator = torch.Generator().manual_seed(0)
    similarities = (2 * torch.rand(200, 50, generator=generator) - 1).sort(dim=1, descending=True).values
    labels = torch.randint(5, (200, 50), generator=generator)
    for neighbours in (1, 10, 20, 50):
        for temperature in (0.02, 0.07, 1.0):
            near, classes = similarities[:, :neighbours].double(), labels[:, :neighbours]
            one_hot = torch.nn.functional.one_hot(classes, 5)
            dino = ((near / temperature).exp()[..., None] * one_hot).sum(dim=1)
            # DINOv2 takes the softmax over the most neighbours, then the first k of them
            weights = (similarities.double() / temperature).softmax(dim=1)[:, :neighbours]
            dinov2 = (weights[..., None] * one_hot).sum(dim=1)
            ours = votes(near, classes, temperature, 5)
            assert torch.equal(dino.argmax(dim=1), dinov2.argmax(dim=1))
            assert torch.equal(dino.argmax(dim=1), ours.argmax(dim=1))


@pytest.mark.parametrize(
    ("images", "expected"), [(1, [1]), (15, [15, 10]), (100, [20, 10, 100]), (500, [20, 10, 100, 200])]
)
def test_neighbours_are_at_most_the_training_images_and_each_number_comes_once(images, expected):
    assert clipped((20, 10, 100, 200), images) == expected


def test_one_training_image_decides_for_every_query():
    found = knn_predict((np.ones((1, 3)), np.array([2])), np.eye(3), [(1, 0.07)], num_classes=4)
    assert found[1, 0.07].tolist() == [2, 2, 2]


def test_few_training_and_test_images_are_no_problem(noisy_parts):
    result = _knn(*noisy_parts(counts=(4, 3, 3)))
    assert result.settings["neighbours"] == [4]
    assert {row[5] for row in result.tables[0].rows} == {3}


def test_choices_ignore_the_test_part_and_follow_validation(noisy_parts, relabelled):
    train, val, test = noisy_parts()
    one, other = _knn(train, val, test), _knn(train, val, relabelled(test))
    for name in ("neighbours", "temperature", "val_right", "best_on_val"):
        assert one.values[name] == other.values[name]
    assert one.values["top1"] != other.values["top1"]
    assert _knn(train, relabelled(val), test).values["val_right"] != one.values["val_right"]


def test_the_chosen_numbers_have_the_highest_validation_accuracy_and_of_equal_ones_the_first(noisy_parts):
    train, val, test = noisy_parts()
    result = _knn(train, val, test, pools=("gap",), neighbours=(20, 1, 50), temperatures=(0.07, 1.0))
    choices = [(k, t) for k in (20, 1, 50) for t in (0.07, 1.0)]
    said = knn_predict((train.read("gap"), train.labels), val.read("gap"), choices, num_classes=3)
    counts = [int((said[choice] == val.labels).sum()) for choice in choices]
    assert (result.values["neighbours"]["gap"], result.values["temperature"]["gap"]) == choices[
        np.argmax(counts)
    ]
    assert result.values["val_right"]["gap"] == max(counts)
    assert len(set(counts)) > 1


def test_the_result_says_that_the_mean_is_worse_where_one_patch_carries_the_class(noisy_parts):
    result = _knn(*noisy_parts(), pools=("cls", "gap"))
    (finding,) = result.findings
    assert finding.verdict == "supported"
    assert finding.estimate == pytest.approx(result.values["top1"]["gap"] - result.values["top1"]["cls"])
    assert finding.estimate < -0.1
    right = {
        pool: int((preds == result.predictions["labels"]).sum())
        for pool, preds in result.predictions["preds"].items()
    }
    assert {row[0]: row[4] for row in result.tables[0].rows} == right
    assert f"{right['cls']} of 80 right" in result.headline
    json.dumps(result.to_dict(predictions=True))


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"--neighbours must be numbers above 0; got \[0\]"):
        KnnProbe(neighbours=(0,))
    with pytest.raises(ConfigError, match=r"--temperatures must be numbers above 0; got \[\]"):
        KnnProbe(temperatures=())
