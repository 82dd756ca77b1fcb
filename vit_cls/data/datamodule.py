"""The data of one training run: an image folder or the embedded digits, split, transformed and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vit_cls.checks import check_choice, check_range
from vit_cls.data.agreement import (
    agreed_seed,
    refuse_gap,
    refuse_mixing_elsewhere,
    refuse_other_classes,
    refuse_other_samplers,
    refuse_unconfigured,
    too_many,
    training_place,
)
from vit_cls.data.augmentations import augmentation_of, name_of
from vit_cls.data.cache import PixelCache
from vit_cls.data.dataset import ArraySource, Batch, FolderSource, ImageDataset, ImageSource
from vit_cls.data.doctor.issues import Problem
from vit_cls.data.doctor.report import quick_check
from vit_cls.data.folders import DIGITS, FoundParts, find_parts
from vit_cls.data.index import balanced_weights
from vit_cls.data.loader import TIMEOUT_SECONDS, make_loader
from vit_cls.data.mixing import UNMIXED, MixOptions
from vit_cls.data.own_datasets import DatasetSource, dataset_sources
from vit_cls.data.partition import Split, split_for_training
from vit_cls.data.sampler import LIMITS, EpochSampler, scored_images, spread_order
from vit_cls.data.transforms import AUGMENTS, Preprocessing, model_reader
from vit_cls.errors import ConfigError, DataError, ImageError
from vit_cls.own_code import HINT

log = logging.getLogger("vit_cls")

NAMES = ("folder", DIGITS)
BALANCED = "balanced"
FROM_ANY_PROCESS = {"from_any_process": True}
"""Marks a log record that one process of a run alone has; of others the first one's is enough."""
ALLOWED = ("leakage",)  # problems that stop a run unless they are allowed by name


