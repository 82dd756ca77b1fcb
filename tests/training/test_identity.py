"""A run goes on as the run that it was, or is refused, or says what was changed on purpose."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.training.runs import fit_tiny, record_of, rows_of
from vit_cls.data import file_digests
from vit_cls.data.file_digests import FileDigests
from vit_cls.data.folders import find_parts
from vit_cls.data.mixing import MixOptions
from vit_cls.errors import ConfigError, RunError
from vit_cls.training.checkpoint_io import RunCheckpointIO, read_checkpoint
from vit_cls.training.identity import FREE, LENGTHS, RENAMED, changes_of, check_same_run
from vit_cls.verification import VERIFY

OPTIONS = (Path(__file__).parents[1] / "contracts/fit_options.txt").read_text().split()


@pytest.fixture(scope="module")
def finished(image_root, tmp_path_factory):
    """Images, and a run of two epochs on them."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(image_root, place / "images")
    fit_tiny(place / "images", place / "run", trainer={"max_steps": 4}, optim={"weight_decay": 0.1})
    return place


@pytest.fixture
def place(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _resume(place, **changes):
    trainer = {"max_steps": 6, **changes.pop("trainer", {})}
    optim = {"weight_decay": 0.1, **changes.pop("optim", {})}
    return fit_tiny(
        place / "images", None, resume=str(place / "run"), trainer=trainer, optim=optim, **changes
    )


def test_every_option_is_free_or_one_of_the_identity(finished):
    """A new option is compared, unless it is written down as one that changes nothing."""
    identity = record_of(finished / "run")["identity"]
    config = {"config", "optim.lr", "optim.base_lr_per_256_images"}
    for option in OPTIONS:
        known = option in identity or option in FREE or option in config
        assert known, f"{option} is neither compared nor free"
    assert not set(FREE) & set(identity)
    assert set(FREE) <= set(OPTIONS)
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(
    "key", ["seed", "optim.lr", "data.augment", "trainer.precision", "own_code", "device"]
)
def test_a_changed_key_of_the_identity_is_refused_and_named_and_may_be_taken(key, finished):
    identity = record_of(finished / "run")["identity"]
    now = {**identity, key: "another"}
    told = rf"cannot be continued: {key} changed \(then .*, now 'another'\).*--resume_changes {key};"
    with pytest.raises(RunError, match=told):
        check_same_run(identity, now, finished)
    assert check_same_run(identity, now, finished, [key]) == {key: [identity[key], "another"]}
    with pytest.raises(ConfigError, match=r"resume_changes data.augmnet is nothing.*data.augment"):
        check_same_run(identity, now, finished, ["data.augmnet"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data": {"mix": MixOptions(mixup_alpha=0.5)}}, "data.mix.mixup_alpha"),
        ({"data": {"batch_size": 4}}, "data.batch_size"),
        ({"data": {"repeats": 2}}, "data.repeats"),
        ({"data": {"augment": "none"}}, "data.augment"),
        ({"data": {"weights": "balanced"}}, "data.weights"),
        ({"optim": {"weight_decay": 0.2}}, "optim.weight_decay"),
        ({"optim": {"lr": 1e-2}}, "optim.lr"),
        ({"optim": {"ema_decay": 0.9}}, "optim.ema_decay"),
        ({"model": {"crop_pct": 0.5}}, "preprocess"),
        ({"model": {"drop_path_rate": 0.0}}, "architecture"),
        ({"trainer": {"accumulate_grad_batches": 2}}, "trainer.accumulate_grad_batches"),
        ({"trainer": {"gradient_clip_val": 0.5}}, "trainer.gradient_clip_val"),
        ({"trainer": {"limit_train_batches": 2}}, "trainer.limit_train_batches"),
        ({"trainer": {"limit_val_batches": 1}}, "trainer.limit_val_batches"),
        ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision"),
        ({"metrics": ["f1"]}, "metrics"),
        ({"early_stopping_patience": 3}, "early_stopping_patience"),
        ({"trainer": {"max_steps": 3}}, "trainer.max_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_setting_is_refused(changes, key, place):
    before = (place / "run/run.json").read_bytes()
    with pytest.raises(RunError, match=rf"{key} changed"):
        _resume(place, **changes)
    assert (place / "run/run.json").read_bytes() == before


def _change(place: Path) -> None:
    path = next((place / "images/train").glob("*/0.png"))
    shutil.copy(path.with_name("1.png"), path)


def _swap(place: Path) -> None:
    red, blue = (place / "images/train" / name for name in ("red", "blue"))
    red.rename(place / "other")
    blue.rename(red)
    (place / "other").rename(blue)


@pytest.mark.parametrize("change", [_change, _swap])
def test_changed_files_are_told_by_their_content(change, place):
    change(place)
    with pytest.raises(RunError, match="train_content changed"):
        _resume(place)


def test_a_changed_time_of_a_file_is_no_change(place):
    for path in (place / "images").rglob("*.png"):
        os.utime(path, (1, 1))
    assert _resume(place).epochs == 2


def test_only_files_whose_size_or_time_has_changed_are_read_again(place, monkeypatch):
    source = find_parts(str(place / "images"), name="data").read("train")
    first = FileDigests({"train": source})
    first.save(place / "files.npz")
    read = []
    monkeypatch.setattr(file_digests, "_digest", lambda path, size: read.append(path) or bytes(16))
    assert FileDigests({"train": source}, place / "files.npz").content == first.content
    assert read == []
    os.utime(source.index.path(3), (1, 1))
    FileDigests({"train": source}, place / "files.npz")
    assert read == [source.index.path(3)]
    (place / "files.npz").write_bytes(b"damaged")
    FileDigests({"train": source}, place / "files.npz")
    assert len(read) == 1 + len(source.index)
    token = VERIFY.set(False)
    assert FileDigests({"train": source}).content == {}
    VERIFY.reset(token)


def test_of_many_bytes_a_sample_is_read_and_all_sizes(place, monkeypatch):
    monkeypatch.setattr(file_digests, "MOST_BYTES", 10_000)
    source = find_parts(str(place / "images"), name="data").read("train")
    before = FileDigests({"train": source}).content
    with source.index.path(1).open("ab") as file:
        file.write(b"0")
    assert FileDigests({"train": source}).content != before


def test_a_change_on_purpose_is_recorded_and_the_configuration_of_before_kept(place, caplog):
    config = (place / "run/config.yaml").read_bytes()
    _resume(place, optim={"weight_decay": 0.3}, resume_changes="optim.weight_decay")
    assert "taken on purpose: optim.weight_decay changed (then 0.1, now 0.3)" in caplog.text
    first, second = record_of(place / "run")["segments"]
    assert (first["step"], first["changes"]) == (0, {})
    assert (second["epoch"], second["batches"], second["step"]) == (0, 4, 4)
    assert second["changes"] == {"optim.weight_decay": [0.1, 0.3], "trainer.max_steps": [4, 6]}
    assert (place / "run/config_0.yaml").read_bytes() == config


def test_a_longer_run_goes_on_with_the_rate_of_its_schedule_and_says_so(place, caplog):
    _resume(place)
    assert "the run is made longer: trainer.max_steps was 4 and is 6" in caplog.text
    assert "the learning rate goes from " in caplog.text
    assert [row["step"] for row in rows_of(place / "run") if row["train/loss"]] == ["5", "6"]


def _floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


def test_a_checkpoint_of_another_run_or_without_finite_weights_is_refused(place):
    path = place / "run/checkpoints/last.ckpt"
    state = read_checkpoint(path)
    weights = {name: value * torch.nan for name, value in state["state_dict"].items()}
    for change, told in (
        ({"vit_cls_run_id": "other"}, "is of another run"),
        ({"state_dict": {**state["state_dict"], **_floats(weights)}}, "are not finite"),
    ):
        RunCheckpointIO().save_checkpoint({**state, **change}, path)
        with pytest.raises(RunError, match=told):
            _resume(place)


def test_records_of_before_are_compared_by_what_they_know():
    record = {"seed": 0, "batch_size": 8}
    assert set(RENAMED) == {"batch_size", "augment"}
    assert changes_of(record, {"seed": 0, "data.batch_size": 8, "trainer.precision": "32-true"}) == {}
    assert changes_of(record, {"data.batch_size": 9}) == {"data.batch_size": (8, 9)}
    assert changes_of(record, {"optim.name": "sgd"}) == {"optim.name": ("adamw", "sgd")}
    assert all(key.startswith("trainer.") for key in LENGTHS)


def test_a_pipe_among_the_images_is_not_opened_for_its_digest(tmp_path, image_root):
    shutil.copytree(image_root, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "train/red/pipe.png")
    os.symlink("/dev/zero", tmp_path / "train/red/zero.png")
    source = find_parts(str(tmp_path), name="data").read("train")
    assert len(source.index) == 26
    assert FileDigests({"train": source}).content
