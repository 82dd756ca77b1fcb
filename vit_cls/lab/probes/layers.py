"""The probe ``layers``: what a linear classifier reads off the tokens before and after each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_cls.data.parts import PARTS
from vit_cls.lab.probes.base import Probe, Subject
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    accuracy_cells,
    accuracy_text,
    chosen_pools,
    predictions_of,
)
from vit_cls.lab.probes.linear_fits import Fit, fit_linear
from vit_cls.lab.results import MOST_LINES, LabResult, Line, LineChart, Table

LAYER_POOLS = ("cls", "gap", "max")
Pair = tuple[str, int]
"""A pool, and the layer."""


@dataclass(frozen=True, kw_only=True)
class LayersProbe(Probe):
    """Fit a ridge probe on each read before the first and after each block.

    Every layer is read in one pass over the images; the reads are kept in memory, and in the cache if there
    is one, but not the tokens.

    Args:
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.
        pools: What is read at each layer; none means cls, gap and max, as far as the model has them.

    Raises:
        ConfigError: If the margin is no share.

    Source:
        Linear probes of layers: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644.
    """

    pools: Sequence[str] = ()

    name = "layers"
    question = "After which block can a linear classifier read the class off the tokens?"
    claim = "Reading {} and {} give different test top-1."

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        reader = subject.reader
        depth = reader.depth
        pools, notes = chosen_pools(self.pools, reader, default=LAYER_POOLS)
        for pool in pools:
            reader.layers(pool, 0)  # refuses what some layer cannot be read by
        reads, rows = subject.read_layers(range(depth + 1), pools)
        fits: dict[Pair, Fit] = {}
        preds: dict[Pair, np.ndarray] = {}
        for pair in list(reads["train"]):
            train, val, test = (reads[part].pop(pair) for part in PARTS)  # let go, one by one
            fits[pair] = fit_linear(
                (train, rows["train"].labels),
                (val, rows["val"].labels),
                num_classes=len(rows["train"].class_names),
            )
            preds[pair] = fits[pair].predict(test)
        right = {pair: values == rows["test"].labels for pair, values in preds.items()}
        # Each layer against the last, the nearest to it first.
        scores = {_place(pools[0], n, depth): right[pools[0], n] for n in reversed(range(depth + 1))}
        findings = list(self.compare(_place(pools[0], depth, depth), scores).values())
        last = accuracy_text(right[pools[0], depth])
        layers = list(range(depth + 1))
        settings = {"ways": pools, "margin": self.margin, "seed": self.seed, "layers": layers}
        return self.result(
            f"Reading {pools[0]} after the last of {depth} blocks: {last}. {findings[0].sentence}",
            findings,
            tables=[_table(right, fits, len(rows["val"].labels))],
            figures=[_chart(right, pools, depth)],
            settings=settings,
            parts=rows,
            origin=subject.parts.origin,
            values={
                "top1": {pool: [float(right[pool, n].mean()) for n in layers] for pool in pools},
                "strength": {pool: [fits[pool, n].strength for n in layers] for pool in pools},
            },
            predictions=predictions_of(
                rows["test"], {f"{pool} {n}": values for (pool, n), values in preds.items()}
            ),
            notes=[*notes, NOTE],
        )


NOTE = (
    "Ridge regression in closed form for each read and layer, the penalty chosen on validation. Tokens "
    "between blocks pass the model's final norm, which was trained for the last ones. That the class can be "
    "read off a layer does not say that the model uses it."
)


def _place(pool: str, layer: int, depth: int) -> str:
    if layer == 0:
        return f"{pool} before the first block"
    return f"{pool} after {'the last block' if layer == depth else f'block {layer}'}"


def _table(right: Mapping[Pair, np.ndarray], fits: Mapping[Pair, Fit], val_images: int) -> Table:
    rows: list[list[str | int | float | None]] = [
        [
            pool,
            layer,
            *accuracy_cells(values),
            fits[pool, layer].val_right / val_images,
            fits[pool, layer].strength,
        ]
        for (pool, layer), values in right.items()
    ]
    columns = ["read", "layer", *ACCURACY_COLUMNS, "val top-1 (%)", "penalty"]
    note = (
        "Layer 0 is before the first block. Intervals: Wilson's, 95 %. The penalty was chosen on "
        f"{val_images} validation images, in multiples of the mean variance of the standardised features."
    )
    return Table("Ridge probes by layer, test part", columns, rows, note)


def _chart(right: Mapping[Pair, np.ndarray], pools: Sequence[str], depth: int) -> LineChart:
    lines = []
    for pool in pools[:MOST_LINES]:
        cells = [accuracy_cells(right[pool, layer]) for layer in range(depth + 1)]
        points = [(float(layer), one[0]) for layer, one in enumerate(cells)]
        lines.append(Line(pool, points, [(one[1], one[2]) for one in cells]))
    note = "Test top-1 of ridge probes; bands are Wilson's 95 % intervals. 0 is before the first block."
    if len(pools) > MOST_LINES:
        note += f" Drawn: the first {MOST_LINES} of {len(pools)} reads; the others are in the table."
    return LineChart("What can be read off each layer", "block", "test top-1", lines, note=note)
