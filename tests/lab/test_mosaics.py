"""Mosaics of studies: what stands on which tile, whatever the relevant share, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from vit_cls.data.dataset import ArraySource
from vit_cls.data.index import ImageIndex
from vit_cls.data.partition import Partition, partition_data
from vit_cls.errors import ConfigError, DataError
from vit_cls.lab.studies import mosaics
from vit_cls.lab.studies.mosaics import example_pictures, mosaic_parts, relevant_tiles
from vit_cls.lab.studies.trials import TrialData

NAMES = ["d", "c", "b", "a"]  # not in the order of the names: a and b are to be told apart


def _part(first: int, images: int = 12, side: int = 2, names: list[str] = NAMES) -> ArraySource:
    """Images of one grey value each, that of no other: it tells which image a tile shows."""
    labels = np.arange(images) % len(names)
    values = torch.arange(first, first + images, dtype=torch.uint8)
    pixels = values[:, None, None, None].expand(-1, 3, side, side).contiguous()
    index = ImageIndex(Path("made"), [f"{first + i}.png" for i in range(images)], labels, list(names))
    return ArraySource(index, pixels)


@pytest.fixture
def parts() -> Partition:
    return Partition(_part(100), _part(150), _part(200), "made here")


def _tiles(canvas: torch.Tensor, side: int) -> np.ndarray:
    """The grey value of each tile, which must be the same all over it."""
    tiles = rearrange(canvas.numpy(), "c (r h) (s w) -> (r s) (c h w)", r=side, s=side)
    assert (tiles == tiles[:, :1]).all()
    return tiles[:, 0]


@pytest.mark.parametrize("relevant", [1, 2, 4, 9])
def test_relevant_tiles_show_the_image_and_the_others_images_of_the_other_classes_and_part(parts, relevant):
    made = mosaic_parts(parts, side=3, relevant=relevant, seed=5)
    for name in ("train", "val", "test"):
        before, after = getattr(parts, name), getattr(made, name)
        others = {100 + 50 * ("train", "val", "test").index(name) + i for i in range(12) if i % 4 < 2}
        assert len(after.index) == 6
        for i, path in enumerate(after.index.paths):
            where = relevant_tiles(path, side=3, relevant=relevant, seed=5)
            assert after.tiles[i].tolist() == where.tolist()
            values = _tiles(after.images[i], 3)
            assert set(values[where]) == {int(Path(path).stem)}
            rest = np.delete(values, where)
            assert len(rest) == 9 - relevant
            assert set(rest) <= others
            old = list(before.index.paths).index(path)
            assert after.index.class_names[after.index.labels[i]] == NAMES[before.index.labels[old]]
    assert made.class_names == ["a", "b"]


def test_fewer_relevant_tiles_are_among_more_and_a_distractor_depends_on_its_tile_alone(parts):
    few, more = (mosaic_parts(parts, side=3, relevant=n).test for n in (1, 4))
    differs = 0
    for i in range(len(few.index)):
        assert set(few.tiles[i]) < set(more.tiles[i])
        one, other = _tiles(few.images[i], 3), _tiles(more.images[i], 3)
        changed = np.flatnonzero(one != other)
        assert set(changed) <= set(more.tiles[i]) - set(few.tiles[i])
        differs += len(changed)
    assert differs == 3 * len(few.index)


def test_draws_follow_the_seed_and_the_path_and_not_the_order_of_the_images(parts):
    once, again, other = (mosaic_parts(parts, side=3, seed=seed).test for seed in (1, 1, 2))
    assert torch.equal(once.images, again.images)
    assert not torch.equal(once.images, other.images)
    places = {path: tuple(where) for path, where in zip(once.index.paths, once.tiles.tolist(), strict=True)}
    assert len(set(places.values())) > 1
    reverse = np.arange(12)[::-1].copy()
    source = ArraySource(parts.test.index.subset(reverse), parts.test.images[reverse])
    turned = mosaic_parts(Partition(parts.train, parts.val, source, ""), side=3, seed=1).test
    assert {p: tuple(w) for p, w in zip(turned.index.paths, turned.tiles.tolist(), strict=True)} == places


def test_noise_keeps_all_classes_and_fills_the_other_tiles_evenly(parts):
    made = mosaic_parts(parts, side=2, relevant=1, tile=20, distractors="noise").test
    assert made.index.class_names == ["a", "b", "c", "d"]
    assert len(made.index) == 12
    tiles = rearrange(made.images.numpy(), "n c (r h) (s w) -> n (r s) (c h w)", r=2, s=2)
    rest = np.concatenate(
        [np.delete(row, where, axis=0) for row, where in zip(tiles, made.tiles, strict=True)]
    )
    counts = np.bincount(rest.ravel(), minlength=256)
    assert counts.min() > 0.7 * counts.mean()
    assert counts.max() < 1.3 * counts.mean()


def test_digits_keep_their_pixels_and_test_mosaics_are_the_same_for_every_seed():
    data = TrialData("digits", mosaic={"side": 4, "relevant": 2})
    one, other = data.parts(0), data.parts(1)
    assert torch.equal(one.test.images, other.test.images)
    assert list(one.val.index.paths) != list(other.val.index.paths)
    plain = partition_data("digits").test
    path = one.test.index.paths[7]
    row, column = divmod(int(one.test.tiles[7, 1]), 4)
    shown = one.test.images[7][:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert torch.equal(shown, plain.images[list(plain.index.paths).index(path)])
    assert one.class_names == ["0", "1", "2", "3", "4"]
    assert one.test.images.shape[1:] == (3, 32, 32)
    assert "4x4 tiles of 8 pixels" in one.origin
    assert "images of 5, 6, 7, 8, 9" in one.origin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes in three parts: wide photos, of one colour in the middle and black at the ends."""
    for split in ("train", "val", "test"):
        for k, name in enumerate("abcd"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.zeros((20, 60, 3), dtype=np.uint8)
                pixels[:, 12:48] = 60 * (k + 1) + i  # wider than the square, for the resize looks beyond
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_photos_are_cut_to_the_centre_square_and_resized_and_bad_files_are_left_out_and_counted(folder):
    (folder / "test/a/1.png").write_bytes(b"no image")
    (folder / "test/d/0.png").write_bytes(b"no image")
    made = mosaic_parts(partition_data(folder), side=2, relevant=1, tile=10)
    test = made.test
    assert list(test.index.paths) == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert test.index.labels.tolist() == [0, 0, 1, 1, 1]
    assert set(test.failures) == {"a/1.png", "d/0.png"}
    assert "2 unreadable files left out, the first a/1.png: " in made.origin
    for i, own in enumerate((60, 62, 120, 121, 122)):
        values = _tiles(test.images[i], 2)
        assert values[test.tiles[i, 0]] == own
        assert set(np.delete(values, test.tiles[i, 0])) <= {180, 181, 182, 241, 242}
    assert made.counts() == {"train": 6, "val": 6, "test": 5}


def test_files_are_32_pixels_a_tile_unless_told_otherwise(folder):
    assert mosaic_parts(partition_data(folder), side=2).val.images.shape == (6, 3, 64, 64)


def test_examples_show_the_image_on_as_many_tiles_as_their_column_says(parts):
    source = mosaic_parts(parts, side=3, relevant=1, seed=4).test
    pictures = example_pictures(source, [9, 4, 1], side=3, seed=4)
    assert list(pictures.row_labels) == ["a", "b"]
    for name, row in zip(pictures.row_labels, pictures.rows, strict=True):
        i = int(np.flatnonzero(source.index.labels == "ab".index(name))[0])
        own = int(Path(source.index.paths[i]).stem)
        for count, picture in zip((9, 4, 1), row, strict=True):
            expected = mosaic_parts(parts, side=3, relevant=count, seed=4).test.images[i]
            assert torch.equal(torch.from_numpy(picture).permute(2, 0, 1), expected)
            assert (_tiles(expected, 3) == own).sum() == count


def test_too_few_classes_for_distractors_are_refused_and_noise_is_named():
    three = [_part(first, names=["x", "y", "z"]) for first in (0, 50, 100)]
    with pytest.raises(ConfigError, match=r"at least 4 classes.*got 3 \(x, y, z\).*--distractors noise"):
        mosaic_parts(Partition(*three, ""))
    assert mosaic_parts(Partition(*three, ""), distractors="noise").class_names == ["x", "y", "z"]


def test_a_part_without_distractors_is_refused(parts):
    only = parts.val.index.subset(np.flatnonzero(parts.val.index.labels >= 2))
    val = ArraySource(only, parts.val.images[: len(only)])
    with pytest.raises(DataError, match=r"the val part has no readable image .* for distractors \(c, d\)"):
        mosaic_parts(Partition(parts.train, val, parts.test, ""))


def test_what_does_not_fit_into_memory_is_refused_with_the_amounts(parts, monkeypatch, tmp_path):
    lines = tmp_path / "meminfo"
    lines.write_text("MemTotal: 9 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr(mosaics, "MEMORY", lines)
    mosaic_parts(parts, side=2, tile=2)  # 18 mosaics of 48 bytes, and 144 for the tiles: 1008
    with pytest.raises(DataError, match=r"18 mosaics with tiles of 100 pixels need [\d.]+ MB.*--tile"):
        mosaic_parts(parts, side=2, tile=100)
    monkeypatch.setattr(mosaics, "MEMORY", tmp_path / "none")
    mosaic_parts(parts, side=2, tile=100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"side": 1}, "--side must be at least 2; got 1"),
        ({"side": 3, "relevant": 10}, "at least 1 and at most 9; got 10.*9 tiles"),
        ({"relevant": 0}, "at most 16; got 0"),
        ({"tile": 1}, "--tile must be at least 2; got 1"),
        ({"distractors": "class"}, "one of classes, noise; got 'class'. Did you mean `classes`"),
    ],
)
def test_settings_out_of_range_are_refused(parts, settings, words):
    with pytest.raises(ConfigError, match=words):
        mosaic_parts(parts, **settings)
