"""Fine-tuning: what is trained, at which rate, from which weights; and what the run remembers of it."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

import vit_cls
from tests.training.runs import TINY, fit_tiny, record_of, same_weights, weights_of
from vit_cls import create_model
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.training.optim import Freezer, lr_table, make_optimizer, make_schedule, parameter_groups
from vit_cls.training.options import OptimOptions
from vit_cls.weights.bundle import read_metadata
from vit_cls.weights.families import FROM_SCRATCH_LICENCE, RECIPES, recipe_of
from vit_cls.weights.timm_models import tags


@pytest.fixture
def weights(tmp_path):
    """A file with the weights of a tiny model of five classes."""
    torch.manual_seed(1)
    model = create_model("vit_pico_patch7_28", num_classes=5, **TINY)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def _fit(root, run_dir, weights, *, model=None, **settings):
    return fit_tiny(root, run_dir, model={"pretrained": str(weights), **(model or {})}, **settings)


def _changed(before, after):
    return {key for key in before if key in after and not torch.equal(before[key], after[key])}


# --- learning rates


def _rates(model, **settings):
    """The groups, and the learning rate of each parameter by its name."""
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, lr=1.0, **settings)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    return groups, {name: rate[id(p)] for name, p in model.named_parameters()}


def test_layer_decay_is_in_the_learning_rate_of_each_group():
    model = create_model("vit_pico_patch7_28", depth=3, reg_tokens=2)
    groups, by_name = _rates(model, layer_decay=0.5)
    assert by_name["head.weight"] == by_name["norm.weight"] == 1.0
    assert by_name["blocks.2.mlp.fc1.weight"] == 0.5
    assert by_name["blocks.0.norm1.bias"] == 0.125
    for name in ("patch_embed.proj.weight", "cls_token", "reg_token", "pos_embed"):
        assert by_name[name] == 0.0625, name
    assert len(by_name) == sum(len(group["params"]) for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)  # Lightning's monitor needs that


def test_any_scheduler_honours_layer_decay():
    model = create_model("vit_pico_patch7_28", depth=2)
    optimizer = make_optimizer(model, OptimOptions(layer_decay=0.5), lr=0.8, fused=False)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
        make_schedule(optimizer, OptimOptions(), steps_per_epoch=5, total_steps=20),
    ]
    for scheduler in schedulers:
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert len(rates) == 4
        assert [b / a for a, b in pairwise(rates)] == pytest.approx([2.0] * 3)


def test_the_head_has_a_rate_of_its_own():
    model = create_model("vit_pico_patch7_28", depth=2, pool="map")
    _, by_name = _rates(model, head_lr_ratio=10.0)
    assert {r for name, r in by_name.items() if name.startswith(("head.", "attn_pool."))} == {10.0}
    assert {r for name, r in by_name.items() if not name.startswith(("head.", "attn_pool."))} == {1.0}


def test_the_table_shows_every_rate():
    model = create_model("vit_pico_patch7_28", depth=2)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, lr=1e-3, layer_decay=0.5)
    lines = lr_table(groups).splitlines()
    assert len(lines) == 1 + len(groups)
    assert lines[1].split() == ["after", "blocks", "decayed", "0.001", "0.1", "96,000"]
    assert "embedding not decayed" in lines[-1]


# --- freezing


def test_a_frozen_backbone_is_not_optimised_and_has_no_drop_path():
    model = create_model("vit_pico_patch7_28", drop_path_rate=0.5, drop_rate=0.5, pos_drop_rate=0.5).train()
    freezer = Freezer(model, "backbone")
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert sum(p.numel() for g in groups for p in g["params"]) == 97_000
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.forward_features(images), model.forward_features(images))
    assert not torch.equal(model(images), model(images))  # the head's own dropout stays
    model.train()
    freezer.set_eval()
    assert torch.equal(model.forward_features(images), model.forward_features(images))


def test_the_first_blocks_can_be_frozen():
    model = create_model("vit_pico_patch7_28", depth=3, drop_path_rate=0.5, pos_embed="sincos2d").train()
    Freezer(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"2"}
    assert not model.blocks[1].drop_path1.training
    assert model.blocks[2].drop_path1.training


def test_more_frozen_blocks_than_there_are_is_refused(image_root, tmp_path, weights):
    with pytest.raises(ConfigError, match=r"optim.freeze is 3, but the model has 2 blocks"):
        _fit(image_root, tmp_path / "run", weights, optim={"freeze": 3})
    with pytest.raises(ConfigError, match=r"head_first_epochs must be fewer than the run's; got 2 of 2"):
        _fit(image_root, tmp_path / "run", weights, optim={"head_first_epochs": 2})
    assert not (tmp_path / "run").exists()


def test_a_linear_probe_trains_the_head_alone(image_root, tmp_path, weights):
    _fit(image_root, tmp_path / "run", weights, optim={"freeze": "backbone"}, model={"drop_path_rate": 0.5})
    before, after = load_file(weights), weights_of(tmp_path / "run")
    assert _changed(before, after) == {"head.weight", "head.bias"}
    record = record_of(tmp_path / "run")
    assert record["optim"]["freeze"] == "backbone"


class _Watch(Callback):
    """Which parameters have a gradient in each epoch."""

    def __init__(self):
        self.seen = {}
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.classifier.model.named_parameters()
        self.seen[trainer.current_epoch] = {name.split(".")[0] for name, p in named if p.grad is not None}
        self.rates.append((trainer.current_epoch, max(group["lr"] for group in optimizer.param_groups)))


def test_the_head_is_trained_first_and_then_all(image_root, tmp_path, weights):
    watch = _Watch()
    optim = {"head_first_epochs": 2, "head_first_lr": 0.05, "lr": 1e-3, "warmup_epochs": 0}
    _fit(image_root, tmp_path / "run", weights, epochs=4, optim=optim, trainer={"callbacks": [watch]})
    assert watch.seen[0] == watch.seen[1] == {"head"}
    assert watch.seen[2] == watch.seen[3] >= {"head", "blocks", "patch_embed", "cls_token", "pos_embed"}
    first = [rate for epoch, rate in watch.rates if epoch < 2]
    then = [rate for epoch, rate in watch.rates if epoch >= 2]
    assert max(first) == pytest.approx(0.05)
    assert then[0] == max(then) == pytest.approx(1e-3)
    assert then == sorted(then, reverse=True)


class _CrashAt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("stop here")


def test_a_run_resumed_in_either_stage_ends_with_the_same_weights(image_root, tmp_path, weights):
    optim = {"head_first_epochs": 2, "layer_decay": 0.7}
    _fit(image_root, tmp_path / "whole", weights, epochs=4, optim=optim)
    for stop in (1, 3):
        run = tmp_path / f"stopped_{stop}"
        with pytest.raises(RuntimeError, match="stop here"):
            _fit(image_root, run, weights, epochs=4, optim=optim, trainer={"callbacks": [_CrashAt(stop)]})
        _fit(image_root, None, weights, epochs=4, optim=optim, resume=str(run))
        assert same_weights(weights_of(tmp_path / "whole"), weights_of(run))


# --- what the run remembers


def test_the_run_starts_from_the_weights_and_says_so(image_root, tmp_path, weights, caplog):
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        _fit(image_root, tmp_path / "run", weights, epochs=1, optim={"lr": 1e-9, "layer_decay": 0.5})
    before, after = load_file(weights), weights_of(tmp_path / "run")
    for key in ("blocks.1.mlp.fc2.weight", "pos_embed"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    report = record_of(tmp_path / "run")["model"]["load_report"]
    assert report["counts"]["loaded"] == len(before) - 2
    assert (
        report["changed"]["fresh"]["head.weight"] == "not the checkpoint's: the checkpoint's 5 outputs have "
        "no known class names"
    )
    assert "2 fresh" in caplog.text
    assert "block 0 decayed" in caplog.text
    assert "licence of the weights" in caplog.text


def test_a_run_can_start_from_a_run_and_keeps_its_licence_and_head(image_root, tmp_path, weights):
    _fit(image_root, tmp_path / "first", weights, epochs=1)
    path = tmp_path / "first/model.safetensors"
    metadata = read_metadata(path)
    assert metadata["weights_source"] == str(weights)
    assert metadata["weights_licence"] == "not stated by the source of the weights"
    model = {"name": "auto", "pretrained": str(tmp_path / "first"), **dict.fromkeys(TINY)}
    _fit(image_root, tmp_path / "second", weights, epochs=1, model=model, optim={"lr": 1e-9})
    first, second = load_file(path), weights_of(tmp_path / "second")
    torch.testing.assert_close(second["head.weight"], first["head.weight"], rtol=0, atol=1e-6)
    record = record_of(tmp_path / "second")
    assert record["model"]["weights_licence"] == "not stated by the source of the weights"
    assert record["model"]["load_report"]["counts"]["fresh"] == 0


def test_a_tag_gives_preprocessing_licence_and_drop_path_to_the_run(image_root, tmp_path, caplog):
    torch.manual_seed(0)
    name = "vit_base_patch32_clip_224"
    small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    save_file(create_model(name, num_classes=512, **small).state_dict(), tmp_path / "clip.safetensors")
    model = {
        "name": f"{name}.metaclip_400m",
        "pretrained": str(tmp_path / "clip.safetensors"),
        "patch_size": None,
    }
    model |= {**small, "drop_path_rate": "auto"}
    optim = {"lr": None, "base_lr_per_256_images": "auto", "layer_decay": "auto"}
    _fit(image_root, tmp_path / "run", None, epochs=1, model=model, optim=optim)
    record = record_of(tmp_path / "run")
    assert record["model"]["preprocess"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert record["model"]["weights_licence"] == "cc-by-nc-4.0"
    assert record["optim"]["layer_decay"] == 0.7
    assert record["optim"]["recipe"] == "image and text contrastive"
    assert record["optim"]["peak_lr"] == pytest.approx(7.5e-5 * 5 / 256)
    assert record["identity"]["architecture"]["act"] == "quick_gelu"
    assert record["identity"]["architecture"]["drop_path_rate"] == 0.1
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert any("cc-by-nc-4.0, which does not allow commercial use" in text for text in warnings)
    classifier = vit_cls.load(tmp_path / "run")
    assert classifier.weights_licence == "cc-by-nc-4.0"
    assert classifier.preprocess.mean[0] == 0.48145466


def test_fresh_weights_have_a_licence_of_their_own(image_root, tmp_path):
    _fit(image_root, tmp_path / "run", None, epochs=1, model={"pretrained": None})
    assert read_metadata(tmp_path / "run/model.safetensors")["weights_licence"] == FROM_SCRATCH_LICENCE


def test_a_resumed_run_does_without_the_weights_it_began_with(image_root, tmp_path, weights):
    run = tmp_path / "run"
    _fit(image_root, run, weights, epochs=1)
    weights.unlink()
    _fit(image_root, None, weights, epochs=2, resume=str(run))
    record = record_of(run)
    assert record["model"]["load_report"]["counts"]["loaded"] > 20


def test_weights_that_do_not_fit_leave_no_run_behind(image_root, tmp_path, weights):
    with pytest.raises(ModelFileError, match=r"does not fit the model"):
        _fit(image_root, tmp_path / "run", weights, model={"embed_dim": 48})
    with pytest.raises(ModelFileError, match=r"nowhere.pth: there is no such file"):
        _fit(image_root, tmp_path / "run", tmp_path / "nowhere.pth")
    assert not (tmp_path / "run").exists()


def test_every_published_tag_has_a_recipe():
    families = {recipe_of(tag).family for tag in tags()}
    assert families == {recipe.family for _, recipe in RECIPES}
    expected = {
        "vit_base_patch16_224.augreg2_in21k_ft_in1k": "supervised",
        "vit_base_patch16_224.mae": "masked image modelling",
        "vit_base_patch16_224.dino": "self-distilled",
        "vit_small_patch14_reg4_dinov2.lvd142m": "self-distilled",
        "vit_so400m_patch14_siglip_378.webli": "image and text contrastive",
        "vit_base_patch16_clip_224.laion2b_ft_in12k_in1k": "image and text contrastive",
        "deit3_base_patch16_224.fb_in22k_ft_in1k": "supervised",
        "beit_base_patch16_224.in22k_ft_in22k_in1k": "masked image modelling",
        "vit_small_patch16_dinov3.lvd1689m": "self-distilled",
    }
    assert {tag: recipe_of(tag).family for tag in expected} == expected
