"""What decides the last bits of a run is recorded, and kept to where that is asked for."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch import Callback

from tests.training.runs import StopAfter, fit_tiny, record_of


@pytest.mark.parametrize("then", [2, 3])
def test_a_run_that_goes_on_with_another_number_of_threads_is_warned(
    then, image_root, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fit_tiny(image_root, tmp_path / "run", trainer={"callbacks": [StopAfter(1)]})
    record = record_of(tmp_path / "run")
    assert record["threads"] == 3
    assert record["deterministic"] is False
    monkeypatch.setattr(torch, "get_num_threads", lambda: then)
    fit_tiny(image_root, tmp_path / "run", resume=str(tmp_path / "run"))
    words = "the run began with 3 thread(s) and goes on with 2, so it adds its numbers up in another order"
    assert (words in caplog.text) == (then == 2)


class _Look(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        self.algorithms = torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wanted", [True, "warn", None])
def test_deterministic_leaves_out_what_is_not_and_puts_it_back(wanted, image_root, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    look, before = _Look(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        trainer = {"deterministic": wanted, "callbacks": [look], "limit_train_batches": 1}
        fit_tiny(image_root, tmp_path / "run", epochs=1, trainer=trainer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert look.algorithms == bool(wanted)
    assert look.cudnn == (before and not wanted)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None) == (":4096:8" if wanted else None)
    assert record_of(tmp_path / "run")["deterministic"] == (wanted or False)
