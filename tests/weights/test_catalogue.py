"""The catalogue: every plain ViT of timm, what each is, and what its published weights are."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import timm

from vit_cls.cli import main
from vit_cls.errors import ConfigError
from vit_cls.model.presets import PRESETS
from vit_cls.weights.catalogue import NORMALISATIONS, describe, find
from vit_cls.weights.timm_models import architectures, module_of, tags

# timm 1.0.31; a later one may have more. module: (architectures, tags)
AT_LEAST = {"vision_transformer": (163, 309), "deit": (16, 24), "eva": (65, 83), "beit": (7, 13)}


@pytest.fixture(scope="module")
def rows():
    """Every architecture, described once: some ten seconds."""
    return {name: describe(name) for name in find("*")}


def _tags(rows, module=None):
    """(architecture, tag's row) of every tag, of one module or of all."""
    return [
        (name, tag) for name, row in rows.items() for tag in row["tags"] if module in (None, module_of(name))
    ]


def test_every_architecture_of_four_modules_of_timm_is_described(rows):
    known = [name for module in AT_LEAST for name in timm.list_models(module=module)]
    assert set(known) <= rows.keys()
    found = Counter(module_of(name) for name in rows)
    for module, (count, _) in AT_LEAST.items():
        assert found[module] >= count
    assert rows.keys() - set(known) == {name for name in PRESETS if name not in architectures()}
    assert len(rows) == len(find("*"))


def test_every_tag_of_timm_is_described(rows):
    known = [
        name
        for module in AT_LEAST
        for name in timm.list_models(module=module, pretrained=True, include_tags=True)
    ]
    described = [f"{name}.{tag['tag']}" for name, tag in _tags(rows)]
    assert sorted(described) == sorted(known) == sorted(tags())
    for module, (_, count) in AT_LEAST.items():
        assert len(_tags(rows, module)) >= count


def test_native_blocks_cover_nine_of_ten_tags_of_plain_vits(rows):
    native = [name for name, _ in _tags(rows, "vision_transformer") if rows[name]["kind"] == "native"]
    assert len(native) >= 276
    assert {row["kind"] for row in rows.values()} == {"native", "adapter"}
    assert {rows[name]["kind"] for name in PRESETS} == {"native"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_base_patch16_224", 86_567_656),
        ("vit_tiny_patch16_224", 5_717_416),
        ("deit_base_distilled_patch16_224", 87_338_192),
    ],
)
def test_parameters_are_those_that_timm_publishes(name, parameters, rows):
    assert rows[name]["parameters"] == parameters


def test_parameters_of_our_own_presets_are_counted_by_hand(rows):
    dim, depth, patch, tokens, classes = 96, 4, 7 * 7 * 3, 17, 1000
    block = 12 * dim**2 + 13 * dim  # qkv, proj, two layers of the MLP, two norms
    rest = dim * (patch + 1) + dim * (tokens + 1) + 2 * dim + classes * (dim + 1)
    assert rows["vit_pico_patch7_28"]["parameters"] == depth * block + rest
    assert rows["vit_pico_patch7_28"]["tags"] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224", {"tokens": 197, "pool": "cls", "reg_tokens": 0, "embed_dim": 768}),
        (
            "vit_base_patch14_reg4_dinov2",
            {"tokens": 1374, "reg_tokens": 4, "img_size": 518, "patch_size": 14},
        ),
        ("vit_base_patch16_siglip_224", {"tokens": 196, "pool": "map", "class_token": False}),
        ("deit_tiny_distilled_patch16_224", {"kind": "adapter", "pool": "distilled", "tokens": 198}),
        ("vit_small_patch16_dinov3", {"kind": "adapter", "tokens": 261, "reg_tokens": 4, "num_heads": 6}),
        ("beit_base_patch16_224", {"kind": "adapter", "pool": "gap", "depth": 12, "class_token": True}),
    ],
)
def test_an_architecture_says_what_it_is_made_of(name, expected, rows):
    assert {key: rows[name][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("vit_base_patch14_dinov2", "lvd142m", {"head": "headless", "num_classes": 0, "img_size": 518}),
        (
            "vit_base_patch16_clip_224",
            "openai",
            {"head": "projection", "num_classes": 512, "normalisation": "clip", "quick_gelu": True},
        ),
        ("vit_base_patch16_clip_224", "openai_ft_in1k", {"head": "classes", "quick_gelu": False}),
        (
            "vit_base_patch16_224",
            "augreg2_in21k_ft_in1k",
            {"head": "classes", "num_classes": 1000, "normalisation": "0.5", "licence": "apache-2.0"},
        ),
        ("vit_base_patch16_224", "augreg_in21k", {"head": "classes", "num_classes": 21_843}),
        (
            "vit_base_patch16_224",
            "mae",
            {"head": "headless", "licence": "cc-by-nc-4.0", "non_commercial": True},
        ),
        ("vit_base_patch16_siglip_224", "webli", {"head": "headless", "crop_mode": "center"}),
        ("deit3_base_patch16_224", "fb_in1k", {"head": "classes", "normalisation": "imagenet"}),
    ],
)
def test_a_tag_says_what_its_weights_are(name, tag, expected, rows):
    row = next(row for row in rows[name]["tags"] if row["tag"] == tag)
    assert {key: row[key] for key in expected} == expected


