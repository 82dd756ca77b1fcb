"""The average of the weights, and that the model file is what was validated, whoever changed the weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.training.runs import StopAfter, record_of, rows_of, run_tiny, same_weights
from vit_cls.errors import ConfigError
from vit_cls.training.ema import Ema, auto_decay, warm_decay
from vit_cls.training.options import OptimOptions
from vit_cls.weights.bundle import EMA, RAW, load_classifier, read_metadata

MANY = {"batch_size": 3}


def _score(path, data):
    """Correct validation images of a model file, and their mean loss."""
    samples = [data.val_set[0, i] for i in range(len(data.val_set))]
    targets = torch.tensor([sample.target for sample in samples])
    with torch.inference_mode():
        logits = load_classifier(path)(torch.stack([sample.image for sample in samples]))
    return int((logits.argmax(dim=1) == targets).sum()), float(F.cross_entropy(logits, targets))


def _is_what_was_validated(result, data):
    metrics = read_metadata(result.folder.model_file)["metrics"]
    correct, loss = _score(result.folder.model_file, data)
    return correct == metrics["val/correct"] and loss == pytest.approx(metrics["val/loss"], rel=1e-5)


@pytest.mark.parametrize("optim", [{}, {"ema_decay": 0.9}, {"ema_decay": "auto"}])
def test_the_model_file_is_what_was_validated(optim, image_root, tmp_path):
    result, data = run_tiny(image_root, tmp_path / "run", epochs=3, optim=optim, data=MANY)
    assert _is_what_was_validated(result, data)
    assert _score(result.folder.best_checkpoint, data) == _score(result.folder.model_file, data)


def test_the_model_file_is_what_was_validated_though_a_callback_swaps_the_weights(image_root, tmp_path):
    trainer = {"callbacks": [EMAWeightAveraging(decay=0.8)], "check_val_every_n_epoch": 2}
    result, data = run_tiny(image_root, tmp_path / "run", trainer=trainer, data=MANY)
    assert _is_what_was_validated(result, data)
    raw = torch.load(result.folder.last_checkpoint, weights_only=True)["current_model_state"]
    model = load_classifier(result.folder.model_file).model.state_dict()
    assert not same_weights({k.removeprefix("classifier.model."): v for k, v in raw.items()}, model)


class _Spoil(Callback):
    """Let one of the two always answer the first class, while it is validated."""

    def __init__(self, which):
        self.which = which

    def _head(self, task):
        return (task.ema.classifier if self.which == EMA else task.classifier).model.head

    def on_validation_start(self, trainer, pl_module):
        self.before = copy.deepcopy(self._head(pl_module).state_dict())
        torch.nn.init.constant_(self._head(pl_module).bias[:1], 1e3)

    def on_validation_end(self, trainer, pl_module):
        self._head(pl_module).load_state_dict(self.before)


@pytest.mark.parametrize(("spoiled", "kept"), [(RAW, EMA), (EMA, RAW)])
def test_the_better_of_raw_and_average_is_kept_and_named(spoiled, kept, image_root, tmp_path):
    trainer = {"callbacks": [_Spoil(spoiled)]}
    optim = {"ema_decay": 0.5, "lr": 1e-2}
    result, _ = run_tiny(image_root, tmp_path / "run", epochs=2, optim=optim, data=MANY, trainer=trainer)
    assert result.weights == kept == record_of(tmp_path / "run")["result"]["weights"]
    assert read_metadata(result.folder.model_file)["kept"] == kept
    for row in rows_of(tmp_path / "run"):
        assert float(row["val/kept_ema"]) == (kept == EMA)
        assert (row["val/acc1"], row["val/loss"]) == (row[f"val/{kept}_acc1"], row[f"val/{kept}_loss"])
        assert float(row[f"val/{spoiled}_loss"]) > 100
        assert float(row["val/acc1"]) >= float(row[f"val/{spoiled}_acc1"]) == 0.5


def test_without_decay_the_average_is_the_weights_and_a_tie_is_its(image_root, tmp_path):
    result, _ = run_tiny(image_root, tmp_path / "run", epochs=1, optim={"ema_decay": 0.0})
    assert result.weights == EMA
    state = torch.load(result.folder.last_checkpoint, weights_only=True)["state_dict"]
    averaged = {key.removeprefix("ema."): value for key, value in state.items() if key.startswith("ema.")}
    assert same_weights(averaged, {key: state[key] for key in averaged})


def test_the_average_is_the_one_of_the_formula(image_root, tmp_path):
    class Watch(StopAfter):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.classifier.model.head.weight.detach().clone())
            mine.append(pl_module.ema.classifier.model.head.weight.detach().clone())

        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.classifier.model.head.weight.detach().clone())

    seen, mine = [], []
    trainer = {"callbacks": [Watch(2)], "accumulate_grad_batches": 2}
    run_tiny(image_root, tmp_path / "run", optim={"ema_decay": 0.5}, trainer=trainer)
    expected, step = seen[0], 0
    for before, after, own in zip(seen, seen[1:], mine, strict=False):
        if not torch.equal(before, after):  # the batches of a step change nothing until its last
            step += 1
            expected = torch.lerp(expected, after, 1 - min(0.5, (1 + step) / (10 + step)))
        assert torch.allclose(own, expected, atol=1e-7)
    assert step == 6


def test_a_resumed_run_goes_on_with_its_average(image_root, tmp_path):
    settings = {"epochs": 4, "optim": {"ema_decay": 0.9}}
    whole, _ = run_tiny(image_root, tmp_path / "whole", **settings)
    run_tiny(image_root, tmp_path / "cut", trainer={"callbacks": [StopAfter(2)]}, **settings)
    cut, _ = run_tiny(image_root, tmp_path / "cut", resume="auto", **settings)
    states = [torch.load(run.folder.last_checkpoint, weights_only=True)["state_dict"] for run in (whole, cut)]
    assert any(key.startswith("ema.") for key in states[0])
    assert same_weights(*states)


def test_the_decay_goes_with_the_length_of_the_run():
    assert auto_decay(10) == 0.0
    assert auto_decay(2000) == pytest.approx(0.99)
    assert auto_decay(375_000) == pytest.approx(0.99995, abs=1e-5)  # DeiT: 0.99996
    assert [warm_decay(0.99, step) for step in (1, 10**6)] == [2 / 11, 0.99]
    for wrong in (1.0, -0.1, "long"):
        with pytest.raises(ConfigError, match=r"optim\.ema_decay must be"):
            OptimOptions(ema_decay=wrong)


def test_an_average_takes_no_gradient_and_never_drops(image_root, tmp_path):
    result, _ = run_tiny(image_root, tmp_path / "run", epochs=1, model={"drop_rate": 0.5})
    ema = Ema(load_classifier(result.folder.model_file)).train()
    assert not any(module.training for module in ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())
