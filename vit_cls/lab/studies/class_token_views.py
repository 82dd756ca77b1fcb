"""Tables and figures of several class tokens, over the seeds of an arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls.data.dataset import ImageSource
from vit_cls.data.transforms import model_reader
from vit_cls.lab.results import MOST_LINES, HeatMap, Line, LineChart, Pictures, Table
from vit_cls.lab.studies.class_tokens import (
    AgainstSeeds,
    ClassTokens,
    TokenAnswers,
    against_seeds,
    cosine_matrix,
    image_cosine,
    information_test,
    pair_cosine,
)
from vit_cls.stats.random_effects import Mean, mean_interval

COLLAPSED = 0.95
"""Tokens with a larger cosine are called parallel."""
EXAMPLES = 6
FROM_TO = ("from (%)", "to (%)")


@dataclass(frozen=True)
class ArmTokens:
    """What the models of one arm showed, a seed each.

    Args:
        tokens: Their class tokens on the test part.
        answers: What each token says about the class.
    """

    tokens: list[ClassTokens]
    answers: list[TokenAnswers]

    @property
    def cosines(self) -> np.ndarray:
        """Mean over the pairs of output tokens, shape ``(seeds, images)``."""
        return np.stack([pair_cosine(one.output) for one in self.tokens])

    @property
    def layer_cosines(self) -> np.ndarray:
        """The same by layer, as the blocks left the tokens, shape ``(depth + 1, seeds, images)``."""
        return np.stack([pair_cosine(one.layers).T for one in self.tokens], axis=1)

    def against_seeds(self, seed: int) -> AgainstSeeds | None:
        """Cosines within the models against those between them; None for one seed."""
        return against_seeds(np.stack([one.output for one in self.tokens]), seed=seed)

    def other_image_cosine(self, seed: int) -> float:
        """Cosine of a token with itself on another image, the mean over seeds."""
        return float(np.mean([image_cosine(one.output, seed=seed) for one in self.tokens]))


def collapse(cosine: Mean) -> str:
    """Whether tokens are parallel, as far as the interval of their cosine tells."""
    low, high = cosine.ci95
    return "yes" if low > COLLAPSED else "no" if high < COLLAPSED else "cannot tell"


def alike_table(measured: Mapping[str, ArmTokens], *, seed: int) -> Table:
    """Cosines and attention of the class tokens of each arm.

    Args:
        seed: Which images are paired for comparison; also of the permutations.
    """
    rows: list[list[Any]] = []
    for arm, one in measured.items():
        mean, seeds = mean_interval(one.cosines), one.cosines.mean(axis=1)
        likeness = [*_bounded(mean), collapse(mean), float(seeds.min()), float(seeds.max())]
        others = [one.other_image_cosine(seed), float(one.layer_cosines[0].mean())]
        found = one.against_seeds(seed)
        chance = [None] * 3 if found is None else [found.independent, found.p, found.smallest_p]
        rows.append([arm, *likeness, *others, *chance, *_overlap(one), mean.seeds, mean.images])
    columns = ["arm", "cosine", "from", "to", "collapsed", "lowest seed", "highest seed"]
    columns += ["same token, other image", "at the input", "independent models", "p", "smallest p"]
    columns += ["attention apart", "from", "to", "seeds", "images"]
    return Table(
        "How alike the class tokens are",
        columns,
        rows,
        "Cosine of the output tokens after the final norm, the mean over pairs and images. Collapsed: the "
        f"interval lies above {COLLAPSED:g}. Independent models: a token of one seed and one of another, on "
        "the same image; p by dealing all tokens out anew over the models, not adjusted for the number of "
        "arms; smallest p: what so few seeds and tokens allow. Attention apart: Jensen-Shannon divergence in "
        "the last block, 0 where tokens look at the same patches, 1 where at different ones.",
    )


def knowledge_table(measured: Mapping[str, ArmTokens], *, seed: int) -> Table:
    """What each class token of each arm says on its own."""
    rows: list[list[Any]] = []
    for arm, one in measured.items():
        right = np.stack([each.right for each in one.answers])  # (seeds, images, K)
        tokens, single = right.mean(axis=1), mean_interval(right.mean(axis=2))
        differ = mean_interval(np.stack([each.disagreement for each in one.answers]))
        oracle = mean_interval(np.asarray(right.any(axis=2)))
        most_confident = np.stack([each.most_confident for each in one.answers])
        bits = information_test(most_confident, one.answers[0].targets, seed=seed)
        own = [*_bounded(single, 0.0), float(tokens.min()), float(tokens.max())]
        counts = [single.seeds, single.images]
        rows.append(
            [
                arm,
                one.answers[0].read_by,
                *own,
                *_bounded(differ, 0.0),
                *_bounded(oracle, 0.0),
                *bits,
                *counts,
            ]
        )
    columns = ["arm", "read by", "one token (%)", *FROM_TO, "worst (%)", "best (%)"]
    columns += ["pairs that disagree (%)", *FROM_TO, "any token right (%)", *FROM_TO]
    columns += ["most confident token tells (bits)", "by chance (bits)", "p", "seeds", "images"]
    return Table(
        "What each class token knows",
        columns,
        rows,
        "Test images, each token classified on its own. Any token right: what a perfect choice of the token "
        "would reach. Bits: mutual information of the most confident token and the class; p by permuting "
        "classes.",
    )


def layer_chart(measured: Mapping[str, ArmTokens]) -> LineChart:
    """Cosine of the class tokens, block by block."""
    lines = []
    for arm, one in list(measured.items())[:MOST_LINES]:
        means = [_bounded(mean_interval(values)) for values in one.layer_cosines]
        points = [(float(layer), estimate) for layer, (estimate, _, _) in enumerate(means)]
        lines.append(Line(arm, points, [(low, high) for _, low, high in means]))
    return LineChart(
        "Cosine of the class tokens by layer",
        "block",
        "cosine",
        lines,
        percent=False,
        marks={f"{COLLAPSED:g}": COLLAPSED},
        note="As the blocks left the tokens; 0: the learned tokens and their positions. At most "
        f"{MOST_LINES} arms are drawn; bands are 95 % intervals over seeds and images.",
    )


def cosine_map(arm: str, tokens: ClassTokens) -> HeatMap:
    """Cosine of each output token with each, averaged over images."""
    matrix = cosine_matrix(tokens.output).mean(axis=0)
    labels = [f"token {k + 1}" for k in range(len(matrix))]
    note = "Mean over the test images, of the first seed's model."
    title = f"Cosine of the output tokens, {arm}"
    return HeatMap(title, matrix.tolist(), labels, labels, percent=False, limits=(-1.0, 1.0), note=note)


def token_pictures(source: ImageSource, measured: Mapping[str, ClassTokens]) -> Pictures | None:
    """Where each class token of some models attends to, beside some images.

    Returns:
        Maps with their highest value white, from one image of each class on; None where no weights are known.
    """
    shown = {name: one for name, one in measured.items() if one.maps is not None}
    if not shown:
        return None
    first = next(iter(shown.values()))
    labels = first.rows.labels
    repeat = np.array([int((labels[:i] == label).sum()) for i, label in enumerate(labels)])
    chosen = np.lexsort((labels, repeat))[:EXAMPLES].tolist()
    reader = model_reader(first.preprocess)
    rows = []
    for i in chosen:
        pixels = reader(source.read(int(first.rows.positions[i])))
        row = [np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())]
        for one in shown.values():
            assert one.maps is not None
            row += [_picture(values, one.grid_size, row[0].shape[:2]) for values in one.maps[i]]
        rows.append(row)
    columns = [f"{name}: token {k + 1}" for name, one in shown.items() for k in range(one.count)]
    return Pictures(
        "Attention of each class token to the patches, last block",
        ["image", *columns],
        rows,
        [first.rows.class_names[int(labels[i])] for i in chosen],
        "Mean over heads, of the first seed's models. In each map the highest value is white, 0 is black.",
    )


def _picture(values: np.ndarray, grid_size: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """A map of patches as grey pixels in the size of the image."""
    grid = values.reshape(grid_size) / max(float(values.max()), 1e-12)
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, grid_size, strict=True))
    grey = np.rint(255 * grid[rows][:, columns]).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _bounded(mean: Mean, least: float = -1.0) -> tuple[float, float, float]:
    """Estimate and interval of what lies between ``least`` and 1."""
    low, high = mean.ci95
    return mean.estimate, max(least, low), min(1.0, high)


def _overlap(measured: ArmTokens) -> list[float | None]:
    found = [one.overlap for one in measured.tokens]
    values = [one for one in found if one is not None]
    if len(values) < len(found):
        return [None] * 3
    return [*_bounded(mean_interval(np.stack(values)), 0.0)]
