"""``vit-cls models``: the architectures that can be built, and their sizes."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import make_parser, parse
from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.classifier import Preprocess
from vit_cls.model.presets import PRESETS, create_model


def run(words: list[str]) -> Outcome:
    """List architectures.

    Args:
        words: The words after ``models``.

    Returns:
        One row an architecture.

    Raises:
        ConfigError: If nothing matches.
    """
    parser = make_parser("models", "List the architectures that can be trained.")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or a pattern such as '*_224'")
    pattern = parse(parser, words).pattern
    names = [name for name in PRESETS if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise ConfigError(
            f"no architecture matches {pattern!r}.{did_you_mean(pattern, PRESETS)} "
            "`vit-cls models` lists them all."
        )
    rows = [_describe(name) for name in names]
    columns = {"img_size": "input", "patch_size": "patch", "tokens": "tokens"}
    columns |= {"embed_dim": "width", "depth": "depth", "num_heads": "heads"}
    lines = [f"{'name':<26}{'parameters':>12}" + "".join(f"{title:>8}" for title in columns.values())]
    for row in rows:
        lines.append(
            f"{row['name']:<26}{row['parameters']:>12,}" + "".join(f"{row[key]:>8}" for key in columns)
        )
    lines.append("Parameters are counted with a head of 1,000 classes. Every row takes every --model.pool.")
    return Outcome({"models": rows}, "\n".join(lines))


def _describe(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = create_model(name)
    config = model.config
    pre = Preprocess.for_size(config.image_hw)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "img_size": config.image_hw[0],
        "patch_size": config.patch_size,
        "tokens": model.layout.num_tokens,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "pool": config.pool,
        "mean": list(pre.mean),
        "std": list(pre.std),
        "crop_pct": pre.crop_pct,
        "pretrained": False,
    }
