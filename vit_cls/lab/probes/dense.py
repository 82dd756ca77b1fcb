"""What each patch token knows of its own place: where it is, its colour, what stands there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.data.dataset import ImageSource
from vit_cls.data.parts import PARTS
from vit_cls.errors import ConfigError
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.base import FrozenParts, Probe, Subject
from vit_cls.lab.probes.common import described
from vit_cls.lab.probes.patch_tasks import (
    Mosaics,
    Part,
    fit_by_patch,
    make_mosaics,
    place_losses,
    place_targets,
    subset,
    tile_losses,
    tile_of_patches,
)
from vit_cls.lab.probes.pixel_decoders import pixels_of
from vit_cls.lab.results import Figure, HeatMap, LabResult, Line, LineChart, Table
from vit_cls.model.classifier import ImageClassifier
from vit_cls.stats.least_squares import PENALTIES, R2_UNIT, one_against_all, r2_scores
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import GREATER, POINTS, Claim, judge_all

MAX_IMAGES = 1000
"""Of each part; there are as many samples as patches."""
ROUNDS = 4
"""How often a training image is used in mosaics."""
PATCHES = "patch tokens"
TASKS = {
    "position": "patch found (accuracy)",
    "place": "row and column (R2)",
    "colour": "mean colour (R2)",
    "tile": "class of the tile (accuracy)",
}


@dataclass(frozen=True, kw_only=True)
class DenseProbe(Probe):
    """Predict a patch's place, its mean colour and, in a mosaic, the class of the tile that it lies in.

    From each patch token, and from one vector for the whole image, the same at every place: the class token,
    or the mean of the patches where the model has none. Ridge regression, the same weights at every place.

    Args:
        margin: The largest difference that does not matter, in (0, 1).
        seed: Of the draws and of the mosaics.
        layers: Where; 0 is before the first block. None means the last alone. The last one is judged.
        k: Tiles a side of a mosaic, at least 2.
        max_images: Of each part, at most; drawn at random.

    Raises:
        ConfigError: If a number is impossible.

    Source:
        Linear probes of patch tokens: DINOv2, https://arxiv.org/abs/2304.07193, section 7.4.
    """

    layers: Sequence[int] | None = None
    k: int = 2
    max_images: int = MAX_IMAGES

    name = "dense"
    question = "Do patch tokens know more about their own place than one vector for the whole image does?"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--k", self.k, at_least=2)
        hint = f"Two mosaics of {self.k}x{self.k} tiles need that."
        check_range("--max_images", self.max_images, at_least=2 * self.k * self.k, hint=hint)

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        found = PatchErrors(self, subject)
        findings = judge_all(found.claims(), seed=self.seed)
        last = found.layers[-1]
        tile, position = (
            [1 - float(found.errors[last, read][task].mean()) for read in (PATCHES, found.whole)]
            for task in ("tile", "position")
        )
        headline = (
            f"{findings[0].claim[:-1]}: {findings[0].verdict}. After layer {last}, patch tokens name the "
            f"class of their tile in {fmt.percent(tile[0])} of places, the {found.whole} in "
            f"{fmt.percent(tile[1])} ({len(found.constant)} mosaics), and their own place in "
            f"{fmt.percent(position[0])} of places (chance {fmt.percent(1 / found.num_patches)})."
        )
        errors = {f"layer {n}, {read}": errors for (n, read), errors in found.errors.items()}
        return self.result(
            headline,
            findings,
            tables=[found.table()],
            figures=found.figures(),
            settings={
                "architecture": described(subject.classifier.model),
                "layers": found.layers,
                "tiles": f"{self.k}x{self.k}",
                "max_images": self.max_images,
                "penalties": list(PENALTIES),
                "margin": self.margin,
                "seed": self.seed,
            },
            parts=found.frozen.rows,
            data={"origin": subject.parts.origin, **found.counts},
            values=found.values(),
            predictions={"paths": list(found.frozen.test.paths), **errors},
            notes=found.notes(),
        )


class PatchErrors:
    """Errors of every layer, read and task on the test images and mosaics."""

    def __init__(self, probe: DenseProbe, subject: Subject) -> None:
        self.probe, self.subject, self.k = probe, subject, probe.k
        self.model, self.preprocess = subject.classifier.model, subject.classifier.preprocess
        self.layers = [len(self.model.blocks)] if probe.layers is None else sorted(set(probe.layers))
        layout = self.model.layout
        self.pool = "cls" if layout.class_token else "gap"
        self.whole = "class token" if self.pool == "cls" else "mean of the patches"
        self.grid_size, self.num_patches = layout.grid_size, layout.num_patches
        rng = np.random.default_rng(probe.seed)
        self.sources = [subset(source, probe.max_images, rng) for source in subject.parts.sources]
        train, val, test = (subject.tokens_of(source, self.layers) for source in self.sources)
        self.frozen = FrozenParts(train, val, test)
        self.errors: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        self._measure()

    def _measure(self) -> None:
        frozen = list(self.frozen.by_name.values())
        colours = [self._colours(part, source) for part, source in zip(frozen, self.sources, strict=True)]
        places = place_targets(self.grid_size)
        self.totals = _totals(places[:, -2:], colours)
        mosaics = self._mosaics(frozen)
        whole = replace(self.preprocess, crop_pct=1.0, crop_mode="squash")
        on_mosaics = replace(
            self.subject,
            classifier=ImageClassifier(self.model, whole, self.subject.classifier.class_names),
        )
        of_mosaics = [on_mosaics.tokens_of(some.source, self.layers) for some in mosaics]
        tiles = [self._tile_targets(some) for some in mosaics]
        self.constant = _constant_answer(tiles[2])
        for layer in self.layers:
            for read in (PATCHES, self.whole):
                plain = [
                    self._part(part, layer, read, _with_places(places, c))
                    for part, c in zip(frozen, colours, strict=True)
                ]
                tiled = [
                    self._part(part, layer, read, t.__getitem__)
                    for part, t in zip(of_mosaics, tiles, strict=True)
                ]
                found = fit_by_patch(plain[0], plain[1], plain[2], place_losses)
                missed = [found.pop(f"missed {i}").mean() for i in range(self.num_patches)]
                if layer == self.layers[-1] and read == PATCHES:
                    self.missed = np.array(missed)
                found |= fit_by_patch(tiled[0], tiled[1], tiled[2], tile_losses)
                self.errors[layer, read] = found
        self.counts: dict[str, Any] = {}
        self.sizes = [len(source.index) for source in self.subject.parts.sources]
        for name, part, size, some in zip(PARTS, frozen, self.sizes, mosaics, strict=True):
            self.counts |= {
                name: len(part),
                f"{name} images there were": size,
                f"{name} failures": part.failures,
                f"{name} mosaics": len(some.tiles),
                f"{name} images in no mosaic": some.unused,
            }

    def _part(
        self, frozen: FrozenTokens, layer: int, read: str, targets: Callable[[slice], np.ndarray]
    ) -> Part:
        if read == PATCHES:
            first = frozen.layout.num_prefix_tokens
            return Part(len(frozen), lambda rows: frozen.normed(layer, rows)[:, first:], targets)
        vectors = frozen.read(self.pool, layer)[:, None]
        return Part(len(frozen), vectors.__getitem__, targets)

    def _colours(self, frozen: FrozenTokens, source: ImageSource) -> np.ndarray:
        """Mean colour of each patch, shape ``(images, patches, 3)``."""
        means = pixels_of(source, frozen.positions, self.preprocess, self.grid_size)
        return means.reshape(*means.shape[:2], -1).transpose(0, 2, 1)

    def _mosaics(self, frozen: Sequence[FrozenTokens]) -> list[Mosaics]:
        return [
            make_mosaics(
                source,
                one.positions,
                self.preprocess,
                k=self.k,
                rounds=rounds,
                seed=self.probe.seed,
                most=self.probe.max_images,
                part=part,
            )
            for part, source, one, rounds in zip(PARTS, self.sources, frozen, (ROUNDS, 1, 1), strict=True)
        ]

    def _tile_targets(self, mosaics: Mosaics) -> np.ndarray:
        """One against all of each patch's tile; NaN where a patch lies in several tiles."""
        config = self.model.config
        tile = tile_of_patches(config.image_hw, self.grid_size, config.patch_size, self.k)
        if (tile < 0).all():
            raise ConfigError(
                f"--k {self.k}: every patch of the {self.grid_size[0]}x{self.grid_size[1]} grid lies in "
                "more than one tile. Use fewer tiles."
            )
        labels = mosaics.tiles.reshape(len(mosaics.tiles), -1)[:, tile]
        targets = one_against_all(labels, len(self.subject.parts.class_names))
        targets[:, tile < 0] = np.nan
        return targets

    def scores(self, layer: int, read: str, task: str) -> np.ndarray:
        """A score for each test image or mosaic: accuracy, or its share of R2."""
        errors = self.errors[layer, read][task]
        return r2_scores(errors, self.totals[task]) if task in self.totals else 1 - errors

    def tasks(self) -> list[str]:
        """Those that there is something to explain in: not the colour of images of one colour."""
        return [task for task in TASKS if task not in self.totals or float(self.totals[task].sum()) > 0]

    def claims(self) -> list[Claim]:
        """What is judged, on the last of the layers."""
        texts = {
            "tile": f"Patch tokens tell the class of the tile they lie in better than the {self.whole} does.",
            "position": f"Patch tokens tell where they are better than the {self.whole} does.",
            "colour": f"Patch tokens tell the colour of their patch better than the {self.whole} does.",
        }
        last = self.layers[-1]
        return [
            Claim(
                text,
                self.scores(last, self.whole, task),
                self.scores(last, PATCHES, task),
                GREATER,
                self.probe.margin,
                (f"reading the {self.whole}", f"reading {PATCHES}"),
                R2_UNIT if task in self.totals else POINTS,
            )
            for task, text in texts.items()
            if task in self.tasks()
        ]

    def table(self) -> Table:
        """A row a layer and read."""
        rows: list[list[str | int | float | None]] = []
        for layer, read in self.errors:
            cells = [_cell(self.scores(layer, read, task), task in self.totals) for task in self.tasks()]
            rows.append([layer, read, *cells])
        note = (
            f"{len(self.frozen.test)} test images and {len(self.constant)} mosaics of {self.k}x{self.k} of "
            "them; 95 % intervals over images and mosaics. "
            f"One in {self.num_patches} patches is found by chance. "
            f"The best answer that is the same in all places of a mosaic is right in "
            f"{fmt.percent(float(self.constant.mean()))} of them."
        )
        return Table(
            "What a patch knows of its place",
            ["layer", "from", *(TASKS[t] for t in self.tasks())],
            rows,
            note,
        )

    def values(self) -> dict[str, Any]:
        """Numbers for scripts."""
        found: dict[str, Any] = {}
        for layer, read in self.errors:
            means = {task: mean_interval(self.scores(layer, read, task)) for task in self.tasks()}
            found.setdefault(f"layer {layer}", {})[read] = {
                task: {"estimate": one.estimate, "ci95": one.ci95} for task, one in means.items()
            }
        chance = {"chance_position": 1 / self.num_patches, "constant_tile": float(self.constant.mean())}
        return found | chance

    def figures(self) -> list[Figure]:
        """A curve a task where there are several layers, and where patches are found."""
        figures: list[Figure] = []
        for task in self.tasks() if len(self.layers) > 1 else ():
            lines = []
            for read in (PATCHES, self.whole):
                means = {layer: mean_interval(self.scores(layer, read, task)) for layer in self.layers}
                lines.append(Line.of(read, means))
            marks = {"position": {"chance": 1 / self.num_patches}}
            marks["tile"] = {"same answer everywhere": float(self.constant.mean())}
            title = f"{TASKS[task]} by layer"
            x_label = "layer (0: before the first block)"
            figures.append(LineChart(title, x_label, TASKS[task], lines, marks=marks.get(task, {})))
        found = (1 - self.missed).reshape(self.grid_size).tolist()
        title = f"Patches that are found by their token after layer {self.layers[-1]}"
        note = f"Share of {len(self.frozen.test)} test images. One cell a patch, as the image lies."
        return [*figures, HeatMap(title, found, limits=(0.0, 1.0), note=note)]

    def notes(self) -> list[str]:
        """What to bear in mind."""
        notes = [
            "The same vector at every place cannot tell places apart: it finds one patch of each image, and "
            "its R2 of row and column is 0. A class that stands in several tiles of a mosaic helps it.",
            f"Tiles are images shrunk to 1/{self.k} of their height and width; the model was not trained on "
            "such.",
        ]
        if any(size > self.probe.max_images for size in self.sizes):
            notes.append(f"Of each part {self.probe.max_images} images at most were used, drawn at random.")
        config = self.model.config
        tile = tile_of_patches(config.image_hw, self.grid_size, config.patch_size, self.k)
        if (tile < 0).any():
            notes.append(
                f"{int((tile < 0).sum())} of {len(tile)} patches lie in several tiles and do not count."
            )
        return notes


def _totals(places: np.ndarray, colours: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What one answer for all, the mean of training images and places, leaves of each test image, by task."""
    place = np.square(places - places.mean(axis=0)).sum()
    mean = colours[0].mean(axis=(0, 1))
    colour = np.square(colours[2] - mean).sum(axis=(1, 2))
    return {"place": np.full(len(colours[2]), float(place)), "colour": colour}


def _with_places(places: np.ndarray, colours: np.ndarray) -> Callable[[slice], np.ndarray]:
    def targets(rows: slice) -> np.ndarray:
        some = colours[rows]
        return np.concatenate([np.broadcast_to(places, (len(some), *places.shape)), some], axis=2)

    return targets


def _constant_answer(targets: np.ndarray) -> np.ndarray:
    """Share of patches of each mosaic that have its commonest class; patches in several tiles left out."""
    kept = ~np.isnan(targets[0]).any(axis=1)
    return (targets[:, kept] > 0).mean(axis=1).max(axis=1)


def _cell(scores: np.ndarray, is_r2: bool) -> str:
    found = mean_interval(scores)
    return fmt.estimate_cell(found.estimate, found.ci95, fmt.three_decimals if is_r2 else fmt.percent)
