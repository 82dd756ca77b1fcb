"""``study causal``: where must the class token stand when tokens see only what comes before them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.lab.results import LabResult, Line, LineChart, forest
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.study import (
    LAST_EPOCH,
    ONE_RATE,
    PAIRED,
    Answers,
    Study,
    arms_table,
    train_arms,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import EQUAL, EQUIVALENT, LESS, SUPPORTED, Claim, Finding, judge_all

FREE, FREE_LAST = "bidirectional, cls first", "bidirectional, cls last"
FIRST, MIDDLE, LAST = "causal, cls first", "causal, cls middle", "causal, cls last"
GAP, CAUSAL_GAP = "bidirectional gap", "causal gap"
SAME_PROBS = 1e-6
"""Float32 sums of equal rows may differ by their place in a batch, and by no more than this."""


class CausalStudy(Study):
    """A causal and a bidirectional encoder, with the class token first, in the middle and last.

    Two answers are exact. Without a mask the encoder knows no order, so that the class token's place changes
    nothing: trained with it first and last from one seed, the models answer alike to the bit. With a mask a
    class token that stands first sees itself alone, so that its answer is the same for every image. The rest
    is measured: what the other places cost, and whether the mean of the patches minds the mask.

    Source:
        Attention's order: ViT, https://arxiv.org/abs/2010.11929, equations 5 to 8. The causal mask:
        https://arxiv.org/abs/1706.03762, section 3.2.3.
    """

    name = "causal"
    question = "Where must the class token stand when tokens see only what comes before them?"

    def arms(self) -> dict[str, list[Trial]]:
        """Trials by arm, a seed each."""
        pretrained = self.setup.recipe.pretrained is not None
        cls, gap = (head_settings(head, pretrained=pretrained) for head in ("cls", "gap"))
        causal = {"causal": True}
        return train_arms(
            self.setup,
            {
                FREE: cls,
                FREE_LAST: {**cls, "class_position": "last"},
                FIRST: {**cls, **causal, "class_position": "first"},
                MIDDLE: {**cls, **causal, "class_position": "middle"},
                LAST: {**cls, **causal, "class_position": "last"},
                GAP: gap,
                CAUSAL_GAP: {**gap, **causal},
            },
        )

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        arms = self.arms()
        right = {arm: answers.correct(trials) for arm, trials in arms.items()}
        change = largest_change(answers, arms[FREE], arms[FREE_LAST])
        spread = largest_spread(answers, arms[FIRST])
        targets = answers.probs(arms[FIRST][0])[1]
        findings = self._findings(right, change, spread, targets)
        majority = float(np.bincount(targets).max() / len(targets))
        costs = {
            f"{arm} minus {free}": paired_difference(right[free], right[arm], seed=self.setup.seed)
            for arm, free in ((FIRST, FREE), (MIDDLE, FREE), (LAST, FREE), (CAUSAL_GAP, GAP))
        }
        return self.result(
            answers,
            self._headline(findings, right),
            findings,
            tables=[arms_table("Places of the class token", answers, arms)],
            figures=[
                self._curve(answers, arms, right, majority),
                *forest("What the mask costs", costs, self.setup.margin),
            ],
            values={
                "top1": {arm: rows.mean(axis=1) for arm, rows in right.items()},
                "bidirectional_largest_change": change,
                "causal_first_largest_spread": spread,
                "majority_share": majority,
            },
            predictions=answers.predictions(arms),
            notes=[
                PAIRED,
                "Patches stand in raster order, so that a causal patch sees what is above it and left of it.",
                "The mean of all patches reads each of them, the last of which have seen all.",
                ONE_RATE,
                LAST_EPOCH,
            ],
        )

    def _findings(
        self, right: dict[str, np.ndarray], change: float, spread: float, targets: np.ndarray
    ) -> list[Finding]:
        """The exact answers first; where one is not exact, as on a GPU, it is judged with the others."""
        margin = self.setup.margin
        same = "Without a mask it makes no difference where the class token stands."
        blind = "In a causal encoder a class token that stands first does no better than the majority class."
        exact: list[Finding] = []
        claims: list[Claim] = []
        if spread <= SAME_PROBS:
            exact.append(sees_nothing(blind, right[FIRST], targets, spread))
        else:
            majority = np.tile(targets == np.bincount(targets).argmax(), (len(right[FIRST]), 1))
            names = "the majority class", FIRST
            claims.append(Claim(blind, majority, right[FIRST], LESS, margin, names, at_least=-margin))
        if change == 0:
            exact.append(same_function(same, right[FREE], margin))
        else:
            claims.append(Claim(same, right[FREE], right[FREE_LAST], EQUAL, margin, (FREE, FREE_LAST)))
        for text, one, other, expect in (
            ("A causal encoder does as well if its class token stands last.", FREE, LAST, EQUAL),
            ("In a causal encoder, cls in the middle does worse than last.", LAST, MIDDLE, LESS),
            ("The mean of the patches does as well in a causal encoder.", GAP, CAUSAL_GAP, EQUAL),
        ):
            claims.append(Claim(text, right[one], right[other], expect, margin, (one, other)))
        return exact + judge_all(claims, seed=self.setup.seed)

    def _headline(self, findings: Sequence[Finding], right: dict[str, np.ndarray]) -> str:
        rates = ", ".join(
            f"{arm.removeprefix('causal, cls ')} {fmt.percent(right[arm].mean())}"
            for arm in (FIRST, MIDDLE, LAST)
        )
        finding = next(one for one in findings if "stands last" in one.claim)
        return (
            f"{finding.verdict.capitalize()}: {finding.sentence} With a causal mask, by the class token's "
            f"place: {rates}."
        )

    def _curve(
        self,
        answers: Answers,
        arms: Mapping[str, Sequence[Trial]],
        right: dict[str, np.ndarray],
        majority: float,
    ) -> LineChart:
        patches = answers.model(arms[FIRST][0]).model.layout.num_patches
        places = {FIRST: 0, MIDDLE: patches // 2, LAST: patches}
        line = Line.of("causal, cls", {place: mean_interval(right[arm]) for arm, place in places.items()})
        marks = {"bidirectional cls": float(right[FREE].mean()), "majority class": majority}
        return LineChart(
            "What the class token may see",
            "patches before the class token",
            "test accuracy",
            [line],
            marks=marks,
            note="Mean over seeds and images, with 95 % intervals.",
        )


def largest_change(answers: Answers, ones: Sequence[Trial], others: Sequence[Trial]) -> float:
    """The largest difference of a probability between two arms, over seeds, test images and classes.

    Raises:
        RunError: If a training failed.
    """
    pairs = zip(ones, others, strict=True)
    return max(float(np.abs(answers.probs(a)[0] - answers.probs(b)[0]).max()) for a, b in pairs)


def largest_spread(answers: Answers, trials: Sequence[Trial]) -> float:
    """The largest difference of a probability between two test images, over seeds and classes.

    Raises:
        RunError: If a training failed.
    """
    return max(float(np.ptp(answers.probs(trial)[0], axis=0).max()) for trial in trials)


def sees_nothing(claim: str, right: np.ndarray, targets: np.ndarray, spread: float) -> Finding:
    """What follows where a model gives one answer to all images: the share of one class is all it can get.

    Args:
        right: Which images it had right, bool, shape ``(seeds, images)``.
        targets: True classes, shape ``(images,)``.
    """
    seeds, images = right.shape
    most = int(np.bincount(targets).max())
    accuracy = float(right.mean())
    return Finding(
        claim,
        SUPPORTED,
        f"A causal class token that stands first gives all {fmt.count(images)} test images the same answer "
        f"(largest difference of a probability: {spread:.2g}), so that it is right for one class alone: "
        f"{fmt.percent(accuracy)}, where the majority class has {fmt.percent(most / images)}. That is exact"
        f"{f', in each of {seeds} seeds' if seeds > 1 else ''}.",
        estimate=accuracy - most / images,
        counts={"seeds": seeds, "images": images, "images of the majority class": most},
    )


def same_function(claim: str, right: np.ndarray, margin: float) -> Finding:
    """What is said of two arms whose every probability is equal to the bit.

    Args:
        right: Which images either had right, bool, shape ``(seeds, images)``.
        margin: The largest difference that does not matter; here there is none at all.
    """
    seeds, images = right.shape
    return Finding(
        claim,
        EQUIVALENT,
        f"Trained with the class token first and with it last, {FREE.partition(',')[0]} models give the same "
        f"probabilities to the bit: largest difference 0 over {fmt.count(images)} test images and {seeds} "
        f"seed{'s' if seeds > 1 else ''}.",
        estimate=0.0,
        ci95=(0.0, 0.0),
        margin=margin,
        counts={"seeds": seeds, "images": images},
    )
