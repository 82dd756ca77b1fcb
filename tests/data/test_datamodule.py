"""The data of a run: settings are checked, images are split, and a file that fails stops the run by name."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from vit_cls.data.datamodule import NAMES, ImageDataModule
from vit_cls.data.decode import decode_image
from vit_cls.data.digits import load_digits
from vit_cls.data.sampler import sample_seed
from vit_cls.data.transforms import AUGMENTS, eval_reader, train_reader
from vit_cls.errors import ConfigError, DataError, ImageError
from vit_cls.model.classifier import Preprocess


@pytest.fixture
def split_folder(tmp_path, write_folder) -> Path:
    """6 training and 4 validation images of two classes; no path is in both."""
    write_folder(tmp_path / "train", {"a": [f"t{i}.png" for i in range(4)], "b": ["t0.png", "t1.png"]})
    write_folder(tmp_path / "val", {"a": ["v0.png", "v1.png"], "b": ["v0.png", "v1.png"]})
    return tmp_path


def _configured(
    seed: int = 0, img_size: tuple[int, int] = (12, 12), configure=(), **options
) -> ImageDataModule:
    data = ImageDataModule(num_workers=0, **options)
    data.configure(seed=seed, preprocess=Preprocess(img_size, **dict(configure)))
    return data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.root is missing: .*--data\.name digits"),
        ({"name": "digits", "root": "/x"}, r"data\.root /x has no effect with data\.name digits"),
        (
            {"name": "digit"},
            r"data\.name must be one of folder, digits; got 'digit'\. Did you mean `digits`\?",
        ),
        ({"name": "zzz"}, r"data\.name must be one of folder, digits; got 'zzz'\.$"),
        (
            {"name": "digits", "augment": "crop_flop"},
            r"data\.augment must be one of .*got 'crop_flop'\. Did you mean `crop_flip`\?",
        ),
        (
            {"name": "digits", "val_fraction": 0.0},
            r"data\.val_fraction must be above 0 and below 1",
        ),
    ],
)
def test_setting_that_is_unknown_or_without_effect_is_refused_with_the_next_step(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageDataModule(**options)


def test_missing_root_is_named_when_the_images_are_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"data\.root .*nowhere does not exist"):
        _configured(root=str(tmp_path / "nowhere"))


def test_folders_are_taken_as_they_are(split_folder):
    data = _configured(root=str(split_folder))
    assert data.class_names == ["a", "b"]
    assert data.train_source.index.counts().tolist() == [4, 2]
    assert data.val_source.index.counts().tolist() == [2, 2]
    assert data.origin == f"{split_folder / 'train'} and {split_folder / 'val'}"


def test_val_fraction_and_seed_reach_the_split_of_a_folder(tmp_path, write_folder):
    write_folder(tmp_path, {"a": 10, "b": 20})
    held_out = {}
    for seed in (0, 1):
        data = _configured(root=str(tmp_path), val_fraction=0.3, seed=seed)
        assert data.train_source.index.counts().tolist() == [7, 14]
        assert data.val_source.index.counts().tolist() == [3, 6]
        assert f"seed {seed}" in data.origin
        held_out[seed] = set(data.val_source.index.paths)
    assert held_out[0] != held_out[1]


def test_digits_are_split_with_the_pixels_of_their_names():
    data = _configured(name="digits", val_fraction=0.25, seed=3)
    everything = load_digits("train")
    rows = {path: i for i, path in enumerate(everything.index.paths)}
    train, val = data.train_source, data.val_source
    assert sorted([*train.index.paths, *val.index.paths]) == sorted(rows)
    assert val.index.counts().tolist() == [round(0.25 * n) for n in everything.index.counts()]
    for source in (train, val):
        for i in range(0, len(source.index), 37):
            path = source.index.paths[i]
            assert torch.equal(source.read(i), everything.read(rows[path]))
            assert source.index.labels[i] == int(path.split("/")[0])
    assert data.class_names == [str(digit) for digit in range(10)]
    assert "0.25" in data.origin


def test_every_name_of_the_table_gives_training_and_validation_batches(split_folder):
    assert NAMES == ("folder", "digits")
    for name in NAMES:
        data = _configured(name=name, root=str(split_folder) if name == "folder" else None, batch_size=3)
        for loader, size in (
            (data.train_dataloader(), len(data.train_source.index)),
            (data.val_dataloader(), len(data.val_source.index)),
        ):
            batches = list(loader)
            assert all(batch.images.shape[1:] == (3, 12, 12) for batch in batches)
            assert max(len(batch.images) for batch in batches) <= data.batch_size == 3
            assert sorted(i for batch in batches for i in batch.indices.tolist()) == list(range(size))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_training_images_are_augmented_as_asked_by_seed_epoch_and_index(split_folder, augment):
    data = _configured(root=str(split_folder), augment=augment, seed=5, img_size=(10, 14))
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(2)
    batch = next(iter(loader))
    assert batch.indices.tolist() != list(range(6))
    for image, target, i in zip(batch.images, batch.targets, batch.indices.tolist(), strict=True):
        pixels = decode_image(data.train_source.index.path(i).read_bytes())
        expected = train_reader((10, 14), augment=augment)(pixels, sample_seed(5, 2, i))
        assert torch.equal(image, expected)
        assert target == data.train_source.index.labels[i]


@pytest.mark.parametrize(
    "crop",
    [
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.5, "crop_mode": "center", "interpolation": "bicubic"},
    ],
)
def test_validation_images_are_in_order_and_cropped_as_the_model_asks(split_folder, crop):
    data = _configured(root=str(split_folder), augment="crop_flip", configure=crop)
    (batch,) = data.val_dataloader()
    assert batch.indices.tolist() == [0, 1, 2, 3]
    for i, image in enumerate(batch.images):
        pixels = decode_image(data.val_source.index.path(i).read_bytes())
        assert torch.equal(image, eval_reader(12, **crop)(pixels))


def test_digits_need_no_worker_processes_and_a_number_that_is_given_is_kept(split_folder):
    digits = ImageDataModule(name="digits")
    digits.configure(seed=0, preprocess=Preprocess((12, 12)))
    assert digits.train_dataloader().num_workers == 0
    folder = ImageDataModule(root=str(split_folder), num_workers=2)
    folder.configure(seed=0, preprocess=Preprocess((12, 12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_cls.data.loader.default_num_workers", lambda processes: 2 * processes)
        assert folder.val_dataloader().num_workers == 2
        folder.num_workers = None
        assert folder.val_dataloader().num_workers == 1  # there is one batch
        folder.batch_size = 1
        assert folder.val_dataloader().num_workers == 2
        folder.trainer = _trainer(strategy="ddp", devices=2)
        assert folder.val_dataloader().num_workers == 2 == math.ceil(4 / 2)
        folder.trainer = None
        folder.num_workers = 1
        assert folder.val_dataloader().num_workers == 1


def test_processes_share_the_images_and_too_few_images_are_refused(split_folder):
    data = _configured(root=str(split_folder))
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=2,
            num_devices=2,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        seen.append([i for batch in data.train_dataloader() for i in batch.indices.tolist()])
    assert len(seen[0]) == len(seen[1]) == 3
    assert sorted(seen[0] + seen[1]) == list(range(6))
    data.trainer.world_size = 7
    with pytest.raises(DataError, match=r"6 training image\(s\) cannot be shared by 7 processes"):
        data.train_dataloader()


class _Idle(LightningModule):
    """Takes batches and learns nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", batch.indices.tolist()))

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch.indices.tolist()))

    def configure_optimizers(self):
        return None


def _trainer(**options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


# Lightning's advice on workers and optimizers is not about this data
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("broken", ["train/b/t1.png", "val/b/v1.png", None])
def test_lightning_stops_at_the_broken_file_whichever_split_it_is_in(split_folder, broken):
    if broken:
        (split_folder / broken).write_bytes(b"")
    data, model = _configured(root=str(split_folder), batch_size=2), _Idle()
    trainer = _trainer(max_epochs=2, num_sanity_val_steps=0)
    if broken:
        with pytest.raises(ImageError, match=rf"{broken} cannot be read as an image: the file is empty"):
            trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, datamodule=data)
        for split, size in (("train", 6), ("val", 4)):
            seen = [i for kind, indices in model.seen if kind == split for i in indices]
            assert sorted(seen[:size]) == sorted(seen[size:]) == list(range(size))
            assert (seen[:size] == seen[size:]) == (split == "val")  # a new order in each training epoch
