"""``study when``: does reading one token, or the largest values, pay where little of the input matters?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.data.partition import Partition
from vit_cls.errors import ConfigError
from vit_cls.lab.results import MOST_LINES, Figure, Line, LineChart, Table, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.mosaics import TILE, MosaicSource, example_pictures, roles
from vit_cls.lab.studies.recipe import RECIPES, Recipe
from vit_cls.lab.studies.study import (
    ARM_COLUMNS,
    FROM_TO,
    Measured,
    Setup,
    Study,
    check_pools,
    least_squares_slope,
    score_cells,
    slope_claim,
    verdict_line,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import DIFFERS, Finding, judge_all

GAP = "gap"
DIGIT_TILE, DIGIT_PATCH = 8, 4
"""Pixels. With the patches of 2 pixels that digits usually have, a canvas would be 256 tokens."""
UNIT = "points per halving"


class WhenStudy(Study):
    """Heads on mosaics of which 1, 2, a quarter or all tiles show the image, the others distractors.

    Canvas, tile size and number of tokens are the same throughout, test images and distractors too; only the
    relevant share ``r`` changes. Of each test image and seed, the slope of right-or-wrong over ``log2(1/r)``
    is a fixed sum of scores of 0 and 1; it is compared between each head and GAP.

    Args:
        setup: What all studies share.
        heads: Rows of the table of poolings, ``gap`` among them: the one that others are compared with.
        side: Tiles along each side of a mosaic.
        distractors: What the other tiles show: ``classes`` (images of the second half of the classes) or
            ``noise``.
        tile: Side of a tile in pixels; null takes 8 for digits, as they are, and 32 for files.

    Raises:
        ConfigError: If a head is unknown or named twice, ``gap`` is missing, or a size does not fit.

    Source:
        Mean, maximum and attention over instances of which few matter: Ilse et al. 2018,
        https://arxiv.org/abs/1802.04712.
    """

    name = "when"
    question = "Does the head matter more, the smaller the part of the image that matters?"

    def __init__(
        self,
        setup: Setup,
        heads: Sequence[str] = ("cls", "gap", "max", "map"),
        side: int = 4,
        distractors: str = "classes",
        tile: int | None = None,
    ) -> None:
        super().__init__(setup)
        self.heads = list(heads)
        self.side = side
        self.distractors = distractors
        self.tile = tile if tile is not None else DIGIT_TILE if setup.data == "digits" else TILE
        given = ", ".join(self.heads) or "none"
        if GAP not in self.heads or len(self.heads) < 2:
            raise ConfigError(
                f"--heads needs gap, which others are compared with, and another one; got {given}. "
                "Write --heads cls,gap,max,map."
            )
        if len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"--heads must name each head once; got {given}.")
        check_pools(self.heads)
        check_range("--side", side, at_least=2)
        roles(list("abcd"), distractors)
        self._check_recipe()

    def _check_recipe(self) -> None:
        """What the mosaics decide cannot be set, and a patch must lie in one tile."""
        recipe = self.setup.recipe
        usual = Recipe(pretrained=recipe.pretrained).resolved(self.setup.data)
        for name, why in (
            ("img_size", f"it is {self.side} tiles of {self.tile} pixels; use --side and --tile"),
            ("augment", "a crop or a turn would change which part is relevant"),
        ):
            value = getattr(recipe, name)
            if value != getattr(usual, name) and not (name == "augment" and value == "none"):
                raise ConfigError(f"--recipe.{name} {value} has no effect on mosaics: {why}. Leave it out.")
        if self.tile < 1 or (self.patch_size is not None and self.tile % self.patch_size):
            raise ConfigError(
                f"--tile must be a multiple of the patch size, so that no patch lies in two tiles; got "
                f"{self.tile} and {self.patch_size} pixels. Change --tile or --recipe.patch_size."
            )

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels; None where the weights decide."""
        given = self.setup.recipe.patch_size
        usual = self.setup.data == "digits" and given == RECIPES["digits"].patch_size
        return DIGIT_PATCH if usual else given

    @property
    def relevant(self) -> list[int]:
        """How many tiles show the image, from all to one."""
        return sorted({self.tiles, max(1, self.tiles // 4), 2, 1}, reverse=True)

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self.side**2

    @property
    def others(self) -> list[str]:
        """Heads that are compared with gap."""
        return [head for head in self.heads if head != GAP]

    @property
    def slope_margin(self) -> float:
        """Over all halvings, a difference of slopes that does not matter adds up to the margin at most."""
        return self.setup.margin / math.log2(self.tiles)

    def arms(self) -> dict[str, dict[int, list[Trial]]]:
        """Trials by head and number of relevant tiles, a seed each."""
        setup, data = self.setup, self.setup.trial_data
        mosaic = {"side": self.side, "tile": self.tile, "distractors": self.distractors, "seed": setup.seed}
        sizes = {"img_size": self.side * self.tile, "patch_size": self.patch_size, "crop_pct": 1.0}
        sizes = {key: value for key, value in sizes.items() if value is not None}
        return {
            head: {
                count: setup.trials(
                    head,
                    model=setup.head(head) | sizes,
                    data=dataclasses.replace(data, mosaic=mosaic | {"relevant": count}),
                    loader={"augment": "none"},
                    variant=f"{count} of {self.tiles}",
                )
                for count in self.relevant
            }
            for head in self.heads
        }

    def arm(self, head: str, count: int) -> str:
        """Name of an arm in reports."""
        return f"{head}, {count} of {self.tiles}"

    def slope(self, head: str, by_arm: Mapping[str, np.ndarray]) -> np.ndarray:
        """Change of each score with each halving of the relevant share, as `least_squares_slope` fits it."""
        halvings = [math.log2(self.tiles / count) for count in self.relevant]
        return least_squares_slope(halvings, [by_arm[self.arm(head, count)] for count in self.relevant])

    def measure(self, answers: Answers) -> Measured:
        """Beside what is right, the parts of the first seed with the fewest relevant tiles."""
        last = self.arms()[GAP][self.relevant[-1]][0]
        return dataclasses.replace(super().measure(answers), more=last.data.parts(last.seed))

    def judge(self, measured: Measured) -> list[Finding]:
        """Slopes, which the study is about, and each share on its own; a family of tests each."""
        slopes = [
            slope_claim(
                f"The advantage of {head} over {GAP} grows as the relevant part shrinks.",
                (GAP, head),
                (self.slope(GAP, measured.right), self.slope(head, measured.right)),
                self.slope_margin,
                UNIT,
            )
            for head in self.others
        ]
        levels = [
            (
                f"{head} and {GAP} differ where {count} of {self.tiles} tiles are relevant.",
                self.arm(GAP, count),
                self.arm(head, count),
                DIFFERS,
            )
            for head in self.others
            for count in self.relevant
        ]
        families = slopes, measured.claims(levels, self.setup.margin)
        return [one for claims in families for one in judge_all(claims, seed=self.setup.seed)]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """The head that was named first, and the one that loses least.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        val = {
            arm: np.array([[measured.answers.val_accuracy(trials)]]) for arm, trials in measured.arms.items()
        }
        best = max(self.heads, key=lambda head: float(self.slope(head, val)[0, 0]))
        change = 100 * self.slope(best, measured.right).mean()
        return verdict_line(
            findings[0],
            f"Of all heads {best} loses least on validation as the relevant part shrinks; on the test images "
            f"it is {change:+.1f} {UNIT}.",
        )

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        by_head = dict(zip(self.others, findings, strict=False))
        slopes: list[list[Any]] = []
        for head in self.heads:
            mean = mean_interval(self.slope(head, measured.right))
            compared = [*_estimate(by_head[head]), by_head[head].p_holm] if head != GAP else [None] * 4
            slopes.append([head, mean.estimate, *mean.ci95, *compared, mean.seeds, mean.images])
        pairs = [(head, count) for head in self.others for count in self.relevant]
        levels = [
            [*pair, *_estimate(finding), finding.p_holm, finding.verdict]
            for pair, finding in zip(pairs, findings[len(self.others) :], strict=True)
        ]
        accuracy = [
            [head, count, count / self.tiles, *score_cells(measured.right[self.arm(head, count)])]
            for head in self.heads
            for count in self.relevant
        ]
        compared_columns = [f"minus {GAP} (%)", *FROM_TO, "p (Holm)"]
        return [
            Table(
                "Change of accuracy with each halving of the relevant share",
                ["head", "slope (%)", *FROM_TO, *compared_columns, "seeds", "images"],
                slopes,
                "Test images; least squares over log2(1/r), intervals 95 %, p adjusted over the heads.",
            ),
            Table(
                "Accuracy by head and relevant share",
                ["head", "relevant tiles", "share (%)", *ARM_COLUMNS],
                accuracy,
                "Test images, the same ones at each share.",
            ),
            Table(
                f"Each head minus {GAP} at each share",
                ["head", "relevant tiles", "difference (%)", *FROM_TO, "p (Holm)", "verdict"],
                levels,
                "p adjusted over all rows; intervals 95 %, not adjusted.",
            ),
        ]

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        lines = []
        for head in self.heads[:MOST_LINES]:
            rows = {count: measured.right[self.arm(head, count)] for count in reversed(self.relevant)}
            lines.append(
                Line.of(head, {count / self.tiles: mean_interval(right) for count, right in rows.items()})
            )
        curves = LineChart(
            "Accuracy over the relevant share",
            "share of the tiles that show the image",
            "test accuracy",
            lines,
            log_x=True,
            marks={"commonest class": commonest_share(measured.more)},
            note=f"Bands are 95 % intervals over seeds and images. {MOST_LINES} heads at most are drawn.",
        )
        labels = [f"{head} minus {GAP}" for head in self.others]
        growth = forest(
            "Growth of the advantage with each halving of the relevant share",
            dict(zip(labels, findings, strict=False)),
            self.slope_margin,
            "Above 0, the head's advantage is larger where less of the input is relevant.",
        )
        test = measured.more.test
        return [
            curves,
            *growth,
            example_pictures(test, self.relevant, side=self.side, seed=self.setup.seed),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        right = measured.right
        return {
            "relevant_share": [count / self.tiles for count in self.relevant],
            "top1": {h: [right[self.arm(h, n)].mean(axis=1) for n in self.relevant] for h in self.heads},
            "slope_per_halving": {head: self.slope(head, right).mean(axis=1) for head in self.heads},
            "chance": commonest_share(measured.more),
        }

    def data(self, measured: Measured) -> dict[str, Any]:
        """Of the parts with the fewest relevant tiles."""
        note = measured.answers.note(self.arms()[GAP][self.relevant[-1]][0])
        failures: dict[str, str] = {}
        for part in measured.more.sources:
            assert isinstance(part, MosaicSource)
            failures |= part.failures
        record = {"origin": note["origin"], **note["data"], "classes": measured.more.class_names}
        return {**record, "failed": len(failures), "failures": failures}

    def derived_settings(self) -> dict[str, Any]:
        return {"relevant_tiles": self.relevant, "patch_size": self.patch_size}

    def notes(self, measured: Measured) -> list[str]:
        chance, count = commonest_share(measured.more), self.tiles
        rest = (
            "The first half of the classes, by name, is to be told apart; distractors are images of the "
            "second half, from the same part, drawn once."
            if self.distractors == "classes"
            else "Distractors are uniform noise, drawn once."
        )
        notes = [
            f"One learning rate for all heads and shares, {self.setup.recipe.lr:g}, not tuned: a head that "
            "wants another one is at a disadvantage (vit-cls study heads shows how much).",
            f"{rest} There is no augmentation: each training image is one canvas for all epochs.",
            f"With {count} of {count} tiles the canvas is the image {count} times, so accuracy there is not "
            "that on plain images.",
            "A slope is a mean over all shares: it says nothing of a bend, and accuracies near 100 % or near "
            "chance flatten it.",
            "Slopes are one family of tests, the comparisons at each share another; p-values are adjusted "
            "within each.",
        ]
        low = [arm for arm, right in measured.right.items() if mean_interval(right).ci95[0] <= chance]
        if low:
            notes.append(f"No better than the commonest class ({fmt.percent(chance)}): {'; '.join(low)}.")
        return notes


def commonest_share(parts: Partition) -> float:
    """Share of the test images that are of the commonest class."""
    return float(parts.test.index.counts().max()) / len(parts.test.index)


def _estimate(finding: Finding) -> tuple[float | None, float, float]:
    return finding.estimate, *(finding.ci95 or (0.0, 0.0))
