"""``study depth``: do more blocks help, and the class token more than the mean of the patches?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.errors import ConfigError
from vit_cls.lab.results import MOST_LINES, ForestChart, LabResult, Line, LineChart, forest
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import (
    LAST_EPOCH,
    ONE_RATE,
    PAIRED,
    Answers,
    Setup,
    Study,
    arms_table,
    headline,
    refuse_pretrained,
    train_arms,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.model.pooling import num_class_tokens
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, Finding, judge_all

UNIT = "points per doubling"


class DepthStudy(Study):
    """Encoders of several depths, each read by several heads, with as many steps for all.

    Claims: each depth beats the one before it, for each head; and the first head gains more from depth than
    each other head, as the contrast of two slopes over log2 of the depth, fitted to every image. The margin
    is of accuracies; slopes have it spread over the doublings from the shallowest to the deepest.

    Args:
        setup: What all studies share; its recipe's depth is not used.
        depths: Encoder blocks, two different numbers or more.
        heads: Rows of the table of poolings, the first is compared with the others.

    Raises:
        ConfigError: If a depth or a head is impossible or given twice, there is one depth only, weights are
            to be loaded, or the recipe has a depth too.

    Source:
        Depth at scale: ViT, https://arxiv.org/abs/2010.11929, appendix D.2, figure 8.
    """

    name = "depth"
    question = "Do more blocks help, and the class token more than the mean of the patches?"

    def __init__(
        self,
        setup: Setup,
        depths: Sequence[int] = (1, 2, 3, 4, 6),
        heads: Sequence[str] = ("cls", "gap"),
    ) -> None:
        super().__init__(setup)
        self.depths = sorted(depths)
        self.heads = list(heads)
        given = ",".join(map(str, depths)) or "none"
        if len(self.depths) < 2 or self.depths[0] < 1 or len(set(self.depths)) < len(self.depths):
            raise ConfigError(
                f"--depths needs two or more different numbers from 1 on, such as 1,2,4; got {given}."
            )
        if not 1 <= len(self.heads) <= MOST_LINES or len(set(self.heads)) < len(self.heads):
            raise ConfigError(
                f"--heads needs one to {MOST_LINES} different heads, such as cls,gap; got "
                f"{','.join(self.heads) or 'none'}."
            )
        for head in self.heads:
            num_class_tokens(head, 1)  # refuses what is no pooling
        refuse_pretrained(setup, self.name, "the weights have a depth of their own")
        if setup.recipe.depth != Recipe().resolved(setup.data).depth:
            raise ConfigError(
                f"--recipe.depth {setup.recipe.depth} has no effect in study depth; give --depths instead."
            )

    def arms(self) -> dict[str, dict[int, list[Trial]]]:
        """Trials by head and depth, a seed each."""
        return {
            head: {
                depth: train_arms(
                    self.setup,
                    {f"{head}, depth {depth}": {**head_settings(head, pretrained=False), "depth": depth}},
                )[f"{head}, depth {depth}"]
                for depth in self.depths
            }
            for head in self.heads
        }

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        arms = self.arms()
        right = {
            head: {depth: answers.correct(trials) for depth, trials in by_depth.items()}
            for head, by_depth in arms.items()
        }
        slopes = {head: depth_slopes(by_depth) for head, by_depth in right.items()}
        findings = judge_all(self._claims(right, slopes), seed=self.setup.seed)
        flat = {f"{head}, depth {d}": trials for head, by in arms.items() for d, trials in by.items()}
        return self.result(
            answers,
            self._headline(findings, right, answers, arms),
            findings,
            tables=[arms_table("Heads and depths", answers, flat)],
            figures=[self._curves(right), *self._steps(findings)],
            values={
                "top1": {h: {str(d): r.mean(axis=1) for d, r in by.items()} for h, by in right.items()},
                "gain_per_doubling": {head: rows.mean(axis=1) for head, rows in slopes.items()},
            },
            predictions=answers.predictions(flat),
            notes=[
                f"{PAIRED} A deeper encoder starts with the blocks of a shallower one.",
                "All take the same number of steps; deeper ones take more time for them.",
                ONE_RATE,
                LAST_EPOCH,
            ],
        )

    def _claims(self, right: dict[str, dict[int, np.ndarray]], slopes: dict[str, np.ndarray]) -> list[Claim]:
        """What is claimed of heads first, as it is asked for."""
        margin, (first, *others) = self.setup.margin, self.heads
        # Over all doublings, a difference of slopes that does not matter adds up to the margin at most.
        slope_margin = margin / math.log2(self.depths[-1] / self.depths[0])
        claims = [
            Claim(
                f"{first} gains more from depth than {head}.",
                slopes[head],
                slopes[first],
                GREATER,
                slope_margin,
                (f"the slope of {head}", f"the slope of {first}"),
                UNIT,
                words=("higher", "lower"),
            )
            for head in others
        ]
        for head, by_depth in right.items():
            for low, high in zip(self.depths, self.depths[1:], strict=False):
                names = f"{head}, depth {low}", f"{head}, depth {high}"
                text = f"With {head}, depth {high} beats depth {low}."
                claims.append(Claim(text, by_depth[low], by_depth[high], GREATER, margin, names))
        return claims

    def _headline(
        self,
        findings: list[Finding],
        right: dict[str, dict[int, np.ndarray]],
        answers: Answers,
        arms: dict[str, dict[int, list[Trial]]],
    ) -> str:
        """Of two heads, which gains more; of one, whether the last step helps.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        finding = findings[0] if len(self.heads) > 1 else findings[-1]
        val = {(h, d): answers.val_accuracy(trials) for h, by in arms.items() for d, trials in by.items()}
        head, depth = max(val, key=lambda key: (val[key], -key[1]))
        share = f"{fmt.percent(right[head][depth].mean())} of the test images right"
        return headline(finding, f"Best on validation: {head} with depth {depth}, with {share}.")

    def _curves(self, right: dict[str, dict[int, np.ndarray]]) -> LineChart:
        lines = []
        for head, by_depth in right.items():
            lines.append(Line.of(head, {depth: mean_interval(rows) for depth, rows in by_depth.items()}))
        note = (
            "Mean over seeds and images, with 95 % intervals; differences are paired and closer than these."
        )
        return LineChart("Accuracy over depth", "encoder blocks", "test accuracy", lines, note=note)

    def _steps(self, findings: Sequence[Finding]) -> list[ForestChart]:
        """The findings on heads come before those on steps."""
        labels = [
            f"{head}: {high} minus {low}"
            for head in self.heads
            for low, high in zip(self.depths, self.depths[1:], strict=False)
        ]
        steps = dict(zip(labels, findings[len(self.heads) - 1 :], strict=True))
        return forest("What each step adds", steps, self.setup.margin)


def depth_slopes(right: dict[int, np.ndarray]) -> np.ndarray:
    """Least-squares slope over log2 of the depth, for every seed and image.

    Args:
        right: Which images the models of each depth had right, bool, shape ``(seeds, images)``; two depths or
            more.

    Returns:
        Gain of accuracy by doubling the depth, float64, shape ``(seeds, images)``: a linear combination of
        the scores, so that its mean is the slope of the mean accuracies.

    Example:
        >>> depth_slopes({1: np.array([[False, False]]), 4: np.array([[True, False]])})
        array([[0.5, 0. ]])
    """
    x = np.log2(list(right))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return np.tensordot(weights, np.stack(list(right.values())).astype(np.float64), axes=1)
