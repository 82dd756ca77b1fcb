"""``study specialise``: do several class tokens come to know different things?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.data.partition import Partition
from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.lab.results import Figure, LabResult, Table, forest
from vit_cls.lab.studies.class_token_views import (
    COLLAPSED,
    FROM_TO,
    ArmTokens,
    alike_table,
    cosine_map,
    knowledge_table,
    layer_chart,
    token_pictures,
)
from vit_cls.lab.studies.class_tokens import collect_class_tokens, token_answers
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers, Setup, Study, train_arms
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.metrics import METRICS, Scored
from vit_cls.stats.random_effects import paired_difference
from vit_cls.stats.verdicts import GREATER, LESS, REFUTED, SUPPORTED, Claim, Finding, judge_all

VARIANTS = {"mean": "multicls", "concat": "multicls-concat", "diverse": "multicls-diverse"}
"""Poolings by the word that is typed."""
ONE, REGISTER = "cls", "extra register"
COSINE = "of cosine"
COSINE_MARGIN = 0.01
"""The largest difference of cosines that does not matter; the margin of a study is of accuracies."""


class SpecialiseStudy(Study):
    """Models with 1, 2, 4 ... class tokens, and with one class token and a register.

    Per seed all arms start from the same encoder and see the same images in the same order. Class tokens
    start apart: equal ones would stay equal for ever.

    Args:
        setup: What all studies share.
        counts: Numbers of class tokens, 1 among them: the one that others are compared with.
        variants: How the head reads several: ``mean``, always there; ``concat`` side by side; ``diverse``, a
            sum of differently weighted tokens in which equal ones cancel.

    Raises:
        ConfigError: If a count or a variant is unknown, named twice, or missing.

    Source:
        Two class tokens that end with a cosine of 0.999: DeiT, https://arxiv.org/abs/2012.12877, section 5.3.
        ``diverse``: Multi-CLS BERT, https://arxiv.org/abs/2210.05043. Registers:
        https://arxiv.org/abs/2309.16588.
    """

    name = "specialise"
    question = "Do several class tokens come to know different things?"

    def __init__(
        self,
        setup: Setup,
        counts: Sequence[int] = (1, 2, 4),
        variants: Sequence[str] = ("mean", "concat", "diverse"),
    ) -> None:
        super().__init__(setup)
        self.counts = sorted(counts)
        self.variants = list(variants)
        given = ", ".join(map(str, counts)) or "none"
        if 1 not in self.counts or self.counts[0] < 1 or len(self.counts) < 2:
            raise ConfigError(
                f"--counts needs 1, which others are compared with, and a larger number; got {given}. "
                "Write --counts 1,2,4."
            )
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ConfigError(
                    f"--variants must be of {', '.join(VARIANTS)}; got {variant!r}."
                    f"{did_you_mean(variant, VARIANTS)}"
                )
        if "mean" not in self.variants:
            named = ", ".join(self.variants) or "none"
            raise ConfigError(f"--variants needs mean, which others are compared with; got {named}.")
        for option, values in (("--counts", self.counts), ("--variants", self.variants)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{option} must name each one once; got {', '.join(map(str, values))}.")

    @property
    def several(self) -> dict[str, str]:
        """Poolings of the arms with several class tokens."""
        counts = [count for count in self.counts if count > 1]
        return {f"{word} {k}": f"{VARIANTS[word]}:{k}" for word in self.variants for k in counts}

    def arms(self) -> dict[str, list[Trial]]:
        """Trials by arm, a seed each."""
        models: dict[str, dict[str, Any]] = {ONE: {"pool": "cls"}, REGISTER: {"pool": "cls", "reg_tokens": 1}}
        models |= {arm: {"pool": pool} for arm, pool in self.several.items()}
        return train_arms(self.setup, models)

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        grid = self.arms()
        right = {arm: answers.correct(trials) for arm, trials in grid.items()}
        parts = {seed: grid[ONE][0].data.parts(seed) for seed in self.setup.all_seeds}
        measured = {arm: measure_arm(answers, grid[arm], parts) for arm in self.several}
        findings = self._findings(measured, right)
        return self.result(
            answers,
            self._headline(findings),
            findings,
            tables=[
                alike_table(measured, seed=self.setup.seed),
                knowledge_table(measured, seed=self.setup.seed),
                self._accuracy(answers, grid, right),
            ],
            figures=self._figures(measured, right, parts[self.setup.seed]),
            more_settings={"cosine_margin": COSINE_MARGIN},
            values=self._values(measured, right),
            predictions=answers.predictions(grid),
            notes=self._notes(measured),
        )

    def _headline(self, findings: Sequence[Finding]) -> str:
        """Whether the most tokens end parallel, and what they gain over one."""
        parallel, gain = findings[0], findings[len(self.counts) - 1]
        return f"{parallel.verdict.capitalize()}: {parallel.sentence} {gain.sentence}"

    def _findings(self, measured: dict[str, ArmTokens], right: dict[str, np.ndarray]) -> list[Finding]:
        counts, margin = [count for count in reversed(self.counts) if count > 1], self.setup.margin
        parallel = [
            Claim(
                f"{k} class tokens read by their mean end parallel: their cosine is above {COLLAPSED}.",
                np.zeros_like(measured[f"mean {k}"].cosines),
                measured[f"mean {k}"].cosines,
                expect=GREATER,
                margin=COSINE_MARGIN,
                names=("0", f"the cosine of {k} tokens"),
                unit=COSINE,
                at_least=COLLAPSED,
            )
            for k in counts
        ]
        gains = [
            Claim(
                f"{k} class tokens read by their mean beat {words}.",
                right[arm],
                right[f"mean {k}"],
                expect=GREATER,
                margin=margin,
                names=(arm, f"mean {k}"),
            )
            for k in counts
            for arm, words in ((ONE, "one"), (REGISTER, "one and a register"))
        ]
        lower = [
            Claim(
                f"The diverse head lowers the cosine of {k} class tokens.",
                measured[f"mean {k}"].cosines,
                measured[f"diverse {k}"].cosines,
                expect=LESS,
                margin=COSINE_MARGIN,
                names=(f"the cosine of mean {k}", f"that of diverse {k}"),
                unit=COSINE,
                words=("higher", "lower"),
            )
            for k in counts
            if "diverse" in self.variants
        ]
        found = judge_all([*parallel, *gains, *lower], seed=self.setup.seed)
        spoken = [
            _with_sentence(one, k, measured[f"mean {k}"], self.setup.seed)
            for one, k in zip(found, counts, strict=False)
        ]
        return [*spoken, *found[len(spoken) :]]

    def _accuracy(
        self, answers: Answers, grid: dict[str, list[Trial]], right: dict[str, np.ndarray]
    ) -> Table:
        rows: list[list[Any]] = []
        for arm, trials in grid.items():
            note = answers.note(trials[0])
            errors = [_ece(answers, trial) for trial in trials]
            gains = [
                [None] * 3 if arm == other else [found.estimate, *found.ci95]
                for other in (ONE, REGISTER)
                for found in [paired_difference(right[other], right[arm], seed=self.setup.seed)]
            ]
            calibration = [float(np.mean(errors)), min(errors), max(errors)]
            costs = [note["tokens"], note["parameters"]]
            rows.append([arm, *costs, *answers.cells(trials), *gains[0], *gains[1], *calibration])
        columns = ["arm", "tokens", "parameters", *ARM_COLUMNS, f"minus {ONE} (%)", *FROM_TO]
        columns += [f"minus {REGISTER} (%)", *FROM_TO, "ECE", "lowest seed", "highest seed"]
        return Table(
            "Accuracy",
            columns,
            rows,
            "Test images. Intervals of differences are paired and not adjusted for their number.",
        )

    def _figures(
        self, measured: dict[str, ArmTokens], right: dict[str, np.ndarray], parts: Partition
    ) -> list[Figure]:
        gains = {
            f"{arm} minus {other}": paired_difference(right[other], right[arm], seed=self.setup.seed)
            for other in (ONE, REGISTER)
            for arm in measured
        }
        most = [f"{word} {self.counts[-1]}" for word in ("mean", "diverse") if word in self.variants]
        first = {arm: measured[arm].tokens[0] for arm in most}
        figures: list[Figure] = [
            layer_chart(measured),
            *forest("Accuracy against one class token", gains, self.setup.margin),
            *(cosine_map(arm, tokens) for arm, tokens in first.items()),
        ]
        pictures = token_pictures(parts.test, first)
        return figures if pictures is None else [*figures, pictures]

    def _values(self, measured: dict[str, ArmTokens], right: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "top1": {arm: rows.mean(axis=1) for arm, rows in right.items()},
            "output_cosine": {arm: one.cosines.mean(axis=1) for arm, one in measured.items()},
            "layer_cosine": {arm: one.layer_cosines.mean(axis=2).T for arm, one in measured.items()},
            "other_image_cosine": {
                arm: one.other_image_cosine(self.setup.seed) for arm, one in measured.items()
            },
            "token_top1": {
                arm: [each.right.mean(axis=0) for each in one.answers] for arm, one in measured.items()
            },
            "independent_models": {
                arm: None if (found := one.against_seeds(self.setup.seed)) is None else vars(found)
                for arm, one in measured.items()
            },
            "attention_apart": {
                arm: [None if each.overlap is None else each.overlap.mean() for each in one.tokens]
                for arm, one in measured.items()
            },
        }

    def _notes(self, measured: dict[str, ArmTokens]) -> list[str]:
        assert self.setup.recipe.lr is not None
        notes = [
            f"One learning rate for all arms, {self.setup.recipe.lr:g}, not tuned.",
            "Several class tokens start apart (standard deviation 0.02; a single one 1e-6): equal ones would "
            "stay equal for ever.",
            f"The arm {REGISTER} has as many tokens as two class tokens, and a head that reads one of them.",
            "A head that reads the mean reads each token alone as well. With other heads each token has a "
            "ridge classifier, its penalty chosen on validation: the two kinds are not comparable in level.",
            "Tokens have no order that holds from seed to seed; worst and best token are of any seed, on the "
            "test images, and so too far apart.",
            "Parallel tokens say little where the same token is as parallel to itself on other images.",
        ]
        if self.setup.seeds == 1:
            notes.append(
                "Whether class tokens of one model are more parallel than those of independent models takes "
                "two seeds at least, and was not tested."
            )
        if any(each.overlap is None for one in measured.values() for each in one.tokens):
            notes.append("Attention weights are not known for this architecture, and were left out.")
        return notes


def measure_arm(answers: Answers, trials: Sequence[Trial], parts: dict[int, Partition]) -> ArmTokens:
    """Watch the class tokens of the models of one arm.

    Raises:
        RunError: If a training failed.
    """
    tokens, said = [], []
    for trial in trials:
        model = answers.model(trial)
        tokens.append(collect_class_tokens(model, parts[trial.seed].test))
        said.append(token_answers(model, parts[trial.seed], tokens[-1]))
    return ArmTokens(tokens, said)


def _ece(answers: Answers, trial: Trial) -> float:
    probs, targets = answers.probs(trial)
    return METRICS["ece"].estimate(Scored(probs.astype(np.float64), targets, trial.seed)).value


def _with_sentence(finding: Finding, count: int, measured: ArmTokens, seed: int) -> Finding:
    """A claim on one quantity, not on a difference: a sentence of its own, and what to compare it with."""
    low, high = finding.ci95 or (0.0, 0.0)
    seeds, images = finding.counts["seeds"], finding.counts["images"]
    place = {SUPPORTED: "above", REFUTED: "below"}.get(finding.verdict, "not told from")
    found = measured.against_seeds(seed)
    others = ""
    if found is not None:
        p = fmt.p_value(found.p)
        others = f", tokens of independent models {found.independent:.3f} (p {p})"
    needed = f"; needed: {finding.needed}" if finding.needed else ""
    sentence = (
        f"the mean cosine of {count} class tokens after the final norm is {finding.estimate:.3f} "
        f"({fmt.interval((low, min(1.0, high)), fmt.three_decimals)}; {seeds} "
        f"seed{'s' if seeds > 1 else ''}, {fmt.count(images)} images), {place} {COLLAPSED:g}; "
        f"the same token on another image has {measured.other_image_cosine(seed):.3f}{others}{needed}."
    )
    return dataclasses.replace(finding, sentence=sentence)
