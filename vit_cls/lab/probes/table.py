"""The probes, by the word that is typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_cls.data.partition import Partition
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import FrozenTokens, freeze
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
        call: Takes the classifier, its images, how it is run, the folder that keeps tokens, and the options.
    """

    question: str
    options: Callable[..., Any]
    call: Callable[[ImageClassifier, Partition, InferenceConfig, Path | None, dict[str, Any]], LabResult]

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
        self,
        classifier: ImageClassifier,
        parts: Partition,
        config: InferenceConfig,
        cache: Path | None,
        options: dict[str, Any],
    ) -> LabResult:
        """Probe a model.

        Args:
            classifier: The model.
            parts: Its images.
            config: How the model is run.
            cache: A folder that keeps tokens; None keeps none.
            options: By name; what groups several is a mapping.

        Raises:
            ConfigError: If an option does not fit the model.
            DataError: If the images cannot be used.
        """
        return self.call(classifier, parts, config, cache, options)


def freeze_parts(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    layers: list[int] | None = None,
) -> tuple[FrozenTokens, FrozenTokens, FrozenTokens]:
    """Frozen tokens of the three parts.

    Args:
        classifier: The model.
        parts: Its images.
        config: How it is run.
        cache: A folder that keeps tokens; None keeps none.
        layers: Which; None means the last alone.

    Raises:
        ConfigError: If there is no such layer or device.
        DataError: If no image of a part can be read, or the disk is too small.
    """
    sources = (parts.train, parts.val, parts.test)
    train, val, test = (
        freeze(classifier, source, layers=layers, config=config, cache=cache) for source in sources
    )
    return train, val, test


def _linear(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    options: dict[str, Any],
) -> LabResult:
    settings, model = LinearSettings(**options), classifier.model
    ways, _ = linear_ways(settings, model.layout, model.config.depth)
    needed = layers_needed(ways, model.layout, model.config.depth)
    frozen = freeze_parts(classifier, parts, config, cache, needed)
    return linear(*frozen, settings=settings, origin=parts.origin)


def _knn(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    options: dict[str, Any],
) -> LabResult:
    settings, model = KnnSettings(**options, device=str(config.device)), classifier.model
    ways, _ = chosen_ways(settings.ways, model.layout, model.config.depth)
    needed = layers_needed(ways, model.layout, model.config.depth)
    frozen = freeze_parts(classifier, parts, config, cache, needed)
    return knn(*frozen, settings=settings, origin=parts.origin)


def _retrieval(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    options: dict[str, Any],
) -> LabResult:
    settings, model = RetrievalSettings(**options), classifier.model
    ways, _ = chosen_ways(settings.ways, model.layout, model.config.depth)
    needed = layers_needed(ways, model.layout, model.config.depth)
    train, _, test = freeze_parts(classifier, parts, config, cache, needed)
    return retrieval(train, test, settings=settings, origin=parts.origin)


def _tokens(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    options: dict[str, Any],
) -> LabResult:
    settings = TokenSettings(**options)
    return tokens(*freeze_parts(classifier, parts, config, cache), settings=settings, origin=parts.origin)


def _attentive(
    classifier: ImageClassifier,
    parts: Partition,
    config: InferenceConfig,
    cache: Path | None,
    options: dict[str, Any],
) -> LabResult:
    recipe = options["recipe"]
    options = options | {"recipe": None if recipe is None else HeadRecipe(**recipe)}
    return attentive(classifier, parts, config=config, cache=cache, **options)


PROBES: dict[str, Probe] = {
    "linear": Probe("How much can a linear classifier read, from which token?", LinearSettings, _linear),
    "knn": Probe("Do neighbours share a class, without any training?", KnnSettings, _knn),
    "retrieval": Probe("Which read-out finds images of the same class?", RetrievalSettings, _retrieval),
    "layers": Probe(
        "After which block does the class show, in which token?",
        LayerSettings,
        lambda c, parts, config, cache, o: layers(
            c, parts, settings=LayerSettings(**o), config=config, cache=cache
        ),
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
        lambda c, parts, config, cache, o: dense(c, parts, config=config, cache=cache, **o),
    ),
    "invert": Probe(
        "How much of the image can be recovered from the class token?",
        invert,
        lambda c, parts, config, cache, o: invert(c, parts, config=config, cache=cache, **o),
    ),
}
