"""Mosaics that show one image among distractors: how much of the input is relevant is known, and set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice, check_range
from vit_cls.data.dataset import ArraySource, ImageSource
from vit_cls.data.index import ImageIndex
from vit_cls.data.loader import load_once
from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS
from vit_cls.data.transforms import eval_reader
from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.results import Pictures

DISTRACTORS = ("classes", "noise")
TILE = 32
"""Side of a tile in pixels, where images are files."""
FEWEST_CLASSES = 4
"""Two to tell apart, and two for the other tiles."""
EXAMPLES = 4
LOADED = 64
MEMORY = Path("/proc/meminfo")


class MosaicSource(ArraySource):
    """Canvases in memory, and what stands where on them.

    Args:
        tiles: Which tiles show the image, row by row, int64, shape ``(images, relevant)``.
        failures: Why an image is on no canvas, neither as target nor as distractor, by its relative path.
    """

    def __init__(
        self, index: ImageIndex, images: Tensor, tiles: np.ndarray, failures: dict[str, str]
    ) -> None:
        super().__init__(index, images)
        self.tiles = tiles
        self.failures = failures


def mosaic_parts(
    parts: Partition,
    *,
    side: int = 4,
    relevant: int = 1,
    tile: int | None = None,
    distractors: str = "classes",
    seed: int = 0,
) -> Partition:
    """Put each image of each part on a canvas of ``side * side`` tiles, some of which show the image.

    Canvas, tiles and tokens are the same whatever the relevant share. So are the tiles: those that show the
    image where few do are among those where more do, and a distractor stays as long as its tile shows one.
    All draws are a function of ``seed`` and the image's path.

    Args:
        side: Tiles along each side, at least 2.
        relevant: Tiles that show the image, from 1 to ``side * side``.
        tile: Side of a tile in pixels: the centre square of an image is resized to it. None keeps square
            images in memory as they are, and takes `TILE` for files.
        distractors: What the other tiles show: ``classes``, images of the second of the `roles`, drawn from
            the same part with replacement; or ``noise``, which is uniform.

    Returns:
        The same parts, each a `MosaicSource`. Files that cannot be read are left out; ``origin`` counts them.

    Raises:
        ConfigError: If a setting is out of range, or there are too few classes for ``classes``.
        DataError: If a part has no image for one of the two roles, or the memory is too small.
    """
    tiles = side * side
    check_range("--side", side, at_least=2)
    check_range("relevant", relevant, at_least=1, at_most=tiles, hint=f"A mosaic has {tiles} tiles.")
    check_range("--tile", tile, at_least=2)
    targets, others = roles(parts.class_names, distractors)
    sources: dict[str, ImageSource] = {name: getattr(parts, name) for name in PARTS}
    pixels = tile_side(parts) if tile is None else tile
    count = sum(int(np.isin(_names(one.index), targets).sum()) for one in sources.values())
    size = 3 * pixels * pixels
    canvases = count * tiles * size
    _check_memory(
        canvases + max(len(one.index) for one in sources.values()) * size, f"{count} mosaics", tile=pixels
    )
    made = {
        name: _make(source, name, (targets, others), side, relevant, pixels, seed)
        for name, source in sources.items()
    }
    failures = {path: reason for one in made.values() for path, reason in one.failures.items()}
    rest = f"images of {', '.join(others)}" if others else "noise"
    left_out = ""
    if failures:
        path, reason = next(iter(failures.items()))
        left_out = f"; {len(failures)} unreadable files left out, the first {path}: {reason}"
    origin = (
        f"{parts.origin}; put on mosaics of {side}x{side} tiles of {pixels} pixels ({fmt.size(canvases)} "
        f"in memory), of which {relevant} show the image and the others {rest}, seed {seed}{left_out}"
    )
    return Partition(made["train"], made["val"], made["test"], origin, split=parts.split)


def relevant_tiles(path: str, *, side: int, relevant: int, seed: int = 0) -> np.ndarray:
    """The tiles that show the image, row by row, int64, ``(relevant,)``; fewer are the first of more."""
    return _draws(path, seed).permutation(side * side)[:relevant]


def roles(class_names: Sequence[str], distractors: str) -> tuple[list[str], list[str]]:
    """The classes to be told apart, and those that the other tiles show: halves by name; none for noise.

    Raises:
        ConfigError: If there are too few classes for both roles, or ``distractors`` is another word.

    Example:
        >>> roles(["d", "a", "c", "b", "e"], "classes")
        (['a', 'b'], ['c', 'd', 'e'])
    """
    check_choice("--distractors", distractors, DISTRACTORS)
    names = sorted(class_names)
    if distractors == "noise":
        return names, []
    if len(names) < FEWEST_CLASSES:
        raise ConfigError(
            f"--distractors classes needs at least {FEWEST_CLASSES} classes: two to tell apart, and two for "
            f"the other tiles; got {len(names)} ({', '.join(names)}). Use --distractors noise."
        )
    half = len(names) // 2
    return names[:half], names[half:]


def tile_side(parts: Partition) -> int:
    """Side of a tile in pixels where none is given: that of square images in memory, else `TILE`."""
    if isinstance(parts.train, ArraySource):
        height, width = parts.train.images.shape[-2:]
        if height == width:
            return int(height)
    return TILE


def with_image(canvas: np.ndarray, tile: np.ndarray, where: np.ndarray, side: int) -> np.ndarray:
    """A canvas ``(channels, height, width)`` with an image, in the size of a tile, on some of its tiles."""
    tiles = rearrange(canvas, "c (r h) (s w) -> (r s) c h w", r=side, s=side).copy()
    tiles[where] = tile
    return rearrange(tiles, "(r s) c h w -> c (r h) (s w)", r=side)


def example_pictures(source: MosaicSource, counts: Sequence[int], *, side: int, seed: int) -> Pictures:
    """Some images of a source, whose ``side`` and ``seed`` these are, with as many or more relevant tiles."""
    labels = source.index.labels
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)[:EXAMPLES]]
    rows = []
    for i in chosen:
        canvas = source.images[i].numpy()
        size = canvas.shape[-1] // side
        top, left = (size * place for place in divmod(int(source.tiles[i, 0]), side))
        tile = canvas[:, top : top + size, left : left + size]
        places = [
            relevant_tiles(source.index.paths[i], side=side, relevant=count, seed=seed) for count in counts
        ]
        shown = [with_image(canvas, tile, where, side) for where in places]
        rows.append([np.ascontiguousarray(one.transpose(1, 2, 0)) for one in shown])
    return Pictures(
        "Test images at each share",
        [f"{count} of {side * side} relevant" for count in counts],
        rows,
        [source.index.class_names[int(labels[i])] for i in chosen],
        "Each row is an image, with the class that is to be found.",
    )


def _make(
    source: ImageSource,
    part: str,
    classes: tuple[list[str], list[str]],
    side: int,
    relevant: int,
    pixels: int,
    seed: int,
) -> MosaicSource:
    tiles, kept, failures = _read(source, pixels)
    names = _names(source.index)[kept]
    chosen, pool = (np.flatnonzero(np.isin(names, group)) for group in classes)
    for rows, group, role in ((chosen, classes[0], "to tell apart"), (pool, classes[1], "for distractors")):
        if group and not len(rows):
            raise DataError(
                f"{source.index.root}: the {part} part has no readable image of the classes {role} "
                f"({', '.join(group[:10])}). Give some there, or use --distractors noise."
            )
    index = dataclasses.replace(
        source.index.subset(kept[chosen]),
        labels=np.searchsorted(classes[0], names[chosen]).astype(np.int64),
        class_names=list(classes[0]),
    )
    canvases = np.empty((len(chosen), 3, side * pixels, side * pixels), dtype=np.uint8)
    where = np.empty((len(chosen), relevant), dtype=np.int64)
    for i, row in enumerate(chosen.tolist()):
        draws = _draws(index.paths[i], seed)
        where[i] = draws.permutation(side * side)[:relevant]
        # All tiles are drawn, whatever the relevant share: a distractor depends on its tile alone.
        if len(pool):
            shown = tiles[pool[draws.integers(len(pool), size=side * side)]]
        else:
            shown = draws.integers(256, size=(side * side, 3, pixels, pixels), dtype=np.uint8)
        shown[where[i]] = tiles[row]
        canvases[i] = rearrange(shown, "(r s) c h w -> c (r h) (s w)", r=side)
    return MosaicSource(index, torch.from_numpy(canvases), where, failures)


def _read(source: ImageSource, pixels: int) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Centre squares of all images, uint8, which images they are, and why others are none."""
    index = source.index
    tiles = np.empty((len(index), 3, pixels, pixels), dtype=np.uint8)
    kept: list[int] = []
    failures: dict[str, str] = {}
    for positions, batch in load_once(source, eval_reader(pixels, crop_pct=1.0), batch_size=LOADED):
        failures |= {index.paths[positions[place]]: reason for place, reason in batch.failures}
        rows = [positions[place] for place in batch.indices.tolist()]
        if rows:
            tiles[len(kept) : len(kept) + len(rows)] = batch.images.numpy()
            kept += rows
    return tiles[: len(kept)], np.array(kept, dtype=np.int64), failures


def _names(index: ImageIndex) -> np.ndarray:
    """Class of each image, by name."""
    return np.array(index.class_names)[index.labels]


def _draws(path: str, seed: int) -> np.random.Generator:
    words = f"{seed} {path}".encode("utf-8", "surrogateescape")
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little"))


def _check_memory(needed: int, what: str, *, tile: int) -> None:
    """Refuse what does not fit; where the system does not tell what is free, nothing is refused."""
    free = _free_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{what} with tiles of {tile} pixels need {fmt.size(needed)} of memory, but "
            f"{fmt.size(free)} are free. Use a smaller --tile or --side, or fewer images."
        )


def _free_memory() -> int | None:
    """Bytes that the system could give, None where it does not say."""
    try:
        lines = MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
