"""The probes, by the word that is typed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vit_cls.data.partition import Partition
from vit_cls.lab.extraction import Running
from vit_cls.lab.frozen import FrozenTokens, freeze
from vit_cls.lab.probes.attentive import attentive
from vit_cls.lab.probes.common import chosen_ways, layers_needed
from vit_cls.lab.probes.dense import dense
from vit_cls.lab.probes.head_fits import HeadRecipe
from vit_cls.lab.probes.inversion import invert
from vit_cls.lab.probes.knn import KnnSettings, knn
from vit_cls.lab.probes.layers import LayerSettings, layers
from vit_cls.lab.probes.linear import linear, linear_ways
from vit_cls.lab.probes.linear_fits import LinearSettings
from vit_cls.lab.probes.retrieval import RetrievalSettings, retrieval
from vit_cls.lab.probes.tokens import TokenSettings, tokens
from vit_cls.lab.results import LabResult
from vit_cls.model.classifier import ImageClassifier


@dataclass(frozen=True)
class Probe:
    """One probe.

    Args:
        question: What it asks, as a question.
        options: A settings class, or the function itself, whose arguments are the probe's options.
        call: Takes the classifier, its images, how it is run, and the options.
    """

    question: str
    options: Callable[..., Any]
    call: Callable[[ImageClassifier, Partition, Running, dict[str, Any]], LabResult]

    def add_options(self, parser: Any, shared: Collection[str]) -> list[str]:
        """Give a parser the probe's options.

        Args:
            parser: Of jsonargparse.
            shared: Names of arguments that are no options of the probe.

        Returns:
            Names of the options.
        """
        names = [name for name in inspect.signature(self.options).parameters if name not in shared]
        skip = {name for name in inspect.signature(self.options).parameters if name in shared}
        if inspect.isclass(self.options):
            parser.add_class_arguments(self.options, None, skip=skip)
        else:
            parser.add_function_arguments(self.options, None, skip=skip)
        return names

    def run(
        self, classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
    ) -> LabResult:
        """Probe a model.

        Args:
            classifier: The model.
            parts: Its images.
            running: How the model is run.
            options: By name; what groups several is a mapping.

        Raises:
            ConfigError: If an option does not fit the model.
            DataError: If the images cannot be used.
        """
        return self.call(classifier, parts, running, options)


def freeze_parts(
    classifier: ImageClassifier, parts: Partition, running: Running, layers: list[int] | None = None
) -> tuple[FrozenTokens, FrozenTokens, FrozenTokens]:
    """Frozen tokens of the three parts.

    Args:
        classifier: The model.
        parts: Its images.
        running: How it is run, and where tokens are kept.
        layers: Which; None means the last alone.

    Raises:
        ConfigError: If there is no such layer or device.
        DataError: If no image of a part can be read, or the disk is too small.
    """
    sources = (parts.train, parts.val, parts.test)
    options = dataclasses.asdict(running)
    train, val, test = (freeze(classifier, source, layers=layers, **options) for source in sources)
    return train, val, test


def _linear(
    classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
) -> LabResult:
    settings, model = LinearSettings(**options), classifier.model
    ways, _ = linear_ways(settings, model.layout, model.config.depth)
    frozen = freeze_parts(classifier, parts, running, layers_needed(ways, model.layout, model.config.depth))
    return linear(*frozen, settings=settings, origin=parts.origin)


def _knn(
    classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
) -> LabResult:
    settings, model = KnnSettings(**options, device=running.device), classifier.model
    ways, _ = chosen_ways(settings.ways, model.layout, model.config.depth)
    frozen = freeze_parts(classifier, parts, running, layers_needed(ways, model.layout, model.config.depth))
    return knn(*frozen, settings=settings, origin=parts.origin)


def _retrieval(
    classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
) -> LabResult:
    settings, model = RetrievalSettings(**options), classifier.model
    ways, _ = chosen_ways(settings.ways, model.layout, model.config.depth)
    needed = layers_needed(ways, model.layout, model.config.depth)
    train, _, test = freeze_parts(classifier, parts, running, needed)
    return retrieval(train, test, settings=settings, origin=parts.origin)


def _tokens(
    classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
) -> LabResult:
    settings = TokenSettings(**options)
    return tokens(*freeze_parts(classifier, parts, running), settings=settings, origin=parts.origin)


def _attentive(
    classifier: ImageClassifier, parts: Partition, running: Running, options: dict[str, Any]
) -> LabResult:
    recipe = options["recipe"]
    options = options | {"recipe": None if recipe is None else HeadRecipe(**recipe)}
    return attentive(classifier, parts, running=running, **options)


PROBES: dict[str, Probe] = {
    "linear": Probe("How much can a linear classifier read, from which token?", LinearSettings, _linear),
    "knn": Probe("Do neighbours share a class, without any training?", KnnSettings, _knn),
    "retrieval": Probe("Which read-out finds images of the same class?", RetrievalSettings, _retrieval),
    "layers": Probe(
        "After which block does the class show, in which token?",
        LayerSettings,
        lambda c, parts, running, o: layers(c, parts, settings=LayerSettings(**o), running=running),
    ),
    "tokens": Probe(
        "Does a single patch token know the class as well as the class token?",
        TokenSettings,
        _tokens,
    ),
    "attentive": Probe(
        "Do a few learned queries beat the class token?",
        attentive,
        _attentive,
    ),
    "dense": Probe(
        "What do patch tokens know of their place that the class token does not?",
        dense,
        lambda c, parts, running, o: dense(c, parts, running=running, **o),
    ),
    "invert": Probe(
        "How much of the image can be recovered from the class token?",
        invert,
        lambda c, parts, running, o: invert(c, parts, running=running, **o),
    ),
}
