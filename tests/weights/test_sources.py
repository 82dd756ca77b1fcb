"""Every format that weights come in gives the same numbers as timm, or one clear paragraph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn

import vit_cls
from vit_cls import create_model
from vit_cls.cli import main
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import CHECKPOINT_KEY, save_classifier
from vit_cls.weights.factory import create_classifier

NAME = "vit_tiny_patch16_224"
SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
SMALL = {**SIZES, "num_classes": 10}
CLASSES = list("abcdefghij")


def _reference_timm(name: str = NAME, seed: int = 0, **arguments) -> torch.nn.Module:
    """timm's model with every parameter off its initial value: norms of 1 would hide mistakes."""
    model = timm.create_model(name, **{**SMALL, **arguments})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _assert_same_logits(ours, theirs, size: int = 32, atol: float = 1e-5) -> None:
    with torch.inference_mode():
        expected = theirs(_images(size))
        torch.testing.assert_close(ours.eval()(_images(size)), expected, rtol=0, atol=atol)
    assert expected.std() > 0.01  # logits of zero would agree with anything


def _assert_every_key_has_one_fate(model, file_keys) -> None:
    report = model.load_report
    keys = [row.key for row in report.keys]
    assert len(keys) == len(set(keys))
    assert {row.key for row in report.keys if row.fate != "dropped"} == set(model.state_dict())
    assert set(report.of("dropped")) <= set(file_keys)
    assert sum(report.counts().values()) == len(keys)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in a folder of its own, on one thread: for tensors this small more only wait."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def theirs():
    """A tiny model of timm's with 10 classes."""
    return _reference_timm()


# ---- files under timm's names ----------------------------------------------------------------------------


def _as_our_run(model, path: Path) -> None:
    ours = create_model(NAME, **SMALL)
    ours.load_state_dict(model.state_dict())
    save_classifier(ImageClassifier(ours, Preprocess((32, 32)), CLASSES), path)


