"""What probes say alike: the pools they read, accuracies in words and cells, comparisons with one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.lab.features import Rows
from vit_cls.model.pooling import needs_class_token
from vit_cls.model.token_model import TokenModel
from vit_cls.model.token_reader import TokenReader
from vit_cls.model.tokens import TokenLayout
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.verdicts import Claim, Finding, judge_all

POOLS = ("cls", "gap", "max", "gem:3", "gem:4", "cls+gap", "cls+gem:4")
"""The pools of the last layer, of those that are compared if nothing else is asked for."""
LAST = 4
"""Blocks whose class tokens the usual ``last:N`` joins, as far as there are so many."""
ACCURACY_COLUMNS = ("top-1 (%)", "from (%)", "to (%)", "right", "images")
"""Headers of `accuracy_cells`."""


def usual_pools(depth: int) -> list[str]:
    """The pools that are compared by default; of a single block, ``last:1`` would be ``cls``.

    Example:
        >>> usual_pools(2)[-2:], usual_pools(1)[-1]
        (['cls+gem:4', 'last:2'], 'cls+gem:4')
    """
    return [*POOLS, *([f"last:{min(LAST, depth)}"] if depth > 1 else [])]


def possible_pools(pools: Sequence[str], layout: TokenLayout) -> tuple[list[str], list[str]]:
    """Those of the default pools that a model can be read by, and a sentence for those that it cannot."""
    without = [pool for pool in pools if not layout.class_token and needs_class_token(pool)]
    if not without:
        return list(pools), []
    note = f"Not read: {', '.join(without)}, for the model has no class token."
    return [pool for pool in pools if pool not in without], [note]


def chosen_pools(
    pools: Sequence[str], reader: TokenReader, *, default: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The pools to compare, each once, and notes about those that were left out.

    Args:
        pools: What the user named; none means ``default``, or `usual_pools`, without what the model lacks.

    Raises:
        ConfigError: If a named pool is unknown, or cannot be read of the model.
    """
    if not pools:
        return possible_pools(usual_pools(reader.depth) if default is None else default, reader.layout)
    for pool in pools:
        reader.poolings(pool)
    return list(dict.fromkeys(pools)), []


def layers_needed(pools: Sequence[str], reader: TokenReader) -> list[int]:
    """The layers to freeze, ascending, so that some pools can be read after the last block."""
    return sorted({layer for pool in pools for layer in reader.layers(pool, reader.depth)})


def reference_pool(pools: Sequence[str]) -> str:
    """What others are compared with: the class token where it is read, else the mean or the first."""
    return next((pool for pool in ("cls", "gap") if pool in pools), pools[0])


def described(model: TokenModel) -> str:
    """What a model is, in a few words, for the settings of a result.

    Example:
        >>> from vit_cls import create_model
        >>> described(create_model("vit_pico_patch7_28"))
        '4 blocks, width 96, 3 heads, 28x28 pixels in 4x4 patches, class token, pool cls'
    """
    config, layout = model.config, model.layout
    image, grid = ("x".join(map(str, sides)) for sides in (config.image_hw, layout.grid_size))
    tokens = "class token" if layout.class_token else "no class token"
    if layout.reg_tokens:
        tokens += f", {layout.reg_tokens} registers"
    size = f"{len(model.blocks)} blocks, width {config.embed_dim}, {config.num_heads} heads"
    return f"{size}, {image} pixels in {grid} patches, {tokens}, pool {config.pool}"


def accuracy_cells(right: np.ndarray) -> tuple[float, float, float, int, int]:
    """Cells of a table under `ACCURACY_COLUMNS`; the interval is Wilson's."""
    count, images = int(right.sum()), len(right)
    low, high = wilson_interval(count, images)
    return count / images, low, high, count, images


def accuracy_text(right: np.ndarray) -> str:
    """An accuracy with its counts and interval.

    Example:
        >>> accuracy_text(np.arange(100) < 96)
        '96 of 100 right (96.0 %, 95 % interval 90.2 to 98.4)'
    """
    share, low, high, count, images = accuracy_cells(right)
    interval = fmt.interval((low, high), fmt.bare_percent)
    return f"{count} of {images} right ({fmt.percent(share)}, {interval})"


def compare_with(
    reference: str, scores: Mapping[str, np.ndarray], sentence: str, *, margin: float, seed: int
) -> dict[str, Finding]:
    """Judge everything that was scored against one of them; p-values are adjusted over all.

    Args:
        scores: By name, all bool or all float, shape ``(images,)`` or ``(seeds, images)``.
        sentence: The claim, with two gaps: for a name, and for the reference.
    """
    others = [name for name in scores if name != reference]
    claims = [
        Claim(
            sentence.format(name, reference),
            scores[reference],
            scores[name],
            margin=margin,
            names=(reference, name),
        )
        for name in others
    ]
    return dict(zip(others, judge_all(claims, seed=seed), strict=True)) if claims else {}


def sentence_on(name: str, findings: Mapping[str, Finding]) -> str:
    """What was found of a name, or of the first where there is no finding on it; a space before it."""
    return "".join(
        f" {one.sentence}" for one in [findings.get(name, next(iter(findings.values()), None))] if one
    )


def predictions_of(test: Rows, preds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Predicted class of each image by pool, from which every number can be computed again."""
    return {
        "paths": list(test.paths),
        "labels": test.labels,
        "class_names": list(test.class_names),
        "preds": {pool: np.asarray(values) for pool, values in preds.items()},
    }


def check_margin(margin: float) -> None:
    """Refuse a margin that is no share.

    Raises:
        ConfigError: If it is not in (0, 1).
    """
    check_range("--margin", margin, above=0, below=1, hint="0.01 is one point.")
