"""What every study has in common: its settings, its trainings, and how what they answer becomes a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vit_cls.checks import check_finite, check_range
from vit_cls.errors import ConfigError
from vit_cls.lab.probes.common import check_margin
from vit_cls.lab.results import Figure, LabResult, Table
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.recipe import DATA_KEYS, MODEL_KEYS, OPTIM_KEYS, Recipe
from vit_cls.lab.studies.trials import Trial, TrialData
from vit_cls.model.pooling import needs_class_token, parse_pool
from vit_cls.stats.random_effects import Mean, mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, Finding, judge_all

FROM_TO = ("from (%)", "to (%)")
ARM_COLUMNS = ("top-1 (%)", *FROM_TO, "lowest seed (%)", "highest seed (%)", "seeds", "images")
"""Headers of `score_cells`."""
PAIRED = "Per seed all start from the same encoder weights and see the same images in the same order."
ONE_RATE = (
    "All are trained at one learning rate, which need not suit them alike: --recipe.lr tries another; "
    "`vit-cls study heads` tunes it for each head."
)
LAST_EPOCH = "The model after the last epoch counts; no epoch was selected."


@dataclass(frozen=True)
class Setup:
    """Settings that all studies share.

    Args:
        data: ``digits``, or an image folder.
        folder: Folder of the study; trials and reports go there.
        seeds: How often everything is repeated, each time from other weights, order and validation images.
        seed: The first seed; also of the resampling.
        margin: The largest difference of accuracies that does not matter, in (0, 1), stated before.
        val_fraction: Share of each class to validate on, where that is split here.
        test_fraction: Share of each class to test on, likewise; the same images for every seed.
        recipe: How models are trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    data: str
    folder: Path
    seeds: int = 3
    seed: int = 0
    margin: float = 0.01
    val_fraction: float = 0.1
    test_fraction: float = 0.25
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_range("--seeds", self.seeds, at_least=1)
        check_finite("--", self)
        check_range("--seed", self.seed, at_least=0)
        check_margin(self.margin)
        object.__setattr__(self, "recipe", self.recipe.resolved(self.data))

    @property
    def all_seeds(self) -> list[int]:
        """Every seed."""
        return list(range(self.seed, self.seed + self.seeds))

    @property
    def trial_data(self) -> TrialData:
        """The images as they are."""
        return TrialData(self.data, self.val_fraction, self.test_fraction)

    def head(self, pool: str) -> dict[str, Any]:
        """Settings of ``fit``'s ``model`` for a pooling; weights keep their class token where it is not read.

        Example:
            >>> Setup("digits", Path("study")).head("gap")
            {'pool': 'gap', 'class_token': False}
        """
        kept = self.recipe.pretrained is not None or needs_class_token(pool)
        return {"pool": pool} | ({} if kept else {"class_token": False})

    def trial(
        self,
        arm: str,
        seed: int,
        *,
        model: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        loader: Mapping[str, Any] | None = None,
        data: TrialData | None = None,
        lr_factor: float = 1.0,
        epochs: int | None = None,
        variant: str = "",
        after: Trial | None = None,
    ) -> Trial:
        """One training by the recipe, but for what is given.

        Args:
            model: Settings of ``fit``'s ``model`` on top of the recipe's; so ``optim`` and ``loader``.
            after: The trial whose model it starts from, with that model's architecture.
        """
        recipe = self.recipe
        assert recipe.lr is not None
        assert recipe.epochs is not None
        base = recipe.part(MODEL_KEYS) if after is None else {"name": "auto"}
        settings = recipe.part(OPTIM_KEYS) | {"lr": recipe.lr * lr_factor}
        return Trial(
            arm,
            seed,
            data or self.trial_data,
            model={**base, **(model or {})},
            optim={**settings, **(optim or {})},
            loader={**recipe.part(DATA_KEYS), **(loader or {})},
            epochs=recipe.epochs if epochs is None else epochs,
            variant=variant,
            after=None if after is None else after.key,
        )

    def trials(self, arm: str, **settings: Any) -> list[Trial]:
        """`trial` under every seed."""
        return [self.trial(arm, seed, **settings) for seed in self.all_seeds]

    def arms(self, models: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Trial]]:
        """A training under every seed by arm, from settings of ``fit``'s ``model`` on top of the recipe's."""
        return {arm: self.trials(arm, model=model) for arm, model in models.items()}