def test_the_default_tag_comes_first(rows):
    assert rows["vit_base_patch16_224"]["tags"][0]["tag"] == "augreg2_in21k_ft_in1k"
    assert rows["vit_large_patch14_clip_224"]["tags"][0]["tag"] == "laion2b_ft_in12k_in1k"
    assert rows["vit_large_patch14_clip_224"]["normalisation"] == "0.5"


def test_weights_are_of_four_normalisations_and_a_few_of_none_of_them(rows):
    found = Counter(tag["normalisation"] for _, tag in _tags(rows))
    assert found["0.5"] >= 190
    assert found["clip"] >= 130
    assert found["imagenet"] >= 95
    assert set(found) <= {*NORMALISATIONS.values(), "other"}
    assert {name for name, tag in _tags(rows) if tag["normalisation"] == "other"} == {
        "vit_7b_patch16_dinov3",
        "vit_large_patch16_dinov3",
        "vit_large_patch16_dinov3_qkvb",
    }


def test_quick_gelu_is_flagged_where_the_architecture_does_not_say_so(rows):
    quick = [(name, tag["tag"]) for name, tag in _tags(rows) if tag["quick_gelu"]]
    plain = [row for row in quick if "quickgelu" not in row[0]]
    assert len(plain) == 17
    assert {name for name, _ in quick if "quickgelu" in name} == {n for n in rows if "quickgelu" in n}
    assert ("vit_base_patch16_clip_224", "openai") in plain


def test_weights_that_allow_no_commercial_use_are_marked(rows):
    marked = Counter(tag["licence"] for _, tag in _tags(rows, "vision_transformer") if tag["non_commercial"])
    assert marked["cc-by-nc-4.0"] == 29
    assert set(marked) == {"cc-by-nc-4.0", "apple-amlr"}
    assert not any(tag["non_commercial"] for _, tag in _tags(rows) if tag["licence"] in ("apache-2.0", "mit"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("vit_base_patch16_224", ["vit_base_patch16_224"]),
        ("vit_pico_*28", ["vit_pico_patch7_28", "vit_pico_patch4_28"]),
        ("vit_base_patch16_224.mae", ["vit_base_patch16_224"]),
        ("vit_*_patch14_reg4_dinov2.lvd142m", [f"vit_{s}_patch14_reg4_dinov2" for s in ("base", "giant")]),
    ],
)
def test_a_pattern_finds_names_and_tags(pattern, expected):
    found = find(pattern)
    assert found[: len(expected)] == expected
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("vit_tiny_patch16_223", "vit_tiny_patch16_224"),
        ("vit_pico_patch7_29", "vit_pico_patch7_28"),
        ("vit_base_patch16_224.augreg_in21", "vit_base_patch16_224.augreg_in21k"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(pattern, near):
    with pytest.raises(
        ConfigError, match=rf"no architecture matches .*Did you mean `{near}`\? `vit-cls models`"
    ):
        find(pattern)


def test_an_unknown_architecture_cannot_be_described():
    with pytest.raises(ConfigError, match=r"'vit_tiny_patch16_223' is not a known .*`vit_tiny_patch16_224`"):
        describe("vit_tiny_patch16_223")
    with pytest.raises(ConfigError, match=r"'resnet50' is an architecture of timm, but not a Vision Transf"):
        describe("resnet50")


def test_models_lists_what_a_pattern_finds(capsys):
    assert main(["models", "*clip_quickgelu*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "name kind params input patch tokens pool mean/std tags licence"
    assert len(lines) == 7 + 2
    assert re.match(
        r"vit_base_patch16_clip_quickgelu_224 +native +86\.2 M +224 +16 +197 +cls +clip +3", lines[1]
    )
    assert lines[-1].startswith("7 architectures, 17 tags with weights. native: our blocks")


def test_models_tells_all_about_one(capsys):
    assert main(["models", "vit_base_patch14_reg4_dinov2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vit_base_patch14_reg4_dinov2 (native): 86,582,")
    assert lines[1] == "1374 tokens (class token, 4 registers), width 768, 12 blocks of 12 heads, pool cls"
    assert " ".join(lines[3].split()) == "lvd142m 518 headless imagenet 1.0 center self-distilled apache-2.0"
    assert lines[4] == "Use: --model.name vit_base_patch14_reg4_dinov2.lvd142m --model.pretrained true"


def test_models_says_where_nothing_is_published_or_no_licence_stated(capsys):
    assert main(["models", "vit_pico_patch7_28"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no published weights"
    assert main(["models", "vit_base_patch16_224"]) == 0
    out = capsys.readouterr().out
    assert "None" not in out
    assert next(line for line in out.splitlines() if line.startswith("bamboo")).endswith("not stated")


def test_models_as_json_is_one_object_with_every_row(capsys):
    assert main(["models", "vit_base_patch16_clip_2*", "--json"]) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert [row["name"] for row in data["models"]] == find("vit_base_patch16_clip_2*")
    assert data["models"] == json.loads(json.dumps([describe(row["name"]) for row in data["models"]]))
