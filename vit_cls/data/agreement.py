"""What a Trainer and its LightningModule must agree on with the data, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vit_cls.data.mixing import UNMIXED, MixOptions
from vit_cls.errors import ConfigError, DataError, ImageError


def agreed_seed(chosen: int | None, module: Any) -> int:
    """The seed of the LightningModule, or the one chosen for the data, which must not differ; else 0."""
    seed = getattr(module, "seed", None)
    if seed is None:
        return chosen or 0
    if chosen not in (None, seed):
        raise ConfigError(
            f"the data has the seed {chosen}, but {type(module).__name__} has {seed}. Give it seed={chosen}: "
            "the split and the order of the images depend on it."
        )
    return int(seed)


def refuse_other_samplers(trainer: Any) -> None:
    """The order of the images, and which process has which, are this module's."""
    connector = trainer._accelerator_connector  # there is no public word for it
    if connector.use_distributed_sampler and connector.is_distributed:
        raise ConfigError(
            f"Trainer(use_distributed_sampler=True), Lightning's default, would share out among "
            f"{trainer.world_size} process(es) what ImageDataModule has shared out already, and repeat "
            "validation images. Use Trainer(use_distributed_sampler=False)."
        )
    if trainer.overfit_batches:
        raise ConfigError(
            f"Trainer(overfit_batches={trainer.overfit_batches:g}) swaps the sampler that makes runs "
            "repeatable. Use Trainer(limit_train_batches=...), or a folder with a few images."
        )


def refuse_unconfigured(configured: object) -> None:
    """Raise ConfigError for images that are asked for before a model has said how it wants them."""
    if configured is None:
        raise ConfigError(
            "ImageDataModule does not know how the model wants its images. In a Trainer it asks the "
            "classifier.preprocess of the LightningModule, such as a vit_cls.ClassificationTask; without one "
            "call data.configure(seed=0, preprocess=classifier.preprocess) before."
        )


def refuse_gap(path: str, reason: str) -> None:
    """Rows of a prediction are known by their place alone: an image without one would shift the others."""
    raise ImageError(
        f"{path} cannot be read as an image: {reason}. Trainer.predict gives a row for each image in their "
        "order, so none is skipped, whatever data.max_bad_images says. Repair the file or move it out of the "
        "data; `vit-cls predict` has a row for such files too."
    )


def refuse_mixing_elsewhere(mix: MixOptions, module: Any) -> None:
    """Batches are mixed on the device, by the LightningModule."""
    if mix != UNMIXED and getattr(module, "mix", None) != mix:
        raise ConfigError(
            f"the data's MixOptions have no effect in {type(module).__name__}, which mixes otherwise or not "
            "at all. Give the task the same: ClassificationTask(classifier, mix=MixOptions(...))."
        )


def refuse_other_classes(data: Sequence[str], model: Sequence[str] | None) -> None:
    """Labels are positions in the list of names, so the two lists must be one."""
    if model is None or list(data) == list(model):
        return
    lacking = [name for name in data if name not in set(model)]
    unknown = [name for name in model if name not in set(data)]
    differences = [
        f"{what} {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
        for what, names in (("only the data has", lacking), ("only the classifier has", unknown))
        if names
    ]
    if not differences:
        place = next(i for i, pair in enumerate(zip(data, model, strict=True)) if pair[0] != pair[1])
        pair = f"class {place} is {data[place]} of the data, {model[place]} of the classifier"
        differences = [f"the same names in another order: {pair}"]
    raise DataError(
        f"the classes of data and classifier differ: {'; '.join(differences)}. Make the classifier with "
        "the class_names of the data, or give it data with its own classes."
    )


def training_place(trainer: Any) -> tuple[int, int]:
    """The epoch under way, or next, and how many of its batches each process was trained on."""
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    whole = batches.current.processed >= trainer.num_training_batches or batches.is_last_batch
    if epochs.processed == epochs.started:  # at the end of an epoch, or before the first
        return epochs.processed, 0
    return (epochs.processed + 1, 0) if whole else (epochs.processed, batches.current.processed)


def too_many(count: int, allowed: int, path: str, reason: str) -> str:
    """What is said of an image that cannot be read, when ``data.max_bad_images`` allows no more of them."""
    before = "" if count == 1 else f"It is number {count} that cannot be read. "
    return (
        f"{path} cannot be read as an image: {reason}. {before}Repair the file or move it out of the "
        f"data, or allow more with data.max_bad_images (now {allowed}); nothing is skipped in silence."
    )
