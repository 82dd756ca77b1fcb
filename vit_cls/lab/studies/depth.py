"""``study depth``: do more blocks help, and the class token more than the mean of the patches?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.errors import ConfigError
from vit_cls.lab.results import MOST_LINES, Figure, Line, LineChart, forest
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import (
    LAST_EPOCH,
    ONE_RATE,
    PAIRED,
    Measured,
    Setup,
    Study,
    check_pools,
    least_squares_slope,
    slope_claim,
    verdict_line,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, Finding

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
        ConfigError: If a depth or a head is impossible or given twice, there is one depth only, or the recipe
            has a depth too.

    Source:
        Depth at scale: ViT, https://arxiv.org/abs/2010.11929, appendix D.2, figure 8.
    """

    name = "depth"
    question = "Do more blocks help, and the class token more than the mean of the patches?"
    arms_title = "Heads and depths"
    why_fresh = "the weights have a depth of their own"

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
        check_pools(self.heads)
        if setup.recipe.depth != Recipe().resolved(setup.data).depth:
            raise ConfigError(
                f"--recipe.depth {setup.recipe.depth} has no effect in study depth; give --depths instead."
            )

    def arms(self) -> dict[str, dict[int, list[Trial]]]:
        """Trials by head and depth, a seed each."""
        return {
            head: {
                depth: self.setup.trials(arm(head, depth), model={**self.setup.head(head), "depth": depth})
                for depth in self.depths
            }
            for head in self.heads
        }

    def slope(self, measured: Measured, head: str) -> np.ndarray:
        """Gain of each score by doubling the depth, float64, shape ``(seeds, images)``."""
        scores = [measured.right[arm(head, depth)] for depth in self.depths]
        return least_squares_slope(np.log2(self.depths).tolist(), scores)

    def claims(self, measured: Measured) -> list[Claim]:
        """What is claimed of heads first, as it is asked for; then of steps."""
        margin, (first, *others) = self.setup.margin, self.heads
        # Over all doublings, a difference of slopes that does not matter adds up to the margin at most.
        slope_margin = margin / math.log2(self.depths[-1] / self.depths[0])
        slopes = {head: self.slope(measured, head) for head in self.heads}
        of_heads = [
            slope_claim(
                f"{first} gains more from depth than {head}.",
                (head, first),
                (slopes[head], slopes[first]),
                slope_margin,
                UNIT,
            )
            for head in others
        ]
        steps = [
            (f"With {head}, depth {high} beats depth {low}.", arm(head, low), arm(head, high), GREATER)
            for head in self.heads
            for low, high in pairwise(self.depths)
        ]
        return [*of_heads, *measured.claims(steps, margin)]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """Of two heads, which gains more; of one, whether the last step helps.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        val = {
            (head, depth): measured.answers.val_accuracy(measured.arms[arm(head, depth)])
            for head in self.heads
            for depth in self.depths
        }
        head, depth = max(val, key=lambda key: (val[key], -key[1]))
        share = f"{fmt.percent(measured.right[arm(head, depth)].mean())} of the test images right"
        best = f"Best on validation: {head} with depth {depth}, with {share}."
        return verdict_line(findings[0] if len(self.heads) > 1 else findings[-1], best)

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        lines = [
            Line.of(head, {depth: mean_interval(measured.right[arm(head, depth)]) for depth in self.depths})
            for head in self.heads
        ]
        note = (
            "Mean over seeds and images, with 95 % intervals; differences are paired and closer than these."
        )
        steps = [f"{head}: {high} minus {low}" for head in self.heads for low, high in pairwise(self.depths)]
        differences = dict(zip(steps, findings[len(self.heads) - 1 :], strict=True))
        return [
            LineChart("Accuracy over depth", "encoder blocks", "test accuracy", lines, note=note),
            *forest("What each step adds", differences, self.setup.margin),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        top1 = super().values(measured, findings)["top1"]
        return {
            "top1": {head: {str(d): top1[arm(head, d)] for d in self.depths} for head in self.heads},
            "gain_per_doubling": {head: self.slope(measured, head).mean(axis=1) for head in self.heads},
        }

    def notes(self, measured: Measured) -> list[str]:
        return [
            f"{PAIRED} A deeper encoder starts with the blocks of a shallower one.",
            "All take the same number of steps; deeper ones take more time for them.",
            ONE_RATE,
            LAST_EPOCH,
        ]


def arm(head: str, depth: int) -> str:
    """Name of an arm."""
    return f"{head}, depth {depth}"
