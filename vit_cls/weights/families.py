"""What a checkpoint's family asks of those who use it: its licence, and how it is usually fine-tuned."""

from __future__ import annotations

import re
from dataclasses import dataclass

FROM_SCRATCH_LICENCE = "trained from scratch: the licence is yours to choose"
"""Licence of weights that came from no checkpoint, in the run record and the model file."""

UNKNOWN_LICENCE = "not stated by the source of the weights"

_RESTRICTED = ("cc-by-nc", "noncommercial", "non-commercial", "apple-amlr", "research")
"""Parts of the names of licences that do not allow commercial use."""


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence forbids commercial use, going by its name in timm or on a model card."""
    return licence is not None and any(part in licence.lower() for part in _RESTRICTED)


@dataclass(frozen=True)
class Recipe:
    """How weights of one family are usually fine-tuned: what ``auto`` stands for.

    Args:
        base_lr_per_256_images: Peak learning rate for 256 images a step, AdamW.
        layer_decay: Factor of the learning rate from a layer to the one below.
        source: Where the values come from.
    """

    family: str
    base_lr_per_256_images: float
    layer_decay: float
    drop_path_rate: float
    source: str


SCRATCH = Recipe("fresh weights", 5e-4, 1.0, 0.1, "DeiT, https://arxiv.org/abs/2012.12877, table 9")

# (pattern on architecture.tag, recipe); the first that matches counts
RECIPES: list[tuple[str, Recipe]] = [
    (
        r"mae|in22k_mim|beit|ijepa|eva02|\.m38m|_mim",
        Recipe("masked image modelling", 5e-4, 0.75, 0.1, "MAE, https://arxiv.org/abs/2111.06377, table 9"),
    ),
    (
        r"clip|siglip|datacomp|dfn|laion|openai|metaclip|\.webli|tipsv2|_pe_|aimv2",
        Recipe(
            "image and text contrastive",
            7.5e-5,
            0.7,
            0.1,
            "FT-CLIP, https://arxiv.org/abs/2212.06138, table 2",
        ),
    ),
    (r"dino|eupe|lingbot|radio", Recipe("self-distilled", 2e-4, 0.75, 0.1, "as supervised weights")),
    (r"", Recipe("supervised", 2e-4, 0.75, 0.1, "layer decay: timm's fine-tuning runs, 0.7 to 0.8")),
]


def recipe_of(source: str | None) -> Recipe:
    """The recipe of the family that weights belong to, going by their name; None are fresh ones.

    Example:
        >>> recipe_of("vit_base_patch16_clip_224.openai").layer_decay, recipe_of(None).layer_decay
        (0.7, 1.0)
    """
    if source is None:
        return SCRATCH
    return next(recipe for pattern, recipe in RECIPES if re.search(pattern, source, re.IGNORECASE))
