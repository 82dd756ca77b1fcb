"""The trainings of a study: each is plain data, done once, and again only where it stopped.

They spread over processes and machines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition, partition_data
from vit_cls.errors import ConfigError, ModelFileError, RunError
from vit_cls.files import replacing, write_text
from vit_cls.lab.features import logits_of
from vit_cls.lab.seeding import seeded
from vit_cls.lab.studies.jobs import beginning_of_jobs
from vit_cls.model.classifier import ImageClassifier
from vit_cls.signals import Stopped
from vit_cls.weights.factory import create_classifier, load
from vit_cls.workers import WorkerPool

log = logging.getLogger("vit_cls")

RUN = "run"
MODEL = f"{RUN}/model.safetensors"
DONE = "trial.json"
ANSWERS = "answers.npz"


@dataclass(frozen=True)
class TrialData:
    """The images of a trial, as `partition_data` splits them.

    Args:
        mosaic: Arguments of `vit_cls.lab.studies.mosaics.mosaic_parts`; None leaves images as they are.
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
        model: Settings of ``fit``'s ``model``; so ``optim``, and ``loader`` of its ``data``.
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


@dataclass(frozen=True)
class Spread:
    """How the trials of a study are spread.

    Args:
        jobs: Processes on this machine; job i trains on GPU i, modulo their number.
        shard: Which part of the trials is trained here, from 1.
        shards: How many parts there are.

    Raises:
        ConfigError: If a number is out of range.
    """

    jobs: int = 1
    shard: int = 1
    shards: int = 1

    def __post_init__(self) -> None:
        check_range("--jobs", self.jobs, at_least=1)
        if not 1 <= self.shard <= self.shards:
            raise ConfigError(f"--shard i/n needs i from 1 to n; got {self.shard}/{self.shards}.")

    @classmethod
    def parse(cls, jobs: int, shard: str | None) -> Spread:
        """From what the user wrote.

        Args:
            shard: ``i/n``, or None.

        Raises:
            ConfigError: If it is written otherwise.

        Example:
            >>> Spread.parse(2, "1/4")
            Spread(jobs=2, shard=1, shards=4)
        """
        if shard is None:
            return cls(jobs)
        number, slash, count = shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise ConfigError(f"--shard must be written i/n, such as 1/4; got {shard!r}.")
        return cls(jobs, int(number), int(count))


def trial_folder(study: Path, trial: Trial) -> Path:
    """Where a trial of a study goes."""
    return study / "trials" / trial.key


def is_done(study: Path, key: str) -> bool:
    """Whether a trial of a study's folder has come to its end, good or bad.

    Args:
        key: See `Trial.key`.
    """
    return (study / "trials" / key / DONE).is_file()


def check_models(trials: Sequence[Trial]) -> None:
    """Refuse settings that make no model before the first one is trained.

    Raises:
        ConfigError: If a pooling does not fit the encoder, say.
    """
    for trial in {json.dumps(trial.model, sort_keys=True): trial for trial in trials}.values():
        settings = {key: value for key, value in trial.model.items() if value is not None}
        if trial.after is None:
            with seeded(0):
                create_classifier(settings.pop("name"), ["a", "b"], load_weights=False, **settings)


def run_trials(trials: Sequence[Trial], study: Path, train: TrainFunction, spread: Spread) -> int:
    """Train what is not done yet; those that start from another's model come after it.

    Args:
        trials: All of the study, each once.
        study: Its folder.

    Returns:
        How many of all trials are not done, because they belong to other machines.

    Raises:
        ConfigError: If a trial starts from one that is not in the study.
        RunError: If a training process was killed.
    """
    by_key = {trial.key: trial for trial in trials}
    assert len(by_key) == len(trials), "two trials are the same"
    lines = {key: _line(trial, by_key) for key, trial in by_key.items()}
    roots = [trial.key for trial in trials if trial.after is None]
    owner = {key: i % spread.shards + 1 for i, key in enumerate(roots)}
    mine = [
        trial
        for trial in sorted(trials, key=lambda trial: len(lines[trial.key]))
        if owner[lines[trial.key][-1]] == spread.shard and not is_done(study, trial.key)
    ]
    if mine:
        log.info(f"{len(mine)} of {len(trials)} trainings to do here, in {study}")
    if spread.jobs == 1 or len(mine) <= 1:
        _run_here(mine, study, train)
    else:
        try:
            _run_spread(mine, study, train, spread.jobs)
        except BrokenProcessPool as error:
            raise RunError(
                "a training process was killed from outside, as happens where memory runs out. What is "
                "complete is kept: run the study again, with fewer --jobs if memory is short."
            ) from error
    return sum(not is_done(study, trial.key) for trial in trials)


