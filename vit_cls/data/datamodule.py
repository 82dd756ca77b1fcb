"""The data of one training run: an image folder or the embedded digits, split, transformed and loaded."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vit_cls.data.dataset import ArraySource, Batch, FolderSource, ImageDataset, ImageSource
from vit_cls.data.digits import load_digits
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.splits import split_root, stratified_split
from vit_cls.data.transforms import AUGMENTS, eval_transform, train_transform
from vit_cls.errors import ConfigError, DataError, ImageError, did_you_mean

NAMES = ("folder", "digits")


class ImageDataModule(LightningDataModule):
    """Training and validation images, as uint8 batches.

    Args:
        root: The image folder: ``train/`` and ``val/`` (or validation/, valid/, test/) with one folder a
            class, or one folder of class folders, which is split.
        name: ``folder``, or the embedded ``digits`` (their held-out third is left for ``evaluate``).
        val_fraction: Share of each class to validate on, where there is no validation folder.
        batch_size: Images a step, for each process.
        num_workers: Loading processes; null means one a core, at most 8 (0 for the digits).
        augment: Training transform: ``crop_flip``, ``affine`` (small turns and shifts) or ``none``.

    Raises:
        ConfigError: If a setting is unknown or cannot take effect.

    Example:
        >>> data = ImageDataModule(name="digits")
        >>> data.configure(seed=0, img_size=(28, 28))
        >>> len(data.class_names), len(data.train_source.index) + len(data.val_source.index)
        (10, 1198)
    """

    def __init__(
        self,
        root: str | None = None,
        name: str = "folder",
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int | None = None,
        augment: str = "crop_flip",
    ) -> None:
        super().__init__()
        if name not in NAMES:
            raise ConfigError(
                f"data.name must be one of {', '.join(NAMES)}; got {name!r}.{did_you_mean(name, NAMES)}"
            )
        if augment not in AUGMENTS:
            raise ConfigError(
                f"data.augment must be one of {', '.join(AUGMENTS)}; got {augment!r}."
                f"{did_you_mean(augment, AUGMENTS)}"
            )
        if name == "folder" and root is None:
            raise ConfigError(
                "data.root is missing: the folder with the images, train/ and val/ or one folder a class. "
                "(`--data.name digits` needs no folder.)"
            )
        if name == "digits" and root is not None:
            raise ConfigError(f"data.root {root} has no effect with data.name digits. Remove one of the two.")
        if not 0.0 < val_fraction < 1.0:
            raise ConfigError(
                f"data.val_fraction must be between 0 and 1 (both excluded); got {val_fraction:g}."
            )
        self.root = root
        self.name = name
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.train_source: ImageSource
        self.val_source: ImageSource
        self.origin = ""

    def configure(
        self,
        *,
        seed: int,
        img_size: tuple[int, int],
        crop_pct: float = 0.9,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
    ) -> None:
        """Set what the run and the model decide: the seed, and how an image becomes the model's input.

        Args:
            seed: Seed of split, order and augmentation.
            img_size: Height and width that the model takes, in pixels.
            crop_pct: Side of the evaluation crop over the side of the resized image.
            crop_mode: ``center`` or ``squash``.
            interpolation: Filter of every resize.

        Raises:
            DataError: If the images cannot be used.
        """
        if not self.origin or seed != self.seed:
            self.load_index(seed)
        train = train_transform(img_size, augment=self.augment, interpolation=interpolation)
        val = eval_transform(img_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
        self.train_set = ImageDataset(self.train_source, train, seed=seed)
        self.val_set = ImageDataset(self.val_source, val)

    def load_index(self, seed: int) -> None:
        """Find the images and split them; reads names, no pixels.

        Args:
            seed: Which split is made, where one is made.

        Raises:
            DataError: If the images cannot be used.
        """
        self.seed = seed
        if self.name == "digits":
            everything = load_digits("train")
            train, val = stratified_split(everything.index, val_fraction=self.val_fraction, seed=seed)
            rows = {path: i for i, path in enumerate(everything.index.paths)}
            self.train_source, self.val_source = (
                ArraySource(part, everything.images[[rows[path] for path in part.paths]])
                for part in (train, val)
            )
            self.origin = f"embedded digits, {self.val_fraction:g} of the training two thirds for validation"
        else:
            assert self.root is not None
            split = split_root(self.root, val_fraction=self.val_fraction, seed=seed)
            self.train_source, self.val_source = FolderSource(split.train), FolderSource(split.val)
            self.origin = split.origin

    @property
    def class_names(self) -> list[str]:
        """The training classes, in the order of the labels."""
        return self.train_source.index.class_names

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Stop at an image that cannot be read; Lightning calls this in the main process.

        Raises:
            ImageError: Names the file and the reason.
        """
        if batch.failures:
            training = self.trainer is not None and self.trainer.training
            source = self.train_source if training else self.val_source
            index, reason = batch.failures[0]
            raise ImageError(
                f"{source.index.path(index)} cannot be read as an image: {reason}. Repair the file or "
                "move it out of the data; nothing is skipped in silence."
            )
        return batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of this process."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, over all processes."""
        return self._loader(self.val_set, shuffle=False)

    def _loader(self, dataset: ImageDataset, *, shuffle: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler = EpochSampler(
            len(dataset), seed=self.seed, shuffle=shuffle, rank=rank, world_size=world_size
        )
        if shuffle and not len(sampler):
            raise DataError(f"{len(dataset)} training image(s) cannot be shared by {world_size} processes.")
        workers = self.num_workers
        if workers is None:
            workers = 0 if self.name == "digits" else default_num_workers()
        pin_memory = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return make_loader(
            dataset, sampler, batch_size=self.batch_size, num_workers=workers, pin_memory=pin_memory
        )
