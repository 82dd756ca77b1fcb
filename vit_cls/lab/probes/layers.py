"""The probe ``layers``: what a linear classifier reads off the tokens before and after each block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vit_cls.data.partition import Partition
from vit_cls.data.splits import PARTS
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import freeze_reads
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    MARGIN,
    accuracy_cells,
    check_margin,
    check_parts,
    chosen_ways,
    data_of,
    failures_note,
    in_words,
    predictions_of,
)
from vit_cls.lab.probes.linear_fits import Fit, LinearSettings, fit_linear
from vit_cls.lab.reads import layers_of, parse_way
from vit_cls.lab.results import MOST_LINES, LabResult, Line, LineChart, Table
from vit_cls.model.classifier import ImageClassifier
from vit_cls.stats.verdicts import Claim, Finding, judge_all

LAYER_WAYS = ("cls", "gap", "max")
Pair = tuple[str, int]
"""A way of reading, and the layer."""


@dataclass(frozen=True)
class LayerSettings:
    """Choices of the probe.

    Args:
        ways: What is read at each layer; none means cls, gap and max, as far as the model has them.
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.

    Raises:
        ConfigError: If the margin is no share.
    """

    ways: Sequence[str] = ()
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
        classifier: The frozen model.
        partition: Its images.
        settings: Choices; None means the defaults.
        config: How the model is run; None takes the defaults.
        cache: A folder that keeps the reads; None keeps none.

    Raises:
        ConfigError: If the model cannot be read that way at every layer.
        DataError: If a part is too small.

    Source:
        Linear probes of layers: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644.
    """
    started = time.perf_counter()
    settings = settings or LayerSettings()
    depth, layout = len(classifier.model.blocks), classifier.model.layout
    ways, notes = chosen_ways(settings.ways, layout, depth, default=LAYER_WAYS)
    for way in ways:
        layers_of(parse_way(way, layout, depth), 0)
    reads, rows = {}, {}
    for part in PARTS:
        source = getattr(partition, part)
        reads[part], rows[part] = freeze_reads(
            classifier, source, range(depth + 1), ways, config=config, cache=cache
        )
    check_parts(*rows.values())
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
    findings = _findings(right, ways[0], depth, settings)
    headline = f"Reading {ways[0]} after the last of {depth} blocks: {in_words(right[ways[0], depth])}."
    return LabResult(
        "probe layers",
        "After which block can a linear classifier read the class off the tokens?",
        f"{headline} {findings[0].sentence}",
        findings,
        [_table(right, fits, len(labels["val"]))],
        [_chart(right, ways, depth)],
        {**asdict(settings), "ways": ways, "layers": list(range(depth + 1))},
        data_of(partition.origin, rows),
        {
            "top1": {way: [float(right[way, layer].mean()) for layer in range(depth + 1)] for way in ways},
            "strength": {way: [fits[way, layer].strength for layer in range(depth + 1)] for way in ways},
        },
        predictions_of(rows["test"], {f"{way} {layer}": values for (way, layer), values in preds.items()}),
        [*notes, NOTE, *failures_note(rows)],
        time.perf_counter() - started,
    )


NOTE = (
    "Ridge regression in closed form for each read and layer, the penalty chosen on validation. Tokens "
    "between blocks pass the model's final norm, which was trained for the last ones. That the class can be "
    "read off a layer does not say that the model uses it."
)


def _place(way: str, layer: int, depth: int) -> str:
    if layer == 0:
        return f"{way} before the first block"
    return f"{way} after {'the last block' if layer == depth else f'block {layer}'}"


def _findings(
    right: Mapping[Pair, np.ndarray], way: str, depth: int, settings: LayerSettings
) -> list[Finding]:
    """Each layer against the last, the nearest to it first."""
    last = _place(way, depth, depth)
    claims = [
        Claim(
            f"Reading {_place(way, layer, depth)} and {last} give different test top-1.",
            right[way, depth][None],
            right[way, layer][None],
            expect="differs",
            margin=settings.margin,
            names=(last, _place(way, layer, depth)),
        )
        for layer in reversed(range(depth))
    ]
    return judge_all(claims, seed=settings.seed)


def _table(right: Mapping[Pair, np.ndarray], fits: Mapping[Pair, Fit], val_images: int) -> Table:
    rows: list[list[str | int | float | None]] = [
        [
            way,
            layer,
            *accuracy_cells(values),
            fits[way, layer].val_right / val_images,
            fits[way, layer].strength,
        ]
        for (way, layer), values in right.items()
    ]
    columns = ["read", "layer", *ACCURACY_COLUMNS, "val top-1 (%)", "penalty"]
    note = (
        "Layer 0 is before the first block. Intervals: Wilson's, 95 %. The penalty was chosen on "
        f"{val_images} validation images, in multiples of the mean variance of the standardised features."
    )
    return Table("Ridge probes by layer, test part", columns, rows, note)


def _chart(right: Mapping[Pair, np.ndarray], ways: Sequence[str], depth: int) -> LineChart:
    lines = []
    for way in ways[:MOST_LINES]:
        cells = [accuracy_cells(right[way, layer]) for layer in range(depth + 1)]
        points = [(float(layer), one[0]) for layer, one in enumerate(cells)]
        lines.append(Line(way, points, [(one[1], one[2]) for one in cells]))
    note = "Test top-1 of ridge probes; bands are Wilson's 95 % intervals. 0 is before the first block."
    if len(ways) > MOST_LINES:
        note += f" Drawn: the first {MOST_LINES} of {len(ways)} reads; the others are in the table."
    return LineChart("What can be read off each layer", "block", "test top-1", lines, note=note)
