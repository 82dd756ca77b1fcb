"""A model file is data: what it says is checked by one schema, and opens, fetches and allocates nothing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import socket
import tracemalloc
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT

import vit_cls
from tests.models import make_vit
from vit_cls import create_model
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.adapter import AdapterConfig
from vit_cls.weights.archives import check_pickle
from vit_cls.weights.bundle import METADATA_KEY, load_classifier, save_classifier
from vit_cls.weights.digest import DIGEST_KEY
from vit_cls.weights.metadata import ADAPTED, NATIVE, PREPROCESS, TIMM_ARGUMENTS, check_metadata
from vit_cls.weights.timm_models import make_timm

ADAPTED_NAME = "eva02_tiny_patch14_224"


@pytest.fixture
def no_sockets(monkeypatch):
    """Every attempt to look a machine up or to reach it fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was opened: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def native(tiny, tmp_path):
    """A model file of ours, native."""
    classifier = ImageClassifier(make_vit(tiny, num_classes=3), Preprocess((16, 16)), ["a", "b", "c"])
    return save_classifier(classifier, tmp_path / "native.safetensors")


@pytest.fixture
def adapted(tmp_path):
    """A model file of ours, of an architecture that timm builds."""
    model = create_model(
        ADAPTED_NAME, depth=1, embed_dim=48, num_heads=2, img_size=28, num_classes=3, global_pool="avg"
    )
    classifier = ImageClassifier(model, Preprocess((28, 28)), ["a", "b", "c"])
    return save_classifier(classifier, tmp_path / "adapted.safetensors")


