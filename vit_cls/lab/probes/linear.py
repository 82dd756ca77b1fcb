"""The probe ``linear``: how well a linear classifier does on each read of the frozen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_cls.lab.probes.base import FrozenParts
from vit_cls.lab.probes.classifiers import ClassifierProbe
from vit_cls.lab.probes.common import chosen_pools
from vit_cls.lab.probes.linear_fits import Fit, LinearSettings, fit_pool
from vit_cls.model.token_reader import TokenReader

DINOV2_BLOCKS = (1, 4)


@dataclass(frozen=True, kw_only=True)
class LinearProbe(ClassifierProbe):
    """Fit a linear classifier on each read, choose on validation, test once.

    Args:
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.
        pools: What is read; none means the usual pools that the model has, or those of the protocol.
        protocol: ``ours``; ``dinov2``: class tokens of the last 1 or 4 blocks, with and without the mean of
            the patches, the best of the four on validation; ``mae``: BatchNorm without parameters, then
            logistic regression.
        solver: ``ridge`` (closed form) or ``logistic`` (L-BFGS).
        refit: Whether the classifier is fitted again, on train and validation, with the strength chosen.
        max_steps: Steps that L-BFGS may take.

    Raises:
        ConfigError: If a choice is unknown or the margin is no share.

    Source:
        Ridge on targets of -1 and 1: big_vision, ``evaluators/fewshot_lsr.py``. ``dinov2``:
        https://arxiv.org/abs/2304.07193, B.3, and ``dinov2/eval/linear.py``. ``mae``:
        https://arxiv.org/abs/2111.06377, A.1, and ``main_linprobe.py``.
    """

    protocol: str = "ours"
    solver: str = "ridge"
    refit: bool = False
    max_steps: int = 2000

    name = "linear"
    question = "Which read of the frozen tokens does a linear classifier get the most out of?"
    title = "Linear classifiers on frozen reads, test part"
    metric = "Test top-1"
    winner = "Reading {}"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fitting()  # refuses what it cannot be

    def fitting(self) -> LinearSettings:
        """How classifiers are fitted."""
        return LinearSettings(self.protocol, self.solver, self.refit, self.max_steps)

    def chosen(self, reader: TokenReader) -> tuple[list[str], list[str]]:
        """See `PoolProbe.chosen`."""
        if self.protocol != "dinov2" or self.pools:
            return super().chosen(reader)
        blocks = sorted({min(count, reader.depth) for count in DINOV2_BLOCKS})
        tokens = ["cls" if count == 1 else f"last:{count}" for count in blocks]
        return chosen_pools([f"{token}{mean}" for token in tokens for mean in ("", "+gap")], reader)

    def fit(self, pool: str, frozen: FrozenParts) -> Fit:
        """See `ClassifierProbe.fit`."""
        return fit_pool(pool, frozen.train, frozen.val, self.fitting())

    def tested(self, pools: Sequence[str], reference: str, best: str) -> list[str]:
        """See `ClassifierProbe.tested`."""
        return [pool for pool in pools if self.protocol != "dinov2" or pool in (reference, best)]

    def columns(self, fits: Mapping[str, Fit]) -> dict[str, list[Any]]:
        """See `ClassifierProbe.columns`."""
        return {
            "penalty" if self.fitting().ridge else "C": [fit.strength for fit in fits.values()],
            "parameters": [fit.weight.size + fit.bias.size for fit in fits.values()],
        }

    def table_note(self, frozen: FrozenParts) -> str:
        """See `ClassifierProbe.table_note`."""
        ridge, grid = self.fitting().ridge, self.fitting().strengths
        unit = ", in multiples of the mean variance of the standardised features" if ridge else ""
        return (
            f"The {'penalty' if ridge else 'C'} was chosen on {len(frozen.val)} validation images from "
            f"{len(grid)} values, {grid[0]:g} to {grid[-1]:g}{unit}."
        )

    def details(self, fits: Mapping[str, Fit], frozen: FrozenParts) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `ClassifierProbe.details`."""
        return {"strengths": self.fitting().strengths}, {
            "strength": {pool: fit.strength for pool, fit in fits.items()}
        }

    def notes(self, fits: Mapping[str, Fit], frozen: FrozenParts) -> list[str]:
        """See `ClassifierProbe.notes`."""
        slow = [pool for pool, fit in fits.items() if not fit.converged]
        notes = [f"L-BFGS had not converged after {self.max_steps} steps for {', '.join(slow)}."] * bool(slow)
        notes.append(
            MAE_NOTE if self.protocol == "mae" else RIDGE_NOTE if self.solver == "ridge" else LOGISTIC_NOTE
        )
        if self.protocol == "dinov2":
            notes.append(DINOV2_NOTE)
        on = "train and validation, with the strength chosen before" if self.refit else "train alone"
        return [*notes, f"The classifiers that are tested were fitted on {on}."]


RIDGE_NOTE = (
    "Ridge regression in closed form, float64, on features standardised by the train part and targets of -1 "
    "and 1, one against all; the intercept is not penalised."
)
LOGISTIC_NOTE = "Multinomial logistic regression by L-BFGS, on features standardised by the train part."
DINOV2_NOTE = (
    "Protocol dinov2: class tokens of the last 1 or 4 blocks, with or without the mean of the patches, "
    "val-selected. As published, 13 learning rates of SGD take part in the choice, and the images that "
    "choose are those that are reported; here the test part is others, and only the chosen read and the "
    "class token are tested."
)
MAE_NOTE = (
    "Protocol mae: BatchNorm without parameters (eps 1e-6; here with the statistics of the whole train "
    "part), then a linear layer with cross-entropy. As published, LARS trains it for 90 epochs with random "
    "crops and flips and without weight decay; here L-BFGS does, without augmentation, with a penalty chosen "
    "on validation."
)
