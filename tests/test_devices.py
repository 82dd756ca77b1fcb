"""What holds on every device: run here on the CPU, and on a GPU where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import POOLS, make_vit, perturbed
from tests.training.runs import StopAfter, fit_tiny, record_of, run_tiny, same_weights
from vit_cls.data.dataset import FolderSource
from vit_cls.data.index import index_folder
from vit_cls.data.mixing import MixOptions, mix_batch
from vit_cls.evaluation.predictions import predict_index
from vit_cls.inference import InferenceConfig
from vit_cls.training.ema import warm_decay
from vit_cls.weights.bundle import load_classifier

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
MIXES = {
    "mixup": MixOptions(mixup_alpha=0.8),
    "cutmix": MixOptions(cutmix_alpha=1.0),
    "erasing": MixOptions(erase_prob=0.5),
    "all": MixOptions(mixup_alpha=0.2, cutmix_alpha=1.0, mix_prob=0.8, erase_prob=0.25),
}
BACKENDS = {"cpu": "eager", "cuda": "inductor"}
"""What compiles: on a CPU inductor would run a C++ compiler."""


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """With the settings of torch as they were, afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def _trainer(device, **more):
    return {"accelerator": ACCELERATORS[device], "log_every_n_steps": 1000, **more}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [1, 7, 32])
def test_mixing_on_the_device_is_mixing_on_the_cpu(mix, size, device, generator):
    images = torch.randn(size, 3, 24, 40, generator=generator)
    targets = torch.randint(5, (size,), generator=generator)
    expected, shares = mix_batch(images.double(), targets, MIXES[mix], key=11)
    mixed, found = mix_batch(images.to(device), targets.to(device), MIXES[mix], key=11)
    assert mixed.device.type == found.share.device.type == device
    assert [torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, shares, strict=True)] == [True] * 3
    torch.testing.assert_close(mixed.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mixed.cpu() == 0, expected == 0)  # the same pixels are erased


@pytest.mark.parametrize("pool", POOLS)
def test_a_pooling_gives_on_the_device_what_it_gives_in_float64_on_the_cpu(pool, device, tiny, generator):
    model = perturbed(make_vit({**tiny, "embed_dim": 32}, pool=pool))
    images = torch.randn(3, 3, 16, 16, generator=generator)
    with torch.inference_mode():
        expected = model.double()(images.double())
        model = model.float().to(device)
        logits = model(images.to(device))
        with torch.autocast(device, torch.bfloat16):
            short = model(images.to(device))
    scale = float(expected.abs().max())  # seen on a CPU: 1.3e-6 and 1.4e-2 of it
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(short.cpu().double(), expected, rtol=0, atol=0.05 * scale)


def test_compiled_blocks_are_few_graphs_and_give_the_same_numbers_and_gradients(device, tiny, generator):
    torch.compiler.reset()
    sizes, depth = {"cpu": ((4, 3), 1), "cuda": ((8, 5, 3), 3)}[
        device
    ]  # tests/model/test_compile.py has more
    model = perturbed(make_vit(tiny, depth=depth)).to(device)
    batches = [torch.randn(size, 3, 16, 16, generator=generator).to(device) for size in sizes]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def all_of_it():
        logits = [model(images) for images in batches]
        gradients = torch.autograd.grad(logits[1].square().mean(), parameters)
        with torch.inference_mode():
            return [*logits, *gradients, *(model(images) for images in batches)]

    expected = all_of_it()
    model.compile_encoder(BACKENDS[device])
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    found = all_of_it()
    graphs = frames["unique_graphs"]
    assert 2 <= graphs <= 8  # first and last block, with gradients and without, of one size and of any
    rtol, atol = {"cpu": (1e-4, 1e-5), "cuda": (1e-3, 1e-4)}[device]  # inductor adds up in another order
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    all_of_it()
    assert frames["unique_graphs"] == graphs
    torch.compiler.reset()


def test_a_resumed_run_ends_in_the_weights_of_the_whole_one(device, image_root, tmp_path):
    """With Lightning's ``deterministic``: attention adds gradients up in any order on a GPU otherwise."""
    mix = {"mix": MIXES["all"]}
    settings = {"epochs": 3, "optim": {"ema_decay": 0.9}, "data": mix, "model": {"drop_rate": 0.1}}
    trainer = _trainer(device, deterministic=True)
    whole = fit_tiny(image_root, tmp_path / "whole", trainer=trainer, **settings)
    fit_tiny(image_root, tmp_path / "cut", trainer={**trainer, "callbacks": [StopAfter(1)]}, **settings)
    cut = fit_tiny(image_root, tmp_path / "cut", trainer=trainer, resume="auto", **settings)
    states = [
        torch.load(run.folder.last_checkpoint, weights_only=True, map_location="cpu")["state_dict"]
        for run in (whole, cut)
    ]
    assert same_weights(*states)
    assert whole.folder.model_file.read_bytes()[-1000:] == cut.folder.model_file.read_bytes()[-1000:]
    assert record_of(tmp_path / "cut")["device"].startswith(device)


