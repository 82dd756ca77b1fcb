"""Trials of a study: seeds in common, kept when something stops, and the same however they are spread."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_cls.errors import ConfigError, DataError, ModelFileError, RunError
from vit_cls.lab.probes.common import compare_with
from vit_cls.lab.studies.depth import DepthStudy
from vit_cls.lab.studies.heads import HeadsStudy
from vit_cls.lab.studies.recipe import RECIPES, Recipe
from vit_cls.lab.studies.study import Answers, Setup
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
from vit_cls.stats.verdicts import SUPPORTED
from vit_cls.training.trial import train_trial
from vit_cls.weights.bundle import MODEL_FILE, save_classifier
from vit_cls.weights.factory import create_classifier

TESTED = 599


def untrained(run_dir, train, val, *, origin, seed, model, optim, loader, epochs):
    """A `TrainFunction` that trains nothing: the fresh model of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = create_classifier(**{"class_names": train.index.class_names, **model})
    run_dir.mkdir(parents=True, exist_ok=True)
    return save_classifier(classifier, run_dir / MODEL_FILE)


class Counting:
    """`untrained`, counting what it was asked for, and raising where it is told to."""

    def __init__(self, errors=None):
        self.calls = Counter()
        self.pretrained = {}
        self.errors = errors or {}

    def __call__(self, run_dir, *args, **settings):
        key = run_dir.parent.name
        self.calls[key] += 1
        self.pretrained[key] = settings["model"].pop("pretrained", None)
        if key in self.errors:
            raise self.errors[key]
        if settings["model"]["name"] == "auto":
            settings["model"] = {"name": "vit_pico_patch7_28", "img_size": 8, "patch_size": 2}
        return untrained(run_dir, *args, **settings)


@pytest.fixture
def setup(tmp_path):
    recipe = Recipe(epochs=1, embed_dim=8, depth=1, num_heads=2)
    return Setup("digits", tmp_path / "study", seeds=2, recipe=recipe)


def _study(setup, **options):
    return HeadsStudy(setup, **{"heads": ["cls", "gap"], "lr_grid": 1, **options})


def _finish(study, train=untrained, spread=None):
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

    loss = ClassificationTask._loss

    def see(task, batch, batch_index):
        orders[-1].append(batch.indices.tolist())
        return loss(task, batch, batch_index)

    monkeypatch.setattr(ClassificationTask, "on_train_start", start)
    monkeypatch.setattr(ClassificationTask, "_loss", see)
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


def test_a_stopped_study_goes_on_without_training_anything_again(setup):
    study = _study(setup)
    keys = [trial.key for trial in study.trials()]
    train = Counting({keys[2]: KeyboardInterrupt()})
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
def test_shards_merge_to_the_result_of_one_machine(setup, tmp_path, copied):
    whole = _study(replace(setup, folder=tmp_path / "whole"))
    expected = whole.analyse(_finish(whole)[1])
    parts = []
    for shard in (1, 2):
        folder = tmp_path / (f"machine{shard}" if copied else "study")
        train = Counting()
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
def test_a_trial_that_starts_from_another_comes_after_it_and_on_its_machine(setup, jobs, monkeypatch):
    trials = _chains(setup)
    third, *second, root0, root1 = trials
    ran = []
    monkeypatch.setattr("vit_cls.lab.studies.trials.WorkerPool", lambda *args: _ThreadsInOrder(ran))
    train = Counting()
    assert run_trials(trials, setup.folder, train, Spread(jobs, 2, 2)) == 2
    assert list(train.calls) == [root1.key, second[1].key, third.key]
    assert run_trials(trials, setup.folder, train, Spread(jobs, 1, 2)) == 0
    assert list(train.calls)[3:] == [root0.key, second[0].key]
    assert train.pretrained[third.key] == str(trial_folder(setup.folder, second[1]) / RUN / MODEL_FILE)
    assert train.pretrained[root0.key] is None


class _ThreadsInOrder:
    """A pool of one thread: what is submitted too early fails."""

    def __init__(self, ran):
        from concurrent.futures import ThreadPoolExecutor

        self.pool = ThreadPoolExecutor(1)

    def __enter__(self):
        return self.pool

    def __exit__(self, *error):
        self.pool.shutdown()


def test_a_trial_that_starts_from_none_of_the_study_is_refused(setup):
    root = setup.trial("root", 0)
    lost = setup.trial("lost", 0, after=root)
    with pytest.raises(ConfigError, match=rf"{lost.key} starts from {root.key}, which is not in the study"):
        run_trials([lost], setup.folder, untrained, Spread())


def test_a_study_without_trainings_has_nothing_to_do(setup):
    assert run_trials([], setup.folder, untrained, Spread(2)) == 0


def test_two_processes_give_the_models_of_one(setup, tmp_path):
    one = _study(replace(setup, folder=tmp_path / "one"))
    expected = one.analyse(_finish(one, train_trial)[1])
    study = _study(setup)
    left, answers = _finish(study, train_trial, Spread(2))
    assert left == 0
    assert _numbers(study.analyse(answers)) == _numbers(expected)


