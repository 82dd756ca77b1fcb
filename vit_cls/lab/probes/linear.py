"""The probe ``linear``: how well a linear classifier does on each read of the frozen tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls.checks import check_choice
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    MARGIN,
    READINGS_DIFFER,
    accuracy_cells,
    accuracy_text,
    check_margin,
    checked_parts,
    chosen_pools,
    compare_with,
    data_of,
    failures_note,
    predictions_of,
    reference_pool,
    sentence_on,
    settings_record,
)
from vit_cls.lab.results import LabResult, Table, forest
from vit_cls.model.token_reader import TokenReader
from vit_cls.stats.least_squares import PENALTIES, chosen_classifier, one_against_all, ridge_fits

PROTOCOLS = ("ours", "dinov2", "mae")
SOLVERS = ("ridge", "logistic")
STRENGTHS = tuple(float(10.0**power) for power in range(-4, 4))
"""The C of logistic regression: the loss of all images is multiplied by it, so it depends on their number."""
NORM_EPS = 1e-6
"""Of MAE's BatchNorm before the linear layer, ``main_linprobe.py``."""


@dataclass(frozen=True)
class LinearSettings:
    """Choices of the probe.

    Args:
        pools: What is read; none means the usual pools that the model has, or those of the protocol.
        protocol: ``ours``; ``dinov2``: class tokens of the last 1 or 4 blocks, with and without the mean of
            the patches, the best of the four on validation; ``mae``: BatchNorm without parameters, then
            logistic regression.
        solver: ``ridge`` (closed form) or ``logistic`` (L-BFGS).
        refit: Whether the classifier is fitted again, on train and validation, with the strength chosen.
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.
        max_steps: Steps that L-BFGS may take.

    Raises:
        ConfigError: If a choice is unknown or the margin is no share.
    """

    pools: Sequence[str] = ()
    protocol: str = "ours"
    solver: str = "ridge"
    refit: bool = False
    margin: float = MARGIN
    seed: int = 0
    max_steps: int = 2000

    def __post_init__(self) -> None:
        check_choice("--protocol", self.protocol, PROTOCOLS)
        check_choice("--solver", self.solver, SOLVERS)
        check_margin(self.margin)

    @property
    def ridge(self) -> bool:
        """Whether classifiers are fitted in closed form."""
        return self.solver == "ridge" and self.protocol != "mae"

    @property
    def strengths(self) -> tuple[float, ...]:
        """What is chosen from: penalties of ridge, or values of C."""
        return PENALTIES if self.ridge else STRENGTHS


@dataclass(frozen=True)
class Fit:
    """A linear classifier of one read, chosen on validation.

    Args:
        weight: Shape ``(features, classes)``.
        bias: Shape ``(classes,)``.
        strength: The penalty of ridge, or the C of logistic regression.
        val_right: Validation images that it classifies right.
        converged: Whether the solver did.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    val_right: int
    converged: bool = True

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The class of each row.

        Args:
            features: Shape ``(rows, features)``.
        """
        scores = np.asarray(features, dtype=np.float64) @ self.weight + self.bias
        return scores.argmax(axis=1)


def fit_linear(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    settings: LinearSettings,
) -> Fit:
    """Fit a classifier for each strength, and choose by validation accuracy.

    Args:
        train: Features, shape ``(rows, features)``, and labels, int64, shape ``(rows,)``.
    """
    if settings.ridge:
        best = chosen_classifier(*train, *val, num_classes=num_classes)
        fit = Fit(best.weight, best.bias, best.penalty, 0)
    else:
        fit = _chosen_logistic(train, val, num_classes, settings)
    right = int((fit.predict(val[0]) == val[1]).sum())
    if settings.refit:
        both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
        fit = _fit_again(both, fit.strength, num_classes, settings)
    return Fit(fit.weight, fit.bias, fit.strength, right, fit.converged)


def _fit_again(
    data: tuple[np.ndarray, np.ndarray], strength: float, num_classes: int, settings: LinearSettings
) -> Fit:
    if settings.ridge:
        (again,) = ridge_fits(data[0], one_against_all(data[1], num_classes), [strength])
        return Fit(again.weight, again.bias, strength, 0)
    return _logistic(data, [strength], num_classes, settings)[0]


def _chosen_logistic(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    settings: LinearSettings,
) -> Fit:
    """The C with the highest validation accuracy; of equal ones the smallest, the strongest penalty."""
    fits = _logistic(train, STRENGTHS, num_classes, settings)
    return max(fits, key=lambda fit: (int((fit.predict(val[0]) == val[1]).sum()), -fit.strength))


