"""What every probe is: a question about frozen tokens, its measurement, and what may be claimed of it."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vit_cls.checks import check_finite
from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS
from vit_cls.errors import DataError
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import FrozenTokens, Rows, freeze, freeze_reads
from vit_cls.lab.probes.common import check_margin, chosen_pools, compare_with, layers_needed
from vit_cls.lab.results import LabResult
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_reader import TokenReader
from vit_cls.stats.verdicts import Finding
from vit_cls.weights.architecture import build_model

MARGIN = 0.01
"""A difference of a point does not matter, unless the user says otherwise."""


@dataclass(frozen=True)
class Subject:
    """What is probed: a model whose encoder is frozen, and images.

    Args:
        parts: Images to fit on, to choose by and to report on.
        config: How the model is run.
        cache: A folder that keeps tokens; None keeps none.
    """

    classifier: ImageClassifier
    parts: Partition
    config: InferenceConfig = field(default_factory=InferenceConfig)
    cache: Path | None = None

    @property
    def reader(self) -> TokenReader:
        """Reads the model's tokens."""
        return TokenReader(self.classifier.model)

    def freeze(self, layers: Sequence[int] | None = None) -> FrozenParts:
        """Tokens of the three parts; ``layers`` None means the last alone."""
        train, val, test = (self.tokens_of(source, layers) for source in self.parts.sources)
        return FrozenParts(train, val, test, origin=self.parts.origin, device=str(self.config.device))

    def tokens_of(self, source: ImageSource, layers: Sequence[int] | None = None) -> FrozenTokens:
        """Tokens of some other images."""
        return freeze(self.classifier, source, layers=layers, config=self.config, cache=self.cache)

    def read_layers(
        self, layers: Sequence[int], pools: Sequence[str]
    ) -> tuple[dict[str, dict[tuple[str, int], np.ndarray]], dict[str, Rows]]:
        """By part, what each pool reads at each layer, and the images; tokens are not kept."""
        reads, rows = {}, {}
        for part, source in zip(PARTS, self.parts.sources, strict=True):
            reads[part], rows[part] = freeze_reads(
                self.classifier, source, layers, pools, config=self.config, cache=self.cache
            )
        check_rows(rows)
        return reads, rows

    def control(self, name: str, seed: int) -> Subject:
        """The same with one thing taken away, a row of `CONTROLS`: what a finding is compared with."""
        return CONTROLS[name](self, seed)


def _untrained(subject: Subject, seed: int) -> Subject:
    """The same architecture with fresh weights."""
    old = subject.classifier
    with seeded(seed):
        model = build_model(old.model.config)
    fresh = ImageClassifier(model, old.preprocess, old.class_names)
    return dataclasses.replace(subject, classifier=fresh)


CONTROLS: dict[str, Callable[[Subject, int], Subject]] = {"untrained": _untrained}
"""What is taken away for a control, from a subject and a seed; every probe can be run on each."""


@dataclass(frozen=True)
class FrozenParts:
    """Frozen tokens of images to fit on, to choose by and to report on.

    Args:
        origin: Where the images came from.
        device: Where more than the encoder runs, such as ``cpu``.

    Raises:
        DataError: If class lists differ, the training images are of one class, or there is one test image.
    """

    train: FrozenTokens
    val: FrozenTokens
    test: FrozenTokens
    origin: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_rows({name: part.rows for name, part in self.by_name.items()})

    @property
    def by_name(self) -> dict[str, FrozenTokens]:
        """The parts, in their order."""
        return dict(zip(PARTS, (self.train, self.val, self.test), strict=True))

    @property
    def rows(self) -> dict[str, Rows]:
        """The images of each part."""
        return {name: part.rows for name, part in self.by_name.items()}


