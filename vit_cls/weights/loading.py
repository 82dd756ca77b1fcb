"""Weights of a source into a model: every key has one fate, and too many fresh ones are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vit_cls.errors import ModelFileError
from vit_cls.model.token_model import TokenModel
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights import convert
from vit_cls.weights.class_names import class_aliases
from vit_cls.weights.load_report import KeyFate, LoadReport
from vit_cls.weights.sources import Source
from vit_cls.weights.tracing import Weights, trace

_NOT_ENCODER = ("head.", "head_dist.", "attn_pool.")
"""What the share of fresh parameters leaves out: it depends on the task."""


def load_weights(model: TokenModel, source: Source, head: Any) -> LoadReport:
    """Convert a source's weights to a model's architecture and load them; sets ``model.load_report``.

    Args:
        model: Gets the weights; keys that the source lacks stay as they are.
        source: The weights.
        head: What becomes of the head (`vit_cls.weights.factory.HeadOptions`).

    Returns:
        The report.

    Raises:
        ModelFileError: If the weights cannot be read, shapes differ, or more than ``head.max_fresh`` of the
            encoder would be fresh.
    """
    target: Any = model.config
    weights = source.read(target)
    fates = trace(weights, weights.config, target)
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in weights.state.items()
    }
    work = convert.Conversion(state, fates, [*source.remarks, *weights.remarks])
    own = model.state_dict()
    shapes = {key: value.shape for key, value in own.items()}
    convert.convert_tokens(work, weights.config, target)
    convert.convert_norm(work, shapes)
    convert.convert_channels(work, target.in_chans)
    convert.convert_layer_scale(work, shapes)
    if any(key.endswith("norm1.weight") for key in work.state):
        convert.fill_layer_scale(work, shapes)
    rows, reason = _head_rows(weights, source, target, head)
    convert.convert_head(work, weights.config, target, rows, reason)
    keys, wrong = convert.finish(work, shapes)
    fresh_share = _fresh_share(keys, own)
    _refuse(source, keys, wrong, work.state, shapes, fresh_share, head.max_fresh)
    if isinstance(model, VisionTransformer):  # built without drawing weights
        model.init_weights({row.key for row in keys if row.fate == "fresh"} - work.state.keys())
    model.load_state_dict(work.state, strict=False)
    report = LoadReport(
        source.label,
        tuple(keys),
        fresh_share,
        tuple(work.notes + _function_notes(weights.config, target) + _depth_notes(keys, target.depth)),
        source.licence,
        None if source.class_names is None else tuple(source.class_names),
    )
    model.load_report = report
    return report


def _head_rows(weights: Weights, source: Source, target: Any, head: Any) -> tuple[Sequence[int] | None, str]:
    """Which rows of the checkpoint's head the new one keeps, and why."""
    have, want = weights.config.num_classes, target.num_classes
    if not have or not want:
        return None, "the model has no head" if have else ""
    if not head.keep:
        return None, "keep_head is false"
    if head.class_names is None:
        if have == want:
            return range(have), ""
        return None, f"{have} -> {want} classes"
    known = source.class_names
    if known is None or len(known) != have:
        return None, f"the checkpoint's {have} outputs have no known class names"
    rows = convert.match_class_names(head.class_names, known, class_aliases)
    if rows is None:
        return None, f"its {have} classes are not the model's {want}"
    return rows, f"{want} of {have} classes, matched by name"


def _fresh_share(keys: Sequence[KeyFate], own: Mapping[str, Tensor]) -> float:
    encoder = {key: tensor.numel() for key, tensor in own.items() if not key.startswith(_NOT_ENCODER)}
    ones = ("ones, which keep the function",)
    fresh = sum(encoder.get(row.key, 0) for row in keys if row.fate == "fresh" and row.note not in ones)
    return fresh / max(1, sum(encoder.values()))


def _refuse(
    source: Source,
    keys: Sequence[KeyFate],
    wrong: Sequence[str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Any],
    fresh_share: float,
    max_fresh: float,
) -> None:
    if wrong:
        shown = "; ".join(
            f"{key} is {tuple(state[key].shape)}, not {tuple(shapes[key])}" for key in wrong[:3]
        )
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelFileError(
            f"{source.label} does not fit the model: {shown}{more}. Is it another architecture? Check "
            "model.name (`vit-cls models`), and settings that change shapes."
        )
    if fresh_share > max_fresh:
        missing = [row.key for row in keys if row.fate == "fresh"]
        left = [row.key for row in keys if row.fate == "dropped"]
        raise ModelFileError(
            f"{source.label}: {fresh_share:.0%} of the encoder would be fresh, more than model.max_fresh "
            f"{max_fresh:g} allows. The model wants {', '.join(missing[:3])}; the weights have "
            f"{', '.join(left[:3]) or 'nothing else'}. Check model.name, or raise model.max_fresh."
        )


def _depth_notes(keys: Sequence[KeyFate], depth: int) -> list[str]:
    left = [row.key.split(".")[1] for row in keys if row.fate == "dropped" and row.key.startswith("blocks.")]
    more = {int(number) for number in left if number.isdecimal() and int(number) >= depth}
    return [f"of the weights' {max(more) + 1} blocks the model has the first {depth}"] if more else []


def _function_notes(source: Any, target: Any) -> list[str]:
    """Settings that change what the same weights compute, and leave no trace in any shape."""
    notes = []
    order = ("class_position",) if getattr(target, "causal", False) else ()
    for name in ("act", "norm_eps", "qk_norm", "num_heads", "pool_include_prefix", "causal", *order):
        missing = {"causal": False, "class_position": "first"}.get(name)
        old, new = getattr(source, name, missing), getattr(target, name, missing)
        if old != new and name != "pool_include_prefix":
            notes.append(f"model.{name} is {new}, but the weights were trained with {old}")
    return notes