def test_the_average_of_the_weights_is_that_of_the_formula_and_what_was_validated(
    device, image_root, tmp_path
):
    class Follow(Callback):
        def on_train_start(self, trainer, pl_module):
            self.step, self.expected = 0, self._weights(pl_module.classifier)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.step += 1
            decay = warm_decay(0.7, self.step)
            for mine, now in zip(self.expected, self._weights(pl_module.classifier), strict=True):
                mine.mul_(decay).add_(now, alpha=1 - decay)
            self.found = self._weights(pl_module.ema.classifier)

        def _weights(self, classifier):
            return [p.detach().cpu().double() for p in classifier.model.parameters()]

    follow = Follow()
    trainer = _trainer(device, callbacks=[follow], precision="32-true")
    result, data = run_tiny(image_root, tmp_path / "run", optim={"ema_decay": 0.7}, trainer=trainer)
    assert follow.step == 10
    for ours, theirs in zip(follow.found, follow.expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    predictions = _predict(result, data.val_source, device, "32")
    assert (predictions.probs.argmax(axis=1) == data.val_source.index.labels).sum() == result.correct


def _predict(result, source, device, precision):
    classifier = load_classifier(result.folder.model_file)
    config = InferenceConfig(device, precision, batch_size=5, num_workers=0)
    return predict_index(classifier, source, config)


def test_a_model_predicts_in_bf16_what_it_predicts_in_fp32(device, image_root, tmp_path):
    result = fit_tiny(image_root, tmp_path / "run", epochs=6, trainer=_trainer(device))
    source = FolderSource(index_folder(image_root / "train"))
    long, short = (_predict(result, source, device, precision) for precision in ("32", "bf16"))
    changed = (long.probs.argmax(axis=1) != short.probs.argmax(axis=1)).sum()
    assert abs(long.probs - short.probs).max() < 0.05
    assert abs(long.probs - short.probs).max() > 0  # it was another computation
    assert changed <= 1  # of 24


class _Reads(TorchDispatchMode):
    """Copies of a value to Python, each of which would wait for a GPU."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            type(self).reads += 1
        return func(*args, **(kwargs or {}))


class _NoWait(Callback):
    """On a GPU a step that waits is an error; on a CPU, reads before the optimiser's step are counted."""

    def __init__(self, device):
        self.device, self.steps, self.reads = device, 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")  # the first builds metrics
        else:
            _Reads.reads, self.mode = 0, contextlib.ExitStack()
            self.mode.enter_context(_Reads())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reads += _Reads.reads

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.mode.close()


def test_no_step_waits_for_the_device_with_everything_switched_on(device, image_root, tmp_path):
    no_wait, epochs = _NoWait(device), {"cpu": 2, "cuda": 11}[device]
    trainer = _trainer(device, callbacks=[no_wait], check_val_every_n_epoch=epochs, gradient_clip_val=0.1)
    settings = {"optim": {"ema_decay": 0.9, "loss": "bce"}, "data": {"mix": MIXES["all"]}}
    fit_tiny(image_root, tmp_path / "run", epochs=epochs, trainer=trainer, **settings)
    assert no_wait.steps == 5 * epochs
    assert no_wait.reads == 0
    assert record_of(tmp_path / "run")["device"].startswith(device)


def test_fp16_with_a_scaled_loss_trains_as_float32_and_is_resumed_with_its_scale(
    device, image_root, tmp_path
):
    def trainer(**more):
        half = MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device, init_scale=1024.0))
        return _trainer(device, plugins=[half], **more)

    settings = {"epochs": 2, "model": {"drop_path_rate": 0.0}}
    whole = fit_tiny(image_root, tmp_path / "whole", trainer=trainer(), **settings)
    exact = fit_tiny(
        image_root, tmp_path / "exact", trainer=_trainer(device, precision="32-true"), **settings
    )
    losses = [[row["train/loss"] for row in run.history] for run in (whole, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    cut = tmp_path / "cut"
    fit_tiny(image_root, cut, trainer=trainer(callbacks=[StopAfter(1)]), **settings)
    resumed = fit_tiny(image_root, cut, trainer=trainer(), resume="auto", **settings)
    states = [torch.load(run.folder.last_checkpoint, weights_only=True) for run in (whole, resumed)]
    assert states[0]["MixedPrecision"] == states[1]["MixedPrecision"]
    assert states[0]["MixedPrecision"]["scale"] == 1024.0
    assert states[0]["MixedPrecision"]["_growth_tracker"] == 10
