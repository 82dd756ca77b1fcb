"""The probe ``tokens``: how well a linear classifier does on each patch token, against cls and gap."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    MARGIN,
    READINGS_DIFFER,
    accuracy_cells,
    check_margin,
    checked_parts,
    compare_with,
    data_of,
    failures_note,
    possible_pools,
    predictions_of,
    settings_record,
)
from vit_cls.lab.probes.linear import LinearSettings, fit_pool
from vit_cls.lab.results import HeatMap, LabResult, Table, forest
from vit_cls.stats.random_effects import mean_interval

SINGLE = "the average single patch"
NOTE = (
    "A ridge probe of its own for each patch token, its penalty chosen on validation. The mean over patches "
    "is taken for each image, as the share of its patches whose probe was right, and compared over images. "
    "The best patch is the best on the test part, so its accuracy is optimistic; it is shown for the spread."
)


@dataclass(frozen=True)
class TokenSettings:
    """Choices of the probe.

    Args:
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.

    Raises:
        ConfigError: If the margin is no share.
    """

    margin: float = MARGIN
    seed: int = 0

    def __post_init__(self) -> None:
        check_margin(self.margin)


def tokens(
    train: FrozenTokens,
    val: FrozenTokens,
    test: FrozenTokens,
    *,
    settings: TokenSettings | None = None,
    origin: str = "",
) -> LabResult:
    """Fit a ridge probe on every patch token of its own, and on cls and gap.

    Args:
        settings: Choices; None means the defaults.

    Raises:
        DataError: If the parts do not belong together or are too small.

    Source:
        Raghu et al. 2021, https://arxiv.org/abs/2108.08810, figure 11.
    """
    started = time.perf_counter()
    settings = settings or TokenSettings()
    parts = checked_parts(train.rows, val.rows, test.rows)
    pooled, notes = possible_pools(["cls", "gap"], train.layout)
    patches = [f"token:{patch}" for patch in range(train.layout.num_patches)]
    preds, strengths = {}, {}
    for pool in [*pooled, *patches]:
        fit = fit_pool(pool, train, val, LinearSettings())
        preds[pool], strengths[pool] = fit.predict(test.read(pool)), fit.strength
    right = {pool: values == test.labels for pool, values in preds.items()}
    single = np.mean([right[patch] for patch in patches], axis=0)
    scores = {SINGLE: single, **{pool: right[pool].astype(np.float64) for pool in pooled}}
    findings = compare_with(SINGLE, scores, READINGS_DIFFER, margin=settings.margin, seed=settings.seed)
    means = np.array([right[patch].mean() for patch in patches])
    low, high = mean_interval(single).ci95
    headline = (
        f"A single patch token of {len(patches)} gives {fmt.percent(single.mean())} on average "
        f"({fmt.interval((max(low, 0.0), min(high, 1.0)), fmt.bare_percent)}, {len(test)} images; from "
        f"{fmt.bare_percent(means.min())} to {fmt.percent(means.max())} by patch). "
        f"{findings[pooled[0]].sentence}"
    )
    return LabResult(
        "probe tokens",
        "Does a single patch token know what the class token, or the mean of all patches, knows?",
        headline,
        list(findings.values()),
        [_table(right, single, pooled, patches)],
        [
            _heat_map(means, train.grid_size, {pool: float(right[pool].mean()) for pool in pooled}),
            *forest("Test top-1 less that of the average single patch", findings, settings.margin),
        ],
        settings_record(settings, [*pooled, *patches]),
        data_of(origin, parts),
        {
            "top1": {pool: float(values.mean()) for pool, values in right.items()},
            "mean_single_patch": float(single.mean()),
            "strength": strengths,
        },
        predictions_of(test.rows, preds),
        [*notes, NOTE, *failures_note(parts)],
        time.perf_counter() - started,
    )


def _table(
    right: Mapping[str, np.ndarray], single: np.ndarray, pooled: Sequence[str], patches: Sequence[str]
) -> Table:
    """The pooled reads, the mean patch, and the patches that stand out."""
    low, high = mean_interval(single).ci95
    counts = [int(right[patch].sum()) for patch in patches]
    worst, best = patches[int(np.argmin(counts))], patches[int(np.argmax(counts))]
    rows: list[list[str | int | float | None]] = [[pool, *accuracy_cells(right[pool])] for pool in pooled]
    rows.append([SINGLE, float(single.mean()), max(low, 0.0), min(high, 1.0), None, len(single)])
    rows.append([f"worst patch ({worst})", *accuracy_cells(right[worst])])
    rows.append([f"best patch ({best})", *accuracy_cells(right[best])])
    note = "Intervals: Wilson's, 95 %; of the mean patch, over images."
    return Table("Ridge probes on single tokens, test part", ["read", *ACCURACY_COLUMNS], rows, note)


def _heat_map(means: np.ndarray, grid_size: tuple[int, int], pooled: Mapping[str, float]) -> HeatMap:
    shown = ", ".join(f"{pool} {fmt.percent(value)}" for pool, value in pooled.items())
    note = f"One cell a patch, as the image lies. For comparison: {shown}."
    grid = means.reshape(grid_size)  # patches are in raster order
    return HeatMap("Test top-1 of a probe on each single patch", grid.tolist(), note=note)
