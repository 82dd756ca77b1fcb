"""The data module in anybody's Trainer: what it asks and refuses; own datasets and transforms."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms import v2

from tests.conftest import TINY
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.decode import decode_image
from vit_cls.data.mixing import MixOptions
from vit_cls.data.sampler import sample_seed
from vit_cls.data.transforms import eval_reader, keyed
from vit_cls.errors import ConfigError, DataError, ImageError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.presets import preset_config
from vit_cls.model.vit import VisionTransformer
from vit_cls.training.options import OptimOptions
from vit_cls.training.task import ClassificationTask

# Lightning's advice on workers, loggers and what it calls in torch is not about this data
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


def _task(class_names, crop_pct: float = 0.9, **settings) -> ClassificationTask:
    torch.manual_seed(0)
    model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=len(class_names), **TINY))
    preprocess = Preprocess((TINY["img_size"],) * 2, crop_pct=crop_pct)
    classifier = ImageClassifier(model, preprocess, class_names)
    return ClassificationTask(classifier, OptimOptions(lr=3e-3), **settings)


def _trainer(**options) -> Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "max_epochs": 1, **dict.fromkeys(quiet, False)}
    return Trainer(**{**settings, **options})


def _data(root, **settings) -> ImageDataModule:
    return ImageDataModule(str(root), **{"num_workers": 0, "batch_size": 5, **settings})


@pytest.fixture
def parts(tmp_path, write_folder) -> Path:
    """train/, val/ and test/ of two classes, with 6, 4 and 3 images."""
    for part, counts in (("train", (4, 2)), ("val", (2, 2)), ("test", (2, 1))):
        files = {name: [f"{part}{i}.png" for i in range(n)] for name, n in zip("ab", counts, strict=True)}
        write_folder(tmp_path / part, files)
    return tmp_path


# --- in anybody's Trainer


def test_fit_test_and_predict_need_nothing_but_a_root(image_root):
    data = _data(image_root)
    assert data.class_names == ["blue", "red"]  # before there is a Trainer
    trainer, task = _trainer(max_epochs=4), _task(data.class_names)
    trainer.fit(task, data)
    assert trainer.global_step == 4 * 5
    assert float(trainer.callback_metrics["val/images"]) == 8
    assert trainer.test(task, data, verbose=False)[0]["test/images"] == 8
    (first, second) = trainer.predict(task, data)
    assert (len(first), len(second)) == (5, 3)
    images = torch.stack(
        [
            eval_reader(16, crop_pct=0.9)(data.val_source.read(i))  # in their order, as the model wants them
            for i in range(8)
        ]
    )
    torch.testing.assert_close(torch.cat([first, second]), task.eval()(images).detach())


def test_the_model_is_asked_for_its_preprocessing_and_the_module_for_its_seed(image_root):
    orders = {}
    for seed in (0, 3):
        data = _data(image_root)
        task = _task(data.class_names, crop_pct=0.5, seed=seed)
        _trainer().fit(task, data)
        (batch, *_) = data.train_dataloader()
        orders[seed] = batch.indices.tolist()
        image = next(iter(data.val_dataloader())).images[0]
        assert torch.equal(image, eval_reader(16, crop_pct=0.5)(data.val_source.read(0)))
    assert orders[0] != orders[3]


def test_a_seed_that_was_chosen_for_the_data_must_be_the_modules(image_root):
    data = _data(image_root)
    data.load_index(3)
    with pytest.raises(ConfigError, match=r"the data has the seed 3, but ClassificationTask has 0.*seed=3"):
        _trainer().fit(_task(data.class_names), data)
    _trainer().fit(_task(data.class_names, seed=3), data)
    assert data.seed == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["red", "blue"],
            "the same names in another order: class 0 is blue of the data, red of the classifier",
        ),
        (["blue", "green"], "only the data has red; only the classifier has green"),
        (["blue", "red", "green"], "differ: only the classifier has green"),
    ],
)
def test_other_classes_than_the_classifiers_are_refused_by_name(image_root, names, message):
    trainer, task = _trainer(), _task(names)
    for run in (trainer.fit, trainer.validate, trainer.test):
        with pytest.raises(DataError, match=message):
            run(task, datamodule=_data(image_root))
    assert len(trainer.predict(task, _data(image_root))) == 2  # which needs no classes


def test_test_takes_the_test_part_and_says_so(parts, image_root, caplog):
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        data = _data(parts)
        task = _task(data.class_names)
        assert _trainer().test(task, data, verbose=False)[0]["test/images"] == 3
        assert sum(map(len, _trainer().predict(task, data))) == 3
        _trainer().test(_task(["blue", "red"]), _data(image_root), verbose=False)
    said = [entry.getMessage() for entry in caplog.records if entry.name == "vit_cls"]
    assert said == [
        f"3 images to test: {parts}/test",
        f"3 images to predict: {parts}/test",
        "8 images to test: the validation images, for there is no test part",
    ]


def test_a_limited_test_is_of_all_classes(parts):
    data = _data(parts, batch_size=1)
    found = _trainer(limit_test_batches=2).test(_task(data.class_names), data, verbose=False)
    assert found[0]["test/images"] == 2
    (first, second, _) = data.test_dataloader()
    assert {int(first.targets), int(second.targets)} == {0, 1}


def test_an_unreadable_image_of_the_test_part_is_named(parts):
    (parts / "test/b/test0.png").write_bytes(b"")
    data = _data(parts)
    with pytest.raises(ImageError, match=r"test/b/test0.png cannot be read as an image: the file is empty"):
        _trainer().test(_task(data.class_names), data, verbose=False)
    data = _data(parts, max_bad_images=3)
    assert _trainer().test(_task(data.class_names), data, verbose=False)[0]["test/images"] == 2
    with pytest.raises(ImageError, match=r"test/b/test0.png cannot be read.*so none is skipped"):
        _trainer().predict(_task(data.class_names), data)  # its rows have no names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ddp", "devices": 1}, r"use_distributed_sampler=True.*default.*=False\)"),
        ({"overfit_batches": 2}, r"overfit_batches=2\) swaps the sampler.*limit_train_batches"),
    ],
)
def test_a_trainer_that_would_change_the_order_is_refused(image_root, options, message):
    data = _data(image_root)
    data.trainer = _trainer(**options)
    data.trainer.strategy.connect(_task(data.class_names))
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")
    if "strategy" in options:
        data.trainer = _trainer(**options, use_distributed_sampler=False)
        data.trainer.strategy.connect(_task(data.class_names))
        data.setup("fit")


def test_a_module_without_classifier_is_told_what_to_do_and_mixing_must_be_the_modules(image_root):
    data = _data(image_root)
    for run in (
        lambda: _trainer().validate(_Foreign(), datamodule=data),
        data.test_dataloader,
        lambda: _data(image_root).setup("fit"),
    ):
        with pytest.raises(ConfigError, match=r"does not know how.*classifier.preprocess.*data.configure\("):
            run()
    data.configure(seed=0, preprocess=Preprocess((16, 16)))
    _trainer().validate(_Foreign(), datamodule=data)
    mix = MixOptions(mixup_alpha=0.2)
    with pytest.raises(ConfigError, match=r"MixOptions have no effect in ClassificationTask.*mix=MixOptions"):
        _trainer().fit(_task(["blue", "red"]), _data(image_root, mix=mix))
    _trainer().fit(_task(["blue", "red"], mix=mix), _data(image_root, mix=mix))


class _Foreign(LightningModule):
    def validation_step(self, batch, batch_idx):
        assert batch.images.shape[1:] == (3, 16, 16)


# --- own augmentation


def test_an_own_transform_is_a_function_of_the_sample(image_root):
    transform = v2.Compose([v2.RandomResizedCrop((16, 16)), v2.ColorJitter(0.5, 0.5)])
    data = _data(image_root, augment=transform)
    data.configure(seed=5, preprocess=Preprocess((16, 16)))
    assert data.augment.startswith("Compose( RandomResizedCrop(")  # in run.json
    for workers in (0, 2):
        data.num_workers = workers
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(2)
        for batch in loader:
            for image, i in zip(batch.images, batch.indices.tolist(), strict=True):
                pixels = decode_image(data.train_source.read(i))
                assert torch.equal(image, keyed(transform, pixels, sample_seed(5, 2, i)))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Compose([v2.ToDtype(torch.float32, scale=True)]), "must give a uint8 tensor.*got torch.float32"),
        (v2.MixUp(num_classes=2), "MixUp.* fails on an image"),
        (3, "must be a transform of an image"),
    ],
)
def test_a_transform_that_makes_no_pixels_is_refused_before_any_training(image_root, transform, message):
    with pytest.raises(ConfigError, match=message):
        _data(image_root, augment=transform).configure(seed=0, preprocess=Preprocess((16, 16)))


# --- own datasets


class _Pictures(Dataset):
    """Reddish (0) and bluish (1) noise; item ``broken`` raises."""

    def __init__(self, size: int, *, broken: int | None = None, tensors: bool = False) -> None:
        self.size, self.broken, self.tensors, self.reads = size, broken, tensors, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i):
        self.reads += 1
        if i == self.broken:
            raise KeyError("lost")
        pixels = np.random.default_rng(i).integers(0, 60, (20, 24, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 150
        image = torch.from_numpy(pixels).permute(2, 0, 1) if self.tensors else Image.fromarray(pixels)
        return image, i % 2


@pytest.mark.parametrize("tensors", [False, True])
def test_own_datasets_go_through_the_models_preprocessing_in_the_keyed_order(tensors):
    train, val = _Pictures(24, tensors=tensors), _Pictures(8, tensors=tensors)
    data = ImageDataModule.of_datasets(train, val, ["red", "blue"], num_workers=0, batch_size=5)
    trainer, task = _trainer(max_epochs=8), _task(data.class_names)
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val/acc1"]) == 1
    assert data.train_source.index.counts().tolist() == [12, 12]
    (batch, *_) = data.val_dataloader()
    pixels = _Pictures(8, tensors=True)[0][0]
    assert torch.equal(batch.images[0], eval_reader(16, crop_pct=0.9)(pixels))
    assert trainer.test(task, data, verbose=False)[0]["test/images"] == 8
    more = ImageDataModule.of_datasets(train, val, ["red", "blue"], test=_Pictures(3), num_workers=0)
    assert trainer.test(task, more, verbose=False)[0]["test/images"] == 3


def test_labels_are_those_of_torchvisions_targets_or_read_once(caplog):
    told = _Pictures(6)
    told.targets, told.classes = [i % 2 for i in range(6)], ["red", "blue"]
    data = ImageDataModule.of_datasets(Subset(told, [1, 4, 5]), _Pictures(2))
    assert data.class_names == ["red", "blue"]
    assert data.train_source.index.labels.tolist() == [1, 0, 1]
    assert told.reads == 1  # to look at its form
    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    plain = TensorDataset(pixels, torch.tensor([0, 2, 1, 2]))
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        data = ImageDataModule.of_datasets(plain, plain, ["a", "b", "c"])
    assert data.class_names == ["a", "b", "c"]
    assert data.val_source.index.labels.tolist() == [0, 2, 1, 2]
    assert "the train dataset, TensorDataset, has no targets: its 4 items are read once" in caplog.text
    told.targets = [0] * 6
    data = ImageDataModule.of_datasets(told, told, num_workers=0)
    with pytest.raises(ImageError, match=r"val\[1\] cannot be read as an image: its label is 1, but was 0"):
        _trainer().fit(_task(["red", "blue"]), data)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_raises_is_a_row_and_named_by_its_number(workers, caplog):
    datasets = _Pictures(24, broken=7), _Pictures(8)
    settings = {"class_names": ["red", "blue"], "num_workers": workers}
    with pytest.raises(
        ImageError, match=r"_Pictures/train\[7\] cannot be read as an image: KeyError: 'lost'"
    ):
        _trainer().fit(_task(["red", "blue"]), ImageDataModule.of_datasets(*datasets, **settings))
    data = ImageDataModule.of_datasets(*datasets, max_bad_images=1, **settings)
    _trainer().fit(_task(["red", "blue"]), data)
    assert list(data.bad_images) == ["_Pictures/train[7]"]


class _Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.item


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(())


GREY = torch.zeros(1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            _Items((GREY.float(), 0)),
            r"train\[0\] of _Items must be .*torch.float32 \(1, 8, 8\).*leave ToTensor",
        ),
        (_Items(GREY), r"train\[0\] of _Items must be \(image, label\)"),
        (_Items((GREY, "cat")), r"train\[0\] of _Items must be .*'cat'"),
        (_Items((GREY, 2)), r"train\[0\] of _Items has the label 2, but there are 2 class names.*0 to 1"),
        (Subset(_Pictures(3), []), "train of Subset has no items"),
        (_Stream(), "_Stream, must have a length and items by number"),
    ],
    ids=str,
)
def test_a_dataset_of_another_form_is_refused_before_any_training(dataset, message):
    with pytest.raises((ConfigError, DataError), match=message):
        ImageDataModule.of_datasets(dataset, _Pictures(2), ["red", "blue"])


def test_grey_tensors_have_three_channels_and_class_names_are_asked_for():
    data = ImageDataModule.of_datasets(_Items((GREY, 0)), _Items((GREY, 1)), ["a", "b"])
    assert data.class_names == ["a", "b"]
    assert data.train_source.read(1).shape == (3, 8, 8)
    with pytest.raises(ConfigError, match=r"class_names is missing: _Items has no `classes`"):
        ImageDataModule.of_datasets(_Items((GREY, 0)), _Items((GREY, 1)))
