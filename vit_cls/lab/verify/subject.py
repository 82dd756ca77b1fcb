"""A model under examination, with the passes that several identities share, and what a check found."""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError
from vit_cls.lab.attention import attention_module, capture_attention
from vit_cls.lab.interventions import capture_tokens
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.config import ViTConfig

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative residual that rounding explains."""
EXACT, RELATIVE, GREATER = "exact", "relative", "greater"


class NotApplicableError(Exception):
    """An identity makes no statement about this model; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """What one identity gave on one model.

    Args:
        residual: How far the two sides are apart; of a ``greater`` check, the quantity itself.
        kind: ``exact``: the residual must be 0; ``relative``: at most the tolerance, relative to the largest
            value; ``greater``: above the tolerance.
        tolerance: The bound.
        reason: Why the identity does not apply; None where it does.
    """

    residual: float | None
    kind: str = RELATIVE
    tolerance: float = 0.0
    reason: str | None = None

    @property
    def applies(self) -> bool:
        """Whether the identity says anything about this model."""
        return self.reason is None

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts the identity; one that does not apply contradicts nothing."""
        if self.residual is None:
            return not self.applies
        if not math.isfinite(self.residual):
            return False
        return self.residual > self.tolerance if self.kind == GREATER else self.residual <= self.tolerance


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention.

    Args:
        attn: The module.
        args: The normalised tokens first.
        kwargs: Of its ``forward``.
        output: What it returned, shape ``(images, tokens, dim)``.
    """

    attn: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Alone:
    """What became of one image without others beside it: the same sizes of matrices, hence the same rounding.

    Args:
        after_block_1: Its first token after the first block, shape ``(dim,)``.
        read_token: The first token that the head reads, after the last block, shape ``(dim,)``.
        logits: Shape ``(1, classes)``.
    """

    after_block_1: Tensor
    read_token: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Pass:
    """One pass over all tokens; a reason where the blocks have no ordinary attention."""

    layers: list[Tensor]
    weights: list[Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)
    reason: str = ""


