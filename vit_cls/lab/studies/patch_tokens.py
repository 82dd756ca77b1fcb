"""Probes on every single patch of frozen models of several seeds: what a patch knows, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.inference import InferenceConfig
from vit_cls.lab.probes.base import Subject
from vit_cls.lab.probes.tokens import SINGLE, TokensProbe
from vit_cls.lab.results import HeatMap, Table
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.recipe import MODEL_KEYS, Recipe
from vit_cls.lab.studies.study import ARM_COLUMNS, score_cells
from vit_cls.lab.studies.trials import Trial
from vit_cls.model.pooling import make_pooling
from vit_cls.model.pooling_base import PoolingContext
from vit_cls.model.tokens import TokenLayout
from vit_cls.stats.verdicts import EQUAL, GREATER, Claim
from vit_cls.weights.factory import architecture_of

CLS, GAP = "cls", "gap"
TOKENS = (CLS, "first", "corner", "centre", "random", GAP)


def grid_of(recipe: Recipe) -> tuple[int, int]:
    """Patch rows and columns of the models that a recipe makes."""
    settings = recipe.part(MODEL_KEYS)
    name, pretrained = settings.pop("name"), settings.pop("pretrained", None)
    rows, columns = architecture_of(name, pretrained, **settings).grid_size
    return rows, columns


def chosen_patches(
    tokens: Sequence[str], grid_size: tuple[int, int], seed: int
) -> tuple[dict[str, int], list[str]]:
    """Patches by name, and a sentence for each that was left out because another name has it already.

    Args:
        tokens: As the user wrote them, each once; ``cls`` and ``gap`` are no patches.
        seed: Of the patch that is drawn. It is none of the other names' where there is another.

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
        if not token.startswith("token:"):
            check_choice("--tokens", token, [*TOKENS, "token:K"])
        if token not in named:
            context = PoolingContext(TokenLayout(False, 0, grid_size), setting="--tokens")
            named[token] = make_pooling(token, context).read.start
        patch = named[token]
        same = next((name for name, other in found.items() if other == patch), None)
        if same is None:
            found[token] = patch
        else:
            left_out.append(f"{token} is patch {patch} of {rows}x{columns}, as {same} is")
    return found, left_out


@dataclass(frozen=True)
class FrozenReads:
    """What probes on single tokens got right, of models of one arm.

    Args:
        name: Of the arm, such as ``CLS-trained``.
        grid_size: Patch rows and columns.
        patches: bool, shape ``(seeds, patches, images)``.
        pooled: By read, ``cls`` where there is one and ``gap``: bool, shape ``(seeds, images)``.
        preds: Classes that the probes on pooled reads said, by read, int64, shape ``(seeds, images)``.
    """

    name: str
    seeds: Sequence[int]
    grid_size: tuple[int, int]
    patches: np.ndarray
    pooled: dict[str, np.ndarray]
    preds: dict[str, np.ndarray]

    @property
    def single(self) -> np.ndarray:
        """Share of an image's patches whose probe was right, float64, shape ``(seeds, images)``."""
        return self.patches.mean(axis=1)

    @property
    def grid(self) -> np.ndarray:
        """Test top-1 of each patch, mean over the seeds, shape ``(rows, columns)``."""
        return self.patches.mean(axis=(0, 2)).reshape(self.grid_size)  # patches are in raster order

    def values(self) -> dict[str, Any]:
        """Numbers for scripts."""
        return {
            "single": self.single.mean(axis=1),
            **{pool: rows.mean(axis=1) for pool, rows in self.pooled.items()},
            "patches": self.grid,
        }

    def predictions(self) -> dict[str, Any]:
        """Per image: what the probes on pooled reads said, and how many probes on patches were right."""
        found = {pool: self._by_seed(rows) for pool, rows in self.preds.items()}
        return {**found, "patches_right": self._by_seed(self.patches.sum(axis=1))}

    def _by_seed(self, rows: np.ndarray) -> dict[str, list[int]]:
        return {str(seed): row.tolist() for seed, row in zip(self.seeds, rows, strict=True)}