class ImageDataModule(LightningDataModule):
    """Images to train, validate, test and predict on, as uint8 batches, in anybody's ``Trainer``.

    How images are read it asks the model (``classifier.preprocess`` of the LightningModule), and the seed of
    split, order and augmentation is the LightningModule's ``seed``, or 0. ``test`` and ``predict`` take the
    test part, or where there is none the validation images, in their order.

    Args:
        root: The images: ``train/`` and ``val/`` (or other usual spellings) with one folder a class; one
            folder of class folders, which is split; a manifest, a CSV or Parquet file; or the word
            ``digits``, the embedded ones.
        name: ``folder``, or the embedded ``digits`` (their held-out third is left for ``evaluate``).
        val_fraction: Share of each class to validate on, where there is no validation folder.
        group_by: Pattern with one group, such as ``(patient_\\d+)``: files for whose path it finds the same
            are never split between training and validation. A manifest has a column for that.
        batch_size: Images a step, for each process, at most: the batches of an epoch are as few as that
            allows, and differ by one image.
        num_workers: Loading processes; null means the usable cores, shared by the processes of the run, from
            4 on without one for training itself, and no more than batches (0 for the digits); fewer where
            the shared memory does not hold their batches.
        augment: Training transform: ``crop_flip``, ``affine`` (small turns and shifts), ``randaugment``,
            ``trivialaugment`` or ``none``; or the name of your own (``--import``, docs/extending.md); from
            Python also such a transform itself.
        repeats: Copies of each image in an epoch, augmented each on its own; an epoch sees fewer images then.
        weights: ``balanced`` draws every class equally often; null draws every image once an epoch, or as a
            manifest's weights say.
        max_bad_images: Files that may be unreadable before the run stops; each is named, and skipped.
        allow: Problems to train in spite of, by name: ``leakage``. They are recorded.
        cache: Folder for the decoded validation images; null decodes them in every epoch.
        mix: Mixup, CutMix and erasing of training batches.
        timeout_seconds: How long no loading process may give a batch before the run ends; 0 is for ever.

    Raises:
        ConfigError: If a setting is unknown or cannot take effect.

    Example:
        >>> data = ImageDataModule(name="digits")
        >>> len(data.class_names), len(data.train_source.index) + len(data.val_source.index)
        (10, 1198)
    """

    def __init__(
        self,
        root: str | None = None,
        name: str = "folder",
        val_fraction: float = 0.1,
        group_by: str | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        augment: str | Callable[..., Any] = "crop_flip",
        repeats: int = 1,
        weights: str | None = None,
        max_bad_images: int = 0,
        allow: list[str] | None = None,
        cache: str | None = None,
        mix: MixOptions = UNMIXED,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        super().__init__()
        check_choice("data.name", name, NAMES)
        if isinstance(augment, str):
            check_choice("data.augment", augment, AUGMENTS, hint=HINT)
        if name == "folder" and root is None:
            raise ConfigError(
                "data.root is missing: the folder with the images, train/ and val/ or one folder a class; a "
                "manifest (.csv, .tsv, .parquet); or the word digits. (`--data.name digits` needs no root.)"
            )
        if name == "digits" and root is not None:
            raise ConfigError(f"data.root {root} has no effect with data.name digits. Remove one of the two.")
        check_range("data.val_fraction", val_fraction, above=0, below=1)
        if weights not in (None, BALANCED):
            raise ConfigError(f"data.weights must be {BALANCED} or null; got {weights!r}.")
        for kind in allow or []:
            check_choice("data.allow", kind, ALLOWED)
        check_range("data.max_bad_images", max_bad_images, at_least=0)
        if group_by is not None and name == "digits":
            raise ConfigError("data.group_by has no effect with data.name digits. Remove one of the two.")
        self.root = root
        self.name = name
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.augment = augment if isinstance(augment, str) else name_of(augment)
        self._augmentation = augment if isinstance(augment, str) else augmentation_of(self.augment, augment)
        self.group_by = group_by
        self.repeats = repeats
        self.weights = weights
        self.max_bad_images = max_bad_images
        self.cache = cache
        self.allow = list(allow or [])
        self.problems: list[Problem] = []
        self.mix = mix
        self.bad_images: dict[str, str] = {}
        self.begins: tuple[int, int] = 0, 0  # the epoch of training, and how many of its batches are done
        self.train_source: ImageSource
        self.val_source: ImageSource
        self.origin = ""
        self.given: Split | None = None
        self.given_test: ImageSource | None = None
        self._parts: FoundParts | None = None
        self._chosen_seed: int | None = None
        self._configured: tuple[int, Preprocessing] | None = None

    @classmethod
    def of_sources(
        cls, train: ImageSource, val: ImageSource, origin: str, **settings: Any
    ) -> ImageDataModule:
        """Images that somebody else has found and split, from an ``origin`` told in a sentence.

        Args:
            val: Labelled by the classes of ``train``.
            settings: Further arguments of the constructor; those that find or split images have no effect.
        """
        data = cls(root=str(train.index.root), **settings)
        data.given = Split(train, val, origin)
        return data

    @classmethod
    def of_datasets(
        cls,
        train: Any,
        val: Any,
        class_names: Sequence[str] | None = None,
        *,
        test: Any = None,
        **settings: Any,
    ) -> ImageDataModule:
        """Datasets of your own, map-style, of (image, label): see `vit_cls.data.own_datasets.DatasetSource`.

        Args:
            class_names: In the order of the labels; None takes the ``classes`` of ``train``.
            settings: Further arguments of the constructor; those that find or split images have no effect.

        Raises:
            ConfigError: If there are no class names, or an item is not of that form.
            DataError: If a label is none of the classes.
        """
        sources = dataset_sources(class_names, train=train, val=val, test=test)
        origin = f"the datasets {type(train).__name__} and {type(val).__name__}"
        data = cls.of_sources(sources["train"], sources["val"], origin, **settings)
        data.given_test = sources.get("test")
        return data

    def setup(self, stage: str) -> None:
        """Find the images and read them as the model wants them; Lightning calls this.

        Raises:
            ConfigError: If the Trainer would change the order of the images, or the LightningModule does not
                say what it needs.
            DataError: If the images cannot be used, or have other classes than the classifier.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.trainer is not None:
            refuse_other_samplers(self.trainer)
            refuse_mixing_elsewhere(self.mix, module)
        classifier = getattr(module, "classifier", None)
        preprocess = getattr(classifier, "preprocess", None)
        if preprocess is not None:
            wanted = agreed_seed(self._chosen_seed, module), preprocess
            if wanted != self._configured:
                self._configure(*wanted)
        refuse_unconfigured(self._configured)
        if stage != "predict":
            refuse_other_classes(self.class_names, getattr(classifier, "class_names", None))

    def configure(self, *, seed: int, preprocess: Preprocessing) -> None:
        """Do before there is a Trainer what `setup` does: set the seed, and how the model wants its images.

        Raises:
            DataError: If the images cannot be used.
        """
        self._chosen_seed = seed
        self._configure(seed, preprocess)

    def _configure(self, seed: int, preprocess: Preprocessing) -> None:
        if not self.origin or seed != self.seed:
            self._find(seed)
        val = model_reader(preprocess)
        cache = None
        if self.cache is not None and isinstance(self.val_source, FolderSource):
            cache = PixelCache(Path(self.cache), self.val_source.index, val)
        train = model_reader(preprocess, augment=self._augmentation)
        for source in (self.train_source, self.val_source, self.given_test):
            if isinstance(source, DatasetSource):
                source.background = preprocess.background
        self.train_set = ImageDataset(self.train_source, train, seed=seed)
        self.val_set = ImageDataset(self.val_source, val, cache=cache)
        self._configured = seed, preprocess

    def _dataset(self, stage: str) -> ImageDataset:
        """The images of a stage; to test and to predict those of the test part, or else of the validation."""
        refuse_unconfigured(self._configured)
        if stage not in ("test", "predict"):
            return self.train_set if stage == "train" else self.val_set
        source, where = self.given_test, "the test dataset"
        if source is None and self._parts is not None and "test" in self._parts.places:
            source, where = self._parts.read("test", self.class_names), self._parts.where("test")
        if source is None:
            self.test_set, where = self.val_set, "the validation images, for there is no test part"
        else:
            self.test_set = ImageDataset(source, self.val_set.reader)
        log.info(f"{len(self.test_set):,} images to {stage}: {where}")
        return self.test_set

    def load_index(self, seed: int) -> None:
        """Find the images and split them, if they are to be split, by a seed; reads names, no pixels."""
        self._chosen_seed = seed
        self._find(seed)

    def _find(self, seed: int) -> None:
        self.seed = seed
        split = self.given
        if split is None:
            root, embedded = (DIGITS, True) if self.root is None else (self.root, False)
            self._parts = find_parts(root, name="data.root", embedded=embedded)
            split = split_for_training(
                self._parts, val_fraction=self.val_fraction, seed=seed, group_by=self.group_by
            )
            self._check(split)
        self.train_source, self.val_source, self.origin = split.train, split.val, split.origin

    def _check(self, split: Split) -> None:
        """Refuse images that are in training and in validation, unless that was allowed, or the split is made
        here.
        """
        if isinstance(split.train, ArraySource):
            return
        self.problems = quick_check(split.train.index, split.val.index)
        for problem in self.problems:
            text = f"{problem.title}: {problem.count}. {problem.advice}"
            shown = [f"{offender.path} ({offender.detail})" for offender in problem.offenders[:3]]
            examples = ", ".join(shown)
            if problem.severity == "error" and problem.kind not in self.allow and not split.made_here:
                raise DataError(
                    f"data.root {self.root}: {text} For example {examples}. `vit-cls doctor --data "
                    f"{self.root}` lists them all; to train all the same, --data.allow '[{problem.kind}]'."
                )
            if problem.severity != "note":
                log.warning(f"{text} ({examples})")

    def _weights(self) -> np.ndarray | None:
        """How often each training image is drawn, relative to the others."""
        index = self.train_source.index
        return balanced_weights(index) if self.weights == BALANCED else index.weights

    @property
    def class_names(self) -> list[str]:
        """The training classes, in the order of the labels; finds the images where that was not done."""
        if not self.origin:
            self._find(0)
        return self.train_source.index.class_names

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Name images that cannot be read, and raise ImageError at one too many, in the main process."""
        source = self._read_now().source
        for index, reason in batch.failures:
            path = str(source.index.path(index))
            if self.trainer is not None and self.trainer.predicting:
                refuse_gap(path, reason)
            if path in self.bad_images:
                continue
            self.bad_images[path] = reason
            if len(self.bad_images) > self.max_bad_images:
                raise ImageError(too_many(len(self.bad_images), self.max_bad_images, path, reason))
            log.warning(f"skipped, cannot be read as an image: {path}: {reason}", extra=FROM_ANY_PROCESS)
        return batch

    def _read_now(self) -> ImageDataset:
        """What the Trainer is going through."""
        if self.trainer is not None and self.trainer.training:
            return self.train_set
        scores = self.trainer is not None and (self.trainer.testing or self.trainer.predicting)
        return self.test_set if scores else self.val_set

    def state_dict(self) -> dict[str, Any]:
        """Where training is in its images, and which could not be read."""
        return {"place": list(training_place(self.trainer)), "bad_images": dict(self.bad_images)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: in the midst of an epoch with its next batch, for any number of workers."""
        self.begins, self.bad_images = tuple(state_dict["place"]), dict(state_dict["bad_images"])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of this process."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, over all processes; spread over the classes where Lightning takes but
        some of the batches (``trainer.limit_val_batches``).
        """
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The images of the test part likewise, or of the validation where there is none."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The images of `test_dataloader` in their order, dealt out to the processes in turn."""
        return self._loader("predict")

    def scored_images(self, limit: float | None, world_size: int) -> int:
        """Validation images that are scored where Lightning takes but some of the batches.

        Args:
            limit: Lightning's ``limit_val_batches``: a number of batches, or a share of them; None is all.
            world_size: Processes of the run.

        Raises:
            ConfigError: If that share is less than one batch.
        """
        return scored_images(len(self.val_set), self.batch_size, limit, world_size)

    def _order(self, dataset: ImageDataset, stage: str) -> np.ndarray | None:
        """The order of images that are scored: None is their own; over the classes where not all are."""
        if self.trainer is None or stage not in LIMITS:
            return None
        limit, images = getattr(self.trainer, LIMITS[stage].removeprefix("trainer.")), len(dataset)
        scored = scored_images(images, self.batch_size, limit, self.trainer.world_size, stage)
        if scored == images:
            return None
        if self.trainer.is_global_zero:
            part = f"{scored:,} of {images:,} images are scored, the same each time, spread over the classes"
            log.info(f"{LIMITS[stage]} {limit:g}: {part}")
        return spread_order(dataset.source.index.labels)

    def _loader(self, stage: str) -> DataLoader[Batch]:
        trainer, dataset, shuffle = self.trainer, self._dataset(stage), stage == "train"
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        order: dict[str, Any]
        if shuffle:
            order = {"weights": self._weights(), "repeats": self.repeats}
        else:
            order = {"order": self._order(dataset, stage)}
        sampler = EpochSampler(
            len(dataset), seed=self.seed, shuffle=shuffle, rank=rank, world_size=world_size, **order
        )
        if shuffle and not len(sampler):
            raise DataError(f"{len(dataset)} training image(s) cannot be shared by {world_size} processes.")
        return make_loader(
            dataset,
            sampler,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            even=stage != "predict",
            timeout_seconds=self.timeout_seconds,
            loaders=2 if stage in ("train", "val") else 1,
            local_processes=1 if trainer is None else trainer.num_devices,
            begins=max(self.begins, (getattr(trainer, "current_epoch", 0), 0)) if shuffle else (0, 0),
        )
