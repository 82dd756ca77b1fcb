"""Class tokens of models whose tokens are known: how parallel they are, what they attend to and know."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score
from torch import nn

from vit_cls import create_model
from vit_cls.data.dataset import ArraySource
from vit_cls.data.index import ImageIndex
from vit_cls.data.partition import Partition
from vit_cls.lab.seeding import seeded
from vit_cls.lab.studies.class_tokens import (
    ArmTokens,
    TokenAnswers,
    against_seeds,
    collect_class_tokens,
    information_test,
    jensen_shannon,
    mutual_information,
    pair_cosine,
    token_answers,
)
from vit_cls.model.classifier import ImageClassifier, Preprocess


def _source(images: int, *, first: int = 0) -> ArraySource:
    rng = np.random.default_rng(first)
    labels = np.arange(images) % 3
    pixels = rng.integers(0, 100, (images, 3, 8, 8)) + 50 * labels[:, None, None, None]
    paths = [f"{first + i}.png" for i in range(images)]
    index = ImageIndex(Path("made"), paths, labels, ["a", "b", "c"])
    return ArraySource(index, torch.from_numpy(pixels.astype(np.uint8)))


def _classifier(pool: str, **settings) -> ImageClassifier:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    with seeded(0):
        model = create_model("vit_pico_patch7_28", num_classes=3, pool=pool, **{**sizes, **settings})
    return ImageClassifier(model, Preprocess((8, 8), crop_pct=1.0), ["a", "b", "c"]).eval()


def _silence(model: nn.Module) -> None:
    """Blocks that add nothing: tokens stay what they were."""
    with torch.no_grad():
        for block in model.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()


def test_tokens_that_start_alike_stay_alike_through_training_and_others_do_not():
    source = _source(24)
    ends = []
    for alike in (True, False):
        classifier = _classifier("multicls:3").double()
        classifier.mean, classifier.std = classifier.mean.double(), classifier.std.double()
        if alike:
            with torch.no_grad():
                for values in (classifier.model.cls_token, classifier.model.pos_embed):
                    values[:, 1:3] = values[:, :1]
        before = classifier.model.cls_token.detach().clone()
        descent = torch.optim.SGD(classifier.parameters(), lr=0.5)
        for _ in range(10):
            loss = nn.functional.cross_entropy(
                classifier(source.images), torch.from_numpy(source.index.labels)
            )
            descent.zero_grad()
            loss.backward()
            descent.step()
        model = classifier.model
        assert (model.cls_token - before).abs().max() > 1e-3
        with torch.no_grad():
            tokens = model.encode(classifier.normalise(source.images))[:, :3]
        ends.append(float((tokens - tokens[:, :1]).abs().max()))
    assert ends[0] < 1e-12
    assert ends[1] > 1e-3


def test_cosines_are_those_of_the_tokens_that_were_put_in_where_blocks_add_nothing():
    classifier = _classifier("multicls:3")
    _silence(classifier.model)
    rng = np.random.default_rng(1)
    start = rng.standard_normal((3, 12))
    with torch.no_grad():
        classifier.model.pos_embed[:, :3] = 0
        classifier.model.cls_token[0] = torch.from_numpy(start)
    measured = collect_class_tokens(classifier, _source(5))
    pairs = [(0, 1), (0, 2), (1, 2)]

    def expected(tokens):
        lengths = np.linalg.norm(tokens, axis=1)
        return np.mean([tokens[i] @ tokens[j] / lengths[i] / lengths[j] for i, j in pairs])

    assert measured.layers.shape == (5, 3, 3, 12)
    np.testing.assert_allclose(pair_cosine(measured.layers), expected(start), atol=1e-6)
    normed = start - start.mean(axis=1, keepdims=True)  # the final norm, whose weights are 1 and 0
    np.testing.assert_allclose(pair_cosine(measured.output), expected(normed), atol=1e-5)
    assert abs(expected(normed) - expected(start)) > 1e-3


def test_attention_apart_is_scipys_divergence_of_the_rows_over_the_patches():
    classifier = _classifier("multicls:2", reg_tokens=1)
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.mul_(5)
    source = _source(4)
    measured = collect_class_tokens(classifier, source)
    model = classifier.model
    with torch.no_grad():
        tokens = model.blocks[0](model.embed_tokens(classifier.normalise(source.images)))
        attn, normed = model.blocks[1].attn, model.blocks[1].norm1(tokens)
        q, k, _ = attn.qkv(normed).reshape(4, 7, 3, 2, 6).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(6)).softmax(dim=-1)[:, :, :2, 3:].double().numpy()
    weights /= weights.sum(axis=-1, keepdims=True)
    for i in range(4):
        one = [jensenshannon(weights[i, head, 0], weights[i, head, 1], base=2) ** 2 for head in range(2)]
        assert measured.overlap[i] == pytest.approx(np.mean(one), abs=1e-5)
    assert measured.overlap.min() > 1e-4
    np.testing.assert_allclose(measured.maps, weights.mean(axis=1), atol=1e-5)


def test_divergence_averages_the_pairs_and_one_token_has_none():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert jensen_shannon(rows).item() == pytest.approx(2 / 3)
    assert jensen_shannon(rows[:1]).item() == 0.0


def test_own_head_reads_each_token_as_it_reads_their_mean():
    classifier = _classifier("multicls:2")
    with torch.no_grad():
        classifier.model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    source = _source(30)
    parts = Partition(source, source, source, "")
    measured = collect_class_tokens(classifier, source)
    found = token_answers(classifier, parts, measured)
    with torch.no_grad():
        tokens = classifier.model.encode(classifier.normalise(source.images))[:, :2]
        logits = classifier.model.head(tokens)
        torch.testing.assert_close(logits.mean(dim=1), classifier(source.images))
    assert found.read_by == "own head"
    assert found.preds.tolist() == logits.argmax(dim=2).tolist()
    assert found.most_confident.tolist() == logits.softmax(dim=2).amax(dim=2).argmax(dim=1).tolist()


def test_where_the_head_reads_no_single_token_each_gets_a_probe_of_its_own():
    """Token 0 is the class, put there by hand; token 1 is the same for every image."""
    classifier = _classifier("multicls-concat:2")
    _silence(classifier.model)
    parts = Partition(_source(60, first=1), _source(30, first=2), _source(30, first=3), "")

    def put(_block, _args, out):
        out = out.clone()
        labels = torch.from_numpy(labels_now)[: len(out)]
        out[:, 0] = nn.functional.one_hot(labels, 12).float()
        return out

    found = []
    hook = classifier.model.blocks[-1].register_forward_hook(put)
    try:
        labels_now = parts.test.index.labels  # those of the other parts begin in the same way
        assert parts.train.index.labels[:30].tolist() == labels_now.tolist()
        labels_now = parts.train.index.labels
        found = token_answers(classifier, parts, collect_class_tokens(classifier, parts.test))
    finally:
        hook.remove()
    assert found.read_by == "ridge"
    assert found.right.mean(axis=0).tolist() == pytest.approx([1.0, 1 / 3])
    assert found.disagreement.mean() == pytest.approx(2 / 3)


def test_where_blocks_add_nothing_a_token_is_the_same_on_every_image_and_parallel_ones_say_nothing():
    classifier = _classifier("multicls:2")
    _silence(classifier.model)
    source = _source(9)
    tokens = collect_class_tokens(classifier, source)
    answers = token_answers(classifier, Partition(source, source, source, ""), tokens)
    measured = ArmTokens([tokens], [answers], seed=0)
    assert measured.other_image_cosine == pytest.approx(1.0)
    assert measured.cosines.mean() < 0.9
    assert information_test(answers.most_confident[None], answers.targets, seed=0)[2] == 1.0


def test_disagreement_is_the_share_of_pairs():
    answers = TokenAnswers(np.array([[0, 0, 1], [2, 2, 2]]), np.zeros(2, int), np.array([0, 1]), "ridge")
    assert answers.disagreement.tolist() == pytest.approx([2 / 3, 0.0])
    assert answers.right.tolist() == [[True, True, False], [False, False, False]]


def test_information_is_found_where_tokens_share_the_classes_and_not_where_they_do_not():
    labels = np.arange(200) % 4
    shared = np.stack([labels // 2, (labels // 2 + 1) % 2])  # names of tokens differ from seed to seed
    bits, chance, p = information_test(shared, labels, seed=0)
    assert bits == pytest.approx(1.0)
    assert chance < 0.05
    assert p == 1 / 500
    assert information_test(np.zeros((2, 200), int), labels, seed=0)[2] == 1.0
    ps = [
        information_test(np.random.default_rng(i).integers(0, 2, (1, 40)), labels[:40], seed=i)[2]
        for i in range(12)
    ]
    assert 0.15 < np.mean(ps) < 0.85
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 3, (2, 50)), rng.integers(0, 4, 50)
    expected = np.mean([mutual_info_score(row, labels) for row in tokens]) / math.log(2)
    assert mutual_information(tokens, labels) == pytest.approx(expected)


def _models(rng, seeds: int, images: int, count: int, *, together: float) -> np.ndarray:
    """Tokens of models, each of which has a direction of its own; its tokens share it as far as is said."""
    own = rng.standard_normal((seeds, 1, 1, 16))
    return together * own + rng.standard_normal((seeds, images, count, 16))


def test_tokens_of_one_model_are_told_from_those_of_independent_models_where_they_share_something():
    rng = np.random.default_rng(0)
    outputs = _models(rng, 3, 20, 3, together=1.0)
    found = against_seeds(outputs, seed=0)
    across = []
    for s in range(3):
        for t in range(3):
            if s != t:
                a, b = outputs[s], outputs[t]
                a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
                across.append(np.mean([a[:, i] @ b[:, j].T * np.eye(20) for i in range(3) for j in range(3)]))
    assert found.independent == pytest.approx(20 * np.mean(across))  # the same image: the diagonal
    # 280 divisions to deal 9 tokens to 3 models
    assert found.smallest_p == pytest.approx(1 / 280)
    assert found.p < 0.02
    assert against_seeds(outputs[:1], seed=0) is None
    assert against_seeds(outputs[:2, :, :2], seed=0).smallest_p == pytest.approx(1 / 3)


def test_tokens_that_share_nothing_are_told_apart_no_more_often_than_by_chance():
    rng = np.random.default_rng(1)
    ps = [against_seeds(_models(rng, 3, 5, 3, together=0.0), seed=i).p for i in range(100)]
    assert np.mean(np.array(ps) <= 0.1) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 100)
    assert 0.4 < np.mean(ps) < 0.6


def test_equal_tokens_of_all_models_give_a_p_of_1():
    token = np.random.default_rng(2).standard_normal((1, 4, 1, 16))
    found = against_seeds(np.broadcast_to(token, (3, 4, 2, 16)), seed=0)
    assert found.p == 1.0
    assert found.independent == pytest.approx(1.0)
