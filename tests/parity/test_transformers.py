"""A folder of transformers: the same logits, classes and preprocessing, and every key accounted for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vit_cls import create_model, load
from vit_cls.data.transforms import eval_reader
from vit_cls.errors import ModelFileError
from vit_cls.model.classifier import Preprocess

transformers = pytest.importorskip("transformers")

NAMES = ["wasp", "bee", "ant", "fly", "moth"]  # out of alphabetical order on purpose
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
CLASSIFIER = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
VIT = {"intermediate_size": 120}

# name: (class, configuration, settings)
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "vit headless": ("ViTModel", "ViTConfig", VIT),
    "vit eps 1e-6": ("ViTForImageClassification", "ViTConfig", {**VIT, "layer_norm_eps": 1e-6}),
    "vit quick_gelu": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "quick_gelu"}),
    "vit gelu_new": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "gelu_new"}),
    "vit silu": ("ViTForImageClassification", "ViTConfig", {**VIT, "hidden_act": "silu"}),
    "vit no qkv_bias": ("ViTForImageClassification", "ViTConfig", {**VIT, "qkv_bias": False}),
    "vit grey": ("ViTForImageClassification", "ViTConfig", {**VIT, "num_channels": 1}),
    "vit rectangular": ("ViTForImageClassification", "ViTConfig", {**VIT, "image_size": [32, 48]}),
    "vit for masks": ("ViTForMaskedImageModeling", "ViTConfig", {**VIT, "encoder_stride": 8}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit headless": ("DeiTModel", "DeiTConfig", VIT),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {"layerscale_value": 0.3}),
    "dinov2 headless": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2 swiglu": ("Dinov2ForImageClassification", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2 quick_gelu": ("Dinov2ForImageClassification", "Dinov2Config", {"hidden_act": "quick_gelu"}),
    "dinov2 no qkv_bias": ("Dinov2ForImageClassification", "Dinov2Config", {"qkv_bias": False}),
    "registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}),
    "registers headless": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 2},
    ),
    "registers swiglu": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"use_swiglu_ffn": True, "qkv_bias": False},
    ),
}
DISTILLED = {
    "gelu": VIT,
    "quick_gelu": {**VIT, "hidden_act": "quick_gelu"},
    "no qkv_bias": {**VIT, "qkv_bias": False},
}
NO_PLACE = ("mask_token", "pooler.", "decoder.")
"""What a classifier of ours has no use for."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices as small as these are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(name: str, config: str, settings: dict) -> nn.Module:
    """Every parameter off its initial value; tokens and positions on a grid where their sums are exact."""
    model = getattr(transformers, name)(getattr(transformers, config)(**{**TINY, **CLASSIFIER, **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if "token" in key or "position" in key:
                parameter.mul_(1024).round_().div_(1024)
    return model.eval()


def _saved(case: str, folder) -> nn.Module:
    model = _model(*MODELS[case])
    model.save_pretrained(folder)
    return model


def _images(config, *, dtype=torch.float32) -> Tensor:
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, config.num_channels, *sides, generator=generator, dtype=dtype)


def _reference_transformers_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits; of a model without a head, the class token after the final norm."""
    outputs = getattr(model, "vit", model)(images) if not hasattr(model, "classifier") else model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state[:, 0]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("case", MODELS)
def test_logits_equal_those_of_transformers(case, tmp_path):
    theirs = _saved(case, tmp_path)
    images = _images(theirs.config)
    expected = _reference_transformers_outputs(theirs, images)
    ours = load(tmp_path).model
    assert _difference(ours(images), expected) <= 1e-5
    assert torch.equal(create_model("auto", pretrained=tmp_path).eval()(images), ours(images))
    expected = _reference_transformers_outputs(theirs.double(), images.double())
    assert _difference(ours.double()(images.double()), expected) <= 1e-10


@torch.inference_mode()
@pytest.mark.parametrize("case", DISTILLED)
def test_two_heads_of_a_distilled_model_are_averaged_as_in_transformers(case, tmp_path):
    """Through timm's distilled architecture, whose norms have an epsilon of 1e-6, not 1e-12: 1.4e-5 seen."""
    theirs = _model("DeiTForImageClassificationWithTeacher", "DeiTConfig", DISTILLED[case])
    theirs.save_pretrained(tmp_path)
    images = _images(theirs.config)
    ours = load(tmp_path).model
    assert ours.config.pool == "distilled"
    assert _difference(ours(images), theirs(images).logits) <= 5e-5
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert _difference(ours(images), theirs(images).logits) <= 1e-5
    images = images.double()
    assert _difference(ours.double()(images), theirs.double()(images).logits) <= 1e-10
    assert not ours.load_report.of("fresh")
    assert not ours.load_report.of("dropped")


@pytest.mark.parametrize("case", MODELS)
def test_every_key_has_one_fate_and_none_is_fresh(case, tmp_path):
    _saved(case, tmp_path)
    model = load(tmp_path).model
    report = model.load_report
    keys = [row.key for row in report.keys]
    assert len(keys) == len(set(keys))
    assert set(model.state_dict()) == set(keys) - set(report.of("dropped"))
    assert not report.of("fresh")
    names = load_file(tmp_path / "model.safetensors")
    assert set(report.of("dropped")) == {name for name in names if any(part in name for part in NO_PLACE)}
    moved = {"cls_token"} if case.startswith("registers") else set()
    assert set(report.of("moved")) == moved
    assert set(report.of("resized")) == ({"pos_embed"} if moved else set())


@torch.inference_mode()
def test_no_registers_are_no_token(tmp_path):
    name, config, _ = MODELS["registers"]
    theirs = _model(name, config, {"num_register_tokens": 0})
    theirs.save_pretrained(tmp_path)
    images = _images(theirs.config)
    ours = load(tmp_path).model
    assert ours.layout.num_tokens == 17
    assert _difference(ours(images), theirs(images).logits) <= 1e-5
    assert create_model("auto", pretrained=tmp_path, reg_tokens=2).load_report.of("fresh").keys() == {
        "reg_token"
    }


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2 swiglu", "registers"])
def test_the_names_of_transformers_5_are_read_too(case, tmp_path):
    theirs = _model(*MODELS[case])
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(".q_proj." in name for name in load_file(tmp_path / "model.safetensors"))
    images = _images(theirs.config)
    assert _difference(load(tmp_path).model(images), theirs(images).logits) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_float32(dtype, tmp_path):
    theirs = _model(*MODELS["registers"]).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    images = _images(theirs.config)
    assert _difference(ours(images), theirs.float()(images).logits) <= 1e-5


def test_class_names_come_in_the_order_of_id2label(tmp_path):
    _saved("vit", tmp_path)
    assert load(tmp_path).class_names == NAMES


def test_a_class_name_that_is_there_twice_gets_its_number(tmp_path):
    theirs = _model("ViTForImageClassification", "ViTConfig", {**VIT, "id2label": dict(enumerate("abcab"))})
    theirs.save_pretrained(tmp_path)
    assert load(tmp_path).class_names == ["a (0)", "b (1)", "c", "a (3)", "b (4)"]


def test_numbers_are_no_class_names(tmp_path):
    settings = {**VIT, "id2label": {i: f"LABEL_{i}" for i in range(5)}}
    _model("ViTForImageClassification", "ViTConfig", settings).save_pretrained(tmp_path)
    classifier = load(tmp_path)
    assert classifier.class_names == [f"output_{i}" for i in range(5)]
    assert classifier.model.load_report.class_names is None


def test_the_licence_is_that_of_the_model_card(tmp_path):
    _saved("vit", tmp_path)
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
    _saved("vit", tmp_path)
    values, expected = PROCESSORS[case]
    if values:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    preprocess = load(tmp_path).preprocess
    assert preprocess.img_size == (32, 32)
    assert {name: getattr(preprocess, name) for name in expected} == expected


def test_image_processors_write_what_is_read(tmp_path):
    _saved("dinov2", tmp_path)
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
    theirs = _saved("vit", tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **settings)
    processor.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    inputs = processor(list(images), return_tensors="pt", do_resize=False)
    expected = theirs(**inputs).logits
    ours = load(tmp_path)(images)
    assert _difference(ours, expected) <= 1e-5
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
    _saved("vit", tmp_path)
    theirs = getattr(transformers, name)(**settings)
    theirs.save_pretrained(tmp_path)
    preprocess = load(tmp_path).preprocess
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 60, 90), generator=generator, dtype=torch.uint8)
    expected = theirs(image, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = eval_reader(
        preprocess.img_size,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
    )(image)
    assert (ours.float() - expected.float()).abs().max() <= 1


@torch.inference_mode()
def _tokens(theirs: nn.Module, images: Tensor) -> Tensor:
    """Before the final norm, shape (batch, tokens, dim)."""
    base = theirs.base_model
    found = []
    handle = base.layernorm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    base(images)
    handle.remove()
    return found[0]


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "registers"])
def test_pool_gap_reads_the_patches_through_the_pretrained_norm(case, tmp_path):
    theirs = _saved(case, tmp_path)
    images = _images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="gap").eval()
    first = ours.layout.num_prefix_tokens
    assert first == {"vit": 1, "deit": 2, "dinov2": 1, "registers": 5}[case]
    pooled = theirs.base_model.layernorm(_tokens(theirs, images)[:, first:].mean(dim=1))
    weight = theirs.classifier.weight[:, -pooled.shape[1] :]  # of cls+gap, the columns of gap
    expected = nn.functional.linear(pooled, weight, theirs.classifier.bias)
    assert _difference(ours(images), expected) <= 1e-5
    assert "fc_norm.weight" in ours.load_report.of("moved")


