"""A checkpoint is whole or not there, and a damaged one is told and gone round."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.training.runs import fit_tiny, record_of, rows_of, same_weights, weights_of
from tests.training.test_resume import _SignalAt
from tests.weights.test_digest import flipped
from vit_cls.errors import ModelFileError, RunError
from vit_cls.files import replacing, sweep
from vit_cls.signals import Stopped
from vit_cls.training.checkpoint_io import RunCheckpointIO, read_checkpoint
from vit_cls.weights.bundle import read_own_file
from vit_cls.weights.digest import RUN_KEY, digest_of
from vit_cls.weights.tensor_files import read_tensors

FLIPS = int(os.environ.get("BIT_FLIPS", 80))


def _state(number: int) -> dict[str, object]:
    """Small, and like Lightning's."""
    tensors = {"weight": torch.full((40,), float(number)), "bias": torch.arange(3)}
    return {"state_dict": tensors, "loops": {}, RUN_KEY: {"epoch": number}, "global_step": number}


def _number(folder: Path) -> int:
    """Of the checkpoint from which a run would go on."""
    state = RunCheckpointIO().load_checkpoint(folder / "last.ckpt")
    assert torch.equal(state["state_dict"]["weight"], torch.full((40,), float(state["global_step"])))
    return int(state["global_step"])


