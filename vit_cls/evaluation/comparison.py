"""Two or more models on the same images: counts, the paired difference, and what may be said about it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.errors import DataError
from vit_cls.evaluation.predictions import Row
from vit_cls.stats.intervals import ALPHA, holm, wilson_interval
from vit_cls.stats.paired import (
    FEW_DISCORDANT,
    PAIRED_RESAMPLES,
    difference_interval,
    mcnemar_mid_p,
    score_equivalence_p,
)
from vit_cls.stats.power import mcnemar_detectable_effect, mcnemar_required_images
from vit_cls.stats.verdicts import CANNOT_TELL

MARGIN = 0.01
EQUIVALENT = "equivalent within the margin"


@dataclass(frozen=True)
class Answers:
    """What a model said about each image, by the names of the classes.

    Args:
        paths: Relative paths, each once.
        predictions: Predicted class of each image; empty where the image could not be read.
        probabilities: Of the predicted class; NaN where the image could not be read.
    """

    name: str
    paths: Sequence[str]
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    @property
    def failed(self) -> np.ndarray:
        """Whether an image has no prediction, bool."""
        return self.predictions == ""

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is the true class, bool."""
        return self.predictions == self.labels


def answers_of(name: str, rows: Iterable[Row]) -> Answers:
    """The first predictions of a model.

    Args:
        rows: With labels; from `Predictions.rows` or `read_predictions`.
    """
    rows = list(rows)
    labels = np.array([row.label for row in rows], dtype=object)
    predictions = np.array([row.best[0][0] if row.best else "" for row in rows], dtype=object)
    probabilities = np.array([row.best[0][1] if row.best else math.nan for row in rows])
    return Answers(name, [row.path for row in rows], labels, predictions, probabilities)


def align(answers: Sequence[Answers]) -> list[Answers]:
    """Put every model's answers in the order of the first's images, under names that differ.

    Raises:
        DataError: If images or true classes are not the same, or a model has no prediction at all.
    """
    first = answers[0]
    aligned: list[Answers] = []
    for other in answers:
        place = {path: i for i, path in enumerate(other.paths)}
        _refuse_other_images(first, other, place)
        order = np.array([place[path] for path in first.paths])
        labels, predictions = other.labels[order], other.predictions[order]
        differ = np.flatnonzero(labels != first.labels)
        if len(differ):
            i = int(differ[0])
            raise DataError(
                f"{first.name} and {other.name} must agree on the true class of every image; they differ on "
                f"{len(differ)}, the first: {first.paths[i]} is {first.labels[i]!r} in the one and "
                f"{labels[i]!r} in the other."
            )
        if other.failed.all():
            raise DataError(f"{other.name} has no prediction for any of {len(labels)} images.")
        used, name, number = {earlier.name for earlier in aligned}, other.name, 1
        while name in used:
            number += 1
            name = f"{other.name} ({number})"
        aligned.append(Answers(name, first.paths, labels, predictions, other.probabilities[order]))
    return aligned


def _refuse_other_images(first: Answers, other: Answers, place: dict[str, int]) -> None:
    known = set(first.paths)
    lacking = [path for path in first.paths if path not in place]
    extra = [path for path in other.paths if path not in known]
    if not lacking and not extra:
        return
    only = [
        f"{len(paths)} only in {name} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
        for paths, name in ((lacking, first.name), (extra, other.name))
        if paths
    ]
    raise DataError(
        f"{first.name} and {other.name} must be about the same images; {' and '.join(only)}. "
        f"Evaluate both on one folder."
    )


@dataclass(frozen=True)
class ModelScore:
    """How one model fared, on all the images that it scored, with Wilson's interval."""

    name: str
    correct: int
    scored: int
    top1: float
    top1_ci95: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """Two models on the images that both scored.

    Args:
        failed: Images left out, because one or both could not read them.
        only_a: Images that ``a`` alone classified right.
        difference: Accuracy of ``b`` minus that of ``a``.
        difference_ci95: Its 95 % interval, from `difference_interval`.
        p_mcnemar_mid: Of equal accuracy, two-sided, from `mcnemar_mid_p`.
        p_holm: The same, adjusted over all pairs.
        p_equivalence: Of a difference as large as the margin, adjusted over all pairs.
        margin: The largest difference that does not matter, stated before the comparison.
        smallest_detectable: What this many images could have shown, from `mcnemar_detectable_effect`.
        verdict: ``NAME is better``, `EQUIVALENT` or `CANNOT_TELL`.
        images_needed: How many images would probably settle it, where the verdict is `CANNOT_TELL`.
    """

    a: str
    b: str
    images: int
    failed: int
    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    difference: float
    difference_ci95: tuple[float, float]
    p_mcnemar_mid: float
    p_holm: float
    p_equivalence: float
    margin: float
    smallest_detectable: float
    verdict: str
    images_needed: int | None

    @property
    def discordant(self) -> int:
        """Images that one of the two alone classified right."""
        return self.only_a + self.only_b

    @property
    def interval(self) -> str:
        """Which method gave the interval: ``bootstrap`` or ``score``."""
        return "score" if self.discordant < FEW_DISCORDANT else "bootstrap"

    @property
    def sentence(self) -> str:
        """The verdict with the number that it rests on, as one sentence."""
        points = f"{100 * abs(self.difference):.2f} points"
        margin = f"{100 * self.margin:g} point{'' if self.margin == 0.01 else 's'}"
        if self.verdict == EQUIVALENT:
            return f"{self.a} and {self.b} are equivalent within the margin of {margin}."
        if self.verdict == CANNOT_TELL:
            enough = self.images_needed
            needed = "" if enough is None else f"; about {fmt.count(enough)} would be needed"
            return f"Cannot tell {self.a} and {self.b} apart on {fmt.count(self.images)} images{needed}."
        other = self.a if self.difference > 0 else self.b
        small = f", less than the margin of {margin}" if abs(self.difference) < self.margin else ""
        return f"{self.verdict} than {other}, by {points}{small}."


