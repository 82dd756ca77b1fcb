"""A folder of transformers: classes, licence and preprocessing as it says, and what is wrong with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import relative_difference
from tests.parity.hf_models import NAMES, VIT, make_model, saved_model
from vit_cls import create_model, load
from vit_cls.data.transforms import model_reader
from vit_cls.errors import ModelFileError
from vit_cls.model.classifier import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (NAMES, NAMES),  # in the order of id2label
        ("abcab", ["a (0)", "b (1)", "c", "a (3)", "b (4)"]),  # one that is there twice gets its number
        ([f"LABEL_{i}" for i in range(5)], [f"output_{i}" for i in range(5)]),  # numbers are no names
    ],
)
def test_class_names_are_those_of_id2label(written, names, tmp_path):
    settings = {**VIT, "id2label": dict(enumerate(written))}
    make_model("ViTForImageClassification", "ViTConfig", settings).save_pretrained(tmp_path)
    classifier = load(tmp_path)
    assert classifier.class_names == names
    assert (classifier.model.load_report.class_names is None) == (names[0] == "output_0")


def test_the_licence_is_that_of_the_model_card(tmp_path):
    saved_model("vit", tmp_path)
    assert load(tmp_path).weights_licence == "not stated by the source of the weights"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert load(tmp_path).weights_licence == "apache-2.0"


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
# name: (what preprocessor_config.json says, what that means for us)
PROCESSORS = {
    "none": ({}, {**HALF, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}),
    "squash": (
        {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
        {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    ),
    "shortest edge": (
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
        {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
    ),
    "no crop": (
        {
            "size": {"height": 64, "width": 64},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": False,
        },
        {"crop_pct": 1.0, "crop_mode": "squash"},
    ),
    "old numbers": (
        {"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3},
        {"crop_pct": 0.875, "crop_mode": "squash", "interpolation": "bicubic"},
    ),
    "old shortest edge": (
        {"size": 256, "crop_size": 224, "image_processor_type": "BitImageProcessor"},
        {"crop_pct": 0.875, "crop_mode": "center"},
    ),
    "nulls": (
        {
            "size": {"height": 32, "width": 32},
            "crop_size": None,
            "do_center_crop": None,
            "do_normalize": None,
        },
        {**HALF, "crop_pct": 1.0, "crop_mode": "squash"},
    ),
    "no normalisation": (
        {"size": {"height": 32, "width": 32}, "do_normalize": False, "image_mean": [0.1, 0.2, 0.3]},
        {"mean": (0.0,) * 3, "std": (1.0,) * 3},
    ),
    "one mean for all": ({"size": 32, "image_mean": 0.25}, {"mean": (0.25,) * 3}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_preprocessing_is_what_preprocessor_config_says(case, tmp_path):
    saved_model("vit", tmp_path)
    values, expected = PROCESSORS[case]
    if values:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    preprocess = load(tmp_path).preprocess
    assert preprocess.img_size == (32, 32)
    assert {name: getattr(preprocess, name) for name in expected} == expected


def test_image_processors_write_what_is_read(tmp_path):
    saved_model("dinov2", tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert load(tmp_path).preprocess == Preprocess(
        (32, 32), **HALF, crop_pct=1.0, crop_mode="squash", interpolation="bilinear"
    )
    transformers.BitImageProcessor(size={"shortest_edge": 256}).save_pretrained(tmp_path)
    assert load(tmp_path).preprocess == Preprocess(
        (32, 32), **CLIP, crop_pct=0.875, crop_mode="center", interpolation="bicubic"
    )


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3},
    ],
    ids=str,
)
def test_uint8_pixels_give_the_logits_of_processor_and_model(settings, tmp_path):
    theirs = saved_model("vit", tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **settings)
    processor.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    inputs = processor(list(images), return_tensors="pt", do_resize=False)
    expected = theirs(**inputs).logits
    ours = load(tmp_path)(images)
    assert relative_difference(ours, expected) <= 1e-5
    assert torch.equal(ours.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(
    "processor",
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
        (
            "DeiTImageProcessor",
            {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
        ),
        ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ],
    ids=lambda row: row[0],
)
def test_our_evaluation_transform_makes_the_processors_pixels(processor, tmp_path):
    name, settings = processor
    saved_model("vit", tmp_path)
    theirs = getattr(transformers, name)(**settings)
    theirs.save_pretrained(tmp_path)
    preprocess = load(tmp_path).preprocess
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 60, 90), generator=generator, dtype=torch.uint8)
    expected = theirs(image, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = model_reader(preprocess)(image)
    assert (ours.float() - expected.float()).abs().max() <= 1


def _rewrite(folder, **changes) -> None:
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# name: (settings of config.json, how the message goes on after naming the file)
CONTRADICTIONS = {
    "width": (
        {"hidden_size": 96},
        r"by it cls_token is of shape \(1, 1, 96\), in the weights .*\(1, 1, 48\)",
    ),
    "width and heads": ({"hidden_size": 64}, r"model.num_heads must divide model.embed_dim"),
    "a block too few": ({"num_hidden_layers": 1}, r"by it blocks.1.\S+ is absent, in the weights it is of"),
    "a block too many": (
        {"num_hidden_layers": 3},
        r"by it blocks.2.\S+ is of .* in the weights it is absent",
    ),
    "image size": (
        {"image_size": 64},
        r"pos_embed is of shape \(1, 65, 48\), in the weights .*\(1, 17, 48\)",
    ),
    "patch size": ({"patch_size": 4}, r"by it (?:pos_embed|patch_embed)\S* is of shape"),
    "rectangular patches": ({"patch_size": [8, 4]}, r"patch_size is \[8, 4\], and only square patches"),
    "hidden width": ({"intermediate_size": 64}, r"blocks.0.mlp.fc1.weight is of shape \(64, 48\)"),
    "bias": ({"qkv_bias": False}, r"by it blocks.0.attn.qkv.bias is absent"),
    "activation": ({"hidden_act": "relu"}, r"hidden_act is 'relu'; those that can be read are gelu, "),
    "no width": ({"hidden_size": None}, r"it has no 'hidden_size'"),
    "width in words": ({"hidden_size": "small"}, r"'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_its_weights_is_refused(case, tmp_path):
    saved_model("vit", tmp_path)
    changes, message = CONTRADICTIONS[case]
    _rewrite(tmp_path, **changes)
    with pytest.raises(
        ModelFileError, match=rf"config\.json does not describe the weights beside it: .*{message}"
    ):
        load(tmp_path)


@pytest.mark.parametrize("way", [load, lambda folder: create_model("auto", pretrained=folder)])
def test_a_model_of_another_type_is_refused(way, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 48}))
    message = r"of type 'bert'; those that can be read are vit, deit, dinov2, dinov2_with_registers\."
    with pytest.raises(ModelFileError, match=message):
        way(tmp_path)


def _lack_a_matrix(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, folder / "model.safetensors")


# name: (what is done to the folder, message)
SPOILED = {
    "lacks a matrix": (_lack_a_matrix, r"blocks.1.attn.qkv.weight is of .* in the weights it is absent"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"there is no file '.*model\.safetensors'",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"there is no config\.json beside it.*name=path/to/weights",
    ),
    **{
        f"config {text}": (
            lambda folder, text=text: (folder / "config.json").write_text(text),
            r"config\.json names no architecture",
        )
        for text in ("{", "[1, 2]", "", '{"hidden_size": 48}')
    },
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_lacks_something_is_refused_by_what_it_lacks(case, tmp_path):
    saved_model("vit", tmp_path)
    spoil, message = SPOILED[case]
    spoil(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"preprocessor_config\.json cannot be read as JSON"),
        ('{"size": "large"}', r"preprocessor_config\.json does not say how images are prepared"),
        ('{"size": 32, "image_std": [0, 0, 0]}', r"does not say how images are prepared: .*std above 0"),
        ('{"size": 32, "image_mean": 5, "image_std": "x"}', r"does not say how images are prepared"),
    ],
)
def test_a_damaged_preprocessor_config_is_refused(text, message, tmp_path):
    saved_model("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)