def _as_our_checkpoint(model, path: Path) -> None:
    ours = create_model(NAME, **SMALL)
    metadata = ImageClassifier(ours, Preprocess((32, 32)), CLASSES).to_metadata()
    state = {f"classifier.model.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: metadata, "epoch": 3}, path)


def _doubled(model) -> dict[str, torch.Tensor]:
    return {key: tensor * 2 for key, tensor in model.state_dict().items()}


WRITERS = {
    "weights.safetensors": lambda model, path: save_file(model.state_dict(), path),
    "weights.pth": lambda model, path: torch.save(model.state_dict(), path),
    "weights.bin": lambda model, path: torch.save({"model": model.state_dict(), "epoch": 1}, path),
    "weights.ckpt": lambda model, path: torch.save({"state_dict": model.state_dict()}, path),
    "weights.pth.tar": lambda model, path: torch.save({"state_dict": model.state_dict()}, path),
    "average.pth": lambda model, path: torch.save(
        {"state_dict": _doubled(model), "state_dict_ema": model.state_dict()}, path
    ),
    "parallel.pt": lambda model, path: torch.save(
        {"model": {f"module.{key}": tensor for key, tensor in model.state_dict().items()}}, path
    ),
    "model.safetensors": _as_our_run,
    "epoch.ckpt": _as_our_checkpoint,
}


@pytest.mark.parametrize("file", WRITERS)
def test_logits_are_timms_from_every_kind_of_file(file, theirs):
    WRITERS[file](theirs, Path(file))
    ours = create_model(NAME, pretrained=file, **SMALL)
    _assert_same_logits(ours, theirs)
    assert ours.load_report.counts() == {"loaded": 32, "resized": 0, "moved": 0, "dropped": 0, "fresh": 0}
    assert ours.load_report.fresh_share == 0
    _assert_every_key_has_one_fate(ours, theirs.state_dict())


def test_the_choice_of_averaged_weights_is_in_the_notes(theirs):
    WRITERS["average.pth"](theirs, Path("average.pth"))
    notes = create_model(NAME, pretrained="average.pth", **SMALL).load_report.notes
    assert notes == ("the file holds state_dict_ema, state_dict; state_dict_ema was taken",)


@pytest.mark.parametrize("writer", [_as_our_run, _as_our_checkpoint])
def test_our_own_files_say_their_architecture_by_themselves(writer, theirs):
    path = Path("model.safetensors" if writer is _as_our_run else "epoch.ckpt")
    writer(theirs, path)
    ours = create_model("auto", pretrained=path)
    _assert_same_logits(ours, theirs)
    assert ours.load_report.class_names == tuple(CLASSES)
    assert create_classifier("auto", pretrained=path).class_names == CLASSES


def test_a_run_folder_stands_for_its_model_file(theirs):
    Path("run").mkdir()
    _as_our_run(theirs, Path("run/model.safetensors"))
    _assert_same_logits(create_model("auto", pretrained="run"), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(dtype, theirs):
    half = {key: tensor.to(dtype) for key, tensor in theirs.state_dict().items()}
    torch.save(half, "half.pth")
    ours = create_model(NAME, pretrained="half.pth", **SMALL)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    theirs.load_state_dict(half)
    _assert_same_logits(ours, theirs)


def test_another_image_and_patch_size_are_resized_as_timm_does_it(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    for img_size, patch_size in ((48, 8), (32, 4), (64, 16)):
        target = _reference_timm(img_size=img_size, patch_size=patch_size)
        target.load_state_dict(checkpoint_filter_fn(dict(theirs.state_dict()), target))
        sizes = {**SMALL, "img_size": img_size, "patch_size": patch_size}
        ours = create_model(NAME, pretrained="weights.pth", **sizes)
        _assert_same_logits(ours, target, size=img_size)
        grid = img_size // patch_size
        resized = ours.load_report.of("resized")
        if grid != 4:
            assert resized["pos_embed"] == f"4x4 -> {grid}x{grid} patches"
        if patch_size != 8:
            assert resized["patch_embed.proj.weight"] == f"8x8 pixels -> {patch_size}x{patch_size} pixels"
        _assert_every_key_has_one_fate(ours, theirs.state_dict())


def test_the_patch_grid_of_our_own_file_need_not_be_square():
    torch.manual_seed(0)
    wide = create_model(NAME, **{**SMALL, "img_size": (16, 64)})
    save_classifier(ImageClassifier(wide, Preprocess((16, 64)), CLASSES), "model.safetensors")
    square = create_model("auto", pretrained="model.safetensors", img_size=32)
    assert square.load_report.of("resized") == {"pos_embed": "2x8 -> 4x4 patches"}
    grid = wide.pos_embed[:, 1:].reshape(1, 2, 8, 48).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(square.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(square.pos_embed[:, 0], wide.pos_embed[:, 0])


def test_another_number_of_classes_makes_a_new_head_and_says_so(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    ours = create_model(NAME, pretrained="weights.pth", **{**SMALL, "num_classes": 4})
    note = "not the checkpoint's: 10 -> 4 classes"
    assert ours.load_report.of("fresh") == {"head.weight": note, "head.bias": note}
    assert torch.equal(ours.blocks[1].mlp.fc2.weight, theirs.blocks[1].mlp.fc2.weight)
    _assert_every_key_has_one_fate(ours, theirs.state_dict())
    headless = create_model(NAME, pretrained="weights.pth", **{**SMALL, "num_classes": 0})
    assert headless.load_report.of("dropped") == dict.fromkeys(
        ("head.weight", "head.bias"), "the model has no head"
    )
    _assert_every_key_has_one_fate(headless, theirs.state_dict())


def test_the_classes_of_a_file_are_kept_where_no_number_is_asked_for(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    np.savez("weights.npz", **_reference_google_npz(theirs.state_dict(), heads=3, layout="augreg"))
    for file in ("weights.pth", "weights.npz"):
        ours = create_model(NAME, pretrained=file, **SIZES)
        assert ours.config.num_classes == 10
        _assert_same_logits(ours, theirs)


# ---- folders of timm's ------------------------------------------------------------------------------------

FOLDERS = [
    NAME,
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_rope_224",
    "deit_tiny_distilled_patch16_224",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_timms_says_by_itself_what_it_holds(name):
    theirs = _reference_timm(name)
    labels = {"label_names": CLASSES, "pretrained_cfg": {"license": "cc-by-nc-4.0", "tag": None}}
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8, "interpolation": "bilinear"}
    save_for_hf(theirs, "folder", model_config=labels, data_config=data, safe_serialization=True)
    ours = create_model("auto", pretrained="folder")
    _assert_same_logits(ours, theirs)
    assert ours.load_report.counts()["loaded"] == len(ours.state_dict())
    _assert_every_key_has_one_fate(ours, theirs.state_dict())
    classifier = vit_cls.load("folder")
    _assert_same_logits(classifier.model, theirs)
    assert not classifier.training
    assert classifier.class_names == CLASSES
    assert classifier.weights_licence == "cc-by-nc-4.0"
    assert classifier.preprocess.mean == (0.1, 0.2, 0.3)
    assert classifier.preprocess.crop_pct == 0.8
    assert classifier.preprocess.interpolation == "bilinear"


# of timm's own code for resizing them
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple:UserWarning")
def test_relative_positions_of_our_own_beit_are_resized_as_timm_does_it():
    name = "beit_base_patch16_224"
    theirs = _reference_timm(name)
    ours = create_model(name, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    save_classifier(ImageClassifier(ours, Preprocess((32, 32)), CLASSES), "model.safetensors")
    save_for_hf(theirs, "folder", safe_serialization=True)
    target = timm.create_model("local-dir:folder", pretrained=True, img_size=48, num_classes=10).eval()
    for pretrained in ("model.safetensors", "folder"):
        larger = create_model("auto", pretrained=pretrained, img_size=48)
        _assert_same_logits(larger, target, size=48)
        table = larger.load_report.of("resized")["blocks.0.attn.relative_position_bias_table"]
        assert table == "52x3 -> 124x3"


# ---- Google's .npz ----------------------------------------------------------------------------------------


def _reference_google_npz(
    state: Mapping[str, torch.Tensor], heads: int, *, layout: str, prefix: str = "", stacked: bool = False
) -> dict[str, np.ndarray]:
    """timm's weights as Google's code writes them: what timm's `_load_weights` reads, the other way round.

    ``layout`` is ``augreg`` (the files of ViT, AugReg, SAM) or ``big_vision``; ``stacked`` has all blocks in
    one array, as big_vision's scanned encoders do.
    """
    arrays = {key: tensor.float().numpy() for key, tensor in state.items()}
    dim = arrays["patch_embed.proj.bias"].shape[0]
    attention, mlp, second = (1, 3, 2) if layout == "augreg" else (0, 0, 1)
    out: dict[str, np.ndarray] = {}

    def norm(source: str, target: str) -> None:
        out[f"{target}/scale"], out[f"{target}/bias"] = arrays[f"{source}.weight"], arrays[f"{source}.bias"]

    def linear(source: str, target: str) -> None:
        out[f"{target}/kernel"], out[f"{target}/bias"] = (
            arrays[f"{source}.weight"].T,
            arrays[f"{source}.bias"],
        )

    def projections(weight: np.ndarray, bias: np.ndarray, names: tuple[str, ...], target: str) -> None:
        parts = zip(names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True)
        for name, w, b in parts:
            out[f"{target}/{name}/kernel"] = w.T.reshape(dim, heads, dim // heads)
            out[f"{target}/{name}/bias"] = b.reshape(heads, dim // heads)

    def joined(source: str, target: str) -> None:
        out[f"{target}/out/kernel"] = arrays[f"{source}.weight"].T.reshape(heads, dim // heads, dim)
        out[f"{target}/out/bias"] = arrays[f"{source}.bias"]

    out["embedding/kernel"] = arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    out["embedding/bias"] = arrays["patch_embed.proj.bias"]
    if "cls_token" in arrays:
        out["cls"] = arrays["cls_token"]
    position = "Transformer/posembed_input/pos_embedding" if layout == "augreg" else "pos_embedding"
    out[position] = arrays["pos_embed"]
    final = "norm" if "norm.weight" in arrays else "fc_norm"
    norm(final, "Transformer/encoder_norm")
    if "head.weight" in arrays:
        linear("head", "head")
    depth = len({key.split(".")[1] for key in arrays if key.startswith("blocks.")})
    for i in range(depth):
        block, target = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        norm(f"{block}.norm1", f"{target}/LayerNorm_0")
        norm(f"{block}.norm2", f"{target}/LayerNorm_{second}")
        mha = f"{target}/MultiHeadDotProductAttention_{attention}"
        qkv = (arrays[f"{block}.attn.qkv.weight"], arrays[f"{block}.attn.qkv.bias"])
        projections(*qkv, ("query", "key", "value"), mha)
        joined(f"{block}.attn.proj", mha)
        linear(f"{block}.mlp.fc1", f"{target}/MlpBlock_{mlp}/Dense_0")
        linear(f"{block}.mlp.fc2", f"{target}/MlpBlock_{mlp}/Dense_1")
    if "attn_pool.latent" in arrays:
        mha = "MAPHead_0/MultiHeadDotProductAttention_0"
        out["MAPHead_0/probe"] = arrays["attn_pool.latent"]
        projections(arrays["attn_pool.q.weight"], arrays["attn_pool.q.bias"], ("query",), mha)
        projections(arrays["attn_pool.kv.weight"], arrays["attn_pool.kv.bias"], ("key", "value"), mha)
        joined("attn_pool.proj", mha)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        linear("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
        linear("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")
    if stacked:
        names = [name for name in out if "/encoderblock_0/" in name]
        for name in names:
            blocks = [out.pop(name.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(depth)]
            out[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
    return {prefix + name: array for name, array in out.items()}


def _write_npz(model, path: str = "weights.npz", **settings) -> list[str]:
    arrays = _reference_google_npz(model.state_dict(), heads=3, **settings)
    np.savez(path, **arrays)
    return list(arrays)


NPZ = {
    "augreg": (NAME, {}, {"layout": "augreg"}),
    "augreg, optimiser's": (NAME, {}, {"layout": "augreg", "prefix": "opt/target/"}),
    "big_vision": (NAME, {}, {"layout": "big_vision", "prefix": "params/"}),
    "big_vision, stacked": (NAME, {}, {"layout": "big_vision", "prefix": "params/", "stacked": True}),
    "big_vision, gap": (
        "vit_base_patch16_siglip_gap_224",
        {},
        {"layout": "big_vision", "prefix": "params/"},
    ),
    "siglip": (
        "vit_base_patch16_siglip_224",
        {"num_classes": 0},
        {"layout": "big_vision", "prefix": "params/img/"},
    ),
    "siglip, stacked": (
        "vit_base_patch16_siglip_224",
        {"num_classes": 0},
        {"layout": "big_vision", "prefix": "params/img/", "stacked": True},
    ),
}


@pytest.mark.parametrize("case", NPZ)
def test_googles_npz_gives_the_logits_of_the_weights_in_it(case):
    name, settings, layout = NPZ[case]
    theirs = _reference_timm(name, **settings)
    keys = _write_npz(theirs, **layout)
    timm_reads_it = _reference_timm(name, seed=5, **settings)
    timm_reads_it.load_pretrained("weights.npz")
    _assert_same_logits(timm_reads_it, theirs)  # the writer above is right
    ours = create_model(name, pretrained="weights.npz", **{**SMALL, **settings})
    _assert_same_logits(ours, theirs)
    assert ours.load_report.of("fresh") == {}
    assert ours.load_report.of("dropped") == {}
    _assert_every_key_has_one_fate(ours, keys)


def test_a_mean_over_the_patches_keeps_the_norm_of_an_npz(theirs):
    _write_npz(theirs, layout="augreg")
    ours = create_model(NAME, pretrained="weights.npz", pool="gap", **SMALL)
    with np.load("weights.npz") as file:
        assert np.array_equal(ours.fc_norm.weight.detach().numpy(), file["Transformer/encoder_norm/scale"])
        assert np.array_equal(ours.fc_norm.bias.detach().numpy(), file["Transformer/encoder_norm/bias"])
    assert ours.load_report.of("moved") == {
        "fc_norm.weight": "from norm.weight",
        "fc_norm.bias": "from norm.bias",
    }
    assert any("now after the pooling (norm -> fc_norm)" in note for note in ours.load_report.notes)
    _assert_every_key_has_one_fate(ours, [])


def test_classes_and_size_of_an_npz_can_change(theirs):
    _write_npz(theirs, layout="augreg")
    target = _reference_timm(img_size=48)
    target.load_pretrained("weights.npz")
    ours = create_model(NAME, pretrained="weights.npz", **{**SMALL, "img_size": 48})
    _assert_same_logits(ours, target, size=48)
    fewer = create_model(NAME, pretrained="weights.npz", **{**SMALL, "num_classes": 4})
    note = "not the checkpoint's: 10 -> 4 classes"
    assert fewer.load_report.of("fresh") == {"head.weight": note, "head.bias": note}
    with torch.inference_mode():
        expected = theirs.forward_features(_images())
        torch.testing.assert_close(fewer.eval().encode(_images()), expected, rtol=0, atol=1e-5)
    _assert_every_key_has_one_fate(fewer, [])


def test_the_text_tower_in_an_npz_is_dropped():
    name, settings, layout = NPZ["siglip"]
    theirs = _reference_timm(name, **settings)
    arrays = _reference_google_npz(theirs.state_dict(), heads=3, **layout)
    text = {"params/txt/head/bias": np.ones(4, np.float32), "params/t": np.ones(1, np.float32)}
    np.savez("weights.npz", **arrays, **text)
    ours = create_model(name, pretrained="weights.npz", **{**SMALL, **settings})
    _assert_same_logits(ours, theirs)
    assert set(ours.load_report.of("dropped")) == set(text)
    _assert_every_key_has_one_fate(ours, [*arrays, *text])


def test_a_damaged_or_foreign_npz_is_refused(theirs):
    _write_npz(theirs, "good.npz", layout="augreg")
    content = Path("good.npz").read_bytes()
    Path("cut.npz").write_bytes(content[: len(content) // 2])
    Path("page.npz").write_bytes(b"<!DOCTYPE html><html></html>")
    Path("empty.npz").write_bytes(b"")
    np.savez("object.npz", **{"embedding/kernel": np.array([{"a": 1}], dtype=object)})
    np.savez("other.npz", x=np.ones(3), y=np.ones(3))
    with np.load("good.npz") as file:
        arrays = dict(file)
    raw = {key: np.zeros(array.shape, "V2") for key, array in arrays.items()}
    np.savez("bfloat16.npz", **raw)
    arrays.pop("Transformer/encoder_norm/scale")
    np.savez("lacking.npz", **arrays)
    np.savez("blocks.npz", **{name: array for name, array in arrays.items() if "block" not in name})
    np.savez("flat.npz", **{**arrays, "embedding/kernel": np.ones((8, 48), np.float32)})
    for file, message in {
        "cut.npz": r"cut\.npz is damaged or no \.npz file of arrays alone: .*Copy or download it again\.",
        "page.npz": r"page\.npz is a web page, not weights",
        "empty.npz": r"empty\.npz is empty",
        "object.npz": r"object\.npz is damaged or no \.npz file",
        "other.npz": r"other\.npz holds no Vision Transformer of Google's.*\(it has x, y\)",
        "blocks.npz": r"blocks\.npz does not hold this architecture",
        "lacking.npz": r"lacking\.npz does not hold this architecture: .*encoder_norm/scale",
        "flat.npz": r"flat\.npz does not hold this architecture",
        "bfloat16.npz": r"bfloat16\.npz does not hold this architecture",
    }.items():
        with pytest.raises(ModelFileError, match=message) as refused:
            create_model(NAME, pretrained=file, **SMALL)
        assert "\n" not in str(refused.value)
        assert "pickle" not in str(refused.value)  # numpy's advice to open the file by running it


def test_an_npz_does_not_fit_an_adapted_architecture(theirs):
    _write_npz(theirs, layout="augreg")
    with pytest.raises(ModelFileError, match=r"Google's \.npz files hold plain Vision Transformers"):
        create_model("beit_base_patch16_224", pretrained="weights.npz", **SMALL)


def test_an_npz_of_other_sizes_is_measured_by_its_own(theirs):
    _write_npz(theirs, layout="augreg")
    with pytest.raises(ModelFileError, match=r"cls_token is \(1, 1, 48\), not \(1, 1, 192\)"):
        create_model(NAME, pretrained="weights.npz")
    with pytest.raises(ModelFileError, match=r"30 % of the encoder would be fresh.*blocks\.2\.norm1"):
        create_model(NAME, pretrained="weights.npz", **{**SMALL, "depth": 3})
    shallow = create_model(NAME, pretrained="weights.npz", **{**SMALL, "depth": 1})
    assert len(shallow.load_report.of("dropped")) == 12
    other = create_model(NAME, pretrained="weights.npz", **{**SMALL, "num_heads": 4})
    assert "model.num_heads is 4, but the weights were trained with 3" in other.load_report.notes


# ---- other people's layouts -------------------------------------------------------------------------------


def _reference_openai_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's weights under the names of OpenAI's CLIP, with a text tower beside them."""
    names = [
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^head\.weight$", "proj"),
        (r"^blocks\.(\d+)\.norm", r"transformer.resblocks.\1.ln_"),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    ]
    clip = {}
    for key, tensor in state.items():
        if key == "head.bias":
            continue
        name = next(re.sub(pattern, new, key) for pattern, new in names if re.search(pattern, key))
        if name in ("class_embedding", "positional_embedding"):
            tensor = tensor[0, 0] if name == "class_embedding" else tensor[0]
        clip[f"visual.{name}"] = tensor.T if name == "proj" else tensor
    generator = torch.Generator().manual_seed(7)
    for name, shape in TEXT_TOWER.items():
        clip[name] = torch.randn(shape, generator=generator)
    return {name: tensor.half().contiguous() for name, tensor in clip.items()}


TEXT_TOWER = {
    "transformer.resblocks.0.attn.in_proj_weight": (144, 48),
    "transformer.resblocks.0.ln_1.weight": (48,),
    "token_embedding.weight": (20, 48),
    "positional_embedding": (7, 48),
    "ln_final.weight": (48,),
    "text_projection": (48, 10),
    "logit_scale": (),
}
CLIP = "vit_base_patch32_clip_224"


@pytest.fixture
def clip_file():
    """A tiny CLIP in half precision, in ``clip.pt``; its image tower as timm itself loads it."""
    theirs = _reference_timm(CLIP)
    file = _reference_openai_clip(theirs.state_dict())
    torch.save(file, "clip.pt")
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    return theirs, file


def test_openais_clip_gives_timms_logits_and_its_text_tower_is_dropped(clip_file):
    theirs, file = clip_file
    ours = create_model(CLIP, pretrained="clip.pt", **SMALL)
    assert ours.config.act == "gelu"
    assert not any("QuickGELU" in note for note in ours.load_report.notes)
    _assert_same_logits(ours, theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    assert ours.load_report.of("fresh") == {}
    _assert_every_key_has_one_fate(ours, file)


def test_a_tag_trained_with_quickgelu_is_built_with_it_and_says_so(clip_file):
    _, file = clip_file
    theirs = _reference_timm("vit_base_patch32_clip_quickgelu_224")
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    ours = create_model(f"{CLIP}.openai", pretrained="clip.pt", **SMALL)
    assert ours.config.act == "quick_gelu"
    assert any("QuickGELU" in note for note in ours.load_report.notes)
    _assert_same_logits(ours, theirs)
    with torch.inference_mode():
        plain = create_model(CLIP, pretrained="clip.pt", **SMALL).eval()(_images())
        assert (ours(_images()) - plain).abs().max() > 1e-4  # the activation is no detail
    _assert_every_key_has_one_fate(ours, file)


def test_the_head_of_another_number_of_classes_is_dropped_with_the_text_tower(clip_file):
    _, file = clip_file
    ours = create_model(CLIP, pretrained="clip.pt", pool="gap", **{**SMALL, "num_classes": 3})
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    assert set(ours.load_report.of("fresh")) == {"head.weight", "head.bias"}
    assert set(ours.load_report.of("moved")) == {"fc_norm.weight", "fc_norm.bias"}
    _assert_every_key_has_one_fate(ours, file)


def test_what_was_renamed_and_resized_at_once_is_reported_as_resized(clip_file):
    _, file = clip_file
    theirs = _reference_timm(CLIP, img_size=48, patch_size=4)
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    sizes = {**SMALL, "img_size": 48, "patch_size": 4}
    ours = create_model(CLIP, pretrained="clip.pt", **sizes)
    _assert_same_logits(ours, theirs, size=48, atol=1e-4)
    assert ours.load_report.of("resized") == {
        "pos_embed": "4x4 -> 12x12 patches",
        "patch_embed.proj.weight": "8x8 pixels -> 4x4 pixels",
    }
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    _assert_every_key_has_one_fate(ours, file)


def _reference_dinov2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's weights in the layout of DINOv2's own files, with registers or without."""
    state = dict(state)
    generator = torch.Generator().manual_seed(7)
    file = {"mask_token": torch.randn(1, 48, generator=generator)}
    if "reg_token" in state:  # timm has added the class token's position to it
        position = torch.randn(1, 1, 48, generator=generator)
        file["register_tokens"] = state.pop("reg_token")
        file["cls_token"] = state.pop("cls_token") - position
        file["pos_embed"] = torch.cat([position, state.pop("pos_embed")], dim=1)
    return {**file, **state}


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("img_size", [32, 48])
def test_dinov2s_own_files_give_timms_tokens(name, img_size):
    small = _reference_timm(name, num_classes=0)
    file = _reference_dinov2(small.state_dict())
    torch.save({"teacher": file}, "dinov2.pth")
    theirs = _reference_timm(name, num_classes=0, img_size=img_size)
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    settings = {**SMALL, "num_classes": 0, "img_size": img_size}
    ours = create_model(name, pretrained="dinov2.pth", **settings).eval()
    images = _images(img_size)
    with torch.inference_mode():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours.encode(images), expected, rtol=0, atol=1e-5)
    _assert_same_logits(ours, theirs, size=img_size)
    assert set(ours.load_report.of("dropped")) == {"mask_token"}
    assert ours.load_report.of("fresh") == {}
    note = ours.load_report.of("resized").get("pos_embed")
    if "reg4" in name:
        added = "positions of prefix tokens were added to the tokens"
        assert note == (added if img_size == 32 else "4x4 -> 6x6 patches")
        assert ours.load_report.of("moved") == {"cls_token": "its position was added to it"}
    else:
        assert note == (None if img_size == 32 else "4x4 -> 6x6 patches")
    _assert_every_key_has_one_fate(ours, file)


def test_deit3s_own_files_give_timms_logits():
    name = "deit3_small_patch16_224"
    theirs = _reference_timm(name)
    file = {
        re.sub(r"ls([12])\.gamma", r"gamma_\1", key): tensor for key, tensor in theirs.state_dict().items()
    }
    assert "blocks.1.gamma_2" in file
    torch.save({"model": file}, "deit3.pth")
    ours = create_model(name, pretrained="deit3.pth", **SMALL)
    _assert_same_logits(ours, theirs)
    assert ours.load_report.counts()["loaded"] == len(file)
    _assert_every_key_has_one_fate(ours, file)


def test_ijepas_own_files_give_timms_tokens():
    name = "vit_huge_patch14_gap_224"
    theirs = _reference_timm(name, num_classes=0)
    encoder = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    doubled = {key: tensor * 2 for key, tensor in encoder.items()}
    content = {"encoder": encoder, "predictor": {"module.a": torch.ones(1)}, "target_encoder": doubled}
    torch.save({**content, "epoch": 300, "scaler": None}, "ijepa.pth.tar")
    ours = create_model(name, pretrained="ijepa.pth.tar", **{**SMALL, "num_classes": 0})
    _assert_same_logits(ours, theirs)
    assert "encoder was taken" in ours.load_report.notes[0]


def test_a_timm_tower_inside_open_clip_gives_timms_features():
    name = "vit_base_patch16_siglip_224"
    theirs = _reference_timm(name, num_classes=0)
    file = {f"visual.trunk.{key}": tensor for key, tensor in theirs.state_dict().items()}
    text = {"text.token_embedding.weight": torch.ones(5, 8), "logit_bias": torch.ones([])}
    save_file({**file, **text}, "open_clip.safetensors")
    ours = create_model(name, pretrained="open_clip.safetensors", **{**SMALL, "num_classes": 0})
    _assert_same_logits(ours, theirs)
    assert set(ours.load_report.of("dropped")) == set(text)
    _assert_every_key_has_one_fate(ours, [*file, *text])


# ---- names, tags, files that do not fit -------------------------------------------------------------------


def test_another_architectures_weights_are_refused_with_the_share_and_names_from_both_sides():
    resnet = timm.create_model("resnet18", num_classes=10)
    torch.save(resnet.state_dict(), "resnet.pth")
    message = (
        r"^resnet\.pth: 100 % of the encoder would be fresh, more than model\.max_fresh 0\.1 allows\. The "
        r"model wants cls_token, pos_embed, .*; the weights have conv1\.weight, .*Check model\.name"
    )
    with pytest.raises(ModelFileError, match=message):
        create_model(NAME, pretrained="resnet.pth", **SMALL)


def test_another_width_is_refused_with_the_key_and_both_shapes(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    message = (
        r"^weights\.pth does not fit the model: cls_token is \(1, 1, 48\), not \(1, 1, 24\);.* "
        r"and \d+ more\. Is it another architecture\?"
    )
    with pytest.raises(ModelFileError, match=message):
        create_model(NAME, pretrained="weights.pth", **{**SMALL, "embed_dim": 24})


def test_more_blocks_than_the_file_has_need_a_higher_max_fresh(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    deeper = {**SMALL, "depth": 3}
    message = r"30 % of the encoder would be fresh.*wants blocks\.2\.norm1\.weight.*or raise model\.max_fresh"
    with pytest.raises(ModelFileError, match=message):
        create_model(NAME, pretrained="weights.pth", **deeper)
    ours = create_model(NAME, pretrained="weights.pth", max_fresh=0.6, **deeper)
    fresh = ours.load_report.of("fresh")
    assert fresh
    assert all(key.startswith("blocks.2.") for key in fresh)
    assert ours.load_report.fresh_share == pytest.approx(0.297, abs=1e-3)
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    _assert_every_key_has_one_fate(ours, theirs.state_dict())
    with pytest.raises(ConfigError, match=r"model\.max_fresh must be at least 0 and at most 1; got 1\.5"):
        create_model(NAME, pretrained="weights.pth", max_fresh=1.5, **deeper)


def test_fewer_blocks_than_the_file_has_drop_the_last_ones(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    ours = create_model(NAME, pretrained="weights.pth", **{**SMALL, "depth": 1})
    dropped = ours.load_report.of("dropped")
    assert len(dropped) == 12
    assert all(key.startswith("blocks.1.") for key in dropped)
    _assert_every_key_has_one_fate(ours, theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        (NAME, "nowhere", r"has no tag 'nowhere'\. It has augreg_in21k, augreg_in21k_ft_in1k\."),
        (NAME, "augreg_in21", r"no tag 'augreg_in21'\. Did you mean `augreg_in21k`\?"),
        (NAME, "nowhere/weights", r"^model\.pretrained nowhere/weights: there is no such file or folder\."),
        (NAME, "nowhere.pth", r"^model\.pretrained nowhere\.pth: there is no such file or folder\."),
        (NAME, "nowhere.pth.tar", r"^model\.pretrained nowhere\.pth\.tar: there is no such file"),
        (NAME, "weights.h5", r"weights\.h5 does not look like a weights file: known endings are"),
        (NAME, "nothing", r"^model\.pretrained nothing is a folder without a model\.safetensors"),
        (NAME, "config", r"^config/config\.json names no architecture.*neither timm's nor transformers'"),
        (NAME, "program", r"^timm cannot build what program/config\.json describes: .*no_such_argument"),
        ("vit_pico_patch7_28", "nowhere", r"^model\.pretrained nowhere: there is no such file or folder\."),
        ("vit_tiny_patch16_22", "weights.pth", r"'vit_tiny_patch16_22' is not a known .*mean `vit_tiny_"),
        (f"{NAME}.nowhere", "weights.pth", r"has no tag 'nowhere'"),
        ("auto", "weights.pth", r"^model\.pretrained weights\.pth does not say which architecture it holds"),
        ("auto", None, r"model\.name auto takes the architecture of the weights: give model\.pretrained too"),
        ("vit_small_patch16_224", "run", r"holds another architecture than .*embed_dim is 48, not 384"),
        ("vit_base_patch16_siglip_224", "run", r"embed_dim is 48, not 768\. Use model\.name auto"),
    ],
    ids=str,
)
def test_names_that_lead_nowhere_are_refused(name, pretrained, message, theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    Path("weights.h5").write_bytes(b"\x89HDF")
    for folder in ("nothing", "config", "program", "run"):
        Path(folder).mkdir()
    Path("config/config.json").write_text("{}")
    settings = {
        "architecture": NAME,
        "num_classes": 10,
        "model_args": {"no_such_argument": 1},
        "pretrained_cfg": {},
    }
    Path("program/config.json").write_text(json.dumps(settings))
    _as_our_run(theirs, Path("run/model.safetensors"))
    with pytest.raises((ConfigError, ModelFileError), match=message) as refused:
        create_model(name, pretrained=pretrained)
    assert "\n" not in str(refused.value)


# ---- load: what --model takes -----------------------------------------------------------------------------


def test_load_takes_a_name_with_a_file():
    theirs = _reference_timm("test_vit", **{**dict.fromkeys(SIZES), "num_classes": 1000})
    save_file(theirs.state_dict(), "weights.safetensors")
    classifier = vit_cls.load("test_vit.r160_in1k=weights.safetensors")
    assert not classifier.training
    assert classifier.preprocess.img_size == (160, 160)
    assert classifier.preprocess.crop_pct == 0.95
    assert classifier.class_names[:2] == ["n01440764", "n01443537"]
    assert classifier.weights_licence == "apache-2.0"
    assert classifier.weights_source == "weights.safetensors (test_vit.r160_in1k)"
    _assert_same_logits(classifier.model, theirs, size=160)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator())
    with torch.inference_mode():
        normalised = (images / 255 - 0.5) / 0.5
        torch.testing.assert_close(classifier(images), theirs(normalised), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", r"no file or folder 'nowhere', and no architecture of that name.*name=path/to/weights"),
        (f"{NAME}=nowhere.pth", rf"--model {NAME}=nowhere\.pth: there is no such file or folder"),
        ("vit_tny=weights.pth", r"'vit_tny' is not a known architecture"),
        (f"{NAME}=weights.pth", r"weights\.pth does not fit the model: cls_token is \(1, 1, 48\)"),
        ("nothing", r"--model nothing is a folder without a model\.safetensors"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_paragraph_and_exit_2(model, message, theirs, capsys, image_root):
    torch.save(theirs.state_dict(), "weights.pth")
    Path("nothing").mkdir()
    with pytest.raises((ConfigError, ModelFileError), match=message):
        vit_cls.load(model)
    assert main(["evaluate", "--model", model, "--data", str(image_root / "val")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    paragraphs = [line for line in err.splitlines() if line.startswith("vit-cls: ")]
    assert len(paragraphs) == 1
    assert re.search(message.removeprefix("^"), paragraphs[0]), err
    assert "Traceback" not in err
