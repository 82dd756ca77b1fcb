"""The probe ``layers``: what a linear classifier reads off the tokens before and after each block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import freeze_reads
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    MARGIN,
    accuracy_cells,
    accuracy_text,
    check_margin,
    checked_parts,
    chosen_pools,
    compare_with,
    data_of,
    failures_note,
    predictions_of,
    settings_record,
)
from vit_cls.lab.probes.linear import Fit, LinearSettings, fit_linear
from vit_cls.lab.results import MOST_LINES, LabResult, Line, LineChart, Table
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_reader import TokenReader

LAYER_POOLS = ("cls", "gap", "max")
Pair = tuple[str, int]
"""A pool, and the layer."""


@dataclass(frozen=True)
class LayerSettings:
    """Choices of the probe.

    Args:
        pools: What is read at each layer; none means cls, gap and max, as far as the model has them.
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.

    Raises:
        ConfigError: If the margin is no share.
    """

    pools: Sequence[str] = ()
    margin: float = MARGIN
    seed: int = 0

    def __post_init__(self) -> None:
        check_margin(self.margin)


def layers(
    classifier: ImageClassifier,
    partition: Partition,
    *,
    settings: LayerSettings | None = None,
    config: InferenceConfig | None = None,
    cache: Path | None = None,
) -> LabResult:
    """Fit a ridge probe on each read before the first and after each block.

    Every layer is read in one pass over the images; the reads are kept in memory, and in the cache if there
    is one, but not the tokens.

    Args:
        settings: Choices; None means the defaults.

    Raises:
        ConfigError: If the model cannot be read by a pool at every layer.
        DataError: If a part is too small.

    Source:
        Linear probes of layers: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644.
    """
    started = time.perf_counter()
    settings = settings or LayerSettings()
    reader = TokenReader(classifier.model)
    depth = reader.depth
    pools, notes = chosen_pools(settings.pools, reader, default=LAYER_POOLS)
    for pool in pools:
        reader.layers(pool, 0)
    reads, rows = {}, {}
    for part in PARTS:
        source = getattr(partition, part)
        reads[part], rows[part] = freeze_reads(
            classifier, source, range(depth + 1), pools, config=config, cache=cache
        )
    checked_parts(*rows.values())
    labels = {part: one.labels for part, one in rows.items()}
    fits: dict[Pair, Fit] = {}
    preds: dict[Pair, np.ndarray] = {}
    for pair in list(reads["train"]):
        train, val, test = (reads[part].pop(pair) for part in PARTS)  # let go, one by one
        fits[pair] = fit_linear(
            (train, labels["train"]),
            (val, labels["val"]),
            num_classes=len(rows["train"].class_names),
            settings=LinearSettings(),
        )
        preds[pair] = fits[pair].predict(test)
    right = {pair: values == labels["test"] for pair, values in preds.items()}
    # Each layer against the last, the nearest to it first.
    scores = {_place(pools[0], layer, depth): right[pools[0], layer] for layer in reversed(range(depth + 1))}
    claim = "Reading {} and {} give different test top-1."
    last = _place(pools[0], depth, depth)
    findings = list(compare_with(last, scores, claim, margin=settings.margin, seed=settings.seed).values())
    headline = (
        f"Reading {pools[0]} after the last of {depth} blocks: {accuracy_text(right[pools[0], depth])}."
    )
    return LabResult(
        "probe layers",
        "After which block can a linear classifier read the class off the tokens?",
        f"{headline} {findings[0].sentence}",
        findings,
        [_table(right, fits, len(labels["val"]))],
        [_chart(right, pools, depth)],
        settings_record(settings, pools, layers=list(range(depth + 1))),
        data_of(partition.origin, rows),
        {
            "top1": {
                pool: [float(right[pool, layer].mean()) for layer in range(depth + 1)] for pool in pools
            },
            "strength": {pool: [fits[pool, layer].strength for layer in range(depth + 1)] for pool in pools},
        },
        predictions_of(rows["test"], {f"{pool} {layer}": values for (pool, layer), values in preds.items()}),
        [*notes, NOTE, *failures_note(rows)],
        time.perf_counter() - started,
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