def test_a_failed_training_is_noted_and_heads_leaves_its_rate_out(setup):
    study = _study(setup, lr_grid=2)
    bad = [trial for trial in study.trials() if (trial.arm, trial.seed, trial.variant) == ("gap", 1, "lr x1")]
    left, answers = _finish(study, Counting({bad[0].key: RunError("the loss is not finite.")}))
    assert left == 0
    assert answers.failed(bad[0]) == "the loss is not finite."
    result = study.analyse(answers)
    assert result.values["tuned_lr"]["gap"] == 0.5 * setup.recipe.lr
    assert any("gap: learning rate 0.003 failed" in note for note in result.notes)
    assert not any("cls: learning rate" in note for note in result.notes)


def test_heads_says_why_no_rate_worked(setup):
    study = _study(setup)
    errors = {trial.key: RunError(f"broken {trial.arm}{trial.seed}.") for trial in study.trials()[3:]}
    _, answers = _finish(study, Counting(errors))
    with pytest.raises(RunError, match=r"no learning rate worked for gap: broken gap1"):
        study.analyse(answers)


def test_a_failed_training_is_an_error_where_each_is_needed(setup):
    study = DepthStudy(replace(setup, recipe=replace(setup.recipe, depth=3)), depths=[1, 2], heads=["cls"])
    bad = study.trials()[1]
    _, answers = _finish(study, Counting({bad.key: RunError("the loss is not finite.")}))
    with pytest.raises(RunError, match=rf"{bad.key} failed: the loss is not finite.*delete.*{bad.key}"):
        study.analyse(answers)


def test_a_model_that_diverged_has_failed(setup):
    def diverge(*args, **settings):
        file = untrained(*args, **settings)
        from vit_cls.weights.bundle import load_classifier

        classifier = load_classifier(file)
        torch.nn.init.constant_(classifier.model.head.weight, float("nan"))
        return save_classifier(classifier, file)

    study = _study(replace(setup, seeds=1))
    _, answers = _finish(study, diverge)
    assert all("not finite" in answers.failed(trial) for trial in study.trials())


def test_what_starts_from_a_failed_training_has_failed_too(setup):
    root = setup.trial("root", 0)
    child = setup.trial("child", 0, after=root)
    train = Counting({root.key: RunError("broken.")})
    assert run_trials([root, child], setup.folder, train, Spread()) == 0
    assert (
        Answers(setup.folder).failed(child)
        == f"the training {root.key}, which it starts from, failed: broken."
    )
    assert child.key not in train.calls


@pytest.mark.parametrize("error", [ModelFileError("no such weights."), ConfigError("no."), DataError("no.")])
def test_a_wrong_request_is_no_failed_training(setup, error):
    study = _study(setup)
    first = study.trials()[0]
    with pytest.raises(type(error)):
        _finish(study, Counting({first.key: error}))
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
def test_the_costs_of_every_default_head_are_measured_and_those_of_its_model(kind, setup):
    study = kind(replace(setup, seeds=1, recipe=replace(setup.recipe, depth=2)))
    trials = {trial.arm: trial for trial in study.trials()}  # one of each head
    assert list(trials) == study.heads
    assert {"cls", "gap", "max", "map"} <= set(trials)
    assert run_trials(list(trials.values()), setup.folder, untrained, Spread()) == 0
    answers = Answers(setup.folder)
    for head, trial in trials.items():
        model, note = answers.model(trial).model, answers.note(trial)
        expected = _encoder_macs(model.config, reads_one=head == "cls") + note["head_macs"]
        bias = len(
            model.head.bias
        )  # of the classifier, among its multiply-adds here, and not counted by torch
        assert note["macs"] == expected - bias, head
        assert note["parameters"] == sum(one.numel() for one in model.parameters())


def test_equal_heads_seldom_win(setup):
    """A against A: each head trained anew has luck of its own, in seeds and in images."""
    rng = np.random.default_rng(0)
    winners = 0
    for _ in range(100):
        hard = rng.normal(2.5, 1.5, 400)
        arms = {}
        for name in ("gap", "gap (2)"):
            luck = rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (3, 400))
            arms[name] = hard + luck > 0
        findings = compare_with(next(iter(arms)), arms, "{} and {} differ.", margin=0.01, seed=0)
        winners += next(iter(findings.values())).verdict == SUPPORTED
    assert winners <= 5


def test_equal_heads_have_names_of_their_own(setup):
    study = _study(setup, heads=["gap", "gap"])
    assert study.names == ["gap", "gap (2)"]
    result = study.analyse(_finish(study)[1])
    assert result.findings[0].verdict != SUPPORTED
    assert set(result.predictions["predictions"]) == {"gap", "gap (2)"}


def _first_images(share, count=TESTED):
    return np.arange(count) < round(share * count)


def _tell(told, study, shares):
    """Let each arm and factor have that share of all images right."""
    for arm, rates in study.arms().items():
        for factor, trials in rates.items():
            told(study.setup.folder, trials, [_first_images(shares[arm][factor])] * len(trials))
    return Answers(study.setup.folder)


