"""Options of the data as a run sees them: bad images, weights, mixing, repeats, cache, waiting."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from tests.training.runs import StopAfter, record_of, run_tiny, same_weights, weights_of
from vit_cls.data import dataset
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.mixing import MixOptions
from vit_cls.errors import ConfigError, DataError, ImageError
from vit_cls.training.options import OptimOptions


def _fit(root, run_dir, *, epochs=2, optim=None, trainer=None, resume=None, **data):
    settings = {"epochs": epochs, "optim": optim, "trainer": trainer, "resume": resume}
    return run_tiny(root, run_dir, data=data, **settings)


@pytest.fixture
def broken_root(image_root, tmp_path):
    """Two training files and one validation file cannot be read."""
    root = tmp_path / "data"
    shutil.copytree(image_root, root)
    for path in ("train/blue/3.png", "train/red/0.png", "val/red/1.png"):
        (root / path).write_bytes((root / path).read_bytes()[:40])
    return root


# --- bad images


def test_bad_images_are_skipped_counted_and_named_within_the_budget(broken_root, tmp_path, caplog):
    result, module = _fit(broken_root, tmp_path / "run", max_bad_images=3)
    assert result.images == 7  # of 8 in validation: never replaced by another
    assert len(module.bad_images) == 3
    record = record_of(tmp_path / "run")
    named = {path.removeprefix(f"{broken_root}/") for path in record["data"]["bad_images"]}
    assert named == {"train/blue/3.png", "train/red/0.png", "val/red/1.png"}
    assert all(record["data"]["bad_images"].values())
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert (
        sum("skipped, cannot be read as an image" in text for text in warnings) == 3
    )  # once each, in 2 epochs


def test_one_bad_image_too_many_stops_the_run(broken_root, tmp_path):
    with pytest.raises(ImageError, match=r"It is number 3 .*allow more with data.max_bad_images \(now 2\)"):
        _fit(broken_root, tmp_path / "run", max_bad_images=2)
    with pytest.raises(ImageError, match=r"\.png cannot be read as an image: .*\(now 0\)"):
        _fit(broken_root, tmp_path / "run2")
    with pytest.raises(ConfigError, match=r"data.max_bad_images must be at least 0"):
        ImageDataModule("somewhere", max_bad_images=-1)


def test_a_batch_without_a_readable_image_is_passed_over(broken_root, tmp_path):
    result, _ = _fit(broken_root, tmp_path / "run", epochs=1, max_bad_images=3, batch_size=1)
    assert result.images == 7


# --- weights


class _Seen(Callback):
    def __init__(self):
        self.targets = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.targets += batch.targets.tolist()


@pytest.fixture
def uneven_root(image_root, tmp_path):
    """Twelve blue images and two red ones."""
    root = tmp_path / "uneven"
    shutil.copytree(image_root, root)
    for path in sorted((root / "train/red").iterdir())[2:]:
        path.unlink()
    return root


def test_balanced_weights_draw_both_classes_equally_often(uneven_root, tmp_path):
    for name, weights in (("plain", None), ("balanced", "balanced")):
        seen = _Seen()
        _fit(uneven_root, tmp_path / name, epochs=12, weights=weights, trainer={"callbacks": [seen]})
        share = sum(seen.targets) / len(seen.targets)
        assert len(seen.targets) == 12 * 14
        assert share == pytest.approx(0.5, abs=0.12) if weights else share == 2 / 14
    with pytest.raises(ConfigError, match=r"data.weights must be balanced or null; got 'even'"):
        ImageDataModule("somewhere", weights="even")


def test_class_weights_change_the_loss_as_they_should(uneven_root, tmp_path):
    losses = {}
    for weights in (None, "balanced"):
        optim = {"class_weights": weights, "lr": 1e-12, "label_smoothing": 0.0}
        result, _ = _fit(uneven_root, tmp_path / str(weights), epochs=1, optim=optim, batch_size=14)
        losses[weights] = result.history[0]["train/loss"]
    assert losses[None] != losses["balanced"]
    assert abs(losses["balanced"] - 0.693) < 0.2  # fresh weights: near log 2 whatever the weights
    with pytest.raises(ConfigError, match=r"optim.class_weights must be balanced or null"):
        OptimOptions(class_weights="even")


def test_balanced_accuracy_is_in_every_row(uneven_root, tmp_path):
    result, _ = _fit(uneven_root, tmp_path / "run", epochs=1)
    row = result.history[0]
    assert 0 <= row["val/balanced_acc1"] <= 1
    assert row["val/acc1"] == pytest.approx(row["val/balanced_acc1"])  # 4 and 4 images in validation


# --- mixing and repeats


@pytest.mark.parametrize(
    "data",
    [
        {"mix": MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0, erase_prob=0.5)},
        {"repeats": 3},
        {"weights": "balanced"},
        {"augment": "randaugment"},
        {"augment": "trivialaugment", "mix": MixOptions(cutmix_alpha=1.0)},
    ],
    ids=str,
)
def test_a_run_is_the_same_for_any_number_of_workers_and_when_it_was_resumed(image_root, tmp_path, data):
    _fit(image_root, tmp_path / "whole", epochs=3, **data)
    _fit(image_root, tmp_path / "plain", epochs=3)
    whole = weights_of(tmp_path / "whole")
    assert not same_weights(whole, weights_of(tmp_path / "plain"))  # the option does something
    _fit(
        image_root, tmp_path / "parts", epochs=3, num_workers=2, trainer={"callbacks": [StopAfter(2)]}, **data
    )
    _fit(image_root, None, epochs=3, resume=str(tmp_path / "parts"), **data)
    assert same_weights(whole, weights_of(tmp_path / "parts"))


# --- cache


def test_a_cache_spares_decoding_and_changes_nothing(image_root, tmp_path, monkeypatch):
    plain, _ = _fit(image_root, tmp_path / "plain", epochs=3)
    reads = []
    read = dataset.read_file
    monkeypatch.setattr(
        dataset, "read_file", lambda path, *rest: (reads.append(path.parts[-3]), read(path, *rest))[1]
    )
    cached, _ = _fit(image_root, tmp_path / "cached", epochs=3, cache=str(tmp_path / "cache"))
    assert reads.count("val") == 8  # of three epochs with 8 images each
    assert reads.count("train") == 3 * 24
    assert [row["val/loss"] for row in plain.history] == [row["val/loss"] for row in cached.history]
    _fit(image_root, tmp_path / "again", epochs=1, cache=str(tmp_path / "cache"))
    assert reads.count("val") == 8


# --- some of the validation


class _Validated(Callback):
    def __init__(self):
        self.epochs, self.targets = [], []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.epochs[-1] += batch.indices.tolist()
        self.targets += batch.targets.tolist()


@pytest.mark.parametrize("limit", [1, 0.5])
def test_a_part_of_the_validation_is_of_all_classes_and_said_to_be_a_part(
    image_root, tmp_path, caplog, limit
):
    seen = _Validated()
    trainer = {"limit_val_batches": limit, "callbacks": [seen]}
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        result, _ = _fit(image_root, tmp_path / "run", batch_size=4, trainer=trainer)
    assert seen.targets.count(0) == seen.targets.count(1) == 4  # two of each class in each epoch
    assert seen.epochs[0] == seen.epochs[1]
    assert result.images == 4
    data = record_of(tmp_path / "run")["data"]
    assert (data["scored_val_images"], data["val_images"]) == (4, 8)
    said = [entry.getMessage() for entry in caplog.records if "limit_val_batches" in entry.getMessage()]
    assert said == [
        f"trainer.limit_val_batches {limit:g}: 4 of 8 images are scored, the same each time, spread over the "
        "classes"
    ]


def test_the_whole_validation_is_in_its_own_order(image_root, tmp_path):
    seen = _Validated()
    _fit(image_root, tmp_path / "run", epochs=1, trainer={"limit_val_batches": 2, "callbacks": [seen]})
    assert seen.epochs == [list(range(8))]
    data = record_of(tmp_path / "run")["data"]
    assert data["scored_val_images"] == data["val_images"] == 8
    with pytest.raises(ConfigError, match=r"trainer.limit_val_batches 0.2 is less than one of the 2 batches"):
        _fit(image_root, tmp_path / "none", epochs=1, trainer={"limit_val_batches": 0.2})
    assert not (tmp_path / "none").exists()


# --- waiting


def test_waiting_for_images_is_measured_and_advised_on(image_root, tmp_path, monkeypatch, caplog):
    read = dataset.read_file
    monkeypatch.setattr(dataset, "read_file", lambda *given: (time.sleep(0.02), read(*given))[1])
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        result, _ = _fit(image_root, tmp_path / "slow", epochs=3)
    assert all(0.3 < row["data_wait"] <= 1.0 for row in result.history)
    advice = [e.getMessage() for e in caplog.records if "waiting for images" in e.getMessage()]
    assert len(advice) == 1
    assert "raise data.num_workers (now 0; this process may use" in advice[0]


# --- leakage, groups and manifests


@pytest.fixture
def leaking_root(image_root, tmp_path):
    """One training image is in the validation folder too, under another name and class."""
    root = tmp_path / "leaking"
    shutil.copytree(image_root, root)
    shutil.copy(root / "train/blue/3.png", root / "val/red/copy.png")
    return root


def test_images_in_both_parts_stop_the_run_unless_allowed_by_name(leaking_root, tmp_path):
    with pytest.raises(
        DataError,
        match=r"val/red/copy.png \(.*train/blue/3.png\).*vit-cls doctor.*--data.allow '\[leakage\]'",
    ):
        _fit(leaking_root, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()
    _fit(leaking_root, tmp_path / "run", epochs=1, allow=["leakage"])
    record = record_of(tmp_path / "run")
    assert record["data"]["allowed"] == ["leakage"]
    assert record["data"]["problems"]["leakage"] >= 1
    with pytest.raises(ConfigError, match=r"data.allow must be one of leakage; got 'leakege'. Did you mean"):
        ImageDataModule("somewhere", allow=["leakege"])


def test_copies_that_our_own_split_parted_are_warned_of(image_root, tmp_path, caplog):
    root = tmp_path / "copies"
    for name in ("red", "blue"):
        shutil.copytree(image_root / "train" / name, root / name)
        for i in range(12):
            shutil.copy(root / name / f"{i}.png", root / name / f"copy_{i}.png")
    _fit(root, tmp_path / "run", epochs=1, val_fraction=0.4)
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert any("images that another split has too" in text for text in warnings)


def test_groups_are_never_divided(image_root, tmp_path):
    root = tmp_path / "grouped"
    for name in ("red", "blue"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            shutil.copy(image_root / "train" / name / f"{i}.png", root / name / f"patient{i % 4}_{i}.png")
    _, module = _fit(root, tmp_path / "run", epochs=1, val_fraction=0.25, group_by=r"(patient\d+)")
    parts = [
        {path.split("/")[1].split("_")[0] for path in source.index.paths}
        for source in (module.train_source, module.val_source)
    ]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    with pytest.raises(ConfigError, match=r"data.group_by has no effect with data.name digits"):
        ImageDataModule(name="digits", group_by="(a)")


def test_a_manifest_takes_the_place_of_the_folder(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "images")
    rows = ["path,label,split,weight"]
    for split in ("train", "val"):
        for name in ("red", "blue"):
            for i in range(12 if split == "train" else 4):
                weight = 0 if split == "train" and i >= 6 else 1
                rows.append(f"images/{split}/{name}/{i}.png,{name.upper()},{split},{weight}")
    (tmp_path / "images.csv").write_text("\n".join(rows) + "\n")
    result, module = _fit(tmp_path / "images.csv", tmp_path / "run", epochs=1)
    assert module.class_names == ["BLUE", "RED"]
    assert (len(module.train_set), result.images) == (24, 8)
    paths = module.train_source.index.paths
    drawn = {Path(paths[index]).stem for _, index, _ in module.train_dataloader().batch_sampler.sampler}
    assert {int(stem) for stem in drawn} <= set(range(6))  # the others weigh nothing