def _line(trial: Trial, by_key: Mapping[str, Trial]) -> list[str]:
    """Its key, that of the trial it starts from, and so on."""
    keys = [trial.key]
    while trial.after is not None:
        if trial.after not in by_key:
            raise ConfigError(
                f"the trial {trial.key} starts from {trial.after}, which is not in the study. Let the "
                "study's trials() give that one too."
            )
        trial = by_key[trial.after]
        keys.append(trial.key)
    return keys


def _run_here(trials: Sequence[Trial], study: Path, train: TrainFunction) -> None:
    for done, trial in enumerate(trials, 1):
        seconds = run_trial(trial, study, train)
        log.info(f"{done} of {len(trials)}: {trial.key}, {fmt.duration(seconds)}")


def _run_spread(trials: Sequence[Trial], study: Path, train: TrainFunction, jobs: int) -> None:
    """A process lives for many trials: to import torch takes as long as a small training."""
    waiting = [trial for trial in trials if trial.after is not None and not is_done(study, trial.after)]
    late = {trial.key for trial in waiting}
    names: dict[Future[float], str] = {}
    done = 0
    jobs = min(jobs, len(trials))
    with WorkerPool(jobs, beginning_of_jobs(jobs)) as pool:

        def submit(ready: Sequence[Trial]) -> set[Future[float]]:
            new = {pool.submit(run_trial, trial, study, train): trial.key for trial in ready}
            names.update(new)
            return set(new)

        running = submit([trial for trial in trials if trial.key not in late])
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done, key = done + 1, names[future]
                log.info(f"{done} of {len(trials)}: {key}, {fmt.duration(future.result())}")
                running |= submit([trial for trial in waiting if trial.after == key])


def run_trial(trial: Trial, study: Path, train: TrainFunction) -> float:
    """Train one trial, let it answer for every validation and test image, and note that it is done.

    A training that fails, such as by a learning rate that is too high, is an answer too: it is noted with its
    reason. What was wrong before it began, such as weights that do not exist, is not: it raises. Gives the
    seconds it took.
    """
    started = time.perf_counter()
    folder = trial_folder(study, trial)
    folder.mkdir(parents=True, exist_ok=True)
    parts = trial.data.parts(trial.seed)
    note: dict[str, Any] = {"trial": trial.to_dict(), "data": parts.counts(), "origin": parts.origin}
    try:
        classifier = load(_train(trial, study, train, parts))
        note |= _costs(classifier)
        note["failures"] = _save_answers(folder / ANSWERS, classifier, {"val": parts.val, "test": parts.test})
    except Stopped:
        raise
    except RunError as error:
        note["error"] = str(error)
        log.warning(f"{trial.key} failed: {error}")
    note["seconds"] = time.perf_counter() - started
    write_text(folder / DONE, json.dumps(note, indent=1))
    return note["seconds"]


def _train(trial: Trial, study: Path, train: TrainFunction, parts: Partition) -> Path:
    model = dict(trial.model)
    if trial.after is not None:
        before = study / "trials" / trial.after
        error = json.loads((before / DONE).read_text(encoding="utf-8")).get("error")
        if error is not None:
            raise RunError(f"the training {trial.after}, which it starts from, failed: {error}")
        model["pretrained"] = str(before / MODEL)
    return train(
        trial_folder(study, trial) / RUN,
        parts.train,
        parts.val,
        origin=parts.origin,
        seed=trial.seed,
        model=model,
        optim=trial.optim,
        loader=trial.loader,
        epochs=trial.epochs,
    )


def _costs(classifier: ImageClassifier) -> dict[str, Any]:
    """Parameters of the model, and what pooling and head add to the encoder."""
    model = classifier.model
    head = _count(model.head)
    rows = model.layout.num_prefix_tokens - model.layout.reg_tokens if model.pool.per_class else 1
    return {
        "parameters": _count(model),
        "macs": _macs(classifier),
        "head_parameters": head + _count(model.pool),
        "head_macs": model.pool.macs + rows * head,
        "tokens": model.layout.num_tokens,
    }


def _macs(classifier: ImageClassifier) -> int:
    """Multiply-adds of one image, as torch counts them; not the fused attention, which is taken apart."""
    config = classifier.model.config
    image = torch.zeros(1, config.in_chans, *config.image_hw)
    # Not no_grad: in it, a view of a parameter given to a module makes the counter raise.
    model = classifier.cpu().eval().model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _save_answers(path: Path, classifier: ImageClassifier, parts: dict[str, ImageSource]) -> dict[str, str]:
    arrays: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for part, source in parts.items():
        try:
            logits = logits_of(classifier, source)
        except ModelFileError as error:  # it diverged
            raise RunError(f"{error} Use a lower learning rate.") from error
        probs = classifier.probs(torch.from_numpy(logits.logits)).numpy().astype(np.float32)
        arrays |= {
            f"{part}_probs": probs,
            f"{part}_targets": logits.targets,
            f"{part}_positions": logits.positions,
        }
        failures |= {source.index.paths[i]: reason for i, reason in logits.failures.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return failures
