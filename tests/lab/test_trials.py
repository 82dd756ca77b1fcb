"""Trials of a study: seeds in common, kept when something stops, and the same however they are spread."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_cls.errors import ConfigError, DataError, ModelFileError, RunError
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.depth import DepthStudy
from vit_cls.lab.studies.heads import HeadsStudy
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Setup
from vit_cls.lab.studies.trials import (
    ANSWERS,
    RUN,
    Spread,
    Trial,
    TrialData,
    is_done,
    run_trials,
    trial_folder,
)
from vit_cls.lab.studies.when import WhenStudy
from vit_cls.signals import Stopped
from vit_cls.training.trial import train_trial
from vit_cls.weights.bundle import MODEL_FILE


@pytest.fixture
def setup(tmp_path):
    recipe = Recipe(epochs=1, embed_dim=8, depth=1, num_heads=2)
    return Setup("digits", tmp_path / "study", seeds=2, recipe=recipe)


def _study(setup, **options):
    return HeadsStudy(setup, **{"heads": ["cls", "gap"], "lr_grid": 1, **options})


def _finish(study, train, spread=None):
    folder = study.setup.folder
    left = run_trials(study.trials(), folder, train, spread or Spread())
    return left, Answers(folder)


def _numbers(result):
    found = result.to_dict(predictions=True)
    return {key: found[key] for key in ("headline", "findings", "values", "predictions", "data", "settings")}


def test_arms_of_a_seed_start_from_the_same_encoder_and_see_the_same_images(setup, monkeypatch):
    from vit_cls.training.task import ClassificationTask

    starts, orders = [], []

    def start(task):
        state = task.classifier.model.state_dict()
        starts.append({key: value.clone() for key, value in state.items()})
        orders.append([])

    step = ClassificationTask.training_step

    def see(task, batch, batch_index):
        orders[-1].append(batch.indices.tolist())
        return step(task, batch, batch_index)

    monkeypatch.setattr(ClassificationTask, "on_train_start", start)
    monkeypatch.setattr(ClassificationTask, "training_step", see)
    study = _study(setup, heads=["cls", "gap", "max"])
    _finish(study, train_trial)
    by_arm = {trial.arm: i for i, trial in enumerate(study.trials()) if trial.seed == 0}
    cls = by_arm.pop("cls")
    shared = [key for key in starts[cls] if key.startswith(("blocks", "patch_embed"))]
    assert len(shared) > 10
    for i in by_arm.values():
        assert all(torch.equal(starts[cls][key], starts[i][key]) for key in shared)
        assert torch.equal(starts[cls]["pos_embed"][:, 1:], starts[i]["pos_embed"])
        assert orders[i] == orders[cls]
    other = next(i for i, trial in enumerate(study.trials()) if trial.seed == 1)
    assert not torch.equal(starts[cls][shared[0]], starts[other][shared[0]])
    assert orders[other] != orders[cls]


def test_every_setting_of_a_trial_gives_it_another_folder():
    base = Trial("cls", 0, TrialData("digits"))
    changes = {
        "arm": "gap", "seed": 1, "data": TrialData("digits", 0.2), "model": {"pool": "gap"},
        "optim": {"lr": 1}, "loader": {"batch_size": 2}, "epochs": 2, "variant": "lr x2", "after": "another",
    }  # fmt: skip
    assert set(changes) == set(base.to_dict())
    keys = {replace(base, **{name: value}).key for name, value in changes.items()} | {base.key}
    assert len(keys) == 1 + len(changes)
    assert all(Path(key).name == key for key in keys)


def test_a_stopped_study_goes_on_without_training_anything_again(setup, counting):
    study = _study(setup)
    keys = [trial.key for trial in study.trials()]
    train = counting({keys[2]: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        _finish(study, train)
    assert [is_done(setup.folder, trial.key) for trial in study.trials()] == [True, True, False, False]
    train.errors = {}
    left, _ = _finish(study, train)
    assert left == 0
    assert [train.calls[key] for key in keys] == [1, 1, 2, 1]
    assert _finish(study, train)[0] == 0
    assert sum(train.calls.values()) == 5


def test_a_training_stopped_in_the_middle_goes_on_and_gives_the_same_model(setup, tmp_path, monkeypatch):
    from vit_cls.training.callbacks import RunCheckpoint

    setup = replace(setup, seeds=1, recipe=replace(setup.recipe, epochs=3))
    whole = _study(replace(setup, folder=tmp_path / "whole"))
    _, expected = _finish(whole, train_trial)
    save = RunCheckpoint.on_train_epoch_end
    epochs = []

    def stop_after_two(callback, trainer, module):
        save(callback, trainer, module)
        epochs.append(trainer.current_epoch)
        if epochs == [0, 1]:
            raise Stopped(signal.SIGINT)

    monkeypatch.setattr(RunCheckpoint, "on_train_epoch_end", stop_after_two)
    study = _study(setup)
    with pytest.raises(Stopped):
        _finish(study, train_trial)
    assert not any(is_done(setup.folder, trial.key) for trial in study.trials())
    left, found = _finish(study, train_trial)
    assert left == 0
    assert epochs == [0, 1, 2, 0, 1, 2]
    for trial in study.trials():
        for part in ("val", "test"):
            assert np.array_equal(found.probs(trial, part)[0], expected.probs(trial, part)[0])


def test_a_training_that_ended_just_before_its_answers_is_not_done_again(setup, monkeypatch):
    from vit_cls.training.task import ClassificationTask

    study = _study(replace(setup, seeds=1))
    _, answers = _finish(study, train_trial)
    trial = study.trials()[0]
    before = answers.probs(trial)[0]
    for name in (ANSWERS, "trial.json"):
        (trial_folder(setup.folder, trial) / name).unlink()
    steps = []
    monkeypatch.setattr(ClassificationTask, "training_step", lambda *args: steps.append(args))
    _, again = _finish(study, train_trial)
    assert not steps
    assert np.array_equal(again.probs(trial)[0], before)


@pytest.mark.parametrize("copied", [False, True])
def test_shards_merge_to_the_result_of_one_machine(setup, tmp_path, copied, counting):
    whole = _study(replace(setup, folder=tmp_path / "whole"))
    expected = whole.analyse(_finish(whole, counting())[1])
    parts = []
    for shard in (1, 2):
        folder = tmp_path / (f"machine{shard}" if copied else "study")
        train = counting()
        left, _ = _finish(_study(replace(setup, folder=folder)), train, Spread(1, shard, 2))
        assert left == (0 if shard == 2 and not copied else 2)
        parts.append(set(train.calls))
    assert not parts[0] & parts[1]
    assert len(parts[0]) == len(parts[1]) == 2
    if copied:
        for shard in (1, 2):
            shutil.copytree(tmp_path / f"machine{shard}", setup.folder, dirs_exist_ok=True)
    study = _study(setup)
    assert _numbers(study.analyse(Answers(setup.folder))) == _numbers(expected)


def _chains(setup):
    """Two roots with a dependant each, one of which has another; dependants first."""
    roots = [setup.trial("root", seed) for seed in (0, 1)]
    second = [setup.trial("second", root.seed, after=root) for root in roots]
    third = setup.trial("third", 1, after=second[1])
    return [third, *second, *roots]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trial_that_starts_from_another_comes_after_it_and_on_its_machine(
    setup, jobs, monkeypatch, counting
):
    trials = _chains(setup)
    third, *second, root0, root1 = trials
    ran = []
    monkeypatch.setattr("vit_cls.lab.studies.trials.WorkerPool", lambda *args: _ThreadsInOrder(ran))
    train = counting()
    assert run_trials(trials, setup.folder, train, Spread(jobs, 2, 2)) == 2
    assert list(train.calls) == [root1.key, second[1].key, third.key]
    assert run_trials(trials, setup.folder, train, Spread(jobs, 1, 2)) == 0
    assert list(train.calls)[3:] == [root0.key, second[0].key]
    before = trial_folder(setup.folder, second[1])
    assert train.asked[third.key]["model"]["pretrained"] == str(before / RUN / MODEL_FILE)
    assert "pretrained" not in train.asked[root0.key]["model"]


class _ThreadsInOrder:
    """A pool of one thread: what is submitted too early fails."""

    def __init__(self, ran):
        from concurrent.futures import ThreadPoolExecutor

        self.pool = ThreadPoolExecutor(1)

    def __enter__(self):
        return self.pool

    def __exit__(self, *error):
        self.pool.shutdown()


def test_a_trial_that_starts_from_none_of_the_study_is_refused(setup, counting):
    root = setup.trial("root", 0)
    lost = setup.trial("lost", 0, after=root)
    with pytest.raises(ConfigError, match=rf"{lost.key} starts from {root.key}, which is not in the study"):
        run_trials([lost], setup.folder, counting(), Spread())


def test_a_study_without_trainings_has_nothing_to_do(setup, counting):
    assert run_trials([], setup.folder, counting(), Spread(2)) == 0


def test_two_processes_give_the_models_of_one(setup, tmp_path):
    one = _study(replace(setup, folder=tmp_path / "one"))
    expected = one.analyse(_finish(one, train_trial)[1])
    study = _study(setup)
    left, answers = _finish(study, train_trial, Spread(2))
    assert left == 0
    assert _numbers(study.analyse(answers)) == _numbers(expected)


def test_a_failed_training_is_an_error_where_each_is_needed(setup, counting):
    study = DepthStudy(replace(setup, recipe=replace(setup.recipe, depth=3)), depths=[1, 2], heads=["cls"])
    bad = study.trials()[1]
    _, answers = _finish(study, counting({bad.key: RunError("the loss is not finite.")}))
    with pytest.raises(RunError, match=rf"{bad.key} failed: the loss is not finite.*delete.*{bad.key}"):
        study.analyse(answers)


def test_a_model_that_diverged_has_failed(setup, fresh):
    diverge = fresh(lambda model: torch.nn.init.constant_(model.head.weight, float("nan")))
    study = _study(replace(setup, seeds=1))
    _, answers = _finish(study, diverge)
    assert all("not finite" in answers.failed(trial) for trial in study.trials())


def test_a_training_whose_rate_is_too_high_is_a_failed_trial_of_its_arm(setup):
    study = _study(replace(setup, seeds=1, recipe=replace(setup.recipe, lr=1e30, warmup_epochs=0.0)))
    left, answers = _finish(study, train_trial)
    assert left == 0
    assert all("training ended: " in answers.failed(trial) for trial in study.trials())
    with pytest.raises(RunError, match="no learning rate worked for cls: training ended: the validation of"):
        study.analyse(answers)


def test_what_starts_from_a_failed_training_has_failed_too(setup, counting):
    root = setup.trial("root", 0)
    child = setup.trial("child", 0, after=root)
    train = counting({root.key: RunError("broken.")})
    assert run_trials([root, child], setup.folder, train, Spread()) == 0
    assert (
        Answers(setup.folder).failed(child)
        == f"the training {root.key}, which it starts from, failed: broken."
    )
    assert child.key not in train.calls


@pytest.mark.parametrize("error", [ModelFileError("no such weights."), ConfigError("no."), DataError("no.")])
def test_a_wrong_request_is_no_failed_training(setup, error, counting):
    study = _study(setup)
    first = study.trials()[0]
    with pytest.raises(type(error)):
        _finish(study, counting({first.key: error}))
    assert not is_done(setup.folder, first.key)


def _encoder_macs(config, *, reads_one: bool) -> int:
    """Worked by hand: weights and attention on every token; in the last block, where one token is read,
    keys and values stay unformed."""
    dim, hidden, tokens = config.embed_dim, config.mlp_dim, math.prod(config.grid_size)
    stem = tokens * 3 * config.patch_size**2 * dim
    tokens += config.class_token
    block = tokens * (4 * dim**2 + 2 * tokens * dim + 2 * dim * hidden)
    last = 4 * dim**2 + 2 * tokens * dim * config.num_heads + 2 * dim * hidden
    return stem + (config.depth - 1) * block + (last if reads_one else block)


@pytest.mark.parametrize("kind", [HeadsStudy, WhenStudy])
def test_the_costs_of_every_default_head_are_measured_and_those_of_its_model(kind, setup, fresh):
    study = kind(replace(setup, seeds=1, recipe=replace(setup.recipe, depth=2)))
    trials = {trial.arm: trial for trial in study.trials()}  # one of each head
    assert list(trials) == study.heads
    assert {"cls", "gap", "max", "map"} <= set(trials)
    assert run_trials(list(trials.values()), setup.folder, fresh(), Spread()) == 0
    answers = Answers(setup.folder)
    for head, trial in trials.items():
        model, note = answers.model(trial).model, answers.note(trial)
        expected = _encoder_macs(model.config, reads_one=head == "cls") + note["head_macs"]
        bias = len(
            model.head.bias
        )  # of the classifier, among its multiply-adds here, and not counted by torch
        assert note["macs"] == expected - bias, head
        assert note["parameters"] == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("shard", ["1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_a_shard_is_written_i_of_n(shard):
    with pytest.raises(ConfigError, match="--shard"):
        Spread.parse(1, shard)
