"""Place, colour and class by patch: exact where tokens must tell, chance where they cannot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vit_cls.data.dataset import ArraySource
from vit_cls.data.partition import Partition, partition_data
from vit_cls.errors import ConfigError, DataError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.probes.base import Subject
from vit_cls.lab.probes.dense import PATCHES, DenseProbe
from vit_cls.lab.probes.patch_tasks import (
    Part,
    fit_by_patch,
    make_mosaics,
    mosaic,
    place_losses,
    place_targets,
    subset,
    tile_losses,
    tile_of_patches,
)
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.stats.least_squares import PENALTIES, fits_of_moments, moments_of

CONFIG = InferenceConfig(device="cpu", precision="32")


def _dense(classifier, parts, **options):
    return DenseProbe(**options).run(Subject(classifier, parts, CONFIG))


def _digits() -> Partition:
    parts = partition_data("digits")
    rng = np.random.default_rng(0)
    chosen = [subset(s, n, rng) for s, n in ((parts.train, 120), (parts.val, 40), (parts.test, 60))]
    return Partition(*chosen, "a few digits")


def _classifier(*, positions: bool = True, class_token: bool = True) -> ImageClassifier:
    config = ViTConfig(
        img_size=8,
        patch_size=2,
        num_classes=10,
        embed_dim=48,
        depth=2,
        num_heads=2,
        class_token=class_token,
        pool="cls" if class_token else "gap",
        pos_embed="learn" if positions else "none",
    )
    with seeded(0):
        model = VisionTransformer(config)
        if positions:
            torch.nn.init.normal_(model.pos_embed, std=1.0)
    # Another crop than the whole image: mosaics must not be cropped by it.
    preprocess = Preprocess((8, 8), crop_pct=0.8)
    return ImageClassifier(model, preprocess, [str(i) for i in range(10)]).eval()


@pytest.fixture(scope="module")
def found():
    return _dense(_classifier(), _digits(), layers=[0, 2], seed=1)


def test_before_the_first_block_every_patch_with_its_own_position_is_found(found):
    assert found.values["layer 0"][PATCHES]["position"]["estimate"] == 1.0
    assert found.values["layer 0"][PATCHES]["place"]["estimate"] > 0.95


def test_without_positions_equal_patches_are_not_told_apart():
    layer = _dense(_classifier(positions=False), _digits(), layers=[0]).values["layer 0"]
    assert layer[PATCHES]["position"]["estimate"] < 0.5  # the digit's shape still tells some


@pytest.mark.parametrize("layer", ["layer 0", "layer 2"])
def test_the_class_token_finds_patches_exactly_as_often_as_chance(found, layer):
    values = found.values[layer]["class token"]
    assert values["position"]["estimate"] == 1 / 16
    assert values["position"]["ci95"] == pytest.approx((1 / 16, 1 / 16))
    assert values["place"]["estimate"] == pytest.approx(0, abs=1e-9)
    assert found.values["chance_position"] == 1 / 16


def test_colour_is_in_a_patch_token_and_not_in_the_constant_class_token(found):
    values = found.values["layer 0"]
    assert values[PATCHES]["colour"]["estimate"] > 0.98  # a linear map of the patch, but for the norm
    assert abs(values["class token"]["colour"]["estimate"]) < 0.01


def test_the_class_token_never_beats_the_best_answer_that_is_the_same_everywhere(found):
    best = found.values["constant_tile"]
    for layer in ("layer 0", "layer 2"):
        assert found.values[layer]["class token"]["tile"]["estimate"] <= best
    errors = found.predictions["layer 0, class token"]["tile"]
    assert set(np.round(4 * errors, 6)) <= {0.0, 1.0, 2.0, 3.0, 4.0}  # all patches of a tile alike


def test_findings_are_paired_and_repeat_themselves(found):
    again = _dense(_classifier(), _digits(), layers=[0, 2], seed=1)
    assert dataclasses.replace(again, seconds=0).to_dict() == dataclasses.replace(found, seconds=0).to_dict()
    assert [one.counts["images"] for one in found.findings] == [15, 60, 60]
    position = found.findings[1]
    values = found.values["layer 2"]
    difference = values[PATCHES]["position"]["estimate"] - 1 / 16
    assert position.estimate == pytest.approx(difference)
    assert position.verdict == "supported"
    assert found.headline.startswith(found.findings[0].claim[:-1])
    other = _dense(_classifier(), _digits(), layers=[0, 2], seed=2)
    assert other.values["constant_tile"] != found.values["constant_tile"]


def test_the_variance_of_colours_is_that_around_the_mean_of_training_images():
    parts, classifier = _digits(), _classifier()
    # Brighter than those of training: the mean of test images would leave less to explain.
    bright = ArraySource(parts.test.index, parts.test.images // 2 + 120)
    whole = dataclasses.replace(classifier.preprocess, crop_pct=1.0)
    classifier = ImageClassifier(classifier.model, whole, classifier.class_names).eval()
    found = _dense(classifier, dataclasses.replace(parts, test=bright), layers=[2])

    def patches(source):
        pixels = source.images.double().numpy() / 255
        return pixels.reshape(-1, 3, 4, 2, 4, 2).mean(axis=(3, 5)).reshape(-1, 3, 16)

    seen = patches(bright)
    by_train, by_test = (
        np.square(seen - patches(one).mean(axis=(0, 2))[:, None]).sum() for one in (parts.train, bright)
    )
    assert by_train > 1.5 * by_test
    for read in (PATCHES, "class token"):
        errors = found.predictions[f"layer 2, {read}"]["colour"].sum()
        estimate = found.values["layer 2"][read]["colour"]["estimate"]
        assert estimate == pytest.approx(1 - errors / by_train)


def test_penalties_of_patches_are_chosen_on_validation_images():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 1))

    def noisy(images):  # 3 x 4 patches of 40 numbers to fit on: least squares fits the noise
        x = rng.normal(size=(images, 4, 40))
        y = x @ weight + 6 * rng.normal(size=(images, 4, 1))
        return Part(images, x.__getitem__, y.__getitem__)

    def losses(predicted, targets):
        return {"error": np.square(predicted - targets).sum(axis=(1, 2))}

    train, val, test = noisy(3), noisy(50), noisy(50)
    x, y = (part.reshape(12, -1) for part in next(train.chunks()))
    sums = {"val": [], "train": [], "test": []}
    for fit in fits_of_moments(moments_of([(x, y)]), PENALTIES):
        for name, part in (("val", val), ("train", train), ("test", test)):
            (some,) = part.chunks()
            sums[name].append(float(np.square(some[0] @ fit.weight + fit.bias - some[1]).sum()))
    best = int(np.argmin(sums["val"]))
    assert np.argmin(sums["train"]) == 0 < best
    found = fit_by_patch(train, val, test, losses)["error"].sum()
    assert found == pytest.approx(sums["test"][best])
    assert found != pytest.approx(sums["test"][0], rel=1e-3)


def test_a_map_shows_where_patches_are_found(found):
    (shown,) = [one for one in found.figures if hasattr(one, "values")]
    assert np.mean(shown.values) == pytest.approx(found.values["layer 2"][PATCHES]["position"]["estimate"])


def test_without_a_class_token_the_mean_of_the_patches_is_compared_with():
    values = _dense(_classifier(class_token=False), _digits()).values["layer 2"]
    assert values["mean of the patches"]["position"]["estimate"] == 1 / 16


def test_a_tile_is_named_by_tokens_that_hold_its_class_and_patches_in_several_tiles_do_not_count():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (60, 4))
    targets = 2.0 * np.eye(3)[labels] - 1
    features = np.concatenate([np.eye(3)[labels], rng.normal(size=(60, 4, 2))], axis=2)
    targets[:, 3] = np.nan
    features[:, 3] = rng.normal(size=(60, 5))
    part = Part(60, features.__getitem__, targets.__getitem__)
    assert fit_by_patch(part, part, part, tile_losses)["tile"].tolist() == [0.0] * 60
    # Two of the three patches that count are wrong.
    answers = np.roll(targets[:1], 1, axis=2)
    answers[0, 0] = targets[0, 0]
    assert tile_losses(answers, targets[:1])["tile"] == pytest.approx([2 / 3])


def test_losses_of_a_place_are_the_hand_worked_ones():
    targets = np.concatenate([place_targets((1, 2)), np.zeros((2, 3))], axis=1)[None]
    predicted = targets.copy()
    predicted[0, 1, :2] = [5.0, 0.0]  # the second patch is taken for the first
    predicted[0, 0, 3] += 0.5  # column
    predicted[0, :, 4:] += 0.1  # three colours of two patches
    found = place_losses(predicted, targets)
    assert found["position"].tolist() == [0.5]
    assert (found["missed 0"].tolist(), found["missed 1"].tolist()) == ([0.0], [1.0])
    assert found["place"] == pytest.approx([0.25])
    assert found["colour"] == pytest.approx([0.06])


def test_tiles_keep_their_labels_and_each_image_is_in_one_mosaic_a_round():
    parts = _digits()
    source = parts.test
    assert isinstance(source, ArraySource)
    # Every image is one grey level, its position; every label is kept beside it.
    grey = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    made = make_mosaics(
        ArraySource(source.index, grey), np.arange(58), Preprocess((8, 8)), k=2, rounds=2, seed=0, most=99
    )
    assert made.unused == 2
    assert made.tiles.shape == (28, 2, 2)
    used = made.source.images[:, 0, 2::4, 2::4].long()
    np.testing.assert_array_equal(source.index.labels[used.numpy()], made.tiles)
    for one_round in (used[:14], used[14:]):
        assert len(one_round.unique()) == 56
    assert (made.source.images[:, :, :4, :4] == used[:, None, :1, :1]).all()


def test_a_mosaic_shrinks_whole_images():
    ramp = torch.arange(0, 256, 32, dtype=torch.uint8).expand(3, 8, 8)
    left, right = mosaic([ramp] * 4, 2)[0, 0].split(4)
    assert torch.equal(left, right)
    assert left[0] < 40
    assert left[3] > 180


def test_patches_that_lie_in_two_tiles_are_found():
    expected = np.repeat(np.repeat([[0, 1], [2, 3]], 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(tile_of_patches((8, 8), (4, 4), 2, 2).reshape(4, 4), expected)
    odd = tile_of_patches((21, 21), (3, 3), 7, 2)
    np.testing.assert_array_equal(odd.reshape(3, 3), [[0, -1, 1], [-1, -1, -1], [2, -1, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, r"--k must be at least 2"),
        ({"max_images": 7}, r"--max_images must be at least 8; got 7"),
        ({"margin": 1.0}, r"--margin must be above 0 and below 1.* got 1\."),
        ({"k": 8, "max_images": 200}, r"(?s)too few for two mosaics of 8x8 tiles"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        _dense(_classifier(), _digits(), **options)


def test_fewer_images_are_drawn_and_it_is_said():
    found = _dense(_classifier(), _digits(), max_images=40)
    assert (found.data["train"], found.data["train images there were"]) == (40, 120)
    assert "40 images at most" in " ".join(found.notes)
