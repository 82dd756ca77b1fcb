"""Pixels from tokens: exact where they must be, bounded where they cannot be, and honest metrics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vit_cls.data.dataset import ArraySource
from vit_cls.data.partition import Partition, partition_data
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import freeze
from vit_cls.lab.probes.base import Subject
from vit_cls.lab.probes.inversion import InvertProbe
from vit_cls.lab.probes.pixel_decoders import (
    conv_decoded,
    pixels_of,
    ridge_decoded,
    ridge_decoded_by_patch,
    working_size,
)
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.tokens import TokenLayout
from vit_cls.model.vit import VisionTransformer
from vit_cls.stats.least_squares import PENALTIES, r2, ridge_fits

CONFIG = InferenceConfig(device="cpu", precision="32")


def _invert(classifier, parts, **options):
    return InvertProbe(**options).run(Subject(classifier, parts, CONFIG))


def _part(source: ArraySource, count: int) -> ArraySource:
    rows = np.arange(len(source.index))[:: len(source.index) // count][:count]
    return ArraySource(source.index.subset(rows), source.images[rows])


def _digits(train: int = 90, val: int = 30, test: int = 40) -> Partition:
    parts = partition_data("digits")
    assert isinstance(parts.train, ArraySource)
    assert isinstance(parts.val, ArraySource)
    assert isinstance(parts.test, ArraySource)
    return Partition(
        _part(parts.train, train), _part(parts.val, val), _part(parts.test, test), "a few digits"
    )


def _classifier(class_token: bool = True, seed: int = 0) -> ImageClassifier:
    config = ViTConfig(
        img_size=8,
        patch_size=2,
        num_classes=10,
        embed_dim=16,
        depth=2,
        num_heads=2,
        class_token=class_token,
        pool="cls" if class_token else "gap",
    )
    with seeded(seed):
        model = VisionTransformer(config)
    return ImageClassifier(model, Preprocess.for_size((8, 8)), [str(i) for i in range(10)]).eval()


def _noise(parts: Partition) -> list[ArraySource]:
    """Grey noise in the places of the digits: 64 numbers an image, which 90 images span."""
    rng = np.random.default_rng(0)
    sources = (parts.train, parts.val, parts.test)
    grey = [rng.integers(0, 256, (len(one.index), 1, 8, 8), dtype=np.uint8) for one in sources]
    return [
        ArraySource(one.index, torch.from_numpy(pixels).expand(-1, 3, -1, -1).contiguous())
        for one, pixels in zip(sources, grey, strict=True)
    ]


def _frozen_and_pixels(layer: int, noise: bool = False):
    classifier, parts = _classifier(), _digits()
    sources = _noise(parts) if noise else (parts.train, parts.val, parts.test)
    frozen = [freeze(classifier, s, layers=[layer]) for s in sources]
    pixels = [
        pixels_of(s, f.positions, classifier.preprocess, (8, 8)) for s, f in zip(sources, frozen, strict=True)
    ]
    return frozen, tuple(pixels)


def _r2_of(images: np.ndarray, test: np.ndarray, mean: np.ndarray) -> float:
    errors = np.square(images - test).sum(axis=(1, 2, 3))
    return r2(errors, np.square(test - mean).sum(axis=(1, 2, 3)))


def test_patch_tokens_before_the_first_block_give_the_pixels_back_exactly():
    frozen, pixels = _frozen_and_pixels(0, noise=True)  # patches of 12 numbers, tokens of 16
    flat = tuple(one.tokens(0).reshape(len(one), -1) for one in frozen)
    [plain] = ridge_fits(flat[0], pixels[0].reshape(len(pixels[0]), -1), [0.0])
    found = plain(flat[2]).reshape(pixels[2].shape)
    by_patch = ridge_decoded_by_patch(lambda part, i: frozen[part].tokens(0)[:, i], frozen[0].layout, pixels)
    assert _r2_of(found, pixels[2], pixels[0].mean(axis=0)) == pytest.approx(1, abs=1e-6)
    assert _r2_of(by_patch.images, pixels[2], pixels[0].mean(axis=0)) == pytest.approx(1, abs=1e-6)
    assert by_patch.in_sample == pytest.approx(1, abs=1e-6)


def test_the_class_token_before_the_first_block_gives_nothing_back():
    frozen, pixels = _frozen_and_pixels(0)
    found = ridge_decoded(tuple(one.tokens(0)[:, 0] for one in frozen), pixels)
    assert found.in_sample == pytest.approx(0, abs=1e-9)
    assert _r2_of(found.images, pixels[2], pixels[0].mean(axis=0)) <= 1e-9


def test_all_tokens_explain_at_least_what_the_class_token_explains_and_it_at_most_what_components_do():
    frozen, pixels = _frozen_and_pixels(2)
    tokens = tuple(one.tokens(2) for one in frozen)
    of_cls = ridge_decoded(tuple(one[:, 0] for one in tokens), pixels).in_sample
    of_all = ridge_decoded(tuple(one.reshape(len(one), -1) for one in tokens), pixels).in_sample
    flat = pixels[0].reshape(len(pixels[0]), -1)
    ceiling = PCA(16, svd_solver="full").fit(flat).explained_variance_ratio_.sum()
    assert 0.05 < of_cls < ceiling < 1
    assert of_all >= of_cls


def test_shared_weights_are_least_squares_with_an_intercept_for_each_place(generator):
    layout = TokenLayout(True, 0, (1, 2))
    tokens = torch.randn(30, 3, 2, generator=generator).double().numpy()
    y = torch.randn(30, 1, 1, 2, generator=generator).double().numpy()
    found = ridge_decoded_by_patch(lambda part, i: tokens[:, i], layout, (y, y, y))
    place = np.repeat(np.eye(2), 30, axis=0)
    x = np.concatenate(
        [np.concatenate([tokens[:, i], tokens[:, 0]], axis=1) for i in (1, 2)]
    )  # patch 0 of all images, then patch 1
    x, target = np.concatenate([x, place], axis=1), np.concatenate([y[:, 0, 0, 0], y[:, 0, 0, 1]])
    expected = x @ np.linalg.lstsq(x, target, rcond=None)[0]
    assert found.settings["penalty"] == 0.0  # validated on what it was fitted on
    np.testing.assert_allclose(np.concatenate([found.images[:, 0, 0, 0], found.images[:, 0, 0, 1]]), expected)


def _more_features_than_images(rng):
    """Vectors of 60 numbers, 20 images to fit on, pixels that are mostly noise: least squares fits it all."""
    weight = rng.normal(size=(60, 12))
    x = [rng.normal(size=(images, 60)) for images in (20, 80, 30)]
    y = [one @ weight + 20 * rng.normal(size=(len(one), 12)) for one in x]
    return tuple(x), tuple(one.reshape(-1, 3, 2, 2) for one in y)


def test_the_penalty_of_pixels_is_chosen_on_validation_images():
    x, y = _more_features_than_images(np.random.default_rng(0))
    found = ridge_decoded(x, y)
    flat = [one.reshape(len(one), -1) for one in y]
    fits = list(ridge_fits(x[0], flat[0], [0.0, *PENALTIES]))
    errors = [np.square(fit(x[1]) - flat[1]).sum() for fit in fits]
    assert found.settings["penalty"] == fits[int(np.argmin(errors))].penalty > PENALTIES[0]
    assert found.in_sample == pytest.approx(1)


def test_the_penalty_of_pixels_by_patch_is_chosen_on_validation_images():
    x, y = _more_features_than_images(np.random.default_rng(0))
    # Two patches of two pixels, each from half of the vector: as many rows as images times patches.
    found, own = (
        ridge_decoded_by_patch(
            lambda part, i, order=order: x[order[part]][:, 30 * i : 30 * i + 30],
            TokenLayout(False, 0, (1, 2)),
            tuple(y[i] for i in order),
        ).settings["penalty"]
        for order in ((0, 1, 2), (0, 0, 2))
    )
    assert own == 0.0  # validated on what it was fitted on
    assert found > PENALTIES[0]


def test_a_network_stops_where_validation_images_say_so(monkeypatch):
    monkeypatch.setattr("vit_cls.lab.probes.pixel_decoders.CONV_STEPS", 50)
    x, y = _more_features_than_images(np.random.default_rng(0))
    mean_image = y[0].mean(axis=0, keepdims=True).repeat(len(y[1]), axis=0)  # where training starts from
    assert conv_decoded(x, (y[0], mean_image, y[2]), (1, 1), seed=0).settings == {"steps": 0.0}
    assert conv_decoded((x[0], x[0], x[2]), (y[0], y[0], y[2]), (1, 1), seed=0).settings == {"steps": 50.0}


@pytest.mark.parametrize(
    ("image_hw", "grid_size", "expected"),
    [
        ((28, 28), (4, 4), (28, 28)),
        ((224, 224), (14, 14), (28, 28)),
        ((518, 518), (37, 37), (37, 37)),
        ((32, 32), (8, 8), (32, 32)),
        ((384, 192), (24, 12), (24, 24)),
    ],
)
def test_every_patch_has_whole_pixels(image_hw, grid_size, expected):
    assert working_size(image_hw, grid_size) == expected


def test_a_network_learns_a_linear_map_and_repeats_itself_under_a_seed(monkeypatch):
    monkeypatch.setattr("vit_cls.lab.probes.pixel_decoders.CONV_STEPS", 100)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 4)).astype(np.float32)
    y = np.clip(0.5 + 0.2 * (x @ rng.normal(size=(4, 48))), 0, 1).reshape(160, 3, 4, 4)
    parts = ((x[:100], x[100:130], x[130:]), (y[:100], y[100:130], y[130:]))
    before = torch.get_rng_state()
    found = conv_decoded(*parts, (2, 2), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert _r2_of(found.images, y[130:], y[:100].mean(axis=0)) > 0.5
    np.testing.assert_array_equal(conv_decoded(*parts, (2, 2), seed=3).images, found.images)
    assert (conv_decoded(*parts, (2, 2), seed=4).images != found.images).any()


def test_the_result_says_what_the_reads_explain_and_repeats_itself():
    classifier, parts = _classifier(), _digits()
    found = _invert(classifier, parts, seed=1)
    assert found.headline.startswith("The class token keeps more of the pixels than the label alone tells: ")
    assert len(found.findings) == 4
    assert found.findings[1].estimate == pytest.approx(
        found.values["tokens"]["r2"] - found.values["cls"]["r2"]
    )
    assert found.values["mean"]["r2"] == pytest.approx(0, abs=1e-12)
    assert found.values["mean"]["identified"] == pytest.approx(1 / 40)
    assert found.values["label"]["r2"] > 0.2
    assert found.values["cls"]["r2_in_sample"] <= found.values["pca"]["r2_in_sample"]
    assert found.values["by_layer"]["cls"][0] == pytest.approx(0, abs=1e-9)
    assert found.values["by_layer"]["cls"][2] == pytest.approx(found.values["cls"]["r2"])
    # The random encoder has the seed of the probe; that of the model has another.
    assert found.values["random"]["r2"] != found.values["cls"]["r2"]
    assert _invert(_classifier(seed=1), parts, seed=1).values["cls"] == found.values["random"]
    assert (found.data["train"], found.data["val"], found.data["test"]) == (90, 30, 40)
    again = _invert(classifier, parts, seed=1)
    assert dataclasses.replace(again, seconds=0).to_dict() == dataclasses.replace(found, seconds=0).to_dict()


def test_pictures_show_the_original_beside_its_reconstructions():
    found = _invert(_classifier(), _digits(), layers=[2])
    pictures = found.figures[-1]
    assert pictures.columns[0] == "original"
    assert len(pictures.rows) == 8
    assert len(set(pictures.row_labels)) == 8
    assert all(
        image.shape == (96, 96, 3) and image.dtype == np.uint8 for row in pictures.rows for image in row
    )
    originals = _digits().test.images.permute(0, 2, 3, 1).numpy()
    assert any(np.array_equal(pictures.rows[0][0][::12, ::12], one) for one in originals)


def test_a_model_without_a_class_token_is_read_by_the_mean_of_its_patches():
    found = _invert(_classifier(class_token=False), _digits(), layers=[2])
    assert "cls" not in found.values
    assert len(found.findings) == 2
    assert found.findings[0].claim.startswith("The mean of the patches keeps more")
    assert "no class token" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "gan"}, r"--decoder must be one of ridge, conv; got 'gan'"),
        ({"margin": 0.0}, r"--margin must be above 0 and below 1.* got 0\."),
        ({"layers": [3]}, r"layers must be from 0 .* to 2 .* got 3"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _invert(_classifier(), _digits(), **options)
