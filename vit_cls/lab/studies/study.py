"""What every study has in common: its settings, its trials, and the answers of their models."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError, RunError
from vit_cls.lab.probes.common import check_margin
from vit_cls.lab.results import LabResult, Table
from vit_cls.lab.studies.recipe import DATA_KEYS, MODEL_KEYS, OPTIM_KEYS, Recipe
from vit_cls.lab.studies.trials import ANSWERS, DONE, MODEL, Trial, TrialData, trial_folder
from vit_cls.model.classifier import ImageClassifier
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import Finding
from vit_cls.weights.factory import load

ARM_COLUMNS = ("top-1 (%)", "from (%)", "to (%)", "lowest seed (%)", "highest seed (%)", "seeds", "images")
"""Headers of `Answers.cells`."""


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

    def trial(
        self,
        arm: str,
        seed: int,
        *,
        model: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        data: TrialData | None = None,
        lr_factor: float = 1.0,
        epochs: int | None = None,
        variant: str = "",
        after: Trial | None = None,
    ) -> Trial:
        """One training by the recipe, but for what is given.

        Args:
            model: Settings of ``fit``'s ``model`` on top of the recipe's.
            optim: Settings of ``fit``'s ``optim`` on top of the recipe's.
            data: The images; None takes them as they are.
            epochs: How long; None takes the recipe's.
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
            loader=recipe.part(DATA_KEYS),
            epochs=recipe.epochs if epochs is None else epochs,
            variant=variant,
            after=None if after is None else after.key,
        )


