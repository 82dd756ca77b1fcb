"""The probes, by the word that is typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_cls.data.partition import Partition
from vit_cls.inference import InferenceConfig
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.attentive import attentive
from vit_cls.lab.probes.common import chosen_pools, freeze_parts, layers_needed
from vit_cls.lab.probes.dense import dense
from vit_cls.lab.probes.head_fits import HeadRecipe
from vit_cls.lab.probes.inversion import invert
from vit_cls.lab.probes.knn import KnnSettings, knn
from vit_cls.lab.probes.layers import LayerSettings, layers
from vit_cls.lab.probes.linear import LinearSettings, linear, linear_pools
from vit_cls.lab.probes.retrieval import RetrievalSettings, retrieval
from vit_cls.lab.probes.tokens import TokenSettings, tokens
from vit_cls.lab.results import LabResult
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_reader import TokenReader


@dataclass(frozen=True)
class Request:
    """A model, its images, and how its tokens are computed.

    Args:
        classifier: The model.
        parts: Its images.
        config: How the model is run.
        cache: A folder that keeps tokens; None keeps none.
    """

    classifier: ImageClassifier
    parts: Partition
    config: InferenceConfig
    cache: Path | None

    @property
    def running(self) -> dict[str, Any]:
        """Arguments of the probes that run the model themselves."""
        return {"config": self.config, "cache": self.cache}

    @property
    def reader(self) -> TokenReader:
        """Reads the model's tokens."""
        return TokenReader(self.classifier.model)

    def freeze(self, pools: Sequence[str] = ("gap",)) -> tuple[FrozenTokens, FrozenTokens, FrozenTokens]:
        """Frozen tokens of the three parts, of the layers that some pools read."""
        layers = layers_needed(pools, self.reader)
        return freeze_parts(self.classifier, self.parts.sources, self.config, self.cache, layers)


@dataclass(frozen=True)
class Probe:
    """One probe.

    Args:
        question: What it asks, as a question.
        options: A settings class, or the function itself, whose arguments are the probe's options.
        call: Takes what is probed, and the options by name.
    """

    question: str
    options: Callable[..., Any]
    call: Callable[[Request, dict[str, Any]], LabResult]

    def add_options(self, parser: Any, shared: Collection[str]) -> list[str]:
        """Give a parser the probe's options.

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

        Raises:
            ConfigError: If an option does not fit the model.
            DataError: If the images cannot be used.
        """
        return self.call(Request(classifier, parts, config, cache), options)


def _linear(request: Request, options: dict[str, Any]) -> LabResult:
    settings = LinearSettings(**options)
    frozen = request.freeze(linear_pools(settings, request.reader)[0])
    return linear(*frozen, settings=settings, origin=request.parts.origin)


def _knn(request: Request, options: dict[str, Any]) -> LabResult:
    settings = KnnSettings(**options, device=str(request.config.device))
    frozen = request.freeze(chosen_pools(settings.pools, request.reader)[0])
    return knn(*frozen, settings=settings, origin=request.parts.origin)


def _retrieval(request: Request, options: dict[str, Any]) -> LabResult:
    settings = RetrievalSettings(**options)
    train, _, test = request.freeze(chosen_pools(settings.pools, request.reader)[0])
    return retrieval(train, test, settings=settings, origin=request.parts.origin)


def _tokens(request: Request, options: dict[str, Any]) -> LabResult:
    settings = TokenSettings(**options)  # refused before anything is computed
    return tokens(*request.freeze(), settings=settings, origin=request.parts.origin)


def _attentive(request: Request, options: dict[str, Any]) -> LabResult:
    recipe = options["recipe"]
    options = options | {"recipe": None if recipe is None else HeadRecipe(**recipe)}
    return attentive(request.classifier, request.parts, **request.running, **options)


PROBES: dict[str, Probe] = {
    "linear": Probe("How much can a linear classifier read, from which token?", LinearSettings, _linear),
    "knn": Probe("Do neighbours share a class, without any training?", KnnSettings, _knn),
    "retrieval": Probe("Which read-out finds images of the same class?", RetrievalSettings, _retrieval),
    "layers": Probe(
        "After which block does the class show, in which token?",
        LayerSettings,
        lambda r, o: layers(r.classifier, r.parts, settings=LayerSettings(**o), **r.running),
    ),
    "tokens": Probe(
        "Does a single patch token know the class as well as the class token?",
        TokenSettings,
        _tokens,
    ),
    "attentive": Probe("Do a few learned queries beat the class token?", attentive, _attentive),
    "dense": Probe(
        "What do patch tokens know of their place that the class token does not?",
        dense,
        lambda r, o: dense(r.classifier, r.parts, **r.running, **o),
    ),
    "invert": Probe(
        "How much of the image can be recovered from the class token?",
        invert,
        lambda r, o: invert(r.classifier, r.parts, **r.running, **o),
    ),
}
