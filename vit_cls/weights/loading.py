"""Weights of a source into a model: every key has one fate, and too many fresh ones are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice, check_range
from vit_cls.errors import ModelFileError
from vit_cls.model.config import ModelConfig
from vit_cls.model.token_model import TokenModel
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights import convert
from vit_cls.weights.load_report import KeyFate, LoadReport
from vit_cls.weights.sources import Source
from vit_cls.weights.tensor_files import Weights

MAX_FRESH = 0.1
"""More of the encoder than this must not be fresh, unless the user says so."""
HEAD_INITS = ("normal", "zero")

_NOT_ENCODER = ("head.", "head_dist.", "attn_pool.")
"""What the share of fresh parameters leaves out: it depends on the task."""


@dataclass(frozen=True)
class HeadOptions:
    """What becomes of the head when weights are loaded; ConfigError if a value is impossible."""

    class_names: Sequence[str] | None = None  # None: only their number matters
    keep: bool = True  # the checkpoint's head, where its classes agree
    init: str = "normal"  # one of `HEAD_INITS`; normal has a standard deviation of 0.02
    max_fresh: float = MAX_FRESH  # largest share of the encoder that may be missing, in [0, 1]

    def __post_init__(self) -> None:
        check_choice("model.head_init", self.init, HEAD_INITS)
        check_range("model.max_fresh", self.max_fresh, at_least=0, at_most=1)


def load_weights(model: TokenModel, source: Source, head: HeadOptions) -> None:
    """Convert a source's weights to a model's architecture and load them; sets ``model.load_report``.

    Keys that the source lacks stay as they are in the model. ModelFileError if the weights cannot be read,
    do not fit, or too much of the encoder would be fresh.
    """
    assert source.read is not None
    assert source.label is not None
    target = model.config
    weights = source.read(target)
    own = model.state_dict()
    shapes = {key: value.shape for key, value in own.items()}
    work = convert.Conversion(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.state.items()},
        _fates_so_far(weights, target),
        [*source.remarks, *weights.remarks],
    )
    convert.convert_tokens(work, weights.config, target)
    convert.convert_norm(work, shapes)
    convert.convert_channels(work, target.in_chans)
    convert.convert_layer_scale(work, shapes)
    rows, reason = _head_rows(weights, source, target, head)
    convert.convert_head(work, weights.config, target, rows, reason)
    keys, wrong = convert.finish(work, shapes)
    if wrong:
        raise _other_shapes(source, wrong, work.state, shapes)
    fresh_share = _fresh_share(keys, own)
    if fresh_share > head.max_fresh:
        raise _too_many_fresh(source, keys, fresh_share, head.max_fresh)
    if isinstance(model, VisionTransformer):  # built without drawing weights
        model.init_weights({row.key for row in keys if row.fate == "fresh"} - work.state.keys())
    model.load_state_dict(work.state, strict=False)
    model.load_report = LoadReport(
        source.label,
        tuple(keys),
        fresh_share,
        tuple(work.notes + _function_notes(weights.config, target) + _depth_notes(keys, target.depth)),
        source.licence,
        None if source.class_names is None else tuple(source.class_names),
    )


# ---- what timm's conversion did while the weights were read -----------------------------------------------


def _fates_so_far(weights: Weights, target: ModelConfig) -> dict[str, tuple[str, str]]:
    """Fate and note, by key of the model, of what was resized; by key of the file, of what was left out.

    A tensor that was only renamed, reshaped or cut shares its memory with the file's; one that was joined
    from several holds them as blocks.
    """
    fates: dict[str, tuple[str, str]] = {}
    raw = {name: tensor for name, tensor in weights.raw.items() if tensor is not None}
    spans = {tensor.data_ptr(): name for name, tensor in raw.items()}
    used: set[str] = set()
    made: dict[str, Tensor] = {}
    for key, tensor in weights.state.items():
        name = spans.get(tensor.data_ptr())
        if name is not None:
            used.add(name)
        else:
            made[key] = tensor
    for key, tensor in list(made.items()):
        name = key if key in raw else _original(key, tensor, {n: raw[n] for n in raw if n not in used})
        if name is None:
            continue
        used.add(name)
        made.pop(key)
        if key == "pos_embed" and not torch.equal(raw[name].reshape(-1), tensor.reshape(-1)):
            fates[key] = ("resized", _grids(raw[name], weights.config, target))
        elif key == "cls_token" and not torch.equal(raw[name], tensor):
            fates[key] = ("moved", "its position was added to it")
        elif raw[name].shape != tensor.shape:
            fates[key] = ("resized", f"{_sides(raw[name])} -> {_sides(tensor)}")
    made.pop("head.bias", None)  # zeros, where a projection has none; no part of the file
    for name in raw.keys() - used:
        if not any(_holds(whole, raw[name]) for whole in made.values()):
            fates[name] = ("dropped", "not a part of this model")
    return fates | dict.fromkeys(weights.raw.keys() - raw.keys(), ("dropped", "not read"))


def _original(key: str, tensor: Tensor, unused: Mapping[str, Tensor]) -> str | None:
    """The tensor of the file that was both renamed and resized to this one."""
    if key == "pos_embed":
        names = [
            n for n, t in unused.items() if "pos" in n and t.ndim > 1 and t.shape[-1] == tensor.shape[-1]
        ]
    elif key == "patch_embed.proj.weight":
        names = [n for n, t in unused.items() if t.ndim == 4 and t.shape[:2] == tensor.shape[:2]]
    else:
        return None
    return max(names, key=lambda name: "vis" in name, default=None)  # a text tower has positions too


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Whether ``part`` is a block of ``whole`` along the first axis, or all of it in another shape."""
    same_rows = part.ndim > 0 and part.shape[1:] == whole.shape[1:] and part.shape[0] > 0
    if part.dtype != whole.dtype or whole.numel() % max(1, part.numel()):
        return False
    if not (same_rows or part.numel() == whole.numel() > 0):
        return False
    wanted = part.reshape(-1)
    blocks = whole.reshape(-1).split(part.numel())
    return any(bool(torch.equal(b[:8], wanted[:8]) and torch.equal(b, wanted)) for b in blocks)