class Answers:
    """What the models of finished trials said about each image.

    Args:
        folder: Folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes: dict[str, dict[str, Any]] = {}
        self._positions: np.ndarray | None = None

    def note(self, trial: Trial) -> dict[str, Any]:
        """What the trial left about itself: costs, seconds, counts, ``error`` where it failed."""
        if trial.key not in self._notes:
            text = (trial_folder(self.folder, trial) / DONE).read_text(encoding="utf-8")
            self._notes[trial.key] = json.loads(text)
        return self._notes[trial.key]

    def failed(self, trial: Trial) -> str | None:
        """Why a training failed, or None."""
        return self.note(trial).get("error")

    def model(self, trial: Trial) -> ImageClassifier:
        """The trained classifier, in evaluation mode on the CPU.

        Raises:
            RunError: If its training failed.
        """
        self._refuse_failed(trial)
        return load(trial_folder(self.folder, trial) / MODEL)

    def probs(self, trial: Trial, part: str = "test") -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and true classes.

        Args:
            part: ``val`` or ``test``.

        Returns:
            float32, shape ``(images, classes)``, and int64, shape ``(images,)``.

        Raises:
            RunError: If its training failed, or it answered for other test images than the trials before.
        """
        self._refuse_failed(trial)
        with np.load(trial_folder(self.folder, trial) / ANSWERS, allow_pickle=False) as arrays:
            if part == "test":
                self._refuse_others(trial, arrays["test_positions"])
            return arrays[f"{part}_probs"], arrays[f"{part}_targets"]

    def correct(self, trials: Sequence[Trial], part: str = "test") -> np.ndarray:
        """Which images each model classified right.

        Args:
            part: ``val`` or ``test``. Validation images differ from seed to seed.

        Returns:
            bool, shape ``(trials, images)``.

        Raises:
            RunError: If a training failed.
        """
        rows = [self.probs(trial, part) for trial in trials]
        return np.stack([probs.argmax(axis=1) == targets for probs, targets in rows])

    def val_accuracy(self, trials: Sequence[Trial]) -> float:
        """Mean share of right validation images; what choices are made by.

        Raises:
            RunError: If a training failed.
        """
        rows = [self.probs(trial, "val") for trial in trials]
        return float(np.mean([(probs.argmax(axis=1) == targets).mean() for probs, targets in rows]))

    def cells(self, trials: Sequence[Trial]) -> list[float | int]:
        """Cells of a table under `ARM_COLUMNS`, on the test images.

        Raises:
            RunError: If a training failed.
        """
        right = self.correct(trials)
        mean, seeds = mean_interval(right), right.mean(axis=1)
        return [mean.estimate, *mean.ci95, float(seeds.min()), float(seeds.max()), mean.seeds, mean.images]

    def predictions(self, arms: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
        """Per-image predictions on the test images, from which every statistic can be done again."""
        first = next(iter(arms.values()))[0]
        parts = first.data.parts(first.seed)
        with np.load(trial_folder(self.folder, first) / ANSWERS, allow_pickle=False) as arrays:
            positions = arrays["test_positions"].tolist()
        found = {
            arm: {str(trial.seed): self.probs(trial)[0].argmax(axis=1).tolist() for trial in trials}
            for arm, trials in arms.items()
        }
        return {
            "class_names": parts.class_names,
            "paths": [parts.test.index.paths[i] for i in positions],
            "targets": self.probs(first)[1].tolist(),
            "predictions": found,
        }

    def _refuse_others(self, trial: Trial, positions: np.ndarray) -> None:
        """Everything here is paired by image."""
        if self._positions is None:
            self._positions = positions
        if not np.array_equal(positions, self._positions):
            raise RunError(
                f"the training {trial.key} answered for {len(positions)} test images, others for "
                f"{len(self._positions)}, and not for the same ones: some file could not be read every time. "
                "Mend or remove it (`vit-cls doctor` names it), and give a new --output."
            )

    def _refuse_failed(self, trial: Trial) -> None:
        error = self.failed(trial)
        if error is not None:
            raise RunError(
                f"the training {trial.key} failed: {error} Mend the cause (often --recipe.lr), delete "
                f"{trial_folder(self.folder, trial)} and run the study again; the others are kept."
            )


class Study(ABC):
    """A question, the trainings that it takes, and the answer.

    Args:
        setup: What all studies share.
    """

    name: ClassVar[str]
    """The word that is typed."""
    question: ClassVar[str]
    """What is asked, as a question."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def arms(self) -> Mapping[str, Any]:
        """Trials, a seed each, by arm; where more than the arm is varied, by that inside of it."""

    def trials(self) -> list[Trial]:
        """Every training that the study takes, each once; those that others start from come first."""
        return list(_flat(self.arms()))

    @abstractmethod
    def analyse(self, answers: Answers) -> LabResult:
        """The answer, once all trials are done.

        Raises:
            RunError: If a training that cannot be done without failed.
        """

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

    def result(
        self,
        answers: Answers,
        headline: str,
        findings: Sequence[Finding],
        *,
        data: Mapping[str, Any] | None = None,
        more_settings: Mapping[str, Any] | None = None,
        **contents: Any,
    ) -> LabResult:
        """What the study has to say.

        Args:
            data: Where the images came from; None means what the trials noted.
            more_settings: On top of `settings`.
            contents: Other fields of `LabResult`.
        """
        return LabResult(
            kind=f"study {self.name}",
            question=self.question,
            headline=headline,
            findings=findings,
            settings={**self.settings(), **(more_settings or {})},
            data=self.data_record(answers, self.trials()) if data is None else data,
            **contents,
        )

    def data_record(self, answers: Answers, trials: Sequence[Trial]) -> dict[str, Any]:
        """Where the images came from, how many there were, and which could not be read."""
        note = answers.note(trials[0])
        failures: dict[str, str] = {}
        for trial in trials:
            failures |= answers.note(trial).get("failures", {})
        return {"origin": note["origin"], **note["data"], "failed": len(failures), "failures": failures}


def _flat(arms: Any) -> Iterator[Trial]:
    if isinstance(arms, Trial):
        yield arms
    else:
        for one in arms.values() if isinstance(arms, Mapping) else arms:
            yield from _flat(one)


PAIRED = "Per seed all start from the same encoder weights and see the same images in the same order."
ONE_RATE = (
    "All are trained at one learning rate, which need not suit them alike: --recipe.lr tries another; "
    "`vit-cls study heads` tunes it for each head."
)
LAST_EPOCH = "The model after the last epoch counts; no epoch was selected."


def train_arms(setup: Setup, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Trial]]:
    """One training for each arm and seed, at the recipe's learning rate.

    Args:
        setup: What all studies share.
        arms: Settings of ``fit``'s ``model`` by arm, on top of the recipe's.

    Returns:
        Trials by arm, a seed each; the seeds are the same for all.
    """
    return {
        arm: [setup.trial(arm, seed, model=model) for seed in setup.all_seeds] for arm, model in arms.items()
    }


def arms_table(title: str, answers: Answers, arms: Mapping[str, Sequence[Trial]], note: str = "") -> Table:
    """How every arm does on the test images, and what it costs.

    Raises:
        RunError: If a training failed.
    """
    rows: list[list[Any]] = []
    for arm, trials in arms.items():
        notes = [answers.note(trial) for trial in trials]
        seconds = float(np.median([one["seconds"] for one in notes]))
        val = answers.val_accuracy(trials)
        rows.append([arm, *answers.cells(trials), val, notes[0].get("parameters"), seconds])
    columns = ["arm", *ARM_COLUMNS, "validation (%)", "parameters", "seconds"]
    return Table(title, columns, rows, f"Test images; seconds of one training. {note}".rstrip())


def headline(finding: Finding, more: str = "") -> str:
    """First line of a report."""
    return f"{finding.verdict.capitalize()}: {finding.sentence} {more}".rstrip()


def refuse_pretrained(setup: Setup, study: str, why: str) -> None:
    """Say no to weights that the study would have to take apart.

    Args:
        setup: What all studies share.

    Raises:
        ConfigError: If ``--recipe.pretrained`` was given.
    """
    if setup.recipe.pretrained is not None:
        raise ConfigError(
            f"study {study} trains from fresh weights, since {why}; got --recipe.pretrained "
            f"{setup.recipe.pretrained}. Leave it out."
        )