class Subject:
    """A classifier with random images, and what it makes of them, each computed once.

    Args:
        images: How many, at least 2.
        dtype: float64 or float32.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        *,
        images: int = 2,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_range("--images", images, at_least=2, hint="One is compared with another.")
        check_range("--seed", seed, at_least=0)
        self.seed, self.device, self.dtype = seed, torch.device(device), dtype
        self.classifier = copy.deepcopy(classifier).to(self.device, dtype).eval().requires_grad_(False)
        self.model = self.classifier.model
        self.config, self.layout = self.model.config, self.model.layout
        self.tolerance = TOLERANCES[dtype]
        shape = (images, self.config.in_chans, *self.config.image_hw)
        pixels = torch.randint(0, 256, shape, generator=self.generator("images"), dtype=torch.uint8)
        self.images = pixels.to(self.device)
        """uint8, shape ``(images, channels, height, width)``."""

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each use, on the CPU."""
        # torch's generator on the CPU looks at 32 bits of a seed.
        return torch.Generator().manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))

    def random(self, name: str, *shape: int, std: float = 1.0) -> Tensor:
        """Normal numbers on the subject's device.

        Args:
            name: Of the use; the same name draws the same numbers.
        """
        drawn = torch.randn(shape, generator=self.generator(name), dtype=torch.float64) * std
        return drawn.to(self.device, self.dtype)

    @property
    def native(self) -> bool:
        """Whether the blocks are our own."""
        return isinstance(self.config, ViTConfig)

    @cached_property
    def inputs(self) -> Tensor:
        """The images, normalised here from the preprocessing's numbers, not by the classifier."""
        # The classifier holds them as float32, whatever it is converted to later.
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(self.device, self.dtype)
            for values in (self.classifier.preprocess.mean, self.classifier.preprocess.std)
        )
        return (self.images.to(self.dtype) / 255 - mean) / std

    @cached_property
    def _answer(self) -> tuple[Tensor, Tensor]:
        with capture_tokens(self.model) as after:
            logits = self.model(self.inputs)
        return after[-1], logits

    @property
    def read_tokens(self) -> Tensor:
        """What the last block gives when the model classifies; of a native model the read tokens alone."""
        return self._answer[0]

    @property
    def logits(self) -> Tensor:
        """Of the model inside the classifier, shape ``(images, classes)``."""
        return self._answer[1]

    @cached_property
    def tokens(self) -> Tensor:
        """The encoder's input, shape ``(images, tokens, dim)``."""
        return self.model.embed_tokens(self.inputs)

    @cached_property
    def _pass(self) -> _Pass:
        model = self.model
        try:
            attentions = [attention_module(block) for block in model.blocks]
        except ConfigError as error:
            with capture_tokens(model) as after:
                model.run_blocks(self.tokens)
            return _Pass([self.tokens, *after], reason=str(error).partition(". ")[0])
        calls: dict[int, AttentionCall] = {}

        def note(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[id(attn)] = AttentionCall(attn, args, kwargs, output)

        ends = [attentions[0], attentions[-1]]
        with contextlib.ExitStack() as stack:
            for attn in ends:
                stack.callback(attn.register_forward_hook(note, with_kwargs=True).remove)
            weights = stack.enter_context(capture_attention(model.blocks, _mean_over_heads))
            after = stack.enter_context(capture_tokens(model))
            model.run_blocks(self.tokens)
        return _Pass([self.tokens, *after], weights, [calls[id(attn)] for attn in ends])

    @property
    def layers(self) -> list[Tensor]:
        """Tokens before the first block and after each, all of them, shape ``(images, tokens, dim)``."""
        return self._pass.layers

    @property
    def attention(self) -> list[Tensor]:
        """Attention weights of each block, averaged over heads, shape ``(images, tokens, tokens)``.

        Raises:
            NotApplicableError: If the blocks have no ordinary attention.
        """
        if self._pass.reason:
            raise NotApplicableError(self._pass.reason)
        return self._pass.weights

    def call(self, end: int) -> AttentionCall:
        """How the attention of the first or of the last block was called.

        Raises:
            NotApplicableError: If the blocks have no ordinary attention.
        """
        if self._pass.reason:
            raise NotApplicableError(self._pass.reason)
        return self._pass.calls[end]

    @cached_property
    def alone(self) -> list[Alone]:
        """Each image in a batch of its own."""
        found = []
        for i in range(len(self.inputs)):
            with capture_tokens(self.model) as after:
                logits = self.model(self.inputs[i : i + 1])
            read_token = after[-1][0, 0]
            if len(after) == 1:  # of a single block the model computes the read tokens alone
                after = [self.model.run_blocks(self.tokens[i : i + 1])]
            found.append(Alone(after[0][0, 0], read_token, logits))
        return found

    def relative(self, found: Tensor, expected: Tensor) -> Check:
        """The largest difference, over the largest value.

        Args:
            expected: The other, of the same shape.
        """
        return Check(relative_residual(found, expected), RELATIVE, self.tolerance)


def _mean_over_heads(weights: Tensor) -> Tensor:
    return weights.mean(dim=1)


def relative_residual(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; 0 where both are zero.

    Args:
        expected: The other, of the same shape.

    Example:
        >>> relative_residual(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0]))
        0.25
    """
    difference = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    return difference / scale if difference and scale else difference


def largest(tensor: Tensor) -> float:
    """The largest absolute value."""
    return float(tensor.abs().max())


def exact(residual: float) -> Check:
    """A check whose two sides must agree to the last bit."""
    return Check(residual, EXACT, 0.0)


def greater(quantity: float) -> Check:
    """A check that something is there: more than 0."""
    return Check(quantity, GREATER, 0.0)


def need_class_token(subject: Subject) -> None:
    """Leave a check that is about the class token.

    Raises:
        NotApplicableError: If it has none.
    """
    if not subject.layout.class_token:
        raise NotApplicableError("the model has no class token")


def need_native(subject: Subject, what: str) -> Any:
    """The configuration of a native model.

    Raises:
        NotApplicableError: If it is an adapted one.
    """
    if not subject.native:
        raise NotApplicableError(f"the blocks are timm's, which {what}")
    return subject.config


def need_symmetry(subject: Subject) -> None:
    """Leave a check that permutes tokens, if the blocks themselves know an order.

    Raises:
        NotApplicableError: If attention is causal, or uses rotary or relative positions.
    """
    if getattr(subject.config, "causal", False):
        raise NotApplicableError("attention is causal: the order of the tokens matters")
    body = getattr(subject.model, "body", None)
    if getattr(body, "rope", None) is not None:
        raise NotApplicableError("rotary positions inside attention tie each token to its place")
    tables = [
        getattr(getattr(b, "attn", None), "relative_position_bias_table", None) for b in subject.model.blocks
    ]
    if getattr(body, "rel_pos_bias", None) is not None or any(table is not None for table in tables):
        raise NotApplicableError("relative positions inside attention tie each token to its place")