def _grids(positions: Tensor, source: Any, target: ModelConfig) -> str:
    prefix = 0 if source.no_embed_class else convert.num_class_tokens_of(source) + source.reg_tokens
    count = positions.shape[-2] - prefix
    known, new = ([side // c.patch_size for side in c.image_hw] for c in (source, target))
    old = known if math.prod(known) == count else [math.isqrt(count)] * 2
    if old == new:
        return "positions of prefix tokens were added to the tokens"
    return f"{old[0]}x{old[1]} -> {new[0]}x{new[1]} patches"


def _sides(tensor: Tensor) -> str:
    return (
        f"{tensor.shape[2]}x{tensor.shape[3]} pixels"
        if tensor.ndim == 4
        else "x".join(map(str, tensor.shape))
    )


# ---- the head, what is refused, and what is said ----------------------------------------------------------


def _head_rows(
    weights: Weights, source: Source, target: ModelConfig, head: HeadOptions
) -> tuple[Sequence[int] | None, str]:
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
    from vit_cls.weights.timm_models import class_aliases

    rows = convert.match_class_names(head.class_names, known, class_aliases)
    if rows is None:
        return None, f"its {have} classes are not the model's {want}"
    return rows, f"{want} of {have} classes, matched by name"


def _fresh_share(keys: Sequence[KeyFate], own: Mapping[str, Tensor]) -> float:
    """Share of the encoder's parameters that the weights do not hold, in [0, 1]."""
    encoder = {key: tensor.numel() for key, tensor in own.items() if not key.startswith(_NOT_ENCODER)}
    missing = [row.key for row in keys if row.fate == "fresh" and row.note != convert.KEEPS_FUNCTION]
    return sum(encoder.get(key, 0) for key in missing) / max(1, sum(encoder.values()))


def _other_shapes(
    source: Source, wrong: Sequence[str], state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> ModelFileError:
    shown = "; ".join(f"{key} is {tuple(state[key].shape)}, not {tuple(shapes[key])}" for key in wrong[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return ModelFileError(
        f"{source.label} does not fit the model: {shown}{more}. Is it another architecture? Check "
        "model.name (`vit-cls models`), and settings that change shapes."
    )


def _too_many_fresh(
    source: Source, keys: Sequence[KeyFate], fresh_share: float, max_fresh: float
) -> ModelFileError:
    missing = [row.key for row in keys if row.fate == "fresh"]
    left = [row.key for row in keys if row.fate == "dropped"]
    return ModelFileError(
        f"{source.label}: {fmt.percent(fresh_share, 0)} of the encoder would be fresh, more than "
        f"model.max_fresh {max_fresh:g} allows. The model wants {', '.join(missing[:3])}; the weights have "
        f"{', '.join(left[:3]) or 'nothing else'}. Check model.name, or raise model.max_fresh."
    )


def _depth_notes(keys: Sequence[KeyFate], depth: int) -> list[str]:
    left = [row.key.split(".")[1] for row in keys if row.fate == "dropped" and row.key.startswith("blocks.")]
    more = {int(number) for number in left if number.isdecimal() and int(number) >= depth}
    return [f"of the weights' {max(more) + 1} blocks the model has the first {depth}"] if more else []


def _function_notes(source: Any, target: ModelConfig) -> list[str]:
    """Settings that change what the same weights compute, and leave no trace in any shape."""
    notes = []
    order = ("class_position",) if getattr(target, "causal", False) else ()
    for name in ("act", "norm_eps", "qk_norm", "num_heads", "causal", *order):
        absent = {"causal": False, "class_position": "first"}.get(name)
        old, new = getattr(source, name, absent), getattr(target, name, absent)
        if old != new:
            notes.append(f"model.{name} is {new}, but the weights were trained with {old}")
    return notes