def test_a_flipped_bit_or_a_cut_of_a_checkpoint_is_told_or_changes_nothing(tmp_path):
    path, draws, told = tmp_path / "one.ckpt", random.Random(0), 0
    RunCheckpointIO().save_checkpoint(_state(1), path)
    good, content = digest_of(read_checkpoint(path)), path.read_bytes()
    tensors = digest_of(read_tensors(path)[0])
    cuts = [content[: draws.randrange(len(content))] for _ in range(FLIPS // 4)]
    for damaged in [flipped(content, draws) for _ in range(FLIPS)] + cuts:
        path.write_bytes(damaged)
        try:
            assert digest_of(read_checkpoint(path)) == good
        except ModelFileError:
            told += 1
        with contextlib.suppress(ModelFileError):  # as weights of a named architecture
            assert digest_of(read_tensors(path)[0]) == tensors
    assert told > len(cuts)


class _Cut(BaseException):
    """The power goes."""


@pytest.mark.parametrize("links", [True, False])
def test_wherever_a_save_is_cut_there_is_a_whole_checkpoint(links, tmp_path, monkeypatch):
    """Before each call that changes the disk in turn; what was not synced loses its content."""
    calls, stop, saving, synced = 0, 0, False, set()

    def counted(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop and saving:
                raise _Cut
            if name == "fsync":
                synced.add(os.fstat(args[0]).st_ino)
            return real(*args, **kwargs)

        return call

    folder = tmp_path / "checkpoints"
    RunCheckpointIO().save_checkpoint(_state(1), folder / "last.ckpt")
    RunCheckpointIO().save_checkpoint(_state(2), folder / "last.ckpt")
    for name in ("fsync", "replace", "chmod", *(["link"] if links else [])):
        monkeypatch.setattr(os, name, counted(name))
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    seen = set()
    for stop in range(1, 12):  # `counted` reads it
        place = tmp_path / f"cut_{stop}"
        shutil.copytree(folder, place)
        kept = {path.stat().st_ino for path in place.iterdir()}
        calls, saving = 0, True
        with contextlib.suppress(_Cut):
            RunCheckpointIO().save_checkpoint(_state(3), place / "last.ckpt")
        saving = False
        for path in place.iterdir():
            if path.stat().st_ino not in kept | synced:
                path.write_bytes(b"")
        seen.add(_number(place))
    assert seen == {2, 3}


def test_a_full_disk_leaves_the_checkpoint_as_it_was_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    RunCheckpointIO().save_checkpoint(_state(1), path)

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        RunCheckpointIO().save_checkpoint(_state(2), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert _number(tmp_path) == 1


def test_a_file_that_cannot_grow_is_told_with_the_systems_reason(tmp_path):
    path = tmp_path / "last.ckpt"
    RunCheckpointIO().save_checkpoint(_state(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, 1000, path.stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                RunCheckpointIO().save_checkpoint(_state(2), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["last.ckpt"]
        assert _number(tmp_path) == 1


def test_what_a_users_callback_may_keep_has_a_digest_too(tmp_path):
    kept = {"names": {8, 0}, "conjugate": torch.ones(2, dtype=torch.cfloat).conj()}
    RunCheckpointIO().save_checkpoint({**_state(1), "callbacks": kept}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["names"] == {0, 8}
    assert repr({8, 0}) != repr({0, 8})  # as of words in two processes
    assert digest_of({8, 0}) == digest_of({0, 8}) != digest_of({0, 9})
    assert digest_of(torch.eye(3).to_sparse()) != digest_of(torch.eye(3).mul(2).to_sparse())


def test_of_a_process_that_was_killed_what_it_was_writing_is_swept(tmp_path):
    with pytest.raises(_Cut), replacing(tmp_path / "run.json") as temporary:
        left = temporary.with_name(temporary.name.replace(".tmp", "x.tmp"))
        left.write_text("half")
        raise _Cut
    (tmp_path / "run.json").write_text("{}")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_root) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit_tiny(image_root, folder, epochs=3)
    return folder


@pytest.fixture
def stopped(tmp_path, image_root) -> Path:
    """A run with three epochs to make, stopped in the second, with a best model and three checkpoints."""
    with pytest.raises(Stopped):
        stop = {"callbacks": [_SignalAt(2, 1, False)]}
        fit_tiny(image_root, tmp_path / "run", epochs=3, trainer=stop)
    return tmp_path / "run"


def _cut(path: Path, length: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: _cut(run / "checkpoints/last.ckpt"), "goes on from previous.ckpt, after step 10"),
        (lambda run: (run / "checkpoints/last.ckpt").unlink(), "goes on from previous.ckpt, after step 10"),
        (lambda run: _cut(run / "model.safetensors"), "written anew from the checkpoint"),
        (lambda run: (run / "model.safetensors").unlink(), "written anew from the checkpoint"),
        (lambda run: (run / "metrics.csv").unlink(), ""),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\x00epoch,step"), ""),
        (lambda run: (run / "checkpoints/best.ckpt").write_bytes(b""), "previous.ckpt is copied to it"),
        (lambda run: (run / "checkpoints/best.ckpt").unlink(), "previous.ckpt is copied to it"),
        (lambda run: (run / "run.json").unlink(), "written anew from a checkpoint"),
        (lambda run: _cut(run / "run.json", 200), "written anew from a checkpoint"),
        (lambda run: (run / "run.json").write_text("[1]"), "written anew from a checkpoint"),
        (lambda run: (run / "config.yaml").unlink(), ""),
        (lambda run: (run / ".run.json.abcdefgh.tmp").write_text("half"), ""),
    ],
)
def test_a_run_whose_files_are_damaged_ends_as_the_whole_one(
    damage, said, stopped, whole, image_root, caplog
):
    damage(stopped)
    fit_tiny(image_root, None, epochs=3, resume=str(stopped))
    assert said in caplog.text
    assert same_weights(weights_of(whole), weights_of(stopped))
    assert [row["val/acc1"] for row in rows_of(whole)] == [row["val/acc1"] for row in rows_of(stopped)]
    models = [read_own_file(run / "model.safetensors")[1] for run in (whole, stopped)]
    assert same_weights(*models)
    assert not list(stopped.rglob("*.tmp"))
    assert len(record_of(stopped)["segments"]) == 2
    assert read_checkpoint(stopped / "checkpoints/best.ckpt")


def test_a_finished_run_without_its_model_or_rows_has_them_again(whole, tmp_path, image_root):
    run = shutil.copytree(whole, tmp_path / "run")
    for name in ("model.safetensors", "metrics.csv", "run.json"):
        (run / name).unlink()
    fit_tiny(image_root, None, epochs=3, resume=str(run))
    assert same_weights(*(read_own_file(path / "model.safetensors")[1] for path in (whole, run)))
    assert rows_of(whole) == rows_of(run)
    assert record_of(run)["identity"] == record_of(whole)["identity"]
    assert record_of(run)["status"] == "finished"


def test_a_run_without_a_whole_checkpoint_or_record_is_refused(stopped, image_root):
    for path in (stopped / "checkpoints").iterdir():
        _cut(path)
    (stopped / "run.json").rename(stopped / "kept")
    with pytest.raises(RunError, match=r"run\.json cannot be read.*Restore it"):
        fit_tiny(image_root, None, epochs=3, resume=str(stopped))
    (stopped / "kept").rename(stopped / "run.json")
    with pytest.raises(RunError, match=r"no checkpoint that is whole.*Begin it again"):
        fit_tiny(image_root, None, epochs=3, resume=str(stopped))
    assert (stopped / "model.safetensors").is_file()


def test_a_failed_first_save_keeps_the_model_that_is_there(image_root, tmp_path, monkeypatch):
    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(RunError, match=r"/(last|best).ckpt: No space left .* Make room"):
        fit_tiny(image_root, tmp_path / "run", trainer={"callbacks": [Fill()]})
    assert (tmp_path / "run/model.safetensors").is_file()
    assert record_of(tmp_path / "run")["status"] == "failed"


def test_a_run_killed_between_its_first_writes_is_begun_by_resume_auto(image_root, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.run.json.abcdefgh.tmp").write_text("{")
    assert fit_tiny(image_root, tmp_path / "run", epochs=1, resume="auto").epochs == 1
