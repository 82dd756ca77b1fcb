"""``study specialise``: several class tokens of models whose tokens are known, and the verdicts on them."""

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
from vit_cls.lab.features import Rows
from vit_cls.lab.seeding import seeded
from vit_cls.lab.studies import specialise
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.class_tokens import (
    COLLAPSED,
    ArmTokens,
    ClassTokens,
    TokenAnswers,
    against_seeds,
    collect_class_tokens,
    information_test,
    jensen_shannon,
    mutual_information,
    pair_cosine,
    token_answers,
)
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.specialise import SpecialiseStudy, alike_table, knowledge_table
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import Spread, run_trials
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


def _equal(model: nn.Module, count: int) -> None:
    """Class tokens that start alike."""
    with torch.no_grad():
        for values in (model.cls_token, model.pos_embed):
            values[:, 1:count] = values[:, :1]


def test_tokens_that_start_alike_stay_alike_through_training_and_others_do_not():
    source = _source(24)
    ends = []
    for alike in (True, False):
        classifier = _classifier("multicls:3").double()
        classifier.mean, classifier.std = classifier.mean.double(), classifier.std.double()
        if alike:
            _equal(classifier.model, 3)
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


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory, fresh):
    """The study on models whose class tokens are alike, and its result."""
    folder = tmp_path_factory.mktemp("collapsed")
    recipe = Recipe(epochs=1, depth=2, embed_dim=16)
    study = SpecialiseStudy(Setup("digits", folder, seeds=2, recipe=recipe), counts=(1, 2))
    alike = fresh(lambda model: _equal(model, model.layout.num_class_tokens))
    assert run_trials(study.trials(), folder, alike, Spread(1)) == 0
    return study, study.analyse(Answers(folder))


def test_each_arm_has_its_pooling_and_number_of_tokens(tmp_path):
    trials = SpecialiseStudy(Setup("digits", tmp_path, seeds=2)).trials()
    models = {trial.arm: trial.model for trial in trials}
    assert {arm: (m["pool"], m.get("reg_tokens")) for arm, m in models.items()} == {
        "cls": ("cls", None),
        "extra register": ("cls", 1),
        "mean 2": ("multicls:2", None),
        "mean 4": ("multicls:4", None),
        "concat 2": ("multicls-concat:2", None),
        "concat 4": ("multicls-concat:4", None),
        "diverse 2": ("multicls-diverse:2", None),
        "diverse 4": ("multicls-diverse:4", None),
    }


def test_alike_tokens_are_called_parallel_and_know_the_same(collapsed):
    _, result = collapsed
    parallel = result.findings[0]
    assert parallel.verdict == "supported"
    assert parallel.estimate == pytest.approx(1.0, abs=1e-6)
    assert "the mean cosine of 2 class tokens after the final norm is 1.000" in parallel.sentence
    assert result.headline.startswith("Supported: the mean cosine of 2 class tokens")
    columns = list(result.tables[0].columns)  # of those that come twice, the first
    alike = {row[0]: {name: row[columns.index(name)] for name in columns} for row in result.tables[0].rows}
    for arm in ("mean 2", "concat 2", "diverse 2"):
        assert alike[arm]["collapsed"] == "yes"
        assert alike[arm]["attention apart"] == pytest.approx(0.0, abs=1e-6)
        assert alike[arm]["cosine"] == pytest.approx(1.0, abs=1e-6)
    knowledge = {row[0]: row for row in result.tables[1].rows}
    columns = list(result.tables[1].columns)
    row = knowledge["mean 2"]
    assert row[columns.index("pairs that disagree (%)")] == 0.0
    assert row[columns.index("any token right (%)")] == pytest.approx(row[columns.index("one token (%)")])
    np.testing.assert_allclose(result.values["layer_cosine"]["mean 2"], 1.0, atol=1e-6)


def test_the_diverse_head_of_alike_tokens_says_the_same_of_every_image(collapsed):
    _, result = collapsed
    for seed in ("0", "1"):
        assert len(set(result.predictions["predictions"]["diverse 2"][seed])) == 1
    cosine = [one for one in result.findings if one.claim.startswith("The diverse head lowers")]
    assert [one.verdict for one in cosine] == ["equivalent"]


