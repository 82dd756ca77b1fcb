"""Linear classifiers of frozen features: ridge in closed form or logistic regression, by validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls.checks import check_choice
from vit_cls.lab.features import FrozenTokens
from vit_cls.stats.least_squares import PENALTIES, chosen_classifier, one_against_all, ridge_fits

PROTOCOLS = ("ours", "dinov2", "mae")
SOLVERS = ("ridge", "logistic")
STRENGTHS = tuple(float(10.0**power) for power in range(-4, 4))
"""The C of logistic regression: the loss of all images is multiplied by it, so it depends on their number."""
NORM_EPS = 1e-6
"""Of MAE's BatchNorm before the linear layer, ``main_linprobe.py``."""


@dataclass(frozen=True)
class LinearSettings:
    """How a linear classifier is fitted; see the options of `vit_cls.lab.probes.linear.LinearProbe`.

    Raises:
        ConfigError: If a choice is unknown.
    """

    protocol: str = "ours"
    solver: str = "ridge"
    refit: bool = False
    max_steps: int = 2000

    def __post_init__(self) -> None:
        check_choice("--protocol", self.protocol, PROTOCOLS)
        check_choice("--solver", self.solver, SOLVERS)

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
        """The class of each row of ``(rows, features)``."""
        scores = np.asarray(features, dtype=np.float64) @ self.weight + self.bias
        return scores.argmax(axis=1)


def fit_linear(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    settings: LinearSettings | None = None,
) -> Fit:
    """Fit a classifier for each strength, and choose by validation accuracy.

    Args:
        train: Features, shape ``(rows, features)``, and labels, int64, shape ``(rows,)``.
    """
    settings = settings or LinearSettings()
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


def fit_pool(
    pool: str, train: FrozenTokens, val: FrozenTokens, settings: LinearSettings | None = None
) -> Fit:
    """`fit_linear` on what a pool reads of frozen tokens."""
    return fit_linear(
        (train.read(pool), train.labels),
        (val.read(pool), val.labels),
        num_classes=len(train.class_names),
        settings=settings,
    )
