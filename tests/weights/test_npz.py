"""Google's .npz files give the logits of the weights in them, or one clear paragraph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import assert_every_key_has_one_fate
from tests.weights.timm_weights import NAME, SIZES, SMALL, assert_same_logits, random_images, reference_timm
from vit_cls import create_model
from vit_cls.errors import ModelFileError

pytestmark = pytest.mark.usefixtures("here", "one_thread")


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


@pytest.fixture
def theirs():
    return reference_timm()


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
    theirs = reference_timm(name, **settings)
    keys = _write_npz(theirs, **layout)
    timm_reads_it = reference_timm(name, seed=5, **settings)
    timm_reads_it.load_pretrained("weights.npz")
    assert_same_logits(timm_reads_it, theirs)  # the writer above is right
    ours = create_model(name, pretrained="weights.npz", **{**SMALL, **settings})
    assert_same_logits(ours, theirs)
    assert ours.load_report.of("fresh") == {}
    assert ours.load_report.of("dropped") == {}
    assert_every_key_has_one_fate(ours, keys)


def test_the_classes_of_an_npz_are_kept_where_no_number_is_asked_for(theirs):
    _write_npz(theirs, layout="augreg")
    ours = create_model(NAME, pretrained="weights.npz", **SIZES)
    assert ours.config.num_classes == 10
    assert_same_logits(ours, theirs)


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
    assert_every_key_has_one_fate(ours, [])


def test_classes_and_size_of_an_npz_can_change(theirs):
    _write_npz(theirs, layout="augreg")
    target = reference_timm(img_size=48)
    target.load_pretrained("weights.npz")
    ours = create_model(NAME, pretrained="weights.npz", **{**SMALL, "img_size": 48})
    assert_same_logits(ours, target, size=48)
    fewer = create_model(NAME, pretrained="weights.npz", **{**SMALL, "num_classes": 4})
    note = "not the checkpoint's: 10 -> 4 classes"
    assert fewer.load_report.of("fresh") == {"head.weight": note, "head.bias": note}
    with torch.inference_mode():
        expected = theirs.forward_features(random_images())
        torch.testing.assert_close(fewer.eval().encode(random_images()), expected, rtol=0, atol=1e-5)
    assert_every_key_has_one_fate(fewer, [])


def test_the_text_tower_in_an_npz_is_dropped():
    name, settings, layout = NPZ["siglip"]
    theirs = reference_timm(name, **settings)
    arrays = _reference_google_npz(theirs.state_dict(), heads=3, **layout)
    text = {"params/txt/head/bias": np.ones(4, np.float32), "params/t": np.ones(1, np.float32)}
    np.savez("weights.npz", **arrays, **text)
    ours = create_model(name, pretrained="weights.npz", **{**SMALL, **settings})
    assert_same_logits(ours, theirs)
    assert set(ours.load_report.of("dropped")) == set(text)
    assert_every_key_has_one_fate(ours, [*arrays, *text])


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
