"""Checks of what a user set: one wording for every number out of range and every unknown word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vit_cls.errors import ConfigError, did_you_mean


def check_range(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> None:
    """Refuse a number that is out of range; NaN and infinity always are, None (a default) never.

    Args:
        name: As the user wrote it: ``--margin``, ``data.batch_size``.
        hint: What to do, as a sentence.

    Raises:
        ConfigError: ``--margin must be above 0 and below 1; got 1.5. 0.01 is one point.``
    """
    bounds = (
        (at_least, "at least", lambda value, bound: value >= bound),
        (above, "above", lambda value, bound: value > bound),
        (at_most, "at most", lambda value, bound: value <= bound),
        (below, "below", lambda value, bound: value < bound),
    )
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if value is None:
        return
    in_range = all(holds(value, bound) for bound, _, holds in given)
    if in_range and math.isfinite(value):
        return
    required = " and ".join([*(f"{words} {bound}" for bound, words, _ in given), *["finite"] * in_range])
    raise ConfigError(f"{name} must be {required}; got {value}.{f' {hint}' if hint else ''}")


def check_finite(prefix: str, settings: object) -> None:
    """Refuse NaN and infinity in any field of a dataclass, or value of a mapping, and in lists of these.

    Args:
        prefix: Of the names, as the user wrote them: ``model.``, ``--recipe.``.

    Raises:
        ConfigError: ``optim.lr must be a finite number; got inf.``
    """
    if dataclasses.is_dataclass(settings):
        pairs = [(field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings)]
    else:
        assert isinstance(settings, Mapping)
        pairs = list(settings.items())
    for name, value in pairs:
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ConfigError(f"{prefix}{name} must be a finite number; got {value}.")


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, float):
        yield value
    for part in value if isinstance(value, list | tuple) else ():
        yield from _numbers(part)


def check_choice(name: str, value: object, choices: Iterable[object], *, hint: str = "") -> None:
    """Refuse a word that is none of those known; the nearest of them is named.

    Args:
        name: As the user wrote it: ``--device``, ``model.pos_embed``.
        hint: What to do, as a sentence.

    Raises:
        ConfigError: ``--device must be one of auto, cpu, cuda; got 'cud'. Did you mean `cuda`?``
    """
    known = list(choices)
    if value not in known:
        words = [str(word) for word in known]
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        more = f" {hint}" if hint else ""
        raise ConfigError(f"{name} must be one of {', '.join(words)}; got {value!r}.{near}{more}")
