"""Which reduced precision a run takes, and that fp16 with a scaled loss trains as float32 does."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.training.runs import fit_tiny, record_of
from vit_cls.training.trainer import default_precision

HALF = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("available", "native", "arguments", "expected"),
    [
        (True, True, {}, "bf16-mixed"),
        (True, False, {}, "16-mixed"),
        (True, False, {"accelerator": "gpu"}, "16-mixed"),
        (True, True, {"accelerator": "cpu"}, "32-true"),
        (True, True, {"accelerator": CPUAccelerator()}, "32-true"),
        (False, False, {}, "32-true"),
        (True, True, {"plugins": HALF}, None),
        (True, True, {"plugins": [HALF]}, None),
        (True, True, {"strategy": SingleDeviceStrategy(precision_plugin=HALF)}, None),
    ],
    ids=str,
)
def test_auto_is_what_the_device_has(available, native, arguments, expected, monkeypatch):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert default_precision(arguments) == expected


class _Look(Callback):
    """The gradients that the optimiser steps by, and whether it takes them scaled."""

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.fused = optimizer.defaults["fused"]
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())


def test_fp16_steps_by_unscaled_clipped_gradients_and_says_so(image_root, tmp_path, caplog):
    looks, results = {}, {}
    caplog.set_level("INFO", "vit_cls")
    for name, plugins in (("32", None), ("16", [HALF])):
        looks[name] = _Look()
        trainer = {"plugins": plugins, "callbacks": [looks[name]], "gradient_clip_val": 0.5}
        model = {"drop_path_rate": 0.0}
        results[name] = fit_tiny(image_root, tmp_path / name, epochs=1, trainer=trainer, model=model)
    assert not looks["16"].fused
    assert looks["16"].norms == pytest.approx(looks["32"].norms, rel=0.02)
    assert max(looks["16"].norms) <= 0.5001
    row, other = results["16"].history[0], results["32"].history[0]
    assert row["train/loss"] == pytest.approx(other["train/loss"], rel=0.01)
    assert record_of(tmp_path / "16")["precision"] == "16-mixed"
    assert ", 16-mixed, " in caplog.text