def read_frozen(answers: Answers, trials: Sequence[Trial], name: str) -> FrozenReads:
    """Probe every single token of finished models, by the probe ``tokens``."""
    patches, pooled, preds = [], [], []
    grid_size = (0, 0)
    config = InferenceConfig(precision="32")
    for trial in trials:
        classifier = answers.model(trial)
        grid_size = classifier.model.layout.grid_size
        frozen = Subject(classifier, trial.data.parts(trial.seed), config or InferenceConfig()).freeze()
        said = TokensProbe().analyse(frozen).predictions["preds"]
        right = {pool: rows == frozen.test.labels for pool, rows in said.items()}
        of_patches = [pool for pool in right if pool.startswith("token:")]
        patches.append(np.stack([right[pool] for pool in of_patches]))
        pooled.append({pool: rows for pool, rows in right.items() if pool not in of_patches})
        preds.append({pool: said[pool] for pool in pooled[-1]})
    return FrozenReads(
        name,
        [trial.seed for trial in trials],
        grid_size,
        np.stack(patches),
        {pool: np.stack([one[pool] for one in pooled]) for pool in pooled[0]},
        {pool: np.stack([one[pool] for one in preds]) for pool in preds[0]},
    )


def frozen_claims(cls: FrozenReads, gap: FrozenReads, *, margin: float) -> list[Claim]:
    """What is claimed of single patches, before they are measured."""
    of_cls, of_gap = cls.pooled["cls"].astype(np.float64), gap.pooled["gap"].astype(np.float64)
    of_patch = f"{SINGLE} of the {{}} model"
    return [
        Claim(
            f"Frozen, the class token of a {cls.name} model beats its average patch.",
            cls.single,
            of_cls,
            GREATER,
            margin,
            (of_patch.format(cls.name), "its class token"),
        ),
        Claim(
            f"Frozen, the average patch of a {gap.name} model does as well as the mean of its patches.",
            gap.single,
            of_gap,
            EQUAL,
            margin,
            (of_patch.format(gap.name), "the mean of its patches"),
        ),
        Claim(
            f"Frozen, the class token of a {cls.name} model is further ahead of its average patch than the "
            f"mean of the patches of a {gap.name} one.",
            of_gap - gap.single,
            of_cls - cls.single,
            GREATER,
            margin,
            (
                f"the lead of the mean in the {gap.name} model",
                f"the lead of the class token in the {cls.name} one",
            ),
            words=("larger", "smaller"),
        ),
    ]


def frozen_table(models: Sequence[FrozenReads]) -> Table:
    """Pooled reads, the average patch, and the patches that stand out."""
    rows: list[list[Any]] = []
    for model in models:
        means = model.patches.mean(axis=(0, 2))
        worst, best = int(means.argmin()), int(means.argmax())
        reads = {
            **model.pooled,
            SINGLE: model.single,
            f"worst patch ({worst})": model.patches[:, worst],
            f"best patch ({best})": model.patches[:, best],
        }
        rows += [[model.name, pool, *score_cells(scores)] for pool, scores in reads.items()]
    note = (
        "Test images. The best patch is the best on these images, so its accuracy is optimistic, as that of "
        "the worst is pessimistic; they are shown for the spread."
    )
    return Table("Ridge probes on frozen tokens", ["model", "read", *ARM_COLUMNS], rows, note)


def heat_maps(models: Sequence[FrozenReads]) -> list[HeatMap]:
    """What a probe on each single patch gets right, with one colour scale for all models."""
    if not models:
        return []
    limits = (min(float(one.grid.min()) for one in models), max(float(one.grid.max()) for one in models))
    found = []
    for model in models:
        shown = ", ".join(f"{pool} {fmt.percent(rows.mean())}" for pool, rows in model.pooled.items())
        note = (
            f"One cell a patch, as the image lies; mean over {len(model.seeds)} seed(s), "
            f"{fmt.count(model.patches.shape[2])} test images. For comparison: {shown}. All maps share "
            "their colours."
        )
        title = f"{model.name}, frozen: top-1 of a probe on each single patch"
        found.append(HeatMap(title, model.grid.tolist(), limits=limits, note=note))
    return found