@torch.inference_mode()
@pytest.mark.parametrize("case", ["dinov2", "registers"])
def test_pool_cls_reads_the_columns_of_the_class_token(case, tmp_path):
    theirs = _saved(case, tmp_path)
    images = _images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="cls").eval()
    token = theirs.base_model.layernorm(_tokens(theirs, images)[:, 0])
    expected = nn.functional.linear(token, theirs.classifier.weight[:, :48], theirs.classifier.bias)
    assert _difference(ours(images), expected) <= 1e-5
    assert ours.load_report.of("resized")["head.weight"] == "pool cls+gap -> cls: 96 -> 48 columns"


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit"])
def test_pool_cls_and_gap_keeps_the_logits_of_a_head_on_the_class_token(case, tmp_path):
    theirs = _saved(case, tmp_path)
    images = _images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="cls+gap").eval()
    assert ours.head.in_features == 96
    assert _difference(ours(images), theirs(images).logits) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["cls", "gap", "cls+gap"])
def test_a_distilled_model_can_leave_its_second_head_behind(pool, tmp_path):
    theirs = _model("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT)
    theirs.save_pretrained(tmp_path)
    images = _images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool=pool).eval()
    assert set(ours.load_report.of("dropped")) == {"head_dist.weight", "head_dist.bias"}
    assert ours(images).shape == (3, 5)
    if pool == "cls":
        assert _difference(ours(images), theirs(images).cls_logits) <= 5e-5


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "dinov2 swiglu", "registers"])
def test_another_number_of_classes_makes_a_new_head_on_the_same_features(case, tmp_path):
    theirs = _saved(case, tmp_path)
    images = _images(theirs.config)
    torch.manual_seed(0)
    ours = create_model("auto", pretrained=tmp_path, num_classes=7).eval()
    assert set(ours.load_report.of("fresh")) == {"head.weight", "head.bias"}
    features = ours.forward_features(images)
    expected = nn.functional.linear(features, theirs.classifier.weight, theirs.classifier.bias)
    assert _difference(expected, theirs(images).logits) <= 1e-5
    assert ours(images).shape == (3, 7)


