"""The probe ``tokens``: how well a linear classifier does on each patch token, against cls and gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.lab.probes.base import FrozenParts, Probe, Subject
from vit_cls.lab.probes.common import ACCURACY_COLUMNS, accuracy_cells, possible_pools, predictions_of
from vit_cls.lab.probes.linear_fits import fit_pool
from vit_cls.lab.results import HeatMap, LabResult, Table, forest
from vit_cls.stats.random_effects import mean_interval

SINGLE = "the average single patch"
NOTE = (
    "A ridge probe of its own for each patch token, its penalty chosen on validation. The mean over patches "
    "is taken for each image, as the share of its patches whose probe was right, and compared over images. "
    "The best patch is the best on the test part, so its accuracy is optimistic; it is shown for the spread."
)


@dataclass(frozen=True, kw_only=True)
class TokensProbe(Probe):
    """Fit a ridge probe on every patch token of its own, and on cls and gap.

    Args:
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.

    Raises:
        ConfigError: If the margin is no share.

    Source:
        Raghu et al. 2021, https://arxiv.org/abs/2108.08810, figure 11.
    """

    name = "tokens"
    question = "Does a single patch token know what the class token, or the mean of all patches, knows?"

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        return self.analyse(subject.freeze())

    def analyse(self, frozen: FrozenParts) -> LabResult:
        """The answer, of tokens that are frozen already."""
        layout, test = frozen.train.layout, frozen.test
        pooled, notes = possible_pools(["cls", "gap"], layout)
        patches = [f"token:{patch}" for patch in range(layout.num_patches)]
        preds, strengths = {}, {}
        for pool in [*pooled, *patches]:
            fit = fit_pool(pool, frozen.train, frozen.val)
            preds[pool], strengths[pool] = fit.predict(test.read(pool)), fit.strength
        right = {pool: values == test.labels for pool, values in preds.items()}
        single = np.mean([right[patch] for patch in patches], axis=0)
        scores = {SINGLE: single, **{pool: right[pool].astype(np.float64) for pool in pooled}}
        findings = self.compare(SINGLE, scores)
        means = np.array([right[patch].mean() for patch in patches])
        low, high = mean_interval(single).ci95
        headline = (
            f"A single patch token of {len(patches)} gives {fmt.percent(single.mean())} on average "
            f"({fmt.interval((max(low, 0.0), min(high, 1.0)), fmt.bare_percent)}, {len(test)} images; from "
            f"{fmt.bare_percent(means.min())} to {fmt.percent(means.max())} by patch). "
            f"{findings[pooled[0]].sentence}"
        )
        return self.result(
            headline,
            list(findings.values()),
            tables=[_table(right, single, pooled, patches)],
            figures=[
                _heat_map(means, frozen.train.grid_size, {p: float(right[p].mean()) for p in pooled}),
                *forest("Test top-1 less that of the average single patch", findings, self.margin),
            ],
            settings={"ways": [*pooled, *patches], "margin": self.margin, "seed": self.seed},
            parts=frozen.rows,
            origin=frozen.origin,
            values={
                "top1": {pool: float(values.mean()) for pool, values in right.items()},
                "mean_single_patch": float(single.mean()),
                "strength": strengths,
            },
            predictions=predictions_of(test.rows, preds),
            notes=[*notes, NOTE],
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
