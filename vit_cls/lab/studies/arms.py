"""Arms that are trained alike: their trials, the table of how they do, and the chart of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls.errors import ConfigError
from vit_cls.lab.results import ForestChart, Table
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers, Setup
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import paired_difference
from vit_cls.stats.verdicts import Finding

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

    Args:
        title: What the table shows.
        answers: Of the models.
        arms: Trials of each arm, a seed each.
        note: How to read it, besides that these are test images.

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


def difference_chart(
    title: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], margin: float, *, seed: int
) -> ForestChart:
    """Paired differences below each other.

    Args:
        title: What the chart shows.
        pairs: Scores of A and of B by label; drawn is B minus A.
        margin: The largest difference that does not matter.
        seed: Of the resampling.
    """
    found = {label: paired_difference(a, b, seed=seed) for label, (a, b) in pairs.items()}
    return ForestChart(title, [(label, one.estimate, one.ci95) for label, one in found.items()], margin)


def headline(finding: Finding, more: str = "") -> str:
    """First line of a report.

    Args:
        finding: The one that answers the question.
        more: Another sentence.
    """
    return f"{finding.verdict.capitalize()}: {finding.sentence} {more}".rstrip()


def refuse_pretrained(setup: Setup, study: str, why: str) -> None:
    """Say no to weights that the study would have to take apart.

    Args:
        setup: What all studies share.
        study: Its name.
        why: What the weights have fixed, as a clause.

    Raises:
        ConfigError: If ``--recipe.pretrained`` was given.
    """
    if setup.recipe.pretrained is not None:
        raise ConfigError(
            f"study {study} trains from fresh weights, since {why}; got --recipe.pretrained "
            f"{setup.recipe.pretrained}. Leave it out."
        )