def _reference_timm_positions(positions: Tensor, num_prefix_tokens: int) -> Tensor:
    return resample_abs_pos_embed(positions, new_size=[6, 6], num_prefix_tokens=num_prefix_tokens)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "registers"])
def test_another_image_size_interpolates_the_positions_as_timm_does(case, tmp_path):
    small = _saved(case, tmp_path)
    name, config, settings = MODELS[case]
    theirs = _model(name, config, {**settings, "image_size": 48})
    state = small.state_dict()
    key = next(key for key in state if key.endswith("position_embeddings"))
    state[key] = _reference_timm_positions(state[key], 2 if case == "deit" else 1)
    theirs.load_state_dict(state)
    images = _images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, img_size=48).eval()
    assert "4x4 -> 6x6 patches" in ours.load_report.of("resized")["pos_embed"]
    assert _difference(ours(images), theirs(images).logits) <= 1e-5
    if case == "registers":  # the only one that transformers interpolates with antialiasing
        assert _difference(ours(images), small(images).logits) <= 1e-5


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
    _saved("vit", tmp_path)
    changes, message = CONTRADICTIONS[case]
    _rewrite(tmp_path, **changes)
    with pytest.raises(
        ModelFileError, match=rf"config\.json does not describe the weights beside it: .*{message}"
    ):
        load(tmp_path)


def test_weights_that_lack_a_matrix_are_refused(tmp_path):
    _saved("vit", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["vit.encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, file)
    with pytest.raises(
        ModelFileError, match=r"blocks.1.attn.qkv.weight is of .* in the weights it is absent"
    ):
        load(tmp_path)


@pytest.mark.parametrize("way", [load, lambda folder: create_model("auto", pretrained=folder)])
def test_a_model_of_another_type_is_refused(way, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 48}))
    message = r"of type 'bert'; those that can be read are vit, deit, dinov2, dinov2_with_registers\."
    with pytest.raises(ModelFileError, match=message):
        way(tmp_path)


def test_a_folder_without_its_weights_names_the_file_that_is_missing(tmp_path):
    _saved("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"there is no file '.*model\.safetensors'"):
        load(tmp_path)


def test_a_folder_without_its_config_names_the_file_that_is_missing(tmp_path):
    _saved("vit", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"there is no config\.json beside it.*name=path/to/weights"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '{"hidden_size": 48}'])
def test_a_damaged_config_is_refused(text, tmp_path):
    _saved("vit", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json names no architecture"):
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
    _saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)
