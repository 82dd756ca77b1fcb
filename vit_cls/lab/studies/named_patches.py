"""Patches by name: the first, the one in the centre, one drawn by a seed; and where they stand on a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.lab.reads import parse_way
from vit_cls.lab.studies.recipe import MODEL_KEYS, Recipe
from vit_cls.model.tokens import TokenLayout
from vit_cls.weights.factory import architecture_of

CLS, GAP = "cls", "gap"
TOKENS = (CLS, "first", "corner", "centre", "random", GAP)


def grid_of(recipe: Recipe) -> tuple[int, int]:
    """Patch rows and columns of the models that a recipe makes.

    Args:
        recipe: With every usual setting filled in.

    Raises:
        ConfigError: If its settings do not fit together.
        ModelFileError: If the weights cannot be had.
    """
    settings = recipe.part(MODEL_KEYS)
    name, pretrained = settings.pop("name"), settings.pop("pretrained", None)
    rows, columns = architecture_of(name, pretrained, **settings).grid_size
    return rows, columns


def chosen_patches(
    tokens: Sequence[str], grid_size: tuple[int, int], seed: int
) -> tuple[dict[str, int], list[str]]:
    """Patches by name, and what was left out because another name has it already.

    Args:
        tokens: As the user wrote them, each once; ``cls`` and ``gap`` are no patches.
        grid_size: Patch rows and columns.
        seed: Of the patch that is drawn. It is none of the other names' where there is another.

    Returns:
        The number of each patch in raster order, and a sentence for each that was left out.

    Raises:
        ConfigError: If a token is unknown, or has no such number.

    Example:
        >>> chosen_patches(["cls", "first", "corner", "centre", "token:2"], (4, 4), 0)
        ({'first': 0, 'corner': 15, 'centre': 5, 'token:2': 2}, [])
        >>> chosen_patches(["first", "centre"], (2, 2), 0)
        ({'first': 0}, ['centre is patch 0 of 2x2, as first is'])
    """
    rows, columns = grid_size
    named = {
        "first": 0,
        "corner": rows * columns - 1,
        "centre": (rows - 1) // 2 * columns + (columns - 1) // 2,
    }
    others = sorted(set(range(rows * columns)) - set(named.values())) or [0]
    named["random"] = others[int(np.random.default_rng(seed).integers(len(others)))]
    found: dict[str, int] = {}
    left_out: list[str] = []
    for token in tokens:
        if token in (CLS, GAP):
            continue
        if token not in named and not token.startswith("token:"):
            known = [*TOKENS, "token:K"]
            raise ConfigError(
                f"--tokens must be some of {', '.join(known)}; got {token!r}.{did_you_mean(token, known)}"
            )
        if token not in named:
            layout = TokenLayout(False, 0, grid_size)
            named[token] = parse_way(token, layout, 1, name="--tokens")[0].number or 0
        patch = named[token]
        same = next((name for name, other in found.items() if other == patch), None)
        if same is None:
            found[token] = patch
        else:
            left_out.append(f"{token} is patch {patch} of {rows}x{columns}, as {same} is")
    return found, left_out
