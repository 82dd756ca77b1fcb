"""Frozen tokens: the model's own, computed once, and read as its own head would read them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_cls import create_model
from vit_cls.data.dataset import ArraySource, FolderSource
from vit_cls.data.index import ImageIndex, index_folder
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.inference import InferenceConfig
from vit_cls.lab import features as features_module
from vit_cls.lab import token_cache
from vit_cls.lab.features import freeze, freeze_reads
from vit_cls.lab.probes.common import POOLS, possible_pools
from vit_cls.lab.token_cache import cache_key, data_digest
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.tokens import TokenLayout

ADAPTED = ["beit_base_patch16_224", "eva02_base_patch16_clip_224", "deit_tiny_distilled_patch16_224"]
CPU = {"config": InferenceConfig("cpu", "32", num_workers=0)}


def _config(batch_size=64, precision="32"):
    return InferenceConfig("cpu", precision, batch_size, num_workers=0)


def _classifier(name="vit_pico_patch7_28", *, size=16, seed=0, **settings):
    settings = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": size, "patch_size": 4, **settings}
    torch.manual_seed(seed)
    model = create_model(name, num_classes=3, **settings)
    with torch.no_grad():  # weights that do something: fresh norms and class tokens are nearly constant
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return ImageClassifier(model, Preprocess((size, size), crop_pct=1.0), ["a", "b", "c"]).eval()


def _source(images=7, size=16, seed=0):
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8))
    labels = np.arange(images) % 3
    index = ImageIndex(Path("arrays"), [f"{i}.png" for i in range(images)], labels, ["a", "b", "c"])
    return ArraySource(index, pixels)


@torch.inference_mode()
def _by_hand(classifier, source):
    """Tokens before the first and after each block, block by block, without hooks."""
    model = classifier.model
    tokens = model.embed_tokens(classifier.normalise(source.images))
    found = [tokens]
    for block in model.blocks:
        tokens = block(tokens)
        found.append(tokens)
    return [one.numpy() for one in found]


def test_tokens_are_those_before_the_first_and_after_each_block():
    classifier, source = _classifier(), _source()
    found = freeze(classifier, source, layers=range(4), config=_config(3))
    for layer, expected in enumerate(_by_hand(classifier, source)):
        np.testing.assert_allclose(found.tokens(layer), expected, rtol=1e-5, atol=1e-5)
    assert found.tokens(0).dtype == np.float32
    assert found.layers == (0, 1, 2, 3)
    assert found.labels.tolist() == source.index.labels.tolist()
    assert found.paths == list(source.index.paths)
    assert found.grid_size == (4, 4)
    with pytest.raises(ValueError, match="read-only"):
        found.tokens(0)[0] = 0


def test_the_last_layer_is_frozen_unless_others_are_named_and_others_are_refused():
    found = freeze(_classifier(), _source(), **CPU)
    assert found.layers == (3,)
    with pytest.raises(ConfigError, match=r"layer 2 was not frozen; there are layers 3 of 3.*\[2, 3\]"):
        found.tokens(2)
    with pytest.raises(ConfigError, match=r"layers must be from 0 .* to 3 .*; got 0, 4"):
        freeze(_classifier(), _source(), layers=[4, 0], **CPU)


@pytest.mark.parametrize("name", ["vit_pico_patch7_28", *ADAPTED])
def test_normed_tokens_are_those_that_the_model_encodes(name):
    settings = (
        {} if name == "vit_pico_patch7_28" else {"embed_dim": 128, "size": 48, "patch_size": 16, "depth": 2}
    )
    for pool in ("cls", "gap"):  # the norm before the pooling, and after it
        classifier = _classifier(name, pool=pool, **settings)
        source = _source(5, size=classifier.preprocess.img_size[0])
        found = freeze(classifier, source, **CPU)
        with torch.inference_mode():
            expected = classifier.model.encode(classifier.normalise(source.images))
            expected = classifier.model.fc_norm(expected).numpy()
        np.testing.assert_allclose(found.normed(found.depth), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found.normed(found.depth, slice(1, 3)), expected[1:3], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            found.normed(found.depth, np.array([4, 0])), expected[[4, 0]], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "name", ["vit_pico_patch7_28", "eva02_base_patch16_clip_224", "beit_base_patch16_224"]
)
@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize("pool", ["cls", "gap", "max", "token:3"])
def test_a_read_is_what_the_head_of_a_model_with_that_pooling_gets(name, fc_norm, pool):
    settings = (
        {} if name == "vit_pico_patch7_28" else {"embed_dim": 128, "size": 48, "patch_size": 16, "depth": 2}
    )
    if name == "vit_pico_patch7_28":
        settings["reg_tokens"] = 2
    classifier = _classifier(name, pool=pool, fc_norm=fc_norm, **settings)
    source = _source(5, size=classifier.preprocess.img_size[0])
    with torch.inference_mode():
        expected = classifier.model.forward_features(classifier.normalise(source.images)).numpy()
    np.testing.assert_allclose(freeze(classifier, source, **CPU).read(pool), expected, rtol=1e-4, atol=1e-5)


def test_class_token_and_mean_concatenated_are_what_such_a_head_gets():
    classifier, source = _classifier(pool="cls+gap", reg_tokens=1), _source()
    with torch.inference_mode():
        expected = classifier.model.forward_features(classifier.normalise(source.images)).numpy()
    np.testing.assert_allclose(
        freeze(classifier, source, **CPU).read("cls+gap"), expected, rtol=1e-4, atol=1e-5
    )


def test_each_part_of_a_concatenation_is_normed_on_its_own():
    classifier, source = _classifier(pool="gap"), _source()  # the norm stands after the pooling
    found = freeze(classifier, source, **CPU)
    joined = np.concatenate([found.read("cls"), found.read("gap")], axis=1)
    np.testing.assert_array_equal(found.read("cls+gap"), joined)


def test_a_mean_that_reads_prefix_tokens_is_read_so_from_the_model_that_does():
    classifier, source = _classifier(pool="gap", pool_include_prefix=True, reg_tokens=2), _source()
    with torch.inference_mode():
        expected = classifier.model.forward_features(classifier.normalise(source.images)).numpy()
    found = freeze(classifier, source, **CPU)
    np.testing.assert_allclose(found.read("gap"), expected, rtol=1e-4, atol=1e-5)
    patches = torch.from_numpy(np.array(found.tokens(3)))[:, 3:]  # another pooling reads the patches alone
    with torch.inference_mode():
        largest = classifier.model.fc_norm(patches.amax(dim=1)).numpy()
    np.testing.assert_allclose(found.read("max"), largest, rtol=1e-4, atol=1e-5)


def test_the_class_tokens_of_the_last_blocks_are_joined_first_to_last():
    classifier, source = _classifier(reg_tokens=1), _source()
    found = freeze(classifier, source, layers=[2, 3], **CPU)
    expected = np.concatenate([found.normed(2)[:, 0], found.normed(3)[:, 0]], axis=1)
    np.testing.assert_allclose(found.read("last:2"), expected, atol=1e-6)
    np.testing.assert_allclose(found.read("last:2+gap")[:, :48], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="layer 1 was not frozen"):
        found.read("last:3")


def test_a_generalised_mean_is_computed_over_clamped_patches():
    found = freeze(_classifier(), _source(), **CPU)
    patches = np.clip(found.normed(3)[:, 1:].astype(np.float64), 1e-6, None)
    for way, p in (("gem:3", 3), ("gem4", 4)):
        np.testing.assert_allclose(found.read(way), (patches**p).mean(axis=1) ** (1 / p), rtol=1e-4)


@pytest.mark.parametrize("way", [*POOLS, "last:2", "token:15"])
def test_reading_in_pieces_and_while_streaming_gives_the_same_as_reading_at_once(way, monkeypatch):
    classifier, source = _classifier(), _source(9)
    found = freeze(classifier, source, layers=range(4), **CPU)
    whole = found.read(way)
    streamed, rows = freeze_reads(classifier, source, [3, 2], [way], config=_config(4))
    np.testing.assert_allclose(streamed[way, 3], whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(streamed[way, 2], found.read(way, 2), rtol=1e-4, atol=1e-5)
    assert rows.paths == found.paths
    monkeypatch.setattr(features_module, "AT_ONCE", 2 * 17 * 24)
    np.testing.assert_allclose(found.read(way), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("mean", "--pools must be one of cls, gap, .*; got 'mean'"),
        ("cls:1", "--pools cls takes no index"),
        ("last", "--pools last:K needs a whole number K of at least 1, at most 3"),
        ("last:9", "--pools last:K needs a whole number K of at least 1, at most 3"),
        ("token:16", "--pools token:K needs a patch K from 0 to 15"),
        ("gem", "--pools gem has weights of its own"),
        ("map+cls", "--pools map\\+cls has weights of its own"),
        ("multicls:2", "--pools multicls:2 reads 2 class tokens, but the model has 1"),
        ("classtok", "--pools classtok has a vector for each class"),
        ("cls+", "--pools must be one of"),
    ],
)
def test_a_way_that_the_model_does_not_have_is_refused(way, message):
    with pytest.raises(ConfigError, match=message):
        freeze(_classifier(), _source(3), **CPU).read(way)


def test_without_a_class_token_ways_that_read_it_are_left_out_with_a_note_or_refused_by_name():
    found = freeze(_classifier(class_token=False, pool="gap"), _source(), **CPU)
    with pytest.raises(ConfigError, match=r"--pools cls\+gap reads the class token, but the model has none"):
        found.read("cls+gap")
    ways, notes = possible_pools(POOLS, found.layout)
    assert ways == ["gap", "max", "gem:3", "gem:4"]
    assert notes == ["Not read: cls, cls+gap, cls+gem:4, for the model has no class token."]
    np.testing.assert_allclose(found.read("token:0"), found.normed(3)[:, 0], atol=1e-6)  # no prefix to skip
    assert possible_pools(POOLS, TokenLayout(True, 0, (2, 2))) == (list(POOLS), [])


def test_images_in_memory_are_the_same_wherever_one_stands_and_files_of_another_folder_are_not(
    tmp_path, monkeypatch
):
    for folder in ("one", "other"):
        (tmp_path / folder / "photos/a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "photos/a/0.png")
        os.utime(tmp_path / folder / "photos/a/0.png", (1, 1))
    found = []
    for folder in ("one", "other"):
        monkeypatch.chdir(tmp_path / folder)
        files = FolderSource(index_folder(Path("photos"), min_classes=1))
        found.append((data_digest(_source()), data_digest(files)))
    assert found[0][0] == found[1][0] != data_digest(_source(seed=1))
    assert found[0][1] != found[1][1]


def test_the_same_key_is_computed_once(tmp_path, monkeypatch):
    classifier, source = _classifier(), _source()
    calls = []
    encode = classifier.model.encode
    monkeypatch.setattr(classifier.model, "encode", lambda images: calls.append(1) or encode(images))
    first = freeze(classifier, source, cache=tmp_path, config=_config(7))
    assert len(calls) == 1
    again = freeze(classifier, source, cache=tmp_path, config=_config(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.tokens(3), again.tokens(3))
    freeze(classifier, source, cache=tmp_path, layers=[1, 3], **CPU)
    assert len(calls) == 2


def test_the_key_changes_with_everything_that_tokens_depend_on_and_with_nothing_else(image_root):
    base = _classifier()
    source = FolderSource(index_folder(image_root / "train"))

    def key(classifier=base, source=source, layers=(3,), precision="32"):
        return cache_key(classifier, source, layers, _config(precision=precision))

    keys = [
        key(),
        key(layers=(2,)),
        key(precision="bf16"),
        key(source=FolderSource(source.index.subset(np.arange(5)))),
    ]
    changed = _classifier()
    with torch.no_grad():
        changed.model.blocks[1].mlp.fc1.bias[0] += 1e-6
    keys.append(key(changed))
    cropped = ImageClassifier(base.model, Preprocess((16, 16), crop_pct=0.5), ["a", "b", "c"])
    keys.append(key(cropped))
    keys += [key(source=_source()), key(source=_source(seed=1))]  # the same names, other pixels
    assert len(set(keys)) == len(keys) == 8
    assert key(_classifier()) == key() == key(precision="auto")
    renamed = ImageClassifier(base.model, base.preprocess, ["x", "y", "z"])
    assert key(renamed) == key()


def test_a_file_that_was_replaced_by_another_image_is_read_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 40, dtype=np.uint8)).save(tmp_path / "data" / name / "0.png")
    classifier, source = _classifier(), FolderSource(index_folder(tmp_path / "data"))
    old = freeze(classifier, source, cache=tmp_path / "cache", **CPU).read("gap")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "data" / "a" / "0.png")
    new = freeze(classifier, source, cache=tmp_path / "cache", **CPU).read("gap")
    assert np.abs(new[0] - old[0]).max() > 0.01
    np.testing.assert_array_equal(new[1], old[1])


def test_an_interrupted_run_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    classifier, source = _classifier(), _source()
    encode = classifier.model.encode
    seen = []

    def interrupted(images):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(classifier.model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        freeze(classifier, source, cache=tmp_path, config=_config(2))
    assert list(tmp_path.iterdir()) == []
    found = freeze(classifier, source, cache=tmp_path, config=_config(2))
    np.testing.assert_allclose(found.tokens(3), _by_hand(classifier, source)[3], rtol=1e-5, atol=1e-5)


def test_a_part_that_a_killed_run_left_is_not_used(tmp_path):
    classifier, source = _classifier(), _source()
    key = cache_key(classifier, source, [3], _config())
    left = tmp_path / f"{key}.part-x"
    left.mkdir()
    (left / "layer003.f32").write_bytes(bytes(100))
    found = freeze(classifier, source, cache=tmp_path, **CPU)
    np.testing.assert_allclose(found.tokens(3), _by_hand(classifier, source)[3], rtol=1e-5, atol=1e-5)


def test_files_that_cannot_be_read_are_no_rows_and_have_a_reason_also_from_the_cache(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"no image")
    source = FolderSource(index_folder(tmp_path / "data"))
    for _ in range(2):
        found = freeze(_classifier(), source, cache=tmp_path / "cache", config=_config(2))
        assert found.paths == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
        assert found.labels.tolist() == [0, 0, 1, 1, 1]
        assert found.positions.tolist() == [0, 2, 3, 4, 5]
        assert list(found.failures) == ["a/1.png"]
        assert found.failures["a/1.png"]
        assert len(found.read("cls")) == len(found) == 5
    (sidecar,) = (tmp_path / "cache").glob("*/tokens.json")
    assert list(json.loads(sidecar.read_text())["failures"]) == ["1"]


def test_no_image_that_can_be_read_is_an_error_that_names_the_first_reason(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(b"no image")
    source = FolderSource(index_folder(tmp_path / "data"))
    with pytest.raises(DataError, match=r"none of 2 images could be read; the first, .*a/0\.png: "):
        freeze(_classifier(), source, cache=tmp_path / "cache", **CPU)
    assert list((tmp_path / "cache").iterdir()) == []


def test_transparent_pixels_get_the_background_of_the_model(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((16, 16, 4), dtype=np.uint8), "RGBA").save(tmp_path / name / "0.png")
    index = index_folder(tmp_path)
    white = _classifier()
    black = ImageClassifier(
        white.model, Preprocess((16, 16), crop_pct=1.0, background=(0, 0, 0)), ["a", "b", "c"]
    )
    first = freeze(white, FolderSource(index), **CPU).read("gap")
    second = freeze(black, FolderSource(index), **CPU).read("gap")
    with torch.inference_mode():
        pixels = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
        patches = white.model.encode(white.normalise(pixels))[:, 1:]
    np.testing.assert_allclose(first[:1], patches.mean(dim=1).numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(first - second).max() > 0.01


def test_too_small_a_disk_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda folder: usage)
    classifier = _classifier()
    monkeypatch.setattr(classifier.model, "encode", lambda images: pytest.fail("computed"))
    with pytest.raises(
        DataError, match=r"tokens of 7 images \(17 tokens of 24 numbers, 1 layer\(s\)\) need [\d.]+ kB"
    ):
        freeze(classifier, _source(), cache=tmp_path, **CPU)


def test_tokens_that_are_not_finite_are_refused():
    classifier = _classifier()
    with torch.no_grad():
        classifier.model.blocks[2].mlp.fc2.bias[0] = torch.nan
    with pytest.raises(ModelFileError, match="tokens of layer 3 are not finite"):
        freeze(classifier, _source(), **CPU)
    assert freeze(classifier, _source(), layers=[1], **CPU).layers == (1,)


def test_a_temporary_cache_lives_as_long_as_the_tokens():
    found = freeze(_classifier(), _source(), **CPU)
    folder = found.folder
    assert folder.is_dir()
    del found
    gc.collect()
    assert not folder.parent.exists()


def test_hooks_are_gone_afterwards():
    classifier = _classifier()
    freeze(classifier, _source(), layers=range(4), **CPU)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in classifier.model.blocks)