@dataclass(frozen=True)
class Comparison:
    """Every model, every pair of them, and the seed of the resampling.

    Args:
        pairs: In the order of the models.
    """

    models: list[ModelScore]
    pairs: list[Pair]
    seed: int

    @property
    def letters(self) -> dict[str, str]:
        """A letter for each model, by its name: A, B and so on."""
        return dict(zip((model.name for model in self.models), string.ascii_uppercase, strict=False))

    @property
    def sentence(self) -> str:
        """The verdict on all pairs, as one sentence."""
        if len(self.pairs) == 1:
            return self.pairs[0].sentence
        for model in self.models:
            own = [pair for pair in self.pairs if model.name in (pair.a, pair.b)]
            if all(pair.verdict == f"{model.name} is better" for pair in own):
                return f"{model.name} is better than each of the others."
        verdicts = [pair.verdict for pair in self.pairs]
        same, unknown = verdicts.count(EQUIVALENT), verdicts.count(CANNOT_TELL)
        return (
            f"None is better than all others: of {len(verdicts)} pairs, {len(verdicts) - same - unknown} "
            f"differ, {same} {'is' if same == 1 else 'are'} equivalent within the margin, {unknown} cannot "
            "be told apart."
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        return dataclasses.asdict(self)


def compare_answers(
    answers: Sequence[Answers], *, margin: float = MARGIN, seed: int = 0, resamples: int = PAIRED_RESAMPLES
) -> Comparison:
    """Compare every pair.

    Args:
        answers: Two or more, about the same images in the same order, names distinct.
        margin: The largest difference of accuracies that does not matter, in (0, 1).

    Raises:
        DataError: If a pair has no image that both scored.
    """
    pairs = [_pair(a, b, margin, seed, resamples) for a, b in itertools.combinations(answers, 2)]
    p_holm = holm([pair.p_mcnemar_mid for pair in pairs])
    p_equivalence = holm([pair.p_equivalence for pair in pairs])
    judged = [
        _judge(replace(pair, p_holm=p, p_equivalence=q), len(pairs))
        for pair, p, q in zip(pairs, p_holm, p_equivalence, strict=True)
    ]
    return Comparison([_score(each) for each in answers], judged, seed)


def _score(answers: Answers) -> ModelScore:
    correct, scored = int(answers.correct.sum()), int((~answers.failed).sum())
    return ModelScore(answers.name, correct, scored, correct / scored, wilson_interval(correct, scored))


def _pair(a: Answers, b: Answers, margin: float, seed: int, resamples: int) -> Pair:
    """Everything but what depends on the other pairs."""
    kept = ~(a.failed | b.failed)
    images = int(kept.sum())
    if not images:
        raise DataError(
            f"no image has a prediction of both {a.name} and {b.name}; there is nothing to compare."
        )
    right_a, right_b = a.correct[kept], b.correct[kept]
    classes, codes = np.unique(a.labels[kept].astype(str), return_inverse=True)
    only_a = np.bincount(codes[right_a & ~right_b], minlength=len(classes))
    only_b = np.bincount(codes[right_b & ~right_a], minlength=len(classes))
    counts = int(only_a.sum()), int(only_b.sum())
    difference = (counts[1] - counts[0]) / images
    return Pair(
        a=a.name,
        b=b.name,
        images=images,
        failed=len(kept) - images,
        both_right=int((right_a & right_b).sum()),
        only_a=counts[0],
        only_b=counts[1],
        both_wrong=int((~right_a & ~right_b).sum()),
        difference=difference,
        difference_ci95=difference_interval(
            only_a, only_b, np.bincount(codes), seed=seed, resamples=resamples
        ),
        p_mcnemar_mid=mcnemar_mid_p(*counts),
        p_holm=math.nan,
        p_equivalence=score_equivalence_p(*counts, images, margin),
        margin=margin,
        smallest_detectable=mcnemar_detectable_effect(images, sum(counts) / images),
        verdict=CANNOT_TELL,
        images_needed=None,
    )


def _judge(pair: Pair, num_pairs: int) -> Pair:
    """A difference that is there is named first, even a small one: its size is beside it."""
    if pair.p_holm <= ALPHA:
        return replace(pair, verdict=f"{pair.b if pair.difference > 0 else pair.a} is better")
    if pair.p_equivalence <= ALPHA:
        return replace(pair, verdict=EQUIVALENT)
    required = mcnemar_required_images(
        pair.only_a, pair.only_b, pair.images, pair.margin, alpha=ALPHA / num_pairs
    )
    return replace(pair, images_needed=max(required, pair.images + 1))


@dataclass(frozen=True)
class Disagreement:
    """An image that not all models put in the same class, and what each said.

    Args:
        predictions: In the order of the models; empty where a model could not read the image.
    """

    path: str
    label: str
    predictions: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """Which models are right."""
        return tuple(prediction == self.label for prediction in self.predictions)


def disagreements(answers: Sequence[Answers]) -> list[Disagreement]:
    """The images that models put in different classes, in the order of the images."""
    differ = np.zeros(len(answers[0].labels), dtype=bool)
    for a, b in itertools.combinations(answers, 2):
        differ |= (a.predictions != b.predictions) & ~a.failed & ~b.failed
    return [
        Disagreement(
            answers[0].paths[i],
            str(answers[0].labels[i]),
            tuple(str(each.predictions[i]) for each in answers),
            tuple(float(each.probabilities[i]) for each in answers),
        )
        for i in np.flatnonzero(differ).tolist()
    ]