def test_accuracy_is_compared_with_one_token_and_with_a_register(collapsed):
    study, result = collapsed
    assert [one.claim for one in result.findings[1:3]] == [
        "2 class tokens read by their mean beat one.",
        "2 class tokens read by their mean beat one and a register.",
    ]
    targets = np.array(result.predictions["targets"])
    right = {
        arm: np.mean([np.array(rows[seed]) == targets for seed in ("0", "1")])
        for arm, rows in result.predictions["predictions"].items()
    }
    for finding, arm in zip(result.findings[1:3], ("cls", "extra register"), strict=True):
        assert finding.estimate == pytest.approx(right["mean 2"] - right[arm])
        assert finding.counts["images"] == 599
    rows = {row[0]: row for row in result.tables[2].rows}
    columns = list(result.tables[2].columns)
    assert rows["cls"][columns.index("tokens")] == 17
    assert rows["extra register"][columns.index("tokens")] == rows["mean 2"][columns.index("tokens")] == 18
    assert rows["cls"][columns.index("minus cls (%)")] is None
    assert rows["extra register"][columns.index("minus cls (%)")] == pytest.approx(
        right["extra register"] - right["cls"]
    )
    assert 0 <= rows["cls"][columns.index("ECE")] <= 1
    assert study.settings()["counts"] == [1, 2]


RIGHT = {"cls": 0.5, "extra register": 0.6, "mean 2": 0.8, "mean 4": 0.7, "diverse 2": 0.4, "diverse 4": 0.3}
COSINES = {"mean 2": 0.9, "mean 4": 0.99, "diverse 2": 0.2, "diverse 4": 0.3}


def _made(arm: str, trials) -> ArmTokens:
    """Tokens all of whose pairs have the cosine above, each seed in a basis of its own."""
    count, images = int(arm.split()[1]), 30
    factor = np.linalg.cholesky(np.full((count, count), COSINES[arm]) + np.eye(count) * (1 - COSINES[arm]))
    rows = Rows(np.arange(images) % 3, ["a", "b", "c"], [""] * images, np.arange(images), {})
    answers = TokenAnswers(np.zeros((images, count), int), np.zeros(images, int), rows.labels, "ridge")
    tokens = []
    for trial in trials:
        rng = np.random.default_rng(trial.seed)
        bases = np.stack([np.linalg.qr(rng.standard_normal((8, 8)))[0][:count] for _ in range(images)])
        output = factor @ bases
        layers = np.stack([output] * 3, axis=1)
        tokens.append(ClassTokens(layers, output, None, None, rows, Preprocess((8, 8)), (4, 4)))
    return ArmTokens(tokens, [answers] * len(tokens), seed=0)


@pytest.fixture
def made(tmp_path, answered, monkeypatch):
    """A function to the result where tokens have the cosines above, and models are right for those shares."""
    monkeypatch.setattr(
        specialise, "measure_arm", lambda answers, trials, parts, seed: _made(trials[0].arm, trials)
    )

    def judge(*, seeds=2, margin=0.01, **options):
        study = SpecialiseStudy(Setup("digits", tmp_path, seeds=seeds, margin=margin), **options)
        return study, study.analyse(answered(study, RIGHT))

    return judge


