"""Checks of what a user set: one wording for every number out of range and every unknown word."""

from __future__ import annotations

from collections.abc import Iterable

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
    """Refuse a number that is out of range; NaN always is, None (a default) never.

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
    if value is None or all(holds(value, bound) for bound, _, holds in given):
        return
    required = " and ".join(f"{words} {bound}" for bound, words, _ in given)
    raise ConfigError(f"{name} must be {required}; got {value}.{f' {hint}' if hint else ''}")


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
