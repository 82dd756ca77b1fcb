"""The progress bar does not make the device wait: it reads values once a second, and after a validation."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.runs import fit_tiny
from vit_cls.training import guards, progress


class CountReads(TorchDispatchMode):
    """Counts copies of a value to Python: on a GPU each would wait for all work before it."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("seconds", "reads"), [(1.0, [1, 0, 0, 0, 0]), (0.3, [1, 0, 1, 0, 1])])
def test_between_refreshes_no_step_reads_a_value(seconds, reads, image_root, tmp_path, monkeypatch):
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.now = 100 * trainer.current_epoch + 0.2 * batch_idx
            monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
            self.mode = CountReads()
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)
            counts.append(self.mode.reads)

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_READS", seconds)
    monkeypatch.setattr(guards, "reads_for_free", lambda task: False)  # as on a GPU
    trainer = {"enable_progress_bar": True, "callbacks": [Count()], "log_every_n_steps": 1000}
    fit_tiny(image_root, tmp_path / "run", epochs=1, trainer=trainer)
    assert [min(1, count) for count in counts] == reads


def test_the_bar_shows_the_metrics_of_a_validation_at_once(image_root, tmp_path, monkeypatch):
    shown = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_READS", 1e9)
    trainer = {"enable_progress_bar": True, "callbacks": [Look()]}
    result = fit_tiny(image_root, tmp_path / "run", epochs=1, trainer=trainer)
    assert shown[0]["val/acc1"] == pytest.approx(result.top1)
    assert "v_num" not in shown[0]
