"""Answers are put side by side, and a verdict is given that the numbers allow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vit_cls.data.index import ImageIndex
from vit_cls.errors import DataError
from vit_cls.evaluation.comparison import (
    EQUIVALENT,
    Answers,
    align,
    answers_of,
    compare_answers,
    disagreements,
)
from vit_cls.evaluation.predictions import Predictions
from vit_cls.evaluation.results import evaluate_predictions, tables
from vit_cls.evaluation.row_formats import read_predictions
from vit_cls.files import write_text
from vit_cls.stats.verdicts import CANNOT_TELL

HEAD = "path,label,prediction,probability,correct,error\n"


def _answers(name: str, right, *, failed=(), classes: int = 4) -> Answers:
    """Answers about images of ``classes`` classes, right where ``right`` is true, else the next class."""
    right = np.asarray(right, dtype=bool)
    labels = np.arange(len(right)) % classes
    names = np.array([f"class {i}" for i in range(classes)], dtype=object)
    predictions = names[np.where(right, labels, (labels + 1) % classes)]
    predictions[list(failed)] = ""
    paths = [f"{label}/{i}.jpg" for i, label in enumerate(labels)]
    return Answers(name, paths, names[labels], predictions, np.full(len(right), 0.5))


def _pair(both: int, only_a: int, only_b: int, neither: int, **options):
    a = [True] * both + [True] * only_a + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return compare_answers([_answers("a", a), _answers("b", b)], **options).pairs[0]


def test_a_case_by_hand():
    pair = _pair(60, 2, 10, 28)
    assert (pair.both_right, pair.only_a, pair.only_b, pair.both_wrong) == (60, 2, 10, 28)
    assert pair.images == 100
    assert pair.failed == 0
    assert pair.difference == pytest.approx(0.08)
    assert pair.p_mcnemar_mid == pair.p_holm == pytest.approx(92 / 4096)
    assert pair.difference_ci95[0] < 0.08 < pair.difference_ci95[1]
    assert pair.verdict == "b is better"
    assert pair.sentence == "b is better than a, by 8.00 points."
    assert pair.images_needed is None
    assert pair.interval == "bootstrap"
    back = _pair(60, 10, 2, 28)
    assert (back.verdict, back.difference) == ("a is better", -pair.difference)
    assert back.difference_ci95 == pytest.approx((-pair.difference_ci95[1], -pair.difference_ci95[0]))
    assert _pair(60, 1, 8, 31).interval == "score"


def test_identical_predictions_differ_by_nothing_and_are_equivalent_where_there_are_images_enough():
    few, many = _pair(40, 0, 0, 10), _pair(400, 0, 0, 100)
    for pair in (few, many):
        assert pair.difference == 0
        assert pair.p_mcnemar_mid == 1
    assert few.verdict == CANNOT_TELL
    assert few.images_needed == 268
    assert few.sentence == "Cannot tell a and b apart on 50 images; about 268 would be needed."
    assert many.verdict == EQUIVALENT
    assert many.sentence == "a and b are equivalent within the margin of 1 point."


def test_the_margin_decides_what_is_equivalent_and_a_small_difference_is_named_as_such():
    assert _pair(800, 8, 10, 182, margin=0.005).verdict == CANNOT_TELL
    assert _pair(800, 8, 10, 182, margin=0.02).verdict == EQUIVALENT
    small = _pair(9000, 20, 60, 920)
    assert small.verdict == "b is better"
    assert small.p_equivalence < 0.05
    assert small.sentence == "b is better than a, by 0.40 points, less than the margin of 1 point."


def test_an_image_that_one_model_could_not_read_is_left_out_and_counted():
    right = [True] * 6 + [False] * 4
    result = compare_answers([_answers("a", right, failed=[0, 1]), _answers("b", right, failed=[1, 9])])
    pair = result.pairs[0]
    assert (pair.images, pair.failed, pair.both_right, pair.both_wrong) == (7, 3, 4, 3)
    assert [(m.correct, m.scored) for m in result.models] == [(4, 8), (5, 8)]
    with pytest.raises(DataError, match="no image has a prediction of both a and b"):
        compare_answers([_answers("a", [True, True], failed=[0]), _answers("b", [True, True], failed=[1])])


def test_three_models_are_three_pairs_with_adjusted_p_values():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.7
    better = base | (rng.random(400) < 0.3)
    models = [_answers("a", base), _answers("b", base ^ (rng.random(400) < 0.02)), _answers("c", better)]
    result = compare_answers(models)
    assert [(pair.a, pair.b) for pair in result.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(pair.p_holm >= pair.p_mcnemar_mid for pair in result.pairs)
    assert [pair.verdict for pair in result.pairs[1:]] == ["c is better"] * 2
    assert result.to_dict()["pairs"][1]["verdict"] == "c is better"


def test_disagreements_are_the_images_with_different_classes_right_or_not():
    a, b = _answers("a", [True, True, False, False, True]), _answers("b", [True, False, True, False, False])
    a.predictions[3] = "class 2"
    b.predictions[4] = ""
    found = disagreements([a, b])
    assert [one.path for one in found] == ["1/1.jpg", "2/2.jpg", "3/3.jpg"]
    assert [one.right for one in found] == [(True, False), (False, True), (False, False)]
    assert found[2].predictions == ("class 2", "class 0")


def test_answers_of_a_run_are_names_and_a_failed_image_has_none():
    index = ImageIndex(Path("x"), ["b/1", "b/2", "a/1"], np.array([1, 1, 0]), ["a", "b"])
    probs = np.array([[0.2, 0.8], [np.nan, np.nan], [0.4, 0.6]])
    answers = answers_of("m", Predictions(index, probs, {1: "truncated"}, 1.0).rows())
    assert answers.labels.tolist() == ["b", "b", "a"]
    assert answers.predictions.tolist() == ["b", "", "b"]
    assert answers.probabilities[[0, 2]].tolist() == [0.8, 0.6]
    assert math.isnan(answers.probabilities[1])
    assert answers.correct.tolist() == [True, False, False]


def test_answers_from_files_are_matched_by_path(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEAD}x/1,x,x,0.9,1,\nx/2,x,,,,truncated\ny/1,y,x,0.6,0,\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/predictions.csv").write_text(f"{HEAD}y/1,y,y,0.7,1,\nx/1,x,x,0.8,1,\nx/2,x,x,0.5,1,\n")
    a, b = align(
        [
            answers_of("a", read_predictions(str(tmp_path / "a.csv"))),
            answers_of("b", read_predictions(str(tmp_path / "run"))),
        ]
    )
    assert list(b.paths) == list(a.paths) == ["x/1", "x/2", "y/1"]
    assert b.predictions.tolist() == ["x", "x", "y"]
    assert b.probabilities.tolist() == [0.8, 0.5, 0.7]
    assert a.failed.tolist() == [False, True, False]


def test_what_evaluate_writes_is_read_back_whatever_the_names(tmp_path):
    names, paths = ["a, \r b", 'the "c"'], ['x/"1", \r\n.png', "x/2.png", "x/3.png"]
    index = ImageIndex(tmp_path, paths, np.array([0, 1, 1]), names)
    probs = np.array([[0.75, 0.25], [0.5, 0.5], [np.nan, np.nan]])
    predictions = Predictions(index, probs, {2: "truncated, \r it is"}, 1.0)
    for name, text in tables(predictions, evaluate_predictions(predictions)):
        write_text(tmp_path / name, text)
    assert read_predictions(str(tmp_path)) == list(predictions.rows())


def test_one_model_twice_has_two_names():
    answers = [_answers("a", [True, False])] * 3
    assert [one.name for one in align(answers)] == ["a", "a (2)", "a (3)"]
    named = [_answers(name, [True, False]) for name in ("a (2)", "a", "a")]
    assert [one.name for one in align(named)] == ["a (2)", "a", "a (3)"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "has no column path, label, prediction, probability"),
    ("class,support\na,3\n", "has no column path, label, prediction, probability"),
    (HEAD, "has no rows"),
    (f"{HEAD}x/1,x\n", "line 2 is not complete"),
    (f"{HEAD}x/1,x,x,much,1,\n", "line 2 has the probability 'much', not a number"),
    (f"{HEAD}x/1,x,x,1,1,\nx/1,x,x,1,1,\n", "line 3 names x/1 a second time"),
    ("\0" * 200_000, "no predictions.csv"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_predictions(str(tmp_path / "a.csv"))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"--predictions .*none.csv cannot be read: No such file"):
        read_predictions(str(tmp_path / "none.csv"))


def test_other_images_and_other_classes_are_refused_by_name():
    a, longer = _answers("a", [True] * 8), _answers("b", [True] * 13)
    with pytest.raises(DataError, match=r"same images; 5 only in b \(0/8.jpg, 1/9.jpg, 2/10.jpg, ...\)"):
        align([a, longer])
    with pytest.raises(DataError, match=r"1 only in c \(.*\) and 1 only in b"):
        align([_answers("c", [True] * 13), Answers("b", ["new", *longer.paths[1:]], *vars_of(longer))])
    other = _answers("b", [True] * 8)
    other.labels[3] = "hat"
    with pytest.raises(
        DataError, match=r"differ on 1, the first: 3/3\.jpg is 'class 3' in the one and 'hat'"
    ):
        align([a, other])
    with pytest.raises(DataError, match="b has no prediction for any of 8 images"):
        align([a, _answers("b", [True] * 8, failed=range(8))])


def vars_of(answers: Answers):
    return answers.labels, answers.predictions, answers.probabilities
