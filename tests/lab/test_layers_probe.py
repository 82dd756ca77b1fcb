"""The probes ``layers`` and ``tokens``: what is read where, and against what it is compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_cls import create_model
from vit_cls.data.dataset import ArraySource
from vit_cls.data.index import ImageIndex
from vit_cls.data.partition import Partition
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.probes.base import FrozenParts, Subject
from vit_cls.lab.probes.layers import LayersProbe
from vit_cls.lab.probes.linear import LinearProbe
from vit_cls.lab.probes.tokens import TokensProbe
from vit_cls.model.classifier import ImageClassifier, Preprocess

CONFIG = InferenceConfig("cpu", "32", num_workers=0)


def _layers(classifier, partition, **options):
    return LayersProbe(**options).run(Subject(classifier, partition, CONFIG))


def _tokens(*parts, **options):
    return TokensProbe(**options).analyse(FrozenParts(*parts))


@pytest.fixture
def classifier(tiny):
    torch.manual_seed(0)
    model = create_model("vit_pico_patch7_28", num_classes=2, **tiny)
    return ImageClassifier(model, Preprocess((16, 16), crop_pct=1.0), ["dark", "light"]).eval()


@pytest.fixture
def partition():
    """Images whose class is their brightness."""
    rng = np.random.default_rng(0)

    def part(images):
        labels = np.arange(images) % 2
        pixels = rng.integers(0, 200, (images, 3, 16, 16)) + 40 * labels[:, None, None, None]
        index = ImageIndex(Path("arrays"), [f"{i}.png" for i in range(images)], labels, ["dark", "light"])
        return ArraySource(index, torch.from_numpy(pixels.astype(np.uint8)))

    return Partition(part(40), part(20), part(30), "made here")


def test_every_layer_gets_the_probe_that_linear_fits_on_its_read(classifier, partition):
    result = _layers(classifier, partition)
    last = LinearProbe(pools=("cls", "gap", "max")).run(Subject(classifier, partition, CONFIG))
    for pool in ("cls", "gap", "max"):
        assert len(result.values["top1"][pool]) == 3  # before the first of two blocks, and after each
        assert result.values["top1"][pool][2] == last.values["top1"][pool]
        assert result.predictions["preds"][f"{pool} 2"].tolist() == last.predictions["preds"][pool].tolist()


def test_before_the_first_block_the_class_token_is_the_same_for_every_image(classifier, partition):
    result = _layers(classifier, partition)
    assert len(set(result.predictions["preds"]["cls 0"].tolist())) == 1
    assert result.values["top1"]["cls"][0] == 0.5
    assert result.values["top1"]["gap"][0] > 0.9  # brightness is in the embedded patches already
    first = result.findings[-1]  # the nearest to the last block comes first
    assert first.claim.startswith("Reading cls before the first block and cls after the last block")
    assert first.estimate == pytest.approx(0.5 - result.values["top1"]["cls"][2])
    assert len(result.findings) == 2


def test_the_chart_has_a_line_a_read_with_the_accuracies_and_intervals_of_the_table(classifier, partition):
    result = _layers(classifier, partition, pools=("gap", "cls"))
    (chart,) = result.figures
    assert [line.label for line in chart.lines] == ["gap", "cls"]
    rows = {(row[0], row[1]): row for row in result.tables[0].rows}
    for line in chart.lines:
        for (x, y), band in zip(line.points, line.bands, strict=True):
            row = rows[line.label, int(x)]
            assert (y, *band) == tuple(row[2:5])
            assert row[5] / row[6] == y
    assert "gap after the last of 2 blocks" in result.headline
    json.dumps(result.to_dict(predictions=True))


def test_choices_of_layers_ignore_the_labels_of_the_test_part(classifier, partition):
    index = partition.test.index
    shuffled = np.random.default_rng(0).permutation(index.labels)
    other = ImageIndex(index.root, index.paths, shuffled, index.class_names)
    changed = Partition(partition.train, partition.val, ArraySource(other, partition.test.images), "")
    one = _layers(classifier, partition)
    two = _layers(classifier, changed)
    assert one.values["strength"] == two.values["strength"]
    assert one.values["top1"] != two.values["top1"]


def test_the_class_tokens_of_several_blocks_cannot_be_read_before_the_first(classifier, partition):
    with pytest.raises(ConfigError, match="last:2 needs 2 blocks, but layer 0 comes after 0"):
        _layers(classifier, partition, pools=("last:2",))


def test_the_patch_that_carries_the_class_stands_out_at_its_place_on_the_grid(noisy_parts):
    result = _tokens(*noisy_parts())  # patch 1 of the 2x2 grid
    heat = np.array(result.figures[0].values)
    assert heat.shape == (2, 2)
    assert np.unravel_index(heat.argmax(), heat.shape) == (0, 1)
    assert heat[0, 1] > 0.6 > np.delete(heat.ravel(), 1).max()
    for patch in range(4):
        assert heat.ravel()[patch] == result.values["top1"][f"token:{patch}"]
    assert f"cls {100 * result.values['top1']['cls']:.1f} %" in result.figures[0].note


def test_the_average_patch_is_compared_over_images_with_cls_and_with_gap(noisy_parts):
    result = _tokens(*noisy_parts())
    preds, labels = result.predictions["preds"], result.predictions["labels"]
    single = np.mean([preds[f"token:{patch}"] == labels for patch in range(4)])
    assert result.values["mean_single_patch"] == pytest.approx(single)
    by_cls, by_gap = result.findings
    assert by_cls.estimate == pytest.approx(np.mean(preds["cls"] == labels) - single)
    assert by_gap.estimate == pytest.approx(np.mean(preds["gap"] == labels) - single)
    assert by_cls.verdict == "supported"
    assert by_cls.counts["images"] == 80
    assert f"{100 * single:.1f} % on average" in result.headline
    assert result.headline.endswith(by_cls.sentence)
    json.dumps(result.to_dict(predictions=True))


def test_every_patch_gets_the_probe_that_linear_fits_on_it(noisy_parts, relabelled):
    train, val, test = noisy_parts()
    pools = ("token:0", "token:1", "token:2", "token:3")
    expected = LinearProbe(pools=pools).analyse(FrozenParts(train, val, test))
    result = _tokens(train, val, test)
    for pool in pools:
        assert result.predictions["preds"][pool].tolist() == expected.predictions["preds"][pool].tolist()
    assert _tokens(train, val, relabelled(test)).values["strength"] == result.values["strength"]


def test_without_a_class_token_patches_are_compared_with_the_mean_alone(frozen_part):
    rng = np.random.default_rng(0)
    parts = [
        frozen_part({4: rng.standard_normal((12, 4, 3))}, np.arange(12) % 2, classes=2, class_token=False)
        for _ in range(3)
    ]
    result = _tokens(*parts, margin=0.05, seed=3)
    assert len(result.findings) == 1
    assert result.findings[0].margin == 0.05
    assert "gap" in result.findings[0].claim
    assert result.settings["seed"] == 3
    assert any("no class token" in note for note in result.notes)