def metadata_of(path) -> dict:
    """What the file says."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


def with_changes(path, changes) -> str:
    """The same file, with values of its metadata changed; a dotted key reaches into a part."""
    metadata = metadata_of(path) | {"format_version": 1}  # of a time without digests
    for key, value in changes.items():
        *parts, last = key.split(".")
        place = metadata
        for part in parts:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    changed = path.with_name("changed.safetensors")
    save_file(load_file(path), changed, metadata={METADATA_KEY: json.dumps(metadata)})
    return str(changed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/weights.pth"}, "pretrained": True},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/weights.pth"}},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp/elsewhere"},
        {"features_only": True},
        {"norm_layer": "os.system"},
        {"device": "cuda"},
        {"depth": 10**9},
        {"embed_dim": "48"},
        {"mlp_ratio": float("inf")},
    ],
    ids=str,
)
def test_arguments_of_an_adapted_model_open_nothing(arguments, adapted, no_sockets):
    given = {f"architecture.arguments.{key}": value for key, value in arguments.items()}
    with pytest.raises(ModelFileError, match=r"does not describe a model: architecture.arguments"):
        vit_cls.load(with_changes(adapted, given))


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/tmp", "resnet18", "../x", 7, "a" * 1000])
def test_names_that_an_adapted_model_gives_are_timms_or_refused(name, adapted, no_sockets):
    with pytest.raises(ModelFileError, match=r"timm_architecture must be a word|not one of timm's"):
        vit_cls.load(with_changes(adapted, {"architecture.timm_architecture": name}))
    with pytest.raises(ConfigError, match="not one of timm's"):
        make_timm("hf-hub:evil/model")


def test_an_argument_that_a_file_may_not_hold_is_refused_from_python_too(no_sockets):
    with pytest.raises(ConfigError, match=r"cannot be built with checkpoint_path='x.pth'.*not allowed"):
        create_model(ADAPTED_NAME, checkpoint_path="x.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_args": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9"}}}, "pretrained_cfg_overlay"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model_args": {"features_only": True}}, "features_only"),
        ({"model_args": [1]}, "model_args must be settings by name"),
        ({"architecture": "hf-hub:evil/model"}, "not a known architecture"),
        ({"architecture": ["x"]}, "not a known architecture"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode must be one of"),
        ({"pretrained_cfg": {"std": [0.0, 1, 1]}}, "std must be"),
        ({"pretrained_cfg": {"label_names": "0123456789"}}, "label_names must be"),
        ({"pretrained_cfg": 3}, "pretrained_cfg must be settings by name"),
        ({"label_names": {"a": 1}}, "label_names must be"),
    ],
)
def test_a_folder_for_timm_opens_nothing_either(settings, message, tmp_path, no_sockets):
    told = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"tag": None}} | settings
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises((ModelFileError, ConfigError), match=message):
        create_model("auto", pretrained=tmp_path)


WRONG = {
    "format_version": ["1", 0, -1, None, [1], True],
    "architecture": [..., None, 3, [], "vit"],
    "architecture.depth": [10**9, 0, -1, "2", 2.0, None, True],
    "architecture.embed_dim": [10**9, 25, "24", [24]],
    "architecture.num_heads": [0, 10**9, None],
    "architecture.img_size": [10**9, [16, 16, 16], [16, -16], "16", [16, 10**9], [], 17],
    "architecture.patch_size": [0, -4, "4", 10**9],
    "architecture.num_classes": [4, -1, 10**12, "3", None],
    "architecture.pool": [None, 3, "token:99", "multicls:999999999", "cait:5000", "ep:" + "9" * 5000, ""],
    "architecture.mlp_ratio": [float("inf"), float("nan"), 0, -1, 1e30, "4"],
    "architecture.norm_eps": [float("nan"), -1.0, "x"],
    "architecture.act": ["os.system", None, []],
    "architecture.drop_path_rate": [1.0, -0.1, float("nan"), "auto"],
    "architecture.rope": [True],
    "preprocess": [..., None, [], "x"],
    "preprocess.img_size": [..., [17, 17], [16], 16, [10**9, 10**9]],
    "preprocess.mean": [[0.5] * 4, "abc", [float("nan")] * 3, [None] * 3, 0.5, [], [True] * 3],
    "preprocess.std": [[float("inf")] * 3, [0.0] * 3, [-1.0] * 3, [0.5] * 2, "abc", None],
    "preprocess.crop_pct": [0, -1, 2, float("nan"), "0.9", None],
    "preprocess.crop_mode": ["border", None, []],
    "preprocess.interpolation": ["lanczos", 3],
    "preprocess.background": [[256, 0, 0], [1, 2], "abc", [0.5, 0, 0]],
    "preprocess.more": [1],
    "class_names": [
        ...,
        "abc",
        [],
        ["a", "b"],
        ["a", "a", "b"],
        [1, 2, 3],
        {"a": 1},
        None,
        ["a", ["b"], "c"],
    ],
    "temperature": [0, -1, float("inf"), float("nan"), "1", None],
    "weights_licence": [3, ["mit"]],
    "weights_source": [{}],
    "own_poolings": [[], "x", {"a": 3}],
    "kept": ["both", 3],
}


@pytest.mark.parametrize("key", WRONG)
def test_nonsense_in_metadata_is_one_paragraph(key, native):
    for value in WRONG[key]:
        path = with_changes(native, {key: value})
        with pytest.raises(ModelFileError) as first:
            load_classifier(path)
        assert path in str(first.value), value
        assert len(str(first.value)) < 1000, value
        with pytest.raises((ModelFileError, ConfigError)):  # as weights to start from: no classifier is built
            create_model("auto", pretrained=path)


def test_metadata_that_never_ends_is_refused(native):
    deep = '{"format_version": 1, "architecture": ' + "[" * 100_000 + "]" * 100_000 + "}"
    endless = '{"format_version": 1' + "0" * 5000 + "}"
    for text in (deep, endless, "[1]", "3", "null", '"x"'):
        save_file(load_file(native), native, metadata={METADATA_KEY: text})
        with pytest.raises(ModelFileError, match="damaged metadata"):
            load_classifier(native)


def test_a_model_is_compared_with_the_file_before_it_takes_memory(native):
    """900 blocks of width 65,536 would take 185 TB."""
    path = with_changes(native, {"architecture.depth": 20, "architecture.embed_dim": 65_536})
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=r"by it \S+ is of shape .*65536.*, in the weights it is"):
        load_classifier(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_the_schema_has_every_field_and_timms_arguments_alone():
    assert NATIVE.keys() == {field.name for field in dataclasses.fields(ViTConfig)}
    assert ADAPTED.keys() == {field.name for field in dataclasses.fields(AdapterConfig)}
    assert PREPROCESS.keys() == {field.name for field in dataclasses.fields(Preprocess)}
    known = {name for kind in (TimmViT, Eva, Beit) for name in inspect.signature(kind).parameters}
    assert set(TIMM_ARGUMENTS) - known == {"strict_img_size", "use_naflex"}
    unsafe = {"device", "dtype", "embed_layer", "block_fn", "mlp_layer", "attn_layer"}
    assert known - set(TIMM_ARGUMENTS) == unsafe


def test_what_is_written_passes_the_schema(native, adapted):
    for path in (native, adapted):
        assert check_metadata(metadata_of(path), path) == metadata_of(path)
        assert vit_cls.load(path).class_names == ["a", "b", "c"]


def _in_a_checkpoint(tmp_path, **more):
    torch.manual_seed(0)
    config = ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=2)
    classifier = ImageClassifier(VisionTransformer(config), Preprocess((8, 8)), ["a", "b"])
    state = {f"classifier.model.{name}": value for name, value in classifier.model.state_dict().items()}
    content = {"state_dict": state, "vit_cls_metadata": {"format_version": 2, **classifier.to_metadata()}}
    torch.save({**content, DIGEST_KEY: "0", **more}, tmp_path / "made_up.ckpt")
    return tmp_path / "made_up.ckpt"


def _nested(times):
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def _itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"state_dict": {1: torch.zeros(1)}}, "tensors by name"),
        ({"state_dict": {"a": 1}}, "tensors by name"),
        ({"x": _nested(40)}, "stands for more than"),
        ({"x": _itself()}, "made up"),
        ({"x": torch.zeros(1).expand(10**12)}, "not the values for all of it"),
        ({}, "damaged"),
    ],
    ids=["names", "values", "nested", "endless", "expanded", "digest"],
)
def test_what_else_a_checkpoint_holds_takes_neither_time_nor_memory(more, told, tmp_path):
    with pytest.raises(ModelFileError, match=told):
        load_classifier(_in_a_checkpoint(tmp_path, **more))


def test_a_class_name_that_no_file_can_hold_is_refused(native):
    with safe_open(native, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    names = ["\ud800", *metadata["class_names"][1:]]
    with pytest.raises(ModelFileError, match="class_names"):
        check_metadata({**metadata, "class_names": names}, native)
    names[0] = "caf\udcff"  # of a folder whose name is not UTF-8
    assert check_metadata({**metadata, "class_names": names}, native)


def test_a_file_in_which_torch_would_read_another_pickle_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "sound.pth")
    check_pickle(tmp_path / "sound.pth")
    (tmp_path / "both.pth").write_bytes(b"\x80\x02}q\x00." + (tmp_path / "sound.pth").read_bytes())
    shutil.copy(tmp_path / "sound.pth", tmp_path / "decoy.pth")
    with zipfile.ZipFile(tmp_path / "decoy.pth", "a") as archive:
        archive.writestr("sound/0data.pkl", b"\x80\x02}q\x00.")
    for name in ("both.pth", "decoy.pth"):
        with pytest.raises(ModelFileError, match="several files in one"):
            check_pickle(tmp_path / name)
