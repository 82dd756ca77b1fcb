"""Probes on every single patch of frozen models of several seeds: what a patch knows, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls.data.splits import PARTS
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import freeze
from vit_cls.lab.probes.tokens import SINGLE
from vit_cls.lab.probes.tokens import tokens as probe_tokens
from vit_cls.lab.results import HeatMap, Table
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import EQUAL, GREATER, Claim


@dataclass(frozen=True)
class FrozenReads:
    """What probes on single tokens got right, of models of one arm.

    Args:
        name: Of the arm, such as ``CLS-trained``.
        seeds: Of the models.
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
            **{way: rows.mean(axis=1) for way, rows in self.pooled.items()},
            "patches": self.grid,
        }

    def predictions(self) -> dict[str, Any]:
        """Per image: what the probes on pooled reads said, and how many probes on patches were right."""
        found = {way: self._by_seed(rows) for way, rows in self.preds.items()}
        return {**found, "patches_right": self._by_seed(self.patches.sum(axis=1))}

    def _by_seed(self, rows: np.ndarray) -> dict[str, list[int]]:
        return {str(seed): row.tolist() for seed, row in zip(self.seeds, rows, strict=True)}


def read_frozen(answers: Answers, trials: Sequence[Trial], name: str) -> FrozenReads:
    """Probe every single token of finished models, by the probe ``tokens``.

    Args:
        answers: Of the models.
        trials: Of one arm, a seed each.
        name: Of the arm, for people.

    Raises:
        RunError: If a training failed.
        DataError: If a part is too small for a probe.
    """
    patches, pooled, preds = [], [], []
    config = InferenceConfig(precision="32")
    grid_size = (0, 0)
    for trial in trials:
        classifier = answers.model(trial)
        grid_size = classifier.model.layout.grid_size
        parts = trial.data.parts(trial.seed)
        train, val, test = (freeze(classifier, getattr(parts, part), config=config) for part in PARTS)
        said = probe_tokens(train, val, test).predictions["preds"]
        right = {way: rows == test.labels for way, rows in said.items()}
        of_patches = [way for way in right if way.startswith("token:")]
        patches.append(np.stack([right[way] for way in of_patches]))
        pooled.append({way: rows for way, rows in right.items() if way not in of_patches})
        preds.append({way: said[way] for way in pooled[-1]})
    return FrozenReads(
        name,
        [trial.seed for trial in trials],
        grid_size,
        np.stack(patches),
        {way: np.stack([one[way] for one in pooled]) for way in pooled[0]},
        {way: np.stack([one[way] for one in preds]) for way in preds[0]},
    )


def frozen_claims(cls: FrozenReads, gap: FrozenReads, *, margin: float) -> list[Claim]:
    """What is claimed of single patches, before they are looked at.

    Args:
        cls: Of models that were trained to be read at the class token.
        gap: Of models that were trained to be read at the mean of their patches.
        margin: The largest difference that does not matter.
    """
    of_cls, of_gap = cls.pooled["cls"].astype(np.float64), gap.pooled["gap"].astype(np.float64)
    average = f"{SINGLE} of the {{}} model"
    return [
        Claim(
            f"Frozen, the class token of a {cls.name} model beats its average patch.",
            cls.single,
            of_cls,
            GREATER,
            margin,
            (average.format(cls.name), "its class token"),
        ),
        Claim(
            f"Frozen, the average patch of a {gap.name} model does as well as the mean of its patches.",
            gap.single,
            of_gap,
            EQUAL,
            margin,
            (average.format(gap.name), "the mean of its patches"),
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
    """Pooled reads, the average patch, and the patches that stand out.

    Args:
        models: One an arm.
    """
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
        for way, scores in reads.items():
            mean, by_seed = mean_interval(scores), scores.mean(axis=1)
            low, high = max(0.0, mean.ci95[0]), min(1.0, mean.ci95[1])
            spread = [float(by_seed.min()), float(by_seed.max())]
            rows.append([model.name, way, mean.estimate, low, high, *spread, mean.seeds, mean.images])
    note = (
        "Test images. The best patch is the best on these images, so its accuracy is optimistic, as that of "
        "the worst is pessimistic; they are shown for the spread."
    )
    return Table("Ridge probes on frozen tokens", ["model", "read", *ARM_COLUMNS], rows, note)


def heat_maps(models: Sequence[FrozenReads]) -> list[HeatMap]:
    """What a probe on each single patch gets right, with one colour scale for all models.

    Args:
        models: One an arm.
    """
    if not models:
        return []
    limits = (min(float(one.grid.min()) for one in models), max(float(one.grid.max()) for one in models))
    found = []
    for model in models:
        shown = ", ".join(f"{way} {100 * rows.mean():.1f} %" for way, rows in model.pooled.items())
        note = (
            f"One cell a patch, as the image lies; mean over {len(model.seeds)} seed(s), "
            f"{model.patches.shape[2]:,} test images. For comparison: {shown}. All maps share their colours."
        )
        title = f"{model.name}, frozen: top-1 of a probe on each single patch"
        found.append(HeatMap(title, model.grid.tolist(), limits=limits, note=note))
    return found