def test_each_claim_is_about_the_arms_and_the_quantity_that_it_names(made):
    _, result = made(margin=0.05, counts=(1, 2, 4), variants=("mean", "diverse"))
    beat, lowers = "class tokens read by their mean beat", "The diverse head lowers the cosine of"
    found = [(one.claim, one.verdict, one.margin, one.null, one.unit) for one in result.findings]
    parallel = "class tokens read by their mean end parallel: their cosine is above 0.95."
    assert found == [
        (f"4 {parallel}", "supported", 0.01, 0.95, "of cosine"),
        (f"2 {parallel}", "refuted", 0.01, 0.95, "of cosine"),
        (f"4 {beat} one.", "supported", 0.05, 0.0, "points"),
        (f"4 {beat} one and a register.", "supported", 0.05, 0.0, "points"),
        (f"2 {beat} one.", "supported", 0.05, 0.0, "points"),
        (f"2 {beat} one and a register.", "supported", 0.05, 0.0, "points"),
        (f"{lowers} 4 class tokens.", "supported", 0.01, 0.0, "of cosine"),
        (f"{lowers} 2 class tokens.", "supported", 0.01, 0.0, "of cosine"),
    ]
    sizes = [0.99, 0.9, 0.2, 0.1, 0.3, 0.2, -0.69, -0.7]
    assert [one.estimate for one in result.findings] == pytest.approx(sizes, abs=0.002)
    starts = [
        "the mean cosine of 4 class tokens after the final norm is 0.990 (",
        "the mean cosine of 2 class tokens after the final norm is 0.900 (",
        "mean 4 is better than cls by ",
        "mean 4 is better than extra register by ",
        "mean 2 is better than cls by ",
        "mean 2 is better than extra register by ",
        "that of diverse 4 is lower than the cosine of mean 4 by 0.69 of cosine for ",
        "that of diverse 2 is lower than the cosine of mean 2 by 0.7 of cosine for ",
    ]
    for one, start in zip(result.findings, starts, strict=True):
        assert one.sentence.startswith(start)
    assert result.headline == f"Supported: {result.findings[0].sentence} {result.findings[2].sentence}"
    assert result.settings["cosine_margin"] == 0.01


def test_the_headline_and_the_table_compare_with_other_images_and_independent_models(made):
    study, result = made(seeds=3, counts=(1, 4), variants=("mean",))
    measured = _made("mean 4", study.arms()["mean 4"])
    chance = result.values["independent_models"]["mean 4"]
    assert chance["p"] == 1 / 500  # tokens of cosine 0.99 are not met again by dealing them out anew
    assert abs(chance["independent"]) < 0.1  # bases at random
    assert (
        f"; the same token on another image has {measured.other_image_cosine:.3f}, tokens of independent "
        f"models {chance['independent']:.3f} (p 0.0020)."
    ) in result.headline
    columns = list(result.tables[0].columns)
    row = dict(zip(columns, result.tables[0].rows[0], strict=True))
    assert (row["independent models"], row["p"], row["smallest p"]) == tuple(
        chance[name] for name in ("independent", "p", "smallest_p")
    )
    assert not any("two seeds at least" in note for note in result.notes)


def test_the_report_has_maps_for_each_token(collapsed):
    _, result = collapsed
    pictures = result.figures[-1]
    assert list(pictures.columns) == [
        "image", "mean 2: token 1", "mean 2: token 2", "diverse 2: token 1", "diverse 2: token 2"
    ]  # fmt: skip
    assert list(pictures.row_labels) == ["0", "1", "2", "3", "4", "5"]
    for row in pictures.rows:
        assert np.array_equal(row[1], row[2])  # the tokens are alike
        assert row[1].shape == (8, 8, 3)
        assert row[1].max() == 255


def test_tokens_that_start_apart_are_less_parallel_before_training(tmp_path, fresh):
    study = SpecialiseStudy(
        Setup("digits", tmp_path, seeds=1, recipe=Recipe(epochs=1, depth=1, embed_dim=16)),
        counts=(1, 2),
        variants=("mean",),
    )
    run_trials(study.trials(), tmp_path, fresh(), Spread(1))
    result = study.analyse(Answers(tmp_path))
    assert result.findings[0].verdict == "refuted"
    assert f"below {COLLAPSED:g}" in result.findings[0].sentence
    assert result.tables[0].rows[0][4] == "no"
    assert result.values["independent_models"] == {"mean 2": None}
    assert any("takes two seeds at least, and was not tested" in note for note in result.notes)


def test_tables_state_cosine_with_other_images_beside(collapsed):
    """Where blocks add nothing, a token is the same on every image: parallel tokens then say nothing."""
    classifier = _classifier("multicls:2")
    _silence(classifier.model)
    source = _source(9)
    tokens = collect_class_tokens(classifier, source)
    answers = token_answers(classifier, Partition(source, source, source, ""), tokens)
    measured = ArmTokens([tokens], [answers], seed=0)
    table = alike_table({"mean 2": measured})
    row = {name: table.rows[0][list(table.columns).index(name)] for name in table.columns}
    assert row["same token, other image"] == pytest.approx(1.0)
    assert row["cosine"] < 0.9
    known = knowledge_table({"mean 2": measured})
    assert known.rows[0][list(known.columns).index("p")] == 1.0