@dataclass(frozen=True)
class Control:
    """What a study finds where there is nothing to find, such as in untrained encoders or shuffled labels.

    Args:
        name: Its key among the result's ``controls``, and its row in their table.
        right: As of an arm, bool, shape ``(seeds, images)``.
    """

    name: str
    right: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What the models of a study are found to do, which its claims, tables and figures are about.

    Args:
        arms: Trials, a seed each, by the arm's name in reports.
        right: Which test images the models of each arm had right, bool, shape ``(seeds, images)``.
        more: What else the study measures.
    """

    answers: Answers
    arms: Mapping[str, Sequence[Trial]]
    right: Mapping[str, np.ndarray]
    more: Any = None

    @classmethod
    def of(cls, answers: Answers, arms: Mapping[str, Sequence[Trial]], more: Any = None) -> Measured:
        """With what the arms had right."""
        return cls(answers, arms, {arm: answers.correct(trials) for arm, trials in arms.items()}, more)

    def claims(self, rows: Iterable[tuple[str, str, str, str]], margin: float) -> list[Claim]:
        """A claim for each row: its text, an arm, another arm, and what is expected of that one."""
        return [
            Claim(text, self.right[one], self.right[other], expect, margin, (one, other))
            for text, one, other, expect in rows
        ]


class Study(ABC):
    """A question, the trainings that it takes, and the answer.

    A study gives its arms and its claims, and of the other parts of a result those that are its own. Its
    attributes are its options: they are recorded, and a folder is only resumed where they are the same.

    Args:
        setup: What all studies share.

    Raises:
        ConfigError: If weights are to be loaded that the study would have to take apart.
    """

    name: ClassVar[str]
    """The word that is typed."""
    question: ClassVar[str]
    """What is asked, as a question."""
    why_fresh: ClassVar[str] = ""
    """Why weights cannot be loaded, where that is so."""
    arms_title: ClassVar[str] = "Arms"
    """Title of the table of arms."""
    arms_note: ClassVar[str] = ""
    """How to read it."""
    remarks: ClassVar[Sequence[str]] = ()
    """What a reader of this study needs to know beside what holds for all."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        if self.why_fresh and setup.recipe.pretrained is not None:
            raise ConfigError(
                f"study {self.name} trains from fresh weights, since {self.why_fresh}; got "
                f"--recipe.pretrained {setup.recipe.pretrained}. Leave it out."
            )

    @abstractmethod
    def arms(self) -> Mapping[str, Any]:
        """Trials, a seed each, by arm; where more than the arm is varied, by that inside of it."""

    def control_arms(self) -> dict[str, list[Trial]]:
        """Trainings after which there is nothing to find, a seed each, by the name of the control."""
        return {}

    def trials(self) -> list[Trial]:
        """Every training that the study takes, each once; those that others start from come first."""
        return [trial for arms in (self.arms(), self.control_arms()) for t in _lists(arms) for trial in t]

    def label(self, trial: Trial) -> str:
        """Name of a trial's arm in reports."""
        return f"{trial.arm}, {trial.variant}" if trial.variant else trial.arm

    def analyse(self, answers: Answers) -> LabResult:
        """The answer, once all trials are done.

        Raises:
            RunError: If a training that cannot be done without failed.
        """
        measured = self.measure(answers)
        findings = self.judge(measured)
        controls = self.controls(measured)
        tables, values = list(self.tables(measured, findings)), self.values(measured, findings)
        if controls:
            rows = [[control.name, *score_cells(control.right)] for control in controls]
            tables.append(Table("Controls", ["control", *ARM_COLUMNS], rows, "Test images."))
            values["controls"] = {control.name: control.right.mean(axis=1) for control in controls}
        return LabResult(
            kind=f"study {self.name}",
            question=self.question,
            headline=self.headline(measured, findings),
            findings=findings,
            tables=tables,
            figures=self.figures(measured, findings),
            settings={**self.settings(), **self.derived_settings()},
            data=self.data(measured),
            values=values,
            predictions=self.predictions(measured),
            notes=self.notes(measured),
        )

    def measure(self, answers: Answers) -> Measured:
        """What the models do: where nothing else is said, which test images they have right."""
        return Measured.of(answers, {self.label(trials[0]): trials for trials in _lists(self.arms())})

    def judge(self, measured: Measured) -> list[Finding]:
        """Verdicts on the claims, adjusted for how many there are."""
        return judge_all(self.claims(measured), seed=self.setup.seed)

    def claims(self, measured: Measured) -> list[Claim]:
        """What is claimed, the most important first."""
        raise NotImplementedError(f"study {self.name} says what it claims, or judges itself")

    def controls(self, measured: Measured) -> list[Control]:
        """What is found where there is nothing to find; control arms first."""
        return [Control(name, measured.answers.correct(t)) for name, t in self.control_arms().items()]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """First line of a report."""
        return verdict_line(findings[0])

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        """In reading order; controls come after them."""
        return [arms_table(self.arms_title, measured, self.arms_note)]

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        """In reading order."""
        return []

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        """Numbers for scripts."""
        return {"top1": {arm: rows.mean(axis=1) for arm, rows in measured.right.items()}}

    def predictions(self, measured: Measured) -> dict[str, Any]:
        """Per-image predictions."""
        return measured.answers.predictions(measured.arms)

    def notes(self, measured: Measured) -> list[str]:
        """Sentences that a reader needs to judge the numbers."""
        return [PAIRED, *self.remarks, ONE_RATE, LAST_EPOCH]

    def data(self, measured: Measured) -> dict[str, Any]:
        """Where the images came from, how many there were, and which could not be read."""
        trials, answers = self.trials(), measured.answers
        failures: dict[str, str] = {}
        for trial in trials:
            failures |= answers.note(trial).get("failures", {})
        note = answers.note(trials[0])
        return {"origin": note["origin"], **note["data"], "failed": len(failures), "failures": failures}

    @cached_property
    def options(self) -> dict[str, Any]:
        """The study's own settings, for its record."""
        return {key: value for key, value in vars(self).items() if key not in ("setup", "options")}

    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain data."""
        setup = self.setup
        return {
            "data": setup.data,
            "seeds": setup.all_seeds,
            "margin": setup.margin,
            "val_fraction": setup.val_fraction,
            "test_fraction": setup.test_fraction,
            "recipe": {k: v for k, v in vars(setup.recipe).items() if v is not None},
            **self.options,
        }

    def derived_settings(self) -> dict[str, Any]:
        """What follows from the settings and is worth a line in the result."""
        return {}


def _lists(arms: Any) -> Iterator[list[Trial]]:
    """The lists of trials at the ends of nested arms."""
    if isinstance(arms, Mapping):
        for inner in arms.values():
            yield from _lists(inner)
    else:
        yield arms


def check_pools(pools: Sequence[str]) -> None:
    """Refuse what is no pooling; ConfigError names ``--heads``."""
    for pool in pools:
        parse_pool(pool, "--heads")


def bounded(mean: Mean, least: float = 0.0, most: float = 1.0) -> tuple[float, float, float]:
    """Estimate and 95 % interval of what lies between two bounds."""
    return mean.estimate, max(least, mean.ci95[0]), min(most, mean.ci95[1])


def score_cells(scores: np.ndarray) -> list[float | int]:
    """Cells of a table under `ARM_COLUMNS`, of shares of shape ``(seeds, images)``."""
    mean, seeds = mean_interval(scores), scores.mean(axis=1)
    return [*bounded(mean), float(seeds.min()), float(seeds.max()), mean.seeds, mean.images]


def arms_table(title: str, measured: Measured, note: str = "") -> Table:
    """How every arm does on the test images, and what it costs."""
    answers = measured.answers
    rows: list[list[Any]] = []
    for arm, trials in measured.arms.items():
        costs = answers.note(trials[0]).get("parameters"), answers.seconds(trials)
        rows.append([arm, *score_cells(measured.right[arm]), answers.val_accuracy(trials), *costs])
    columns = ["arm", *ARM_COLUMNS, "validation (%)", "parameters", "seconds"]
    return Table(title, columns, rows, f"Test images; seconds of one training. {note}".rstrip())


def slope_claim(
    text: str, heads: tuple[str, str], slopes: tuple[np.ndarray, np.ndarray], margin: float, unit: str
) -> Claim:
    """That scores of the second head rise more steeply than those of the first; see `least_squares_slope`."""
    names = f"the slope of {heads[0]}", f"the slope of {heads[1]}"
    return Claim(text, *slopes, GREATER, margin, names, unit, words=("higher", "lower"))


def verdict_line(finding: Finding, more: str = "") -> str:
    """A verdict, its sentence, and what else is to be said."""
    return f"{finding.verdict.capitalize()}: {finding.sentence} {more}".rstrip()


def least_squares_slope(x: Sequence[float], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Slope over ``x`` of the scores of every seed and image.

    A linear combination of the scores, so that its mean is the slope of the mean scores.

    Args:
        scores: For each ``x``, of which there are two or more, shape ``(seeds, images)``.
    """
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    return np.tensordot(centred / (centred**2).sum(), np.stack(scores).astype(np.float64), axes=1)
