"""What the probes on frozen tokens have in common: the parts they are given, and how ways are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.features import FrozenTokens, Rows
from vit_cls.lab.reads import layers_of, parse_way, possible_ways, usual_ways
from vit_cls.lab.results import ForestChart
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import TokenLayout
from vit_cls.stats.intervals import wilson_interval
from vit_cls.stats.verdicts import Claim, Finding, judge_all

MARGIN = 0.01
"""A difference of a point does not matter, unless the user says otherwise."""
ACCURACY_COLUMNS = ("top-1 (%)", "from (%)", "to (%)", "right", "images")
"""Headers of `accuracy_cells`."""


def check_parts(train: Rows, val: Rows, test: Rows) -> None:
    """Refuse parts that do not belong together, or cannot be fitted or tested on.

    Args:
        train: Rows to fit on.
        val: Rows to choose by.
        test: Rows to report on.

    Raises:
        DataError: If class lists differ, the training rows are of one class, or there is one test row.
    """
    for name, part in (("val", val), ("test", test)):
        if part.class_names != train.class_names:
            raise DataError(
                f"the {name} part has classes {', '.join(part.class_names[:10])}, but the train part has "
                f"{', '.join(train.class_names[:10])}. Label all parts by one list."
            )
    if len(np.unique(train.labels)) < 2:
        raise DataError(
            f"the train part has {len(train.labels)} image(s), all of one class; a probe needs two classes "
            "at least."
        )
    if len(test.labels) < 2:
        raise DataError("the test part has 1 image; a comparison needs at least two.")


def chosen_ways(
    ways: Sequence[str], layout: TokenLayout, depth: int, *, default: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The ways to compare, each once.

    Args:
        ways: What the user named; none means ``default``, without what the model does not have.
        layout: The model's tokens.
        depth: The model's blocks.
        default: Ways where none are named; None means `usual_ways`.

    Returns:
        The ways, and notes about those that were left out.

    Raises:
        ConfigError: If a named way is unknown, or reads what the model does not have.

    Example:
        >>> chosen_ways(["gap", "gap"], TokenLayout(True, 0, (2, 2)), 2)
        (['gap'], [])
    """
    if not ways:
        return possible_ways(usual_ways(depth) if default is None else default, layout)
    for way in ways:
        parse_way(way, layout, depth)
    return list(dict.fromkeys(ways)), []


def layers_needed(ways: Sequence[str], layout: TokenLayout, depth: int) -> list[int]:
    """The layers to freeze, ascending, so that some ways can be read after the last block.

    Args:
        ways: As `chosen_ways` gives them.
        layout: The model's tokens.
        depth: The model's blocks.

    Example:
        >>> layers_needed(["last:2", "gap"], TokenLayout(True, 0, (2, 2)), 12)
        [11, 12]
    """
    return sorted({one for way in ways for one in layers_of(parse_way(way, layout, depth), depth)})


def reference_way(ways: Sequence[str]) -> str:
    """The way that others are compared with: the class token where it is read, else the mean, else the first.

    Args:
        ways: At least one.

    Example:
        >>> reference_way(["gap", "cls"]), reference_way(["max", "gap"])
        ('cls', 'gap')
    """
    return next((way for way in ("cls", "gap") if way in ways), ways[0])


def described(model: TokenModel) -> str:
    """What a model is, in a few words, for the settings of a result.

    Args:
        model: Any.

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
    """Cells of a table under `ACCURACY_COLUMNS`; the interval is Wilson's.

    Args:
        right: Whether each image was classified right, bool, shape ``(images,)``.

    Example:
        >>> accuracy_cells(np.array([True, False]))[3:]
        (1, 2)
    """
    count, images = int(right.sum()), len(right)
    low, high = wilson_interval(count, images)
    return count / images, low, high, count, images


def in_words(right: np.ndarray) -> str:
    """An accuracy with its counts and interval.

    Args:
        right: As for `accuracy_cells`.

    Example:
        >>> in_words(np.arange(100) < 96)
        '96 of 100 right (96.0 %, 95 % interval 90.2 to 98.4)'
    """
    share, low, high, count, images = accuracy_cells(right)
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return f"{count} of {images} right ({100 * share:.1f} %, {interval})"


def compare_with(
    reference: str, scores: Mapping[str, np.ndarray], *, what: str, margin: float, seed: int
) -> list[Finding]:
    """Compare every way with one of them, on the same images.

    Args:
        reference: One of the ways.
        scores: Of each way, bool or float, shape ``(images,)``.
        what: What the scores say, such as ``test top-1``.
        margin: The largest difference that does not matter.
        seed: Of the resampling.

    Returns:
        A finding for each other way, in their order; p-values are adjusted over all of them.
    """
    claims = [
        Claim(
            f"Reading {way} and reading {reference} give different {what}.",
            scores[reference][None],
            scores[way][None],
            expect="differs",
            margin=margin,
            names=(reference, way),
        )
        for way in scores
        if way != reference
    ]
    return judge_all(claims, seed=seed) if claims else []


def forest(
    title: str, labels: Sequence[str], findings: Sequence[Finding], margin: float
) -> list[ForestChart]:
    """Differences below each other.

    Args:
        title: What the chart shows.
        labels: One a finding.
        findings: With an estimate and an interval each.
        margin: The largest difference that does not matter.

    Returns:
        One chart, or none where there is nothing to show.
    """
    rows = [
        (label, finding.estimate, finding.ci95)
        for label, finding in zip(labels, findings, strict=True)
        if finding.estimate is not None and finding.ci95 is not None
    ]
    return [ForestChart(title, rows, margin)] if rows else []


def data_of(origin: str, parts: Mapping[str, Rows]) -> dict[str, Any]:
    """Where the images came from, for the result.

    Args:
        origin: Of the partition.
        parts: Rows of each part, by its name.
    """
    return {
        "origin": origin,
        "images": {name: len(rows.labels) for name, rows in parts.items()},
        "classes": len(next(iter(parts.values())).class_names),
        "failures": {name: dict(rows.failures) for name, rows in parts.items()},
    }


def predictions_of(test: Rows, preds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Raw predictions, from which every number can be computed again.

    Args:
        test: The images.
        preds: Predicted class of each image, by way.
    """
    return {
        "paths": list(test.paths),
        "labels": test.labels,
        "class_names": list(test.class_names),
        "preds": {way: np.asarray(values) for way, values in preds.items()},
    }


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a setting that there is not.

    Args:
        name: What the user called it.
        value: What was given.
        known: What may be.

    Raises:
        ConfigError: If ``value`` is not known.
    """
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def check_margin(margin: float) -> None:
    """Refuse a margin that is no share.

    Args:
        margin: The largest difference that does not matter.

    Raises:
        ConfigError: If it is not in (0, 1).
    """
    if not 0.0 < margin < 1.0:
        raise ConfigError(
            f"--margin must be above 0 and below 1, as a share (0.01 is a point); got {margin}."
        )


def failures_note(parts: Mapping[str, FrozenTokens | Rows]) -> list[str]:
    """A sentence about files that could not be read, if there are some.

    Args:
        parts: By name.
    """
    failed = {name: len(part.failures) for name, part in parts.items() if part.failures}
    if not failed:
        return []
    counts = ", ".join(f"{count} of {name}" for name, count in failed.items())
    return [f"Files that could not be read are in no number here: {counts}; their reasons are with the data."]
