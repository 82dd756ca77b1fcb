"""``study causal``: where must the class token stand when tokens see only what comes before them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.lab.results import Figure, Line, LineChart, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.study import Measured, Study, verdict_line
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import EQUAL, EQUIVALENT, LESS, SUPPORTED, Claim, Finding, judge_all

FREE, FREE_LAST = "bidirectional, cls first", "bidirectional, cls last"
FIRST, MIDDLE, LAST = "causal, cls first", "causal, cls middle", "causal, cls last"
GAP, CAUSAL_GAP = "bidirectional gap", "causal gap"
SAME_PROBS = 1e-6
"""Float32 sums of equal rows may differ by their place in a batch, and by no more than this."""
SAME = "Without a mask it makes no difference where the class token stands."
BLIND = "In a causal encoder a class token that stands first does no better than the majority class."
CLAIMS = (
    ("A causal encoder does as well if its class token stands last.", FREE, LAST, EQUAL),
    ("In a causal encoder, cls in the middle does worse than last.", LAST, MIDDLE, LESS),
    ("The mean of the patches does as well in a causal encoder.", GAP, CAUSAL_GAP, EQUAL),
)
COSTS = ((FIRST, FREE), (MIDDLE, FREE), (LAST, FREE), (CAUSAL_GAP, GAP))


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
    arms_title = "Places of the class token"
    remarks = (
        "Patches stand in raster order, so that a causal patch sees what is above it and left of it.",
        "The mean of all patches reads each of them, the last of which have seen all.",
    )

    def arms(self) -> dict[str, list[Trial]]:
        cls, gap = (self.setup.head(pool) for pool in ("cls", "gap"))
        causal = {"causal": True}
        return self.setup.arms(
            {
                FREE: cls,
                FREE_LAST: {**cls, "class_position": "last"},
                FIRST: {**cls, **causal, "class_position": "first"},
                MIDDLE: {**cls, **causal, "class_position": "middle"},
                LAST: {**cls, **causal, "class_position": "last"},
                GAP: gap,
                CAUSAL_GAP: {**gap, **causal},
            }
        )

    def measure(self, answers: Answers) -> Measured:
        """Beside what is right: how far what should be exact is from it, and the share of the majority."""
        arms = self.arms()
        targets = answers.probs(arms[FIRST][0])[1]
        more = {
            "bidirectional_largest_change": largest_change(answers, arms[FREE], arms[FREE_LAST]),
            "causal_first_largest_spread": largest_spread(answers, arms[FIRST]),
            "majority_share": float(np.bincount(targets).max() / len(targets)),
        }
        return Measured.of(answers, arms, more)

    def judge(self, measured: Measured) -> list[Finding]:
        """The exact answers first; where one is not exact, as on a GPU, it is judged with the others."""
        right, margin = measured.right, self.setup.margin
        spread = measured.more["causal_first_largest_spread"]
        targets = measured.answers.probs(measured.arms[FIRST][0])[1]
        exact: list[Finding] = []
        claims: list[Claim] = []
        if spread <= SAME_PROBS:
            exact.append(sees_nothing(BLIND, right[FIRST], targets, spread))
        else:
            majority = np.tile(targets == np.bincount(targets).argmax(), (len(right[FIRST]), 1))
            names = "the majority class", FIRST
            claims.append(Claim(BLIND, majority, right[FIRST], LESS, margin, names, at_least=-margin))
        if measured.more["bidirectional_largest_change"] == 0:
            exact.append(same_function(SAME, right[FREE], margin))
        else:
            claims += measured.claims([(SAME, FREE, FREE_LAST, EQUAL)], margin)
        claims += measured.claims(CLAIMS, margin)
        return exact + judge_all(claims, seed=self.setup.seed)

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """The class token at the end, and what each place gives."""
        rates = ", ".join(
            f"{arm.removeprefix('causal, cls ')} {fmt.percent(measured.right[arm].mean())}"
            for arm in (FIRST, MIDDLE, LAST)
        )
        finding = next(one for one in findings if one.claim == CLAIMS[0][0])
        return verdict_line(finding, f"With a causal mask, by the class token's place: {rates}.")

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        right = measured.right
        patches = measured.answers.model(measured.arms[FIRST][0]).model.layout.num_patches
        places = {FIRST: 0, MIDDLE: patches // 2, LAST: patches}
        marks = {
            "bidirectional cls": float(right[FREE].mean()),
            "majority class": measured.more["majority_share"],
        }
        costs = {
            f"{arm} minus {free}": paired_difference(right[free], right[arm], seed=self.setup.seed)
            for arm, free in COSTS
        }
        return [
            LineChart(
                "What the class token may see",
                "patches before the class token",
                "test accuracy",
                [Line.of("causal, cls", {place: mean_interval(right[arm]) for arm, place in places.items()})],
                marks=marks,
                note="Mean over seeds and images, with 95 % intervals.",
            ),
            *forest("What the mask costs", costs, self.setup.margin),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        return {**super().values(measured, findings), **measured.more}


def largest_change(answers: Answers, ones: Sequence[Trial], others: Sequence[Trial]) -> float:
    """The largest difference of a probability between two arms, over seeds, test images and classes."""
    pairs = zip(ones, others, strict=True)
    return max(float(np.abs(answers.probs(a)[0] - answers.probs(b)[0]).max()) for a, b in pairs)


def largest_spread(answers: Answers, trials: Sequence[Trial]) -> float:
    """The largest difference of a probability between two test images, over seeds and classes."""
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
