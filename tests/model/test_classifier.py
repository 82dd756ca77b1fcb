"""The classifier owns its preprocessing and its class names."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torchvision import transforms

from tests.models import make_vit
from vit_cls.errors import ConfigError
from vit_cls.model.classifier import ImageClassifier, Preprocess

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def _classifier(tiny, names=("a", "b", "c"), **preprocess) -> ImageClassifier:
    model = make_vit(tiny, num_classes=len(names))
    return ImageClassifier(model, Preprocess((16, 16), **preprocess), names).eval()


def test_normalisation_is_torchvisions_to_the_bit(tiny, generator):
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP["mean"], CLIP["std"])])
    expected = torch.stack([reference(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(_classifier(tiny, **CLIP).normalise(images), expected)


def test_logits_are_those_of_the_model_on_normalised_images(tiny, generator):
    classifier = _classifier(tiny)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    expected = classifier.model((images.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(classifier(images), expected, rtol=1e-5, atol=1e-6)


def test_floats_are_refused(tiny):
    with pytest.raises(TypeError, match=r"images must be uint8 in \[0, 255\]; got torch.float32"):
        _classifier(tiny)(torch.zeros(1, 3, 16, 16))


def test_metadata_rebuild_everything_but_the_weights(tiny):
    classifier = _classifier(tiny, crop_pct=0.875, crop_mode="squash", interpolation="bilinear", **CLIP)
    rebuilt = ImageClassifier.from_metadata(json.loads(json.dumps(classifier.to_metadata())))
    assert rebuilt.preprocess == classifier.preprocess
    assert rebuilt.class_names == classifier.class_names
    assert rebuilt.model.config == classifier.model.config
    assert torch.equal(rebuilt.mean, classifier.mean)
    assert torch.equal(rebuilt.std, classifier.std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a", "b", "a"]}, "class names must be unique; repeated: a"),
        ({"names": ["a", "b"], "num_classes": 3}, "3 outputs, but there are 2 class names"),
        ({"img_size": (16, 20)}, r"3 channels of \(16, 20\) pixels, but the model takes 3 of \(16, 16\)"),
        ({"mean": (0.5,), "std": (0.5,)}, "1 channels"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"crop_pct": 1.5}, r"crop_pct must be above 0 and at most 1; got 1.5"),
        ({"crop_mode": "pad"}, "crop_mode must be one of center, squash; got 'pad'"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"background": (0, 0)}, "three numbers from 0 to 255"),
        ({"background": (0, 0, 256)}, "three numbers from 0 to 255"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(arguments, message, tiny):
    names = arguments.pop("names", ["a", "b", "c"])
    classes = arguments.pop("num_classes", len(names))
    with pytest.raises(ConfigError, match=message):
        model = make_vit(tiny, num_classes=classes)
        ImageClassifier(model, Preprocess(arguments.pop("img_size", (16, 16)), **arguments), names)


def test_metadata_of_something_else_are_refused():
    with pytest.raises(ConfigError, match="do not describe a classifier"):
        ImageClassifier.from_metadata({"architecture": {}})


def test_preprocess_is_plain_data():
    assert json.loads(json.dumps(dataclasses.asdict(Preprocess((8, 8)))))["crop_pct"] == 0.9
    assert Preprocess.for_size((28, 28)).crop_pct == 1.0
    assert Preprocess.for_size((224, 224)).crop_pct == 0.9
    assert Preprocess.for_size((384, 384)).crop_pct == 1.0


def test_preprocessing_for_other_channels_averages_or_repeats_the_statistics():
    pre = Preprocess((16, 16), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3), crop_pct=0.8)
    one = pre.resized((32, 24), 1)
    assert (one.img_size, one.mean, one.std) == ((32, 24), (pytest.approx(0.4),), (pytest.approx(0.2),))
    assert pre.resized((16, 16), 5).mean == (0.2, 0.4, 0.6, 0.2, 0.4)
    assert pre.resized((16, 16), 3) == pre
    assert one.crop_pct == 0.8


def test_probabilities_are_the_softmax_of_logits_over_the_temperature(tiny, generator):
    logits = torch.randn(5, 3, generator=generator)
    classifier = _classifier(tiny)
    torch.testing.assert_close(classifier.probs(logits), logits.double().softmax(dim=1))
    classifier.temperature = 2.0
    torch.testing.assert_close(classifier.probs(logits), (logits.double() / 2).softmax(dim=1))
    assert torch.equal(classifier.probs(logits).argmax(dim=1), logits.argmax(dim=1))


def test_the_temperature_is_in_the_metadata_and_is_1_where_they_have_none(tiny):
    classifier = _classifier(tiny)
    assert not classifier.calibrated
    classifier.temperature = 1.25
    metadata = json.loads(json.dumps(classifier.to_metadata()))
    rebuilt = ImageClassifier.from_metadata(metadata)
    assert (rebuilt.temperature, rebuilt.calibrated) == (1.25, True)
    del metadata["temperature"]
    assert ImageClassifier.from_metadata(metadata).temperature == 1.0
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="temperature must be above 0 and below inf"):
            ImageClassifier.from_metadata(metadata | {"temperature": wrong})