HAND_MADE = {"cls": {0.5: 0.5, 1.0: 0.9, 2.0: 0.7}, "gap": {0.5: 0.95, 1.0: 0.6, 2.0: 0.5}}


def test_rankings_differ_between_tuned_and_shared_rates(setup, told):
    study = _study(setup, lr_grid=3)
    answers = _tell(told, study, HAND_MADE)
    result = study.analyse(answers)
    assert result.values["tuned_lr"] == {"cls": 0.003, "gap": 0.0015}
    best, ranks, shared, pairs = result.tables
    assert [list(row[:2]) for row in pairs.rows] == [["gap", "cls"]]
    assert pairs.rows[0][2] == pytest.approx(0.05, abs=0.001)
    assert [row[0] for row in best.rows] == ["gap", "cls"]
    assert [list(row) for row in ranks.rows] == [[1, "gap", "cls"], [2, "cls", "gap"]]
    assert [row[0] for row in shared.rows] == ["cls", "gap"]
    assert best.rows[0][1] == pytest.approx(0.95, abs=0.001)
    assert shared.rows[1][1] == pytest.approx(0.6, abs=0.001)
    assert result.headline.startswith("Supported: gap is better than cls by 5.0 points")
    assert "Best on validation: gap, with 95.0 % of the test images right." in result.headline


def test_of_equal_rates_the_one_nearest_to_the_shared_wins(setup, told):
    study = _study(setup, lr_grid=3)
    shares = {"cls": {0.5: 0.8, 1.0: 0.8, 2.0: 0.8}, "gap": {0.5: 0.8, 1.0: 0.7, 2.0: 0.8}}
    result = study.analyse(_tell(told, study, shares))
    assert result.values["tuned_lr"] == {"cls": 0.003, "gap": 0.0015}


def test_the_choice_of_rates_never_sees_the_test_images(setup, told):
    study = _study(setup, lr_grid=3)
    answers = _tell(told, study, HAND_MADE)
    before = study.analyse(answers)
    rng = np.random.default_rng(0)
    for trial in study.trials():
        file = trial_folder(setup.folder, trial) / ANSWERS
        arrays = dict(np.load(file))
        arrays["test_targets"] = rng.permutation(arrays["test_targets"])
        np.savez(file, **arrays)
    after = study.analyse(answers)
    assert after.values["tuned_lr"] == before.values["tuned_lr"]
    assert after.values["top1"]["gap"].max() < 0.3 < before.values["top1"]["gap"].min()


def test_the_head_called_best_is_not_chosen_by_the_test_images(setup, told):
    study = _study(setup)
    answers = _tell(told, study, {"cls": {1.0: 0.9}, "gap": {1.0: 0.8}})
    for trial in study.trials():
        file = trial_folder(setup.folder, trial) / ANSWERS
        arrays = dict(np.load(file))
        if trial.arm == "cls":  # now it has no test image right
            arrays["test_probs"] = np.roll(np.eye(10, dtype=np.float32)[arrays["test_targets"]], 1, axis=1)
        np.savez(file, **arrays)
    headline = study.analyse(answers).headline
    assert headline.endswith("Best on validation: cls, with 0.0 % of the test images right.")


def test_a_result_names_every_test_image_and_what_was_said_of_it(setup, told):
    study = _study(setup)
    answers = _tell(told, study, {"cls": {1.0: 1.0}, "gap": {1.0: 0.0}})
    found = json.loads(json.dumps(study.analyse(answers).to_dict(predictions=True)))["predictions"]
    classes, targets = found["class_names"], found["targets"]
    assert [path.partition("/")[0] for path in found["paths"]] == [classes[i] for i in targets]
    assert len(targets) == TESTED
    for seed in ("0", "1"):
        assert found["predictions"]["cls"][seed] == targets
        assert not set(zip(found["predictions"]["gap"][seed], targets, strict=True)) & {
            (i, i) for i in range(10)
        }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1; got 0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"margin": 0}, "--margin must be above 0 and below 1.*got 0"),
        ({"margin": 1.5}, "--margin must be above 0 and below 1.*got 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Setup("digits", Path("x"), **settings)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr"])
def test_a_recipe_needs_numbers_above_zero(name):
    with pytest.raises(ConfigError, match=rf"--recipe.{name} must be above 0; got 0"):
        Recipe(**{name: 0})


def test_a_recipe_is_filled_by_what_suits_the_data():
    assert Recipe().resolved("digits") == RECIPES["digits"]
    assert Recipe(lr=1.0).resolved("folder") == replace(RECIPES["scratch"], lr=1.0)
    tuned = Recipe(pretrained="weights").resolved("folder")
    assert tuned == replace(RECIPES["finetune"], pretrained="weights")


@pytest.mark.parametrize("shard", ["1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_a_shard_is_written_i_of_n(shard):
    with pytest.raises(ConfigError, match="--shard"):
        Spread.parse(1, shard)
