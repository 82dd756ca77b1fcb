"""Every format that weights come in gives the same numbers as timm, or one clear paragraph."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn

import vit_cls
from tests.models import assert_every_key_has_one_fate
from tests.weights.timm_weights import NAME, SIZES, SMALL, assert_same_logits, reference_timm
from vit_cls import create_model
from vit_cls.cli import main
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import CHECKPOINT_KEY, save_classifier
from vit_cls.weights.factory import create_classifier

pytestmark = pytest.mark.usefixtures("here", "one_thread")
CLASSES = list("abcdefghij")


@pytest.fixture
def theirs():
    """A tiny model of timm's with 10 classes."""
    return reference_timm()


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
    assert_same_logits(ours, theirs)
    assert ours.load_report.counts() == {"loaded": 32, "resized": 0, "moved": 0, "dropped": 0, "fresh": 0}
    assert ours.load_report.fresh_share == 0
    assert_every_key_has_one_fate(ours, theirs.state_dict())


def test_the_choice_of_averaged_weights_is_in_the_notes(theirs):
    WRITERS["average.pth"](theirs, Path("average.pth"))
    notes = create_model(NAME, pretrained="average.pth", **SMALL).load_report.notes
    assert notes == ("the file holds state_dict_ema, state_dict; state_dict_ema was taken",)


@pytest.mark.parametrize("path", ["run/model.safetensors", "run/epoch.ckpt", "run"])
def test_our_own_files_say_their_architecture_by_themselves(path, theirs):
    Path("run").mkdir()
    (_as_our_checkpoint if path.endswith("ckpt") else _as_our_run)(
        theirs, Path("run/epoch.ckpt" if path.endswith("ckpt") else "run/model.safetensors")
    )
    ours = create_model("auto", pretrained=path)
    assert_same_logits(ours, theirs)
    assert ours.load_report.class_names == tuple(CLASSES)
    assert create_classifier("auto", pretrained=path).class_names == CLASSES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(dtype, theirs):
    half = {key: tensor.to(dtype) for key, tensor in theirs.state_dict().items()}
    torch.save(half, "half.pth")
    ours = create_model(NAME, pretrained="half.pth", **SMALL)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    theirs.load_state_dict(half)
    assert_same_logits(ours, theirs)


def test_another_image_and_patch_size_are_resized_as_timm_does_it(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    for img_size, patch_size in ((48, 8), (32, 4), (64, 16)):
        target = reference_timm(img_size=img_size, patch_size=patch_size)
        target.load_state_dict(checkpoint_filter_fn(dict(theirs.state_dict()), target))
        sizes = {**SMALL, "img_size": img_size, "patch_size": patch_size}
        ours = create_model(NAME, pretrained="weights.pth", **sizes)
        assert_same_logits(ours, target, size=img_size)
        grid = img_size // patch_size
        resized = ours.load_report.of("resized")
        if grid != 4:
            assert resized["pos_embed"] == f"4x4 -> {grid}x{grid} patches"
        if patch_size != 8:
            assert resized["patch_embed.proj.weight"] == f"8x8 pixels -> {patch_size}x{patch_size} pixels"
        assert_every_key_has_one_fate(ours, theirs.state_dict())


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


def test_the_classes_of_a_file_are_kept_where_no_number_is_asked_for(theirs):
    torch.save(theirs.state_dict(), "weights.pth")
    ours = create_model(NAME, pretrained="weights.pth", **SIZES)
    assert ours.config.num_classes == 10
    assert_same_logits(ours, theirs)


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
    theirs = reference_timm(name)
    labels = {"label_names": CLASSES, "pretrained_cfg": {"license": "cc-by-nc-4.0", "tag": None}}
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8, "interpolation": "bilinear"}
    save_for_hf(theirs, "folder", model_config=labels, data_config=data, safe_serialization=True)
    ours = create_model("auto", pretrained="folder")
    assert_same_logits(ours, theirs)
    assert ours.load_report.counts()["loaded"] == len(ours.state_dict())
    assert_every_key_has_one_fate(ours, theirs.state_dict())
    classifier = vit_cls.load("folder")
    assert_same_logits(classifier.model, theirs)
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
    theirs = reference_timm(name)
    ours = create_model(name, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    save_classifier(ImageClassifier(ours, Preprocess((32, 32)), CLASSES), "model.safetensors")
    save_for_hf(theirs, "folder", safe_serialization=True)
    target = timm.create_model("local-dir:folder", pretrained=True, img_size=48, num_classes=10).eval()
    for pretrained in ("model.safetensors", "folder"):
        larger = create_model("auto", pretrained=pretrained, img_size=48)
        assert_same_logits(larger, target, size=48)
        table = larger.load_report.of("resized")["blocks.0.attn.relative_position_bias_table"]
        assert table == "52x3 -> 124x3"


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


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        (NAME, "nowhere", r"has no tag 'nowhere'\. It has augreg_in21k, augreg_in21k_ft_in1k\."),
        ("resnet50", None, r"'resnet50' is an architecture of timm, but not a Vision Transformer"),
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
    theirs = reference_timm("test_vit", **{**dict.fromkeys(SIZES), "num_classes": 1000})
    save_file(theirs.state_dict(), "weights.safetensors")
    classifier = vit_cls.load("test_vit.r160_in1k=weights.safetensors")
    assert not classifier.training
    assert classifier.preprocess.img_size == (160, 160)
    assert classifier.preprocess.crop_pct == 0.95
    assert classifier.class_names[:2] == ["n01440764", "n01443537"]
    assert classifier.weights_licence == "apache-2.0"
    assert classifier.weights_source == "weights.safetensors (test_vit.r160_in1k)"
    assert_same_logits(classifier.model, theirs, size=160)
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
