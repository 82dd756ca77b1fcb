"""``study heads``: which token should a head read, with the learning rate tuned for each head?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError, RunError
from vit_cls.lab.results import Figure, HeatMap, Line, LineChart, ScatterChart, Table, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.study import (
    ARM_COLUMNS,
    FROM_TO,
    LAST_EPOCH,
    Measured,
    Setup,
    Study,
    check_pools,
    score_cells,
    verdict_line,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import DIFFERS, Claim, Finding, judge_all

LR_FACTORS = {1: (1.0,), 2: (0.5, 1.0), 3: (0.5, 1.0, 2.0), 5: (0.25, 0.5, 1.0, 2.0, 4.0)}
COSTS = ("parameters", "head_parameters", "macs", "head_macs")
"""What a trial notes of its model, in the order of the table."""
DEFAULT_HEADS = ("cls", "gap", "max", "map", "ep:8")


@dataclass(frozen=True)
class Rates:
    """What the heads do at each learning rate, given as a factor of the recipe's.

    Args:
        usable: Trials of those rates at which every training ended well, by head and factor.
        failed: Head and factor of the others.
        tuned: The factor that was chosen for each head.
        shared: Which test images are right at the recipe's own rate, by head that could be trained with it.
    """

    usable: dict[str, dict[float, list[Trial]]]
    failed: list[tuple[str, float]]
    tuned: dict[str, float]
    shared: dict[str, np.ndarray]


class HeadsStudy(Study):
    """Poolings on the same encoder, each at its own best learning rate.

    Per seed all heads start from the same encoder and see the same images in the same order. A head's
    learning rate is the one with the best mean validation accuracy; the test images are read with that
    one, and with the shared one to show what a comparison at one rate would have said.

    Args:
        setup: What all studies share.
        heads: Rows of the table of poolings; the first is what others are compared with.
        lr_grid: How many learning rates are tried for each head: 1, 2, 3 or 5, factors of 2 apart.

    Raises:
        ConfigError: If a head is unknown or there are fewer than two, or ``lr_grid`` is another number.

    Source:
        The effect of one shared learning rate: ViT, https://arxiv.org/abs/2010.11929, appendix D.3, figure 9.
    """

    name = "heads"
    question = "Which token should the head read, when each head has its own learning rate?"

    def __init__(self, setup: Setup, heads: Sequence[str] = DEFAULT_HEADS, lr_grid: int = 3) -> None:
        super().__init__(setup)
        self.heads = list(heads)
        self.lr_grid = lr_grid
        if len(self.heads) < 2:
            given = ", ".join(self.heads) or "none"
            raise ConfigError(f"--heads needs two or more, such as cls,gap; got {given}.")
        check_choice("--lr_grid", lr_grid, LR_FACTORS)
        check_pools(self.heads)

    @property
    def names(self) -> list[str]:
        """A name for each head; of equal ones the later are numbered."""
        return [
            head if head not in self.heads[:i] else f"{head} ({self.heads[:i].count(head) + 1})"
            for i, head in enumerate(self.heads)
        ]

    def arms(self) -> dict[str, dict[float, list[Trial]]]:
        """Trials by arm and factor of the learning rate, a seed each."""
        setup = self.setup
        return {
            arm: {
                factor: setup.trials(arm, model=setup.head(head), lr_factor=factor, variant=f"lr x{factor:g}")
                for factor in LR_FACTORS[self.lr_grid]
            }
            for arm, head in zip(self.names, self.heads, strict=True)
        }

    def measure(self, answers: Answers) -> Measured:
        """Each head at the rate that is best for it, and at the others."""
        usable: dict[str, dict[float, list[Trial]]] = {}
        failed: list[tuple[str, float]] = []
        for arm, rates in self.arms().items():
            errors = {
                factor: next(filter(None, map(answers.failed, trials)), None)
                for factor, trials in rates.items()
            }
            usable[arm] = {factor: trials for factor, trials in rates.items() if errors[factor] is None}
            failed += [(arm, factor) for factor in rates if errors[factor] is not None]
            if not usable[arm]:
                raise RunError(f"no learning rate worked for {arm}: {next(iter(errors.values()))}")
        tuned = {arm: best_rate(answers, rates) for arm, rates in usable.items()}
        shared = {arm: answers.correct(rates[1.0]) for arm, rates in usable.items() if 1.0 in rates}
        chosen = {arm: usable[arm][factor] for arm, factor in tuned.items()}
        return Measured.of(answers, chosen, Rates(usable, failed, tuned, shared))

    def claims(self, measured: Measured) -> list[Claim]:
        first, *others = measured.right
        return self._differ(measured, [(first, other) for other in others])

    def _differ(self, measured: Measured, pairs: Sequence[tuple[str, str]]) -> list[Claim]:
        rows = [(f"{b} and {a} differ.", a, b, DIFFERS) for a, b in pairs]
        return measured.claims(rows, self.setup.margin)

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """The comparison that is asked most: CLS with GAP where both are there, else the first two.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        arms = list(measured.arms)
        other = "gap" if arms[0] != "gap" and "gap" in arms else arms[1]
        best = max(arms, key=lambda arm: measured.answers.val_accuracy(measured.arms[arm]))
        share = fmt.percent(measured.right[best].mean())
        top = f"Best on validation: {best}, with {share} of the test images right."
        return verdict_line(findings[arms[1:].index(other)], top)

    def _lr(self, factor: float) -> float:
        assert self.setup.recipe.lr is not None
        return self.setup.recipe.lr * factor

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        rates: Rates = measured.more
        tuned = sorted(self._rows(measured), key=lambda row: -row[1])
        costs = ["validation (%)", "learning rate", "parameters", "of pooling and head", "MACs", "of these"]
        order = sorted(rates.shared, key=lambda arm: -rates.shared[arm].mean())
        ranks = [
            [place, row[0], at_one]
            for place, (row, at_one) in enumerate(itertools.zip_longest(tuned, order), 1)
        ]
        return [
            Table(
                "Each head at its own learning rate",
                ["head", *ARM_COLUMNS, *costs, "seconds"],
                tuned,
                "Test images; the learning rate was chosen on validation images. MACs: multiply-adds for one "
                "image, encoder included, then of pooling and head. Seconds: of a training and its answers, "
                "beside others where --jobs is above 1.",
            ),
            Table(
                "Rankings",
                ["place", "each at its own learning rate", f"all at {self._lr(1.0):g}"],
                ranks,
                "Where the two differ, a comparison at one learning rate would have misled.",
            ),
            Table(
                "All at the shared learning rate",
                ["head", *ARM_COLUMNS],
                [[arm, *score_cells(rates.shared[arm])] for arm in order],
            ),
            self._pairs(measured),
        ]

    def _rows(self, measured: Measured) -> list[list[Any]]:
        answers = measured.answers
        rows: list[list[Any]] = []
        for arm, trials in measured.arms.items():
            row = [arm, *score_cells(measured.right[arm]), answers.val_accuracy(trials)]
            costs = [answers.note(trials[0])[name] for name in COSTS]
            rows.append([*row, self._lr(measured.more.tuned[arm]), *costs, answers.seconds(trials)])
        return rows

    def _pairs(self, measured: Measured) -> Table:
        pairs = list(itertools.combinations(measured.right, 2))
        judged = judge_all(self._differ(measured, pairs), seed=self.setup.seed)
        return Table(
            "Every pair",
            ["head", "less", "difference (%)", *FROM_TO, "p, Holm", "p of equivalence, Holm"],
            [
                [b, a, one.estimate, *(one.ci95 or (None, None)), one.p_holm, one.p_equivalence]
                for (a, b), one in zip(pairs, judged, strict=True)
            ],
            f"Each at its own learning rate, paired by seed and image; adjusted over all {len(pairs)} pairs.",
        )

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        answers, right = measured.answers, measured.right
        first, *others = right
        response = [
            Line(arm, [(self._lr(f), answers.val_accuracy(t)) for f, t in sorted(rates.items())])
            for arm, rates in list(measured.more.usable.items())[:8]
        ]
        means = {arm: mean_interval(rows) for arm, rows in right.items()}
        points = [
            (arm, float(answers.note(trials[0])["macs"]), means[arm].estimate, means[arm].ci95)
            for arm, trials in measured.arms.items()
        ]
        matrix = [
            [paired_difference(right[a], right[b]).estimate if a != b else float("nan") for b in right]
            for a in right
        ]
        differences = dict(zip([f"{arm} minus {first}" for arm in others], findings, strict=True))
        return [
            *forest(f"Difference to {first}", differences, self.setup.margin),
            LineChart(
                "Response to the learning rate",
                "learning rate",
                "validation accuracy",
                response,
                log_x=True,
                note="Mean over the seeds. A curve that ends at its highest point wants a wider --lr_grid.",
            ),
            ScatterChart("Accuracy over cost", "multiply-adds for one image", "test accuracy", points),
            HeatMap(
                "Column minus row",
                matrix,
                list(right),
                list(right),
                note="Mean difference of test accuracy over seeds and images.",
            ),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        rates: Rates = measured.more
        return {
            "tuned_lr": {arm: self._lr(factor) for arm, factor in rates.tuned.items()},
            **super().values(measured, findings),
            "top1_shared_lr": {arm: rows.mean(axis=1) for arm, rows in rates.shared.items()},
        }

    def notes(self, measured: Measured) -> list[str]:
        fresh = "Heads that do not read a class token are trained without one."
        return [
            "Per seed all heads start from the same encoder and see the same images in the same order.",
            LAST_EPOCH,
            *([fresh] if self.setup.recipe.pretrained is None else []),
            *(
                f"{arm}: learning rate {self._lr(factor):g} failed and was left out."
                for arm, factor in measured.more.failed
            ),
        ]


def best_rate(answers: Answers, rates: dict[float, list[Trial]]) -> float:
    """The factor with the best mean validation accuracy; of equals the one nearest to 1."""
    return max(rates, key=lambda factor: (answers.val_accuracy(rates[factor]), -abs(np.log(factor))))
