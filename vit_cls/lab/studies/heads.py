"""``study heads``: which token should a head read, with the learning rate tuned for each head?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError, RunError
from vit_cls.lab.probes.common import compare_with
from vit_cls.lab.results import HeatMap, LabResult, Line, LineChart, ScatterChart, Table, forest
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers, Setup, Study
from vit_cls.lab.studies.trials import Trial
from vit_cls.model.pooling import needs_class_token, num_class_tokens
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import Claim, Finding, judge_all

LR_FACTORS = {1: (1.0,), 2: (0.5, 1.0), 3: (0.5, 1.0, 2.0), 5: (0.25, 0.5, 1.0, 2.0, 4.0)}
DEFAULT_HEADS = ("cls", "gap", "max", "map", "ep:8")


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
        for head in self.heads:
            num_class_tokens(head, 1)  # refuses what is no pooling

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
        found: dict[str, dict[float, list[Trial]]] = {}
        for arm, head in zip(self.names, self.heads, strict=True):
            found[arm] = {
                factor: [
                    setup.trial(
                        arm,
                        seed,
                        model=head_settings(head, pretrained=setup.recipe.pretrained is not None),
                        lr_factor=factor,
                        variant=f"lr x{factor:g}",
                    )
                    for seed in setup.all_seeds
                ]
                for factor in LR_FACTORS[self.lr_grid]
            }
        return found

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        grid = self.arms()
        usable = {
            arm: {f: t for f, t in rates.items() if not any(answers.failed(one) for one in t)}
            for arm, rates in grid.items()
        }
        for arm, rates in usable.items():
            if not rates:
                errors = [answers.failed(trial) for trials in grid[arm].values() for trial in trials]
                raise RunError(f"no learning rate worked for {arm}: {next(filter(None, errors))}")
        tuned = {arm: best_rate(answers, rates) for arm, rates in usable.items()}
        chosen = {arm: usable[arm][factor] for arm, factor in tuned.items()}
        shared = {arm: rates[1.0] for arm, rates in usable.items() if 1.0 in rates}
        right = {arm: answers.correct(trials) for arm, trials in chosen.items()}
        first, margin, seed = self.names[0], self.setup.margin, self.setup.seed
        findings = list(compare_with(first, right, "{} and {} differ.", margin=margin, seed=seed).values())
        best = max(chosen, key=lambda arm: answers.val_accuracy(chosen[arm]))
        return self.result(
            answers,
            self._headline(right, findings, best),
            findings,
            tables=self._tables(answers, chosen, shared, tuned),
            figures=self._figures(answers, usable, chosen, findings, right),
            values={
                "tuned_lr": {arm: self._lr(factor) for arm, factor in tuned.items()},
                "top1": {arm: rows.mean(axis=1) for arm, rows in right.items()},
                "top1_shared_lr": {arm: answers.correct(t).mean(axis=1) for arm, t in shared.items()},
            },
            predictions=answers.predictions(chosen),
            notes=self._notes(grid, usable),
        )

    def _headline(self, right: dict[str, np.ndarray], findings: Sequence[Finding], best: str) -> str:
        """The comparison that is asked most: CLS with GAP where both are there, else the first two.

        The best of several, chosen by the images that it is reported on, would look better than it is.
        """
        arms = list(right)
        other = "gap" if arms[0] != "gap" and "gap" in arms else arms[1]
        finding = findings[arms[1:].index(other)]
        top = f"Best on validation: {best}, with {fmt.percent(right[best].mean())} of the test images right."
        return f"{finding.verdict.capitalize()}: {finding.sentence} {top}"

    def _lr(self, factor: float) -> float:
        assert self.setup.recipe.lr is not None
        return self.setup.recipe.lr * factor

    def _tables(
        self,
        answers: Answers,
        chosen: dict[str, list[Trial]],
        shared: dict[str, list[Trial]],
        tuned: dict[str, float],
    ) -> list[Table]:
        rows: list[list[Any]] = []
        for arm, trials in chosen.items():
            note = answers.note(trials[0])
            seconds = float(np.median([answers.note(trial)["seconds"] for trial in trials]))
            rows.append(
                [
                    arm,
                    *answers.cells(trials),
                    answers.val_accuracy(trials),
                    self._lr(tuned[arm]),
                    note["parameters"],
                    note["head_parameters"],
                    note["macs"],
                    note["head_macs"],
                    seconds,
                ]
            )
        rows.sort(key=lambda row: -row[1])
        costs = ["validation (%)", "learning rate", "parameters", "of pooling and head", "MACs", "of these"]
        order = sorted(shared, key=lambda arm: -answers.correct(shared[arm]).mean())
        ranks = [
            [place, row[0], order[place - 1] if place <= len(order) else None]
            for place, row in enumerate(rows, 1)
        ]
        return [
            Table(
                "Each head at its own learning rate",
                ["head", *ARM_COLUMNS, *costs, "seconds"],
                rows,
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
                [[arm, *answers.cells(shared[arm])] for arm in order],
            ),
            self._pairs({arm: answers.correct(trials) for arm, trials in chosen.items()}),
        ]

    def _pairs(self, right: dict[str, np.ndarray]) -> Table:
        pairs = list(itertools.combinations(right, 2))
        judged = judge_all(
            [
                Claim(f"{b} and {a} differ.", right[a], right[b], margin=self.setup.margin, names=(a, b))
                for a, b in pairs
            ],
            seed=self.setup.seed,
        )
        return Table(
            "Every pair",
            ["head", "less", "difference (%)", "from (%)", "to (%)", "p, Holm", "p of equivalence, Holm"],
            [
                [b, a, one.estimate, *(one.ci95 or (None, None)), one.p_holm, one.p_equivalence]
                for (a, b), one in zip(pairs, judged, strict=True)
            ],
            f"Each at its own learning rate, paired by seed and image; adjusted over all {len(pairs)} pairs.",
        )

    def _figures(
        self,
        answers: Answers,
        usable: dict[str, dict[float, list[Trial]]],
        chosen: dict[str, list[Trial]],
        findings: Sequence[Finding],
        right: dict[str, np.ndarray],
    ) -> list[Any]:
        arms = list(chosen)
        response = [
            Line(arm, [(self._lr(f), answers.val_accuracy(t)) for f, t in sorted(rates.items())])
            for arm, rates in list(usable.items())[:8]
        ]
        points = []
        for arm, trials in chosen.items():
            mean = mean_interval(right[arm])
            points.append((arm, float(answers.note(trials[0])["macs"]), mean.estimate, mean.ci95))
        matrix = [
            [paired_difference(right[a], right[b]).estimate if a != b else float("nan") for b in arms]
            for a in arms
        ]
        return [
            *forest(
                f"Difference to {arms[0]}",
                {f"{arm} minus {arms[0]}": one for arm, one in zip(arms[1:], findings, strict=True)},
                self.setup.margin,
            ),
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
                arms,
                arms,
                note="Mean difference of test accuracy over seeds and images.",
            ),
        ]

    def _notes(self, grid: dict[str, Any], usable: dict[str, Any]) -> list[str]:
        notes = [
            "Per seed all heads start from the same encoder and see the same images in the same order.",
            "The model after the last epoch counts; no epoch was selected.",
        ]
        if self.setup.recipe.pretrained is None:
            notes.append("Heads that do not read a class token are trained without one.")
        notes += [
            f"{arm}: learning rate {self._lr(factor):g} failed and was left out."
            for arm in grid
            for factor in grid[arm]
            if factor not in usable[arm]
        ]
        return notes


def head_settings(head: str, *, pretrained: bool) -> dict[str, Any]:
    """Settings of ``fit``'s ``model`` for a pooling.

    Args:
        pretrained: Whether the weights have a class token, which is then kept even where it is not read.

    Example:
        >>> head_settings("gap", pretrained=False)
        {'pool': 'gap', 'class_token': False}
    """
    return {"pool": head} | ({} if pretrained or needs_class_token(head) else {"class_token": False})


def best_rate(answers: Answers, rates: dict[float, list[Trial]]) -> float:
    """The factor with the best mean validation accuracy; of equals the one nearest to 1."""
    return max(rates, key=lambda factor: (answers.val_accuracy(rates[factor]), -abs(np.log(factor))))