def _logistic(
    data: tuple[np.ndarray, np.ndarray],
    strengths: Sequence[float],
    num_classes: int,
    settings: LinearSettings,
) -> list[Fit]:
    """One fit a strength, each from where the one before ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = np.asarray(data[0], dtype=np.float64)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    eps = NORM_EPS if settings.protocol == "mae" else 1e-12
    scale = np.sqrt(variance + eps)
    z = (x - mean) / scale
    model = LogisticRegression(solver="lbfgs", max_iter=settings.max_steps, warm_start=True)
    fits = []
    for strength in strengths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(C=strength).fit(z, data[1])
        coefficients, intercept = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn keeps the score of the second alone
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercept = np.concatenate([-intercept, intercept]) / 2
        weight = np.zeros((x.shape[1], num_classes))
        bias = np.full(num_classes, -np.inf)  # a class without training images is never predicted
        weight[:, model.classes_] = coefficients.T / scale[:, None]
        bias[model.classes_] = intercept - mean @ weight[:, model.classes_]
        slow = any(issubclass(one.category, ConvergenceWarning) for one in caught)
        fits.append(Fit(weight, bias, strength, 0, converged=not slow))
    return fits


DINOV2_BLOCKS = (1, 4)


def linear_pools(settings: LinearSettings, reader: TokenReader) -> tuple[list[str], list[str]]:
    """What the probe reads, so that the layers it needs can be frozen.

    Returns:
        The pools, and notes about those that were left out.

    Raises:
        ConfigError: If a named pool is unknown, or reads what the model does not have.
    """
    if settings.protocol != "dinov2" or settings.pools:
        return chosen_pools(settings.pools, reader)
    blocks = sorted({min(count, reader.depth) for count in DINOV2_BLOCKS})
    tokens = ["cls" if count == 1 else f"last:{count}" for count in blocks]
    return chosen_pools([f"{one}{mean}" for one in tokens for mean in ("", "+gap")], reader)


def linear(
    train: FrozenTokens,
    val: FrozenTokens,
    test: FrozenTokens,
    *,
    settings: LinearSettings | None = None,
    origin: str = "",
) -> LabResult:
    """Fit a linear classifier on each read, choose on validation, test once.

    Args:
        val: Likewise, to choose the strength (and with ``dinov2`` the read) by.
        settings: Choices; None means the defaults.

    Raises:
        ConfigError: If the model cannot be read by a pool.
        DataError: If the parts do not belong together or are too small.

    Source:
        Ridge on targets of -1 and 1: big_vision, ``evaluators/fewshot_lsr.py``. ``dinov2``:
        https://arxiv.org/abs/2304.07193, B.3, and ``dinov2/eval/linear.py``. ``mae``:
        https://arxiv.org/abs/2111.06377, A.1, and ``main_linprobe.py``.
    """
    started = time.perf_counter()
    settings = settings or LinearSettings()
    parts = checked_parts(train.rows, val.rows, test.rows)
    pools, notes = linear_pools(settings, train.reader)
    fits = {pool: fit_pool(pool, train, val, settings) for pool in pools}
    best = max(pools, key=lambda pool: fits[pool].val_right)  # of equal ones the first
    reference = reference_pool(pools)
    tested = [pool for pool in pools if settings.protocol != "dinov2" or pool in (reference, best)]
    preds = {pool: fits[pool].predict(test.read(pool)) for pool in tested}
    right = {pool: values == test.labels for pool, values in preds.items()}
    findings = compare_with(reference, right, READINGS_DIFFER, margin=settings.margin, seed=settings.seed)
    headline = f"Reading {best}, the best on {len(val)} validation images: {accuracy_text(right[best])}."
    slow = [pool for pool in pools if not fits[pool].converged]
    if slow:
        notes.append(f"L-BFGS had not converged after {settings.max_steps} steps for {', '.join(slow)}.")
    return LabResult(
        "probe linear",
        "Which read of the frozen tokens does a linear classifier get the most out of?",
        headline + sentence_on(best, findings),
        list(findings.values()),
        [_table(pools, fits, right, settings, len(val))],
        forest(f"Test top-1 less that of {reference}", findings, settings.margin),
        settings_record(settings, pools, reference=reference, strengths=settings.strengths),
        data_of(origin, parts),
        {
            "top1": {pool: float(values.mean()) for pool, values in right.items()},
            "strength": {pool: fit.strength for pool, fit in fits.items()},
            "val_right": {pool: fit.val_right for pool, fit in fits.items()},
            "best_on_val": best,
        },
        predictions_of(test.rows, preds),
        [*notes, *_protocol_notes(settings), *failures_note(parts)],
        time.perf_counter() - started,
    )


def fit_pool(pool: str, train: FrozenTokens, val: FrozenTokens, settings: LinearSettings) -> Fit:
    """`fit_linear` on what a pool reads of frozen tokens."""
    return fit_linear(
        (train.read(pool), train.labels),
        (val.read(pool), val.labels),
        num_classes=len(train.class_names),
        settings=settings,
    )


def _table(
    pools: Sequence[str],
    fits: Mapping[str, Fit],
    right: Mapping[str, np.ndarray],
    settings: LinearSettings,
    val_images: int,
) -> Table:
    strength, grid = "penalty" if settings.ridge else "C", settings.strengths
    rows = [
        [
            pool,
            *(accuracy_cells(right[pool]) if pool in right else (None,) * 5),
            fits[pool].val_right / val_images,
            fits[pool].val_right,
            fits[pool].strength,
            fits[pool].weight.size + fits[pool].bias.size,
        ]
        for pool in pools
    ]
    columns = ["read", *ACCURACY_COLUMNS, "val top-1 (%)", "val right", strength, "parameters"]
    unit = ", in multiples of the mean variance of the standardised features" if settings.ridge else ""
    note = (
        f"Intervals: Wilson's, 95 %. The {strength} was chosen on {val_images} validation images from "
        f"{len(grid)} values, {grid[0]:g} to {grid[-1]:g}{unit}."
    )
    if len(right) < len(pools):
        note += " A dash: not tested, for it was not chosen."
    return Table("Linear classifiers on frozen reads, test part", columns, rows, note)


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


def _protocol_notes(settings: LinearSettings) -> list[str]:
    notes = [RIDGE_NOTE if settings.solver == "ridge" else LOGISTIC_NOTE]
    if settings.protocol == "mae":
        notes = [MAE_NOTE]
    if settings.protocol == "dinov2":
        notes.append(DINOV2_NOTE)
    fitted_on = "train and validation, with the strength chosen before" if settings.refit else "train alone"
    return [*notes, f"The classifiers that are tested were fitted on {fitted_on}."]
