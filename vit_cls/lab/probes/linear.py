"""The probe ``linear``: how well a linear classifier does on each read of the frozen tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    accuracy_cells,
    check_parts,
    chosen_ways,
    compare_with,
    data_of,
    failures_note,
    forest,
    in_words,
    predictions_of,
    reference_way,
)
from vit_cls.lab.probes.linear_fits import Fit, LinearSettings, fit_linear
from vit_cls.lab.results import LabResult, Table
from vit_cls.model.tokens import TokenLayout

DINOV2_BLOCKS = (1, 4)


def linear_ways(settings: LinearSettings, layout: TokenLayout, depth: int) -> tuple[list[str], list[str]]:
    """What the probe reads, so that the layers it needs can be frozen.

    Args:
        settings: Of the probe.
        layout: The model's tokens.
        depth: The model's blocks.

    Returns:
        The ways, and notes about those that were left out.

    Raises:
        ConfigError: If a named way is unknown, or reads what the model does not have.

    Example:
        >>> linear_ways(LinearSettings(protocol="dinov2"), TokenLayout(True, 0, (2, 2)), 12)[0]
        ['cls', 'cls+gap', 'last:4', 'last:4+gap']
    """
    if settings.protocol != "dinov2" or settings.ways:
        return chosen_ways(settings.ways, layout, depth)
    blocks = sorted({min(count, depth) for count in DINOV2_BLOCKS})
    tokens = ["cls" if count == 1 else f"last:{count}" for count in blocks]
    return chosen_ways([f"{one}{mean}" for one in tokens for mean in ("", "+gap")], layout, depth)


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
        train: Frozen tokens to fit on; the layers that `linear_ways` reads.
        val: Likewise, to choose the strength (and with ``dinov2`` the read) by.
        test: Likewise, to report on.
        settings: Choices; None means the defaults.
        origin: Of the partition, for the result.

    Raises:
        ConfigError: If the model cannot be read that way.
        DataError: If the parts do not belong together or are too small.

    Source:
        Ridge on targets of -1 and 1: big_vision, ``evaluators/fewshot_lsr.py``. ``dinov2``:
        https://arxiv.org/abs/2304.07193, B.3, and ``dinov2/eval/linear.py``. ``mae``:
        https://arxiv.org/abs/2111.06377, A.1, and ``main_linprobe.py``.
    """
    started = time.perf_counter()
    settings = settings or LinearSettings()
    check_parts(train.rows, val.rows, test.rows)
    ways, notes = linear_ways(settings, train.layout, train.depth)
    fits = {way: _fit(way, train, val, settings) for way in ways}
    best = max(ways, key=lambda way: fits[way].val_right)  # of equal ones the first
    reference = reference_way(ways)
    tested = [way for way in ways if settings.protocol != "dinov2" or way in (reference, best)]
    preds = {way: fits[way].predict(test.read(way)) for way in tested}
    right = {way: values == test.labels for way, values in preds.items()}
    findings = compare_with(reference, right, what="test top-1", margin=settings.margin, seed=settings.seed)
    others = [way for way in tested if way != reference]
    headline = f"Reading {best}, the best on {len(val)} validation images: {in_words(right[best])}."
    if findings:
        headline += f" {findings[others.index(best) if best in others else 0].sentence}"
    slow = [way for way in ways if not fits[way].converged]
    if slow:
        notes.append(f"L-BFGS had not converged after {settings.max_steps} steps for {', '.join(slow)}.")
    parts = {"train": train.rows, "val": val.rows, "test": test.rows}
    return LabResult(
        "probe linear",
        "Which read of the frozen tokens does a linear classifier get the most out of?",
        headline,
        findings,
        [_table(ways, fits, right, settings, len(val))],
        forest(f"Test top-1 less that of {reference}", others, findings, settings.margin),
        {**asdict(settings), "ways": ways, "reference": reference, "strengths": settings.strengths},
        data_of(origin, parts),
        {
            "top1": {way: float(values.mean()) for way, values in right.items()},
            "strength": {way: fit.strength for way, fit in fits.items()},
            "val_right": {way: fit.val_right for way, fit in fits.items()},
            "best_on_val": best,
        },
        predictions_of(test.rows, preds),
        [*notes, *_protocol_notes(settings), *failures_note(parts)],
        time.perf_counter() - started,
    )


def _fit(way: str, train: FrozenTokens, val: FrozenTokens, settings: LinearSettings) -> Fit:
    return fit_linear(
        (train.read(way), train.labels),
        (val.read(way), val.labels),
        num_classes=len(train.class_names),
        settings=settings,
    )


def _table(
    ways: Sequence[str],
    fits: Mapping[str, Fit],
    right: Mapping[str, np.ndarray],
    settings: LinearSettings,
    val_images: int,
) -> Table:
    strength, grid = "penalty" if settings.ridge else "C", settings.strengths
    rows = [
        [
            way,
            *(accuracy_cells(right[way]) if way in right else (None,) * 5),
            fits[way].val_right / val_images,
            fits[way].val_right,
            fits[way].strength,
            fits[way].weight.size + fits[way].bias.size,
        ]
        for way in ways
    ]
    columns = ["read", *ACCURACY_COLUMNS, "val top-1 (%)", "val right", strength, "parameters"]
    unit = ", in multiples of the mean variance of the standardised features" if settings.ridge else ""
    note = (
        f"Intervals: Wilson's, 95 %. The {strength} was chosen on {val_images} validation images from "
        f"{len(grid)} values, {grid[0]:g} to {grid[-1]:g}{unit}."
    )
    if len(right) < len(ways):
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
