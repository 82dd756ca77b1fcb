"""Which rows of the head are kept while loading, and when it is new."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.weights.checkpoints import NAME, TINY, assert_close
from vit_cls.errors import ConfigError
from vit_cls.model.classifier import Preprocess
from vit_cls.weights.convert import match_class_names
from vit_cls.weights.factory import create_classifier


def test_another_number_of_classes_gets_a_new_head(make, images):
    checkpoint = make()
    torch.manual_seed(0)
    model = checkpoint.load(num_classes=3)
    assert model.load_report.of("fresh") == {
        "head.weight": "not the checkpoint's: 5 -> 3 classes",
        "head.bias": "not the checkpoint's: 5 -> 3 classes",
    }
    assert 0.01 < model.head.weight.std() < 0.03
    assert model.head.bias.abs().max() == 0
    assert torch.equal(checkpoint.load(num_classes=3, head_init="zero")(images), torch.zeros(3, 3))


def test_a_headless_model_gives_the_features(make, images):
    checkpoint = make()
    model = checkpoint.load(num_classes=0)
    assert_close(model(images), checkpoint.model.forward_features(images))
    gone = dict.fromkeys(("head.weight", "head.bias"), "the model has no head")
    assert model.load_report.of("dropped") == gone


def test_a_head_can_be_left_behind(make):
    model = make().load(keep_head=False)
    assert "head.weight" in model.load_report.of("fresh")
    with pytest.raises(ConfigError, match=r"head_init must be one of normal, zero; got 'ones'"):
        make().load(head_init="ones")


def test_a_head_whose_classes_are_the_same_is_kept_in_the_new_order(make, images):
    checkpoint = make()
    names = ["ant", "bee", "cat", "dog", "eel"]
    path = checkpoint.own_file(names)
    logits = checkpoint.model(images)
    same = create_classifier("auto", ["dog", "ant", "eel", "cat", "bee"], pretrained=path).eval()
    assert_close(same.model(images), logits[:, [3, 0, 4, 2, 1]])
    subset = create_classifier("auto", ["eel", "bee"], pretrained=path).eval()
    assert_close(subset.model(images), logits[:, [4, 1]])
    assert subset.model.load_report.of("resized")["head.bias"] == "2 of 5 classes, matched by name"
    other = create_classifier("auto", ["eel", "fox"], pretrained=path, head_init="zero").eval()
    assert torch.equal(other.model(images), torch.zeros(3, 2))
    assert "its 5 classes are not the model's 2" in other.model.load_report.of("fresh")["head.weight"]
    kept = create_classifier("auto", names, pretrained=path, keep_head=False, head_init="zero").eval()
    assert torch.equal(kept.model(images), torch.zeros(3, 5))


def test_imagenet_classes_are_found_by_wordnet_id_or_by_name(tmp_path, images):
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, **TINY).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    tag = f"{NAME}.augreg_in21k_ft_in1k"
    options = {"pretrained": tmp_path / "weights.safetensors", **TINY}
    by_id = create_classifier(tag, ["n01443537", "n01440764"], **options).eval()
    by_name = create_classifier(tag, ["Goldfish", "tinca_tinca"], **options).eval()
    logits = theirs(images)
    assert_close(by_id.model(images), logits[:, [1, 0]])
    assert_close(by_name.model(images), logits[:, [1, 0]])
    # "crane" is a bird and a machine, "cat" no class of ImageNet-1k: nobody guesses
    for names in (["crane", "goldfish"], ["cat", "goldfish"]):
        assert "head.weight" in create_classifier(tag, names, **options).model.load_report.of("fresh")
    assert by_id.preprocess == Preprocess((16, 16))
    whole = create_classifier(tag, **options)
    assert (len(whole.class_names), whole.class_names[1]) == (1000, "n01443537")


def test_names_are_matched_one_to_one():
    assert match_class_names(["b", "a"], ["a", "b"]) == [1, 0]
    assert match_class_names(["a", "a"], ["a", "b"]) is None
    assert match_class_names(["A"], ["a"]) is None  # without aliases, case counts
    aliases = {"n1": ("tench", "Tinca"), "n2": ("crane",), "n3": ("crane",)}.get
    assert match_class_names(["tinca"], ["n1", "n2", "n3"], aliases) == [0]
    assert match_class_names(["crane"], ["n1", "n2", "n3"], aliases) is None
    assert match_class_names(["n3"], ["n1", "n2", "n3"], aliases) == [2]
