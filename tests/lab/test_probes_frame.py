"""What holds for every probe, whatever it asks: its row, its frame, its controls."""

from __future__ import annotations

import dataclasses
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
from vit_cls.lab.probes.base import CONTROLS, Subject
from vit_cls.lab.probes.head_fits import HeadRecipe
from vit_cls.lab.probes.table import PROBES
from vit_cls.model.classifier import ImageClassifier, Preprocess

CONFIG = InferenceConfig("cpu", "32", num_workers=0)
SHORT = HeadRecipe(epochs=1, batch_size=16, learning_rates=(1e-2,))
OPTIONS = {"attentive": {"recipe": SHORT, "heads": ("gap",)}, "dense": {"max_images": 24}}


@pytest.fixture
def subject(tiny):
    """Images whose class is hard to tell from their brightness, and a model that was trained on nothing."""
    rng = np.random.default_rng(0)
    names = ["dark", "light"]

    def part(images):
        labels = np.arange(images) % 2
        pixels = rng.integers(0, 180, (images, 3, 16, 16)) + 3 * labels[:, None, None, None]
        index = ImageIndex(Path("arrays"), [f"{i}.png" for i in range(images)], labels, names)
        return ArraySource(index, torch.from_numpy(pixels.astype(np.uint8)))

    torch.manual_seed(0)
    model = create_model("vit_pico_patch7_28", num_classes=2, **tiny)
    classifier = ImageClassifier(model, Preprocess((16, 16), crop_pct=1.0), names).eval()
    return Subject(classifier, Partition(part(48), part(24), part(24), "made here"), CONFIG)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_has_its_row_and_refuses_a_margin_that_is_no_share(name):
    kind = PROBES[name]
    assert (kind.name, kind.question[-1]) == (name, "?")
    with pytest.raises(ConfigError, match="--margin must be above 0 and below 1; got 2"):
        kind(margin=2)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", PROBES)
def test_every_probe_can_be_run_on_every_control(name, control, subject):
    probe = PROBES[name](seed=3, **OPTIONS.get(name, {}))
    found, again, other = (
        probe.run(one) for one in (subject, dataclasses.replace(subject), subject.control(control, seed=1))
    )
    assert found.kind == f"probe {name}"
    assert (found.question, found.settings["margin"]) == (probe.question, probe.margin)
    assert found.seconds > 0
    assert found.data["origin"] == "made here"
    assert len(found.findings) == len(other.findings) > 0
    plain = [dataclasses.replace(one, seconds=0).to_dict() for one in (found, again, other)]
    assert plain[0] == plain[1]
    assert plain[0]["values"] != plain[2]["values"]


def test_an_untrained_encoder_is_the_same_architecture_with_other_weights_by_the_seed(subject):
    def weights(subject):
        return torch.cat([value.flatten() for value in subject.classifier.model.state_dict().values()])

    state = torch.get_rng_state()
    one, same, other = (subject.control("untrained", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.classifier.model.config == subject.classifier.model.config
    assert one.parts is subject.parts
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(subject))
