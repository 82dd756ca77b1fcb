"""``study when``: does reading one token, or the largest values, pay where little of the input matters?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.errors import ConfigError
from vit_cls.lab.results import MOST_LINES, ForestChart, LabResult, Line, LineChart, Table, forest
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.mosaics import TILE, MosaicSource, example_pictures, roles
from vit_cls.lab.studies.recipe import RECIPES
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers, Setup, Study
from vit_cls.lab.studies.trials import Trial
from vit_cls.model.pooling import num_class_tokens
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, Finding, judge_all

GAP = "gap"
DIGIT_TILE, DIGIT_PATCH = 8, 4
"""Pixels. With the patches of 2 pixels that digits usually have, a canvas would be 256 tokens."""
UNIT = "points per halving"
Grid = dict[str, dict[int, list[Trial]]]
"""Trials by head and number of relevant tiles, a seed each."""


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
        self._check_heads()
        for head in self.heads:
            num_class_tokens(head, 1)  # refuses what is no pooling
        check_range("--side", side, at_least=2)
        roles(list("abcd"), distractors)
        self._check_recipe()

    def _check_heads(self) -> None:
        given = ", ".join(self.heads) or "none"
        if GAP not in self.heads or len(self.heads) < 2:
            raise ConfigError(
                f"--heads needs gap, which others are compared with, and another one; got {given}. "
                "Write --heads cls,gap,max,map."
            )
        if len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"--heads must name each head once; got {given}.")

    def _check_recipe(self) -> None:
        """What the mosaics decide cannot be set, and a patch must lie in one tile."""
        recipe, digits = self.setup.recipe, self.setup.data == "digits"
        usual = RECIPES["digits" if digits else "finetune" if recipe.pretrained else "scratch"]
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
        tiles = self.side**2
        return sorted({tiles, max(1, tiles // 4), 2, 1}, reverse=True)

    def share(self, relevant: int) -> float:
        """The relevant share of the canvas."""
        return relevant / self.side**2

    def mosaic(self, relevant: int) -> dict[str, Any]:
        """Arguments of `mosaic_parts`."""
        return {
            "side": self.side,
            "relevant": relevant,
            "tile": self.tile,
            "distractors": self.distractors,
            "seed": self.setup.seed,
        }

    def arms(self) -> Grid:
        """Trials by head and number of relevant tiles, a seed each."""
        setup = self.setup
        sizes = {"img_size": self.side * self.tile, "patch_size": self.patch_size, "crop_pct": 1.0}
        sizes = {key: value for key, value in sizes.items() if value is not None}
        found: Grid = {}
        for head in self.heads:
            model = head_settings(head, pretrained=setup.recipe.pretrained is not None) | sizes
            found[head] = {}
            for count in self.relevant:
                data = dataclasses.replace(setup.trial_data, mosaic=self.mosaic(count))
                variant = f"{count} of {self.side**2}"
                trials = [
                    setup.trial(head, seed, model=model, data=data, variant=variant)
                    for seed in setup.all_seeds
                ]
                found[head][count] = [
                    dataclasses.replace(one, loader={**one.loader, "augment": "none"}) for one in trials
                ]
        return found

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        grid = self.arms()
        right = {
            head: {count: answers.correct(trials) for count, trials in counts.items()}
            for head, counts in grid.items()
        }
        slopes = {head: self.slopes(rows) for head, rows in right.items()}
        main, levels = self._findings(right, slopes)
        first = grid[GAP][self.relevant[-1]][0]
        parts = first.data.parts(first.seed)
        test = parts.test
        assert isinstance(test, MosaicSource)
        pictures = example_pictures(test, self.relevant, side=self.side, seed=self.setup.seed)
        chance = float(test.index.counts().max()) / len(test.index)
        failures: dict[str, str] = {}
        for part in (parts.train, parts.val, parts.test):
            assert isinstance(part, MosaicSource)
            failures |= part.failures
        record = self.data_record(answers, [first])
        record |= {"classes": parts.class_names, "failed": len(failures), "failures": failures}
        arms = {self._arm(head, count): t for head, counts in grid.items() for count, t in counts.items()}
        return self.result(
            answers,
            self._headline(main, slopes, {h: self._val_slope(answers, t) for h, t in grid.items()}),
            [*main, *levels],
            tables=self._tables(answers, grid, slopes, (main, levels)),
            figures=[self._curves(right, chance), *self._forest(main), pictures],
            more_settings={"relevant_tiles": self.relevant, "patch_size": self.patch_size},
            data=record,
            values={
                "relevant_share": [self.share(count) for count in self.relevant],
                "top1": {h: [rows[n].mean(axis=1) for n in self.relevant] for h, rows in right.items()},
                "slope_per_halving": {head: rows.mean(axis=1) for head, rows in slopes.items()},
                "chance": chance,
            },
            predictions=answers.predictions(arms),
            notes=self._notes(right, chance),
        )

    def slopes(self, right: dict[int, np.ndarray]) -> np.ndarray:
        """Least-squares slope of each image's score over ``log2(1/r)``.

        Args:
            right: Scores by number of relevant tiles, each of shape ``(seeds, images)``.

        Returns:
            Change of the score with each halving of the relevant share, float64, shape ``(seeds, images)``.
        """
        halvings = np.array([-math.log2(self.share(count)) for count in self.relevant])
        weights = (halvings - halvings.mean()) / ((halvings - halvings.mean()) ** 2).sum()
        return np.tensordot(weights, np.stack([right[count] for count in self.relevant]), axes=1)

    def _val_slope(self, answers: Answers, trials: dict[int, list[Trial]]) -> float:
        """Slope of the mean validation accuracies; the images differ from seed to seed."""
        means = {count: np.array([[answers.val_accuracy(one)]]) for count, one in trials.items()}
        return float(self.slopes(means)[0, 0])

    def _arm(self, head: str, count: int) -> str:
        return f"{head}, {count} of {self.side**2}"

    def _findings(
        self, right: dict[str, dict[int, np.ndarray]], slopes: dict[str, np.ndarray]
    ) -> tuple[list[Finding], list[Finding]]:
        """Slopes, which the study is about, and each share on its own; a family of tests each."""
        setup, others = self.setup, [head for head in self.heads if head != GAP]
        # Over all halvings, a difference that does not matter adds up to the margin at most.
        margin = setup.margin / math.log2(self.side**2)
        main = [
            Claim(
                f"The advantage of {head} over {GAP} grows as the relevant part shrinks.",
                slopes[GAP],
                slopes[head],
                expect=GREATER,
                margin=margin,
                names=(f"the slope of {GAP}", f"the slope of {head}"),
                unit=UNIT,
                words=("higher", "lower"),
            )
            for head in others
        ]
        levels = [
            Claim(
                f"{head} and {GAP} differ where {count} of {self.side**2} tiles are relevant.",
                right[GAP][count],
                right[head][count],
                margin=setup.margin,
                names=(self._arm(GAP, count), self._arm(head, count)),
            )
            for head in others
            for count in self.relevant
        ]
        return judge_all(main, seed=setup.seed), judge_all(levels, seed=setup.seed)

    def _headline(
        self, main: Sequence[Finding], slopes: dict[str, np.ndarray], val_slopes: dict[str, float]
    ) -> str:
        """The head that was named first, and the one that loses least.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        best = max(val_slopes, key=lambda head: val_slopes[head])
        change = 100 * slopes[best].mean()
        return (
            f"{main[0].verdict.capitalize()}: {main[0].sentence} Of all heads {best} loses least on "
            f"validation as the relevant part shrinks; on the test images it is {change:+.1f} {UNIT}."
        )

    def _tables(
        self,
        answers: Answers,
        grid: Grid,
        slopes: dict[str, np.ndarray],
        findings: tuple[Sequence[Finding], Sequence[Finding]],
    ) -> list[Table]:
        accuracy = [
            [head, count, self.share(count), *answers.cells(trials)]
            for head, counts in grid.items()
            for count, trials in counts.items()
        ]
        others = [head for head in self.heads if head != GAP]
        rows: list[list[Any]] = []
        for head, values in slopes.items():
            mean = mean_interval(values)
            found = findings[0][others.index(head)] if head != GAP else None
            shared = [None] * 4 if found is None else [found.estimate, *_ends(found), found.p_holm]
            rows.append([head, mean.estimate, *mean.ci95, *shared, mean.seeds, mean.images])
        levels: list[list[Any]] = [
            [head, count, found.estimate, *_ends(found), found.p_holm, found.verdict]
            for (head, count), found in zip(
                [(head, count) for head in others for count in self.relevant], findings[1], strict=True
            )
        ]
        interval = ["from (%)", "to (%)"]
        return [
            Table(
                "Change of accuracy with each halving of the relevant share",
                [
                    "head",
                    "slope (%)",
                    *interval,
                    f"minus {GAP} (%)",
                    *interval,
                    "p (Holm)",
                    "seeds",
                    "images",
                ],
                rows,
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
                ["head", "relevant tiles", "difference (%)", *interval, "p (Holm)", "verdict"],
                levels,
                "p adjusted over all rows; intervals 95 %, not adjusted.",
            ),
        ]

    def _curves(self, right: dict[str, dict[int, np.ndarray]], chance: float) -> LineChart:
        lines = []
        for head, rows in list(right.items())[:MOST_LINES]:
            means = {self.share(count): mean_interval(rows[count]) for count in reversed(self.relevant)}
            lines.append(Line.of(head, means))
        return LineChart(
            "Accuracy over the relevant share",
            "share of the tiles that show the image",
            "test accuracy",
            lines,
            log_x=True,
            marks={"commonest class": chance},
            note=f"Bands are 95 % intervals over seeds and images. {MOST_LINES} heads at most are drawn.",
        )

    def _forest(self, main: Sequence[Finding]) -> list[ForestChart]:
        others = [f"{head} minus {GAP}" for head in self.heads if head != GAP]
        return forest(
            "Growth of the advantage with each halving of the relevant share",
            dict(zip(others, main, strict=True)),
            self.setup.margin / math.log2(self.side**2),
            "Above 0, the head's advantage is larger where less of the input is relevant.",
        )

    def _notes(self, right: dict[str, dict[int, np.ndarray]], chance: float) -> list[str]:
        recipe, count = self.setup.recipe, self.side**2
        rest = (
            "The first half of the classes, by name, is to be told apart; distractors are images of the "
            "second half, from the same part, drawn once."
            if self.distractors == "classes"
            else "Distractors are uniform noise, drawn once."
        )
        notes = [
            f"One learning rate for all heads and shares, {recipe.lr:g}, not tuned: a head that wants "
            "another one is at a disadvantage (vit-cls study heads shows how much).",
            f"{rest} There is no augmentation: each training image is one canvas for all epochs.",
            f"With {count} of {count} tiles the canvas is the image {count} times, so accuracy there is not "
            "that on plain images.",
            "A slope is a mean over all shares: it says nothing of a bend, and accuracies near 100 % or near "
            "chance flatten it.",
            "Slopes are one family of tests, the comparisons at each share another; p-values are adjusted "
            "within each.",
        ]
        low = [
            self._arm(head, n)
            for head, rows in right.items()
            for n in self.relevant
            if mean_interval(rows[n]).ci95[0] <= chance
        ]
        if low:
            notes.append(f"No better than the commonest class ({fmt.percent(chance)}): {'; '.join(low)}.")
        return notes


def _ends(finding: Finding) -> tuple[float, float]:
    return finding.ci95 or (0.0, 0.0)
