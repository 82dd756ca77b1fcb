"""One training of a study, as plain data: what is trained, on what, under which seed, and where it goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition, partition_data

RUN = "run"
MODEL = f"{RUN}/model.safetensors"
DONE = "trial.json"
ANSWERS = "answers.npz"


@dataclass(frozen=True)
class TrialData:
    """The images of a trial.

    Args:
        data: ``digits`` or a folder, as `partition_data` takes it.
        val_fraction: Share of each class to validate on, where that is split here.
        test_fraction: Share of each class to test on, likewise.
        mosaic: How the images are put together to larger ones, for `vit_cls.lab.studies.mosaics`; None leaves
            them as they are.
    """

    data: str
    val_fraction: float = 0.1
    test_fraction: float = 0.25
    mosaic: Mapping[str, Any] | None = None

    def parts(self, seed: int) -> Partition:
        """The three parts under a seed."""
        parts = partition_data(
            self.data, seed=seed, val_fraction=self.val_fraction, test_fraction=self.test_fraction
        )
        if self.mosaic is None:
            return parts
        from vit_cls.lab.studies.mosaics import mosaic_parts

        return mosaic_parts(parts, **self.mosaic)


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        arm: What it is compared as, such as ``cls`` or ``gap``.
        seed: Of weights, order, augmentation and validation images: the same for all arms.
        data: The images.
        model: Settings of ``fit``'s ``model``.
        optim: Settings of ``fit``'s ``optim``.
        loader: Settings of ``fit``'s ``data``, such as ``batch_size``.
        epochs: How long.
        variant: What else tells it from the arm's other trials, such as ``lr x2``.
        after: Key of the trial whose model it starts from; None starts as ``model`` says.
    """

    arm: str
    seed: int
    data: TrialData
    model: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1
    variant: str = ""
    after: str | None = None

    @property
    def key(self) -> str:
        """Name of its folder: for people, and another one wherever a setting is another."""
        words = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.blake2b(words.encode(), digest_size=4).hexdigest()
        name = f"{self.arm} {self.variant}".lower().replace("+", " and ")
        return f"{re.sub(r'[^a-z0-9.]+', '-', name).strip('-')}-s{self.seed}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class TrainFunction(Protocol):
    """What trains one trial; `vit_cls.training.trial.train_trial`, which the lab is given."""

    def __call__(
        self,
        run_dir: Path,
        train: ImageSource,
        val: ImageSource,
        *,
        origin: str,
        seed: int,
        model: Mapping[str, Any],
        optim: Mapping[str, Any],
        loader: Mapping[str, Any],
        epochs: int,
    ) -> Path:
        """Train, or go on where an earlier try stopped; gives the model file."""