def check_rows(parts: Mapping[str, Rows]) -> None:
    """Refuse parts that do not belong together, or cannot be fitted or tested on.

    Raises:
        DataError: If class lists differ, the training rows are of one class, or there is one test row.
    """
    train = parts["train"]
    for name, part in parts.items():
        if part.class_names != train.class_names:
            raise DataError(
                f"the {name} part has classes {', '.join(part.class_names[:10])}, but the train part has "
                f"{', '.join(train.class_names[:10])}. Label all parts by one list."
            )
    if len(np.unique(train.labels)) < 2:
        raise DataError(
            f"the train part has {len(train.labels)} image(s), all of one class; a probe needs two classes "
            "at least."
        )
    if len(parts["test"].labels) < 2:
        raise DataError("the test part has 1 image; a comparison needs at least two.")


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """A question about frozen tokens; its fields are the options of ``vit-cls probe NAME``.

    Args:
        margin: The largest difference that does not matter, in (0, 1).
        seed: Of everything that is random.

    Raises:
        ConfigError: If an option is out of range.
    """

    margin: float = MARGIN
    seed: int = 0

    name: ClassVar[str]
    """The word that is typed."""
    question: ClassVar[str]
    """What is asked, as a question."""
    claim: ClassVar[str] = "Reading {} and reading {} give different test top-1."
    """What `compare` claims of each other name and the reference."""

    def __post_init__(self) -> None:
        check_finite("--", self)
        check_margin(self.margin)

    def run(self, subject: Subject) -> LabResult:
        """Probe a model, and say how long it took.

        Raises:
            ConfigError: If an option does not fit the model.
            DataError: If the images cannot be used.
        """
        started = time.perf_counter()
        result = self.measure(subject)
        return dataclasses.replace(result, seconds=time.perf_counter() - started)

    @abstractmethod
    def measure(self, subject: Subject) -> LabResult:
        """The answer; `run` says how long it took."""

    def compare(self, reference: str, scores: Mapping[str, np.ndarray]) -> dict[str, Finding]:
        """Judge everything that was scored against one of them; see `compare_with`."""
        return compare_with(reference, scores, self.claim, margin=self.margin, seed=self.seed)

    def result(
        self,
        headline: str,
        findings: Sequence[Finding],
        *,
        settings: Mapping[str, Any],
        parts: Mapping[str, Rows],
        origin: str = "",
        notes: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
        **contents: Any,
    ) -> LabResult:
        """What the probe has to say; ``contents`` are other fields of `LabResult`.

        Args:
            parts: The images, for counts and failures.
            notes: What to bear in mind; files that could not be read are named after them.
            data: Where the images came from; None means counts and failures of ``parts``.
        """
        return LabResult(
            f"probe {self.name}",
            self.question,
            headline,
            findings,
            settings=settings,
            data=data_of(origin, parts) if data is None else data,
            notes=[*notes, *failures_note(parts)],
            **contents,
        )


@dataclass(frozen=True, kw_only=True)
class PoolProbe(Probe):
    """A probe that compares poolings of the last layer: ``pools``, or the usual ones that the model has."""

    pools: Sequence[str] = ()

    def chosen(self, reader: TokenReader) -> tuple[list[str], list[str]]:
        """The pools to compare, and notes about those that were left out."""
        return chosen_pools(self.pools, reader)

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        pools, _ = self.chosen(subject.reader)
        return self.analyse(subject.freeze(layers_needed(pools, subject.reader)))

    @abstractmethod
    def analyse(self, frozen: FrozenParts) -> LabResult:
        """The answer, of tokens that are frozen already."""

    def settings(self, pools: Sequence[str], **more: Any) -> dict[str, Any]:
        """The settings of a result, as plain data; what was read is called ``ways`` there."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "pools"}
        return {"ways": pools, **own, **more}


def data_of(origin: str, parts: Mapping[str, Rows]) -> dict[str, Any]:
    """Where the images came from, for the result."""
    return {
        "origin": origin,
        "images": {name: len(rows.labels) for name, rows in parts.items()},
        "classes": len(next(iter(parts.values())).class_names),
        "failures": {name: dict(rows.failures) for name, rows in parts.items()},
    }


def failures_note(parts: Mapping[str, Rows]) -> list[str]:
    """A sentence about files that could not be read, if there are some."""
    failed = {name: len(part.failures) for name, part in parts.items() if part.failures}
    if not failed:
        return []
    counts = ", ".join(f"{count} of {name}" for name, count in failed.items())
    return [f"Files that could not be read are in no number here: {counts}; their reasons are with the data."]
