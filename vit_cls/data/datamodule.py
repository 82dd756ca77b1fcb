"""The data of one training run: an image folder or the embedded digits, split, transformed and loaded."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vit_cls.checks import check_choice, check_range
from vit_cls.data.cache import PixelCache
from vit_cls.data.dataset import ArraySource, Batch, FolderSource, ImageDataset, ImageSource
from vit_cls.data.doctor.issues import Problem
from vit_cls.data.doctor.report import quick_check
from vit_cls.data.folders import DIGITS, find_parts
from vit_cls.data.index import balanced_weights
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.mixing import UNMIXED, MixOptions
from vit_cls.data.partition import Split, split_for_training
from vit_cls.data.sampler import EpochSampler, scored_images, spread_order
from vit_cls.data.transforms import AUGMENTS, Preprocessing, model_reader
from vit_cls.errors import ConfigError, DataError, ImageError
from vit_cls.own_code import HINT

log = logging.getLogger("vit_cls")

NAMES = ("folder", DIGITS)
BALANCED = "balanced"
ALLOWED = ("leakage",)
"""Problems that stop a run unless they are allowed by name."""


class ImageDataModule(LightningDataModule):
    """Training and validation images, as uint8 batches.

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
            4 on without one for training itself, and no more than batches (0 for the digits).
        augment: Training transform: ``crop_flip``, ``affine`` (small turns and shifts), ``randaugment``,
            ``trivialaugment`` or ``none``; or the name of your own (``--import``, docs/extending.md).
        repeats: Copies of each image in an epoch, augmented each on its own; an epoch sees fewer images then.
        weights: ``balanced`` draws every class equally often; null draws every image once an epoch, or as a
            manifest's weights say.
        max_bad_images: Files that may be unreadable before the run stops; each is named, and skipped.
        allow: Problems to train in spite of, by name: ``leakage``. They are recorded.
        cache: Folder for the decoded validation images; null decodes them in every epoch.
        mix: Mixup, CutMix and erasing of training batches.

    Raises:
        ConfigError: If a setting is unknown or cannot take effect.

    Example:
        >>> from vit_cls.model.classifier import Preprocess
        >>> data = ImageDataModule(name="digits")
        >>> data.configure(seed=0, preprocess=Preprocess((28, 28)))
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
        augment: str = "crop_flip",
        repeats: int = 1,
        weights: str | None = None,
        max_bad_images: int = 0,
        allow: list[str] | None = None,
        cache: str | None = None,
        mix: MixOptions = UNMIXED,
    ) -> None:
        super().__init__()
        check_choice("data.name", name, NAMES)
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
        self.augment = augment
        self.group_by = group_by
        self.repeats = repeats
        self.weights = weights
        self.max_bad_images = max_bad_images
        self.cache = cache
        self.allow = list(allow or [])
        self.problems: list[Problem] = []
        self.mix = mix
        self.bad_images: dict[str, str] = {}
        self.train_source: ImageSource
        self.val_source: ImageSource
        self.origin = ""
        self.given: Split | None = None

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

    def configure(self, *, seed: int, preprocess: Preprocessing) -> None:
        """Set the seed of split, order and augmentation, and the model's preprocessing.

        Raises:
            DataError: If the images cannot be used.
        """
        if not self.origin or seed != self.seed:
            self.load_index(seed)
        val = model_reader(preprocess)
        cache = None
        if self.cache is not None and isinstance(self.val_source, FolderSource):
            cache = PixelCache(Path(self.cache), self.val_source.index, val)
        train = model_reader(preprocess, augment=self.augment)
        self.train_set = ImageDataset(self.train_source, train, seed=seed)
        self.val_set = ImageDataset(self.val_source, val, cache=cache)

    def load_index(self, seed: int) -> None:
        """Find the images and split them, if they are to be split, by a seed; reads names, no pixels."""
        self.seed = seed
        split = self.given
        if split is None:
            root, embedded = (DIGITS, True) if self.root is None else (self.root, False)
            split = split_for_training(
                find_parts(root, name="data.root", embedded=embedded),
                val_fraction=self.val_fraction,
                seed=seed,
                group_by=self.group_by,
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
        """The training classes, in the order of the labels."""
        return self.train_source.index.class_names

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Name images that cannot be read, and raise ImageError at one too many, in the main process."""
        for index, reason in batch.failures:
            training = self.trainer is not None and self.trainer.training
            source = self.train_source if training else self.val_source
            path = str(source.index.path(index))
            if path in self.bad_images:
                continue
            self.bad_images[path] = reason
            if len(self.bad_images) > self.max_bad_images:
                raise ImageError(self._too_many(path, reason))
            log.warning(f"skipped, cannot be read as an image: {path}: {reason}")
        return batch

    def _too_many(self, path: str, reason: str) -> str:
        count = len(self.bad_images)
        before = "" if count == 1 else f"It is number {count} that cannot be read. "
        return (
            f"{path} cannot be read as an image: {reason}. {before}Repair the file or move it out of the "
            f"data, or allow more with data.max_bad_images (now {self.max_bad_images}); nothing is skipped "
            "in silence."
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of this process."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, over all processes; spread over the classes where Lightning takes but
        some of the batches (``trainer.limit_val_batches``).
        """
        return self._loader(self.val_set, shuffle=False)

    def scored_images(self, limit: float | None, world_size: int) -> int:
        """Validation images that are scored where Lightning takes but some of the batches.

        Args:
            limit: Lightning's ``limit_val_batches``: a number of batches, or a share of them; None is all.
            world_size: Processes of the run.

        Raises:
            ConfigError: If that share is less than one batch.
        """
        return scored_images(len(self.val_set), self.batch_size, limit, world_size)

    def _order(self, dataset: ImageDataset) -> np.ndarray | None:
        """The order of images that are scored: None is their own; over the classes where not all are."""
        if self.trainer is None:
            return None
        limit, images = self.trainer.limit_val_batches, len(dataset)
        scored = scored_images(images, self.batch_size, limit, self.trainer.world_size)
        if scored == images:
            return None
        if self.trainer.is_global_zero:
            log.info(
                f"trainer.limit_val_batches {limit:g}: validation scores {scored:,} of {images:,} images, "
                "the same in every epoch, spread over the classes"
            )
        return spread_order(dataset.source.index.labels)

    def _loader(self, dataset: ImageDataset, *, shuffle: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        extra: dict[str, Any]
        if shuffle:
            extra = {"weights": self._weights(), "repeats": self.repeats}
        else:
            extra = {"order": self._order(dataset)}
        sampler = EpochSampler(
            len(dataset), seed=self.seed, shuffle=shuffle, rank=rank, world_size=world_size, **extra
        )
        if shuffle and not len(sampler):
            raise DataError(f"{len(dataset)} training image(s) cannot be shared by {world_size} processes.")
        workers = self.num_workers
        if workers is None:
            workers = 0
            if not isinstance(dataset.source, ArraySource):
                batches = math.ceil(len(sampler) / max(1, self.batch_size))
                workers = min(batches, default_num_workers(1 if trainer is None else trainer.num_devices))
        pin_memory = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return make_loader(
            dataset, sampler, batch_size=self.batch_size, num_workers=workers, pin_memory=pin_memory
        )
