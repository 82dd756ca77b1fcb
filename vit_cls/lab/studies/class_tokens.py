"""Several class tokens of one model: how parallel they are, what they attend to, what each of them knows."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig, batches, layer_tokens
from vit_cls.lab.attention import attention_module, capture_attention
from vit_cls.lab.features import Rows
from vit_cls.lab.probes.linear_fits import LinearSettings, fit_linear
from vit_cls.lab.studies.study import Answers
from vit_cls.lab.studies.trials import Trial
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.pooling_tokens import ClassTokenPool, MultiClassTokenPool
from vit_cls.model.token_reader import TokenReader
from vit_cls.stats.intervals import permutation_p
from vit_cls.stats.random_effects import Mean

COLLAPSED = 0.95
"""Tokens with a larger cosine are called parallel."""
PERMUTATIONS = 499
CONFIG = InferenceConfig(precision="32")
"""As the models of a study answer."""


@dataclass(frozen=True)
class ClassTokens:
    """The class tokens of one model on some images.

    Args:
        layers: As `class_tokens_by_layer` gives them.
        output: After the last block and the final norm, float32, shape ``(images, K, dim)``.
        overlap: Jensen-Shannon divergence of the tokens' attention to the patches in the last block, the mean
            over heads and pairs, shape ``(images,)``; None where weights are not known.
        maps: That attention, the mean over heads, shape ``(images, K, patches)``; rows sum to 1.
    """

    layers: np.ndarray
    output: np.ndarray
    overlap: np.ndarray | None
    maps: np.ndarray | None
    rows: Rows
    preprocess: Preprocess
    grid_size: tuple[int, int]


def class_tokens_by_layer(
    classifier: ImageClassifier, source: ImageSource, config: InferenceConfig
) -> tuple[Tensor, Rows]:
    """Class tokens before the first block and after each, as the blocks left them.

    Returns:
        On the CPU, shape ``(images, depth + 1, K, dim)``, and which images these are.

    Raises:
        DataError: If no image can be read.
        ModelFileError: If tokens are not finite.
    """
    count = classifier.model.layout.num_class_tokens
    layers = range(len(classifier.model.blocks) + 1)
    kept: list[Tensor] = []
    failures: dict[int, str] = {}
    for outputs in batches(classifier, source, layer_tokens(classifier, layers), config):
        failures |= outputs.failures
        if (tokens := outputs.values) is not None:
            kept.append(torch.stack([tokens[layer][:, :count] for layer in layers], dim=1))
    rows = Rows.of(source, failures)
    return torch.cat(kept), rows


def collect_class_tokens(classifier: ImageClassifier, source: ImageSource) -> ClassTokens:
    """Run a model, which ends in evaluation mode, over images; keep its class tokens and their attention.

    Raises:
        ConfigError: If the model has no class token.
    """
    model = classifier.model
    layout = model.layout
    if not layout.class_token:
        raise ConfigError("the model has no class token. Choose one that has: model.pool cls.")
    overlaps: list[Tensor] = []

    def keep(weights: Tensor) -> Tensor:
        rows = weights[:, :, : layout.num_class_tokens, layout.num_prefix_tokens :].float()
        rows = rows / rows.sum(dim=-1, keepdim=True)
        overlaps.append(jensen_shannon(rows).mean(dim=1).cpu())
        return rows.mean(dim=1).cpu()

    blocks = [model.blocks[-1]]
    try:
        attention_module(blocks[0])
    except ConfigError:
        blocks = []
    with capture_attention(blocks, keep) as maps:
        tokens, rows = class_tokens_by_layer(classifier, source, CONFIG)
    return ClassTokens(
        tokens.numpy(),
        TokenReader(model).on_cpu().normed(tokens[:, -1]).numpy(),
        torch.cat(overlaps).double().numpy() if blocks else None,
        torch.cat(maps).numpy() if blocks else None,
        rows,
        classifier.preprocess,
        layout.grid_size,
    )


def pair_cosine(tokens: np.ndarray) -> np.ndarray:
    """Mean cosine over the pairs of two or more tokens, none of them zero: ``(..., K, dim)`` to ``(...)``."""
    count = tokens.shape[-2]
    matrix = cosine_matrix(tokens)
    diagonal = np.trace(matrix, axis1=-2, axis2=-1)
    return (matrix.sum(axis=(-2, -1)) - diagonal) / (count * (count - 1))


def cosine_matrix(tokens: np.ndarray) -> np.ndarray:
    """Cosine of each of ``(..., K, dim)`` tokens with each: float64, shape ``(..., K, K)``."""
    unit = _unit(tokens)
    return unit @ np.swapaxes(unit, -1, -2)


def _unit(tokens: np.ndarray) -> np.ndarray:
    """Tokens of length 1, float64."""
    tokens = tokens.astype(np.float64)
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


def image_cosine(tokens: np.ndarray, *, seed: int) -> float:
    """Mean cosine of the same token on two images: what parallel ones among ``(images, K, dim)`` mean.

    Example:
        >>> round(image_cosine(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), seed=0), 6)
        0.0
    """
    order = np.random.default_rng(seed).permutation(len(tokens))
    pairs = np.stack([tokens[order], tokens[np.roll(order, 1)]], axis=-2)
    return float(pair_cosine(pairs).mean())


@dataclass(frozen=True)
class AgainstSeeds:
    """Whether tokens of one model are more parallel than tokens of models that know nothing of each other.

    Args:
        independent: Mean cosine of tokens of different models on the same image.
        p: One-sided.
        smallest_p: The least that so few seeds and tokens allow.
    """

    independent: float
    p: float
    smallest_p: float


def against_seeds(outputs: np.ndarray, *, seed: int) -> AgainstSeeds | None:
    """Compare the cosines within models with those of token i of one seed and token j of another.

    If the tokens of a model had nothing to do with each other, it would not matter which of all tokens are
    put together as a model: they are dealt out at random, and the mean cosine within a model computed again.
    Outputs are of shape ``(seeds, images, K, dim)``; one seed alone gives None.
    """
    seeds, images, count, dim = outputs.shape
    if seeds < 2:
        return None
    tokens = _unit(outputs).transpose(0, 2, 1, 3).reshape(seeds * count, images * dim)
    cosines = tokens @ tokens.T / images  # the mean over images
    model = np.repeat(np.arange(seeds), count)
    pairs = ~np.eye(len(model), dtype=bool)

    def within(order: np.ndarray) -> float:
        owner = model[order]
        return float(cosines[(owner[:, None] == owner) & pairs].mean())

    rng = np.random.default_rng(seed)
    dealt = np.array([within(rng.permutation(len(model))) for _ in range(PERMUTATIONS)])
    p = _rounded_p(within(np.arange(len(model))), dealt)
    divisions = math.factorial(seeds * count) // (math.factorial(count) ** seeds * math.factorial(seeds))
    return AgainstSeeds(
        float(cosines[model[:, None] != model].mean()), p, max(1 / divisions, 1 / (1 + len(dealt)))
    )


def _rounded_p(observed: float, null_draws: np.ndarray) -> float:
    """As `permutation_p`; sums in another order differ by rounding: what is equal counts as equal."""
    return permutation_p(observed - 1e-12, null_draws)


def jensen_shannon(rows: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions, the mean over pairs, in units of log 2.

    Rows are of shape ``(..., K, places)``, each of which sums to 1; the result, ``(...)``, goes from 0, where
    all are equal or there is one alone, to 1, where they have no place in common.

    Source:
        Lin 1991, https://doi.org/10.1109/18.61115.
    """
    count = rows.shape[-2]
    if count == 1:
        return rows.new_zeros(rows.shape[:-2])
    i, j = torch.triu_indices(count, count, offset=1)
    left, right = rows[..., i, :], rows[..., j, :]
    own = (torch.special.entr(left).sum(dim=-1) + torch.special.entr(right).sum(dim=-1)) / 2
    joint = torch.special.entr((left + right) / 2).sum(dim=-1)
    return (joint - own).clamp(min=0).mean(dim=-1) / math.log(2)


@dataclass(frozen=True)
class TokenAnswers:
    """What each class token says about the class.

    Args:
        preds: Shape ``(images, K)``.
        most_confident: The token with the highest score for any class, shape ``(images,)``.
        read_by: ``own head``, or ``ridge`` where the head reads no single token.
    """

    preds: np.ndarray
    most_confident: np.ndarray
    targets: np.ndarray
    read_by: str

    @property
    def right(self) -> np.ndarray:
        """Whether each token is right, bool, shape ``(images, K)``."""
        return self.preds == self.targets[:, None]

    @property
    def disagreement(self) -> np.ndarray:
        """Share of the pairs of tokens that name different classes, shape ``(images,)``."""
        count = self.preds.shape[1]
        differ = (self.preds[:, :, None] != self.preds[:, None, :]).sum(axis=(1, 2))
        return differ / max(1, count * (count - 1))


def token_answers(classifier: ImageClassifier, parts: Partition, test: ClassTokens) -> TokenAnswers:
    """Classify by each class token alone.

    A head whose width is that of a token reads each token as it reads their mean. Else each token gets a
    ridge classifier, whose penalty is chosen on validation.
    """
    model = classifier.model
    own_head = type(model.pool) in (ClassTokenPool, MultiClassTokenPool)
    if own_head:
        with torch.inference_mode():
            head = copy.deepcopy(model.head).to("cpu", torch.float32)
            scores = head(torch.from_numpy(test.output)).softmax(dim=-1).numpy()
    else:
        train, val = (collect_class_tokens(classifier, part) for part in (parts.train, parts.val))
        columns = []
        for k in range(test.output.shape[1]):
            fit = fit_linear(
                (train.output[:, k], train.rows.labels),
                (val.output[:, k], val.rows.labels),
                num_classes=len(classifier.class_names),
                settings=LinearSettings(),
            )
            columns.append(test.output[:, k].astype(np.float64) @ fit.weight + fit.bias)
        scores = np.stack(columns, axis=1)
    most_confident = scores.max(axis=2).argmax(axis=1)
    read_by = "own head" if own_head else "ridge"
    return TokenAnswers(scores.argmax(axis=2), most_confident, test.rows.labels, read_by)


def mutual_information(tokens: np.ndarray, labels: np.ndarray) -> float:
    """How much the choice of a token, ``(seeds, images)``, tells about the class: bits, mean over seeds.

    The estimate is from counts, and above 0 by chance.
    """
    from sklearn.metrics import mutual_info_score

    classes = int(labels.max()) + 1
    bits = []
    for row in tokens:
        counts = np.bincount(row * classes + labels, minlength=(int(row.max()) + 1) * classes)
        joint = counts.reshape(-1, classes)  # (K, classes)
        bits.append(float(mutual_info_score(None, None, contingency=joint)) / math.log(2))
    return float(np.mean(bits))


def information_test(tokens: np.ndarray, labels: np.ndarray, *, seed: int) -> tuple[float, float, float]:
    """Mutual information in bits, its mean where labels are permuted for all seeds alike, and the p-value."""
    rng = np.random.default_rng(seed)
    bits = mutual_information(tokens, labels)
    null = np.array([mutual_information(tokens, rng.permutation(labels)) for _ in range(PERMUTATIONS)])
    return bits, float(null.mean()), _rounded_p(bits, null)


def collapse(cosine: Mean) -> str:
    """Whether tokens are parallel, as far as the interval of their cosine tells."""
    low, high = cosine.ci95
    return "yes" if low > COLLAPSED else "no" if high < COLLAPSED else "cannot tell"


@dataclass(frozen=True)
class ArmTokens:
    """What the models of one arm showed on the test part, a seed each; ``seed`` is that of comparisons."""

    tokens: list[ClassTokens]
    answers: list[TokenAnswers]
    seed: int

    @cached_property
    def cosines(self) -> np.ndarray:
        """Mean over the pairs of output tokens, shape ``(seeds, images)``."""
        return np.stack([pair_cosine(tokens.output) for tokens in self.tokens])

    @cached_property
    def layer_cosines(self) -> np.ndarray:
        """The same by layer, as the blocks left the tokens, shape ``(depth + 1, seeds, images)``."""
        return np.stack([pair_cosine(tokens.layers).T for tokens in self.tokens], axis=1)

    @cached_property
    def overlaps(self) -> np.ndarray | None:
        """Divergence of attention, shape ``(seeds, images)``; None where weights are not known."""
        overlaps = [tokens.overlap for tokens in self.tokens if tokens.overlap is not None]
        return np.stack(overlaps) if len(overlaps) == len(self.tokens) else None

    @cached_property
    def against_seeds(self) -> AgainstSeeds | None:
        """Cosines within the models against those between them; None for one seed."""
        return against_seeds(np.stack([tokens.output for tokens in self.tokens]), seed=self.seed)

    @cached_property
    def other_image_cosine(self) -> float:
        """Cosine of a token with itself on another image, the mean over seeds."""
        return float(np.mean([image_cosine(tokens.output, seed=self.seed) for tokens in self.tokens]))


def measure_arm(
    answers: Answers, trials: Sequence[Trial], parts: Mapping[int, Partition], seed: int
) -> ArmTokens:
    """Watch the class tokens of the models of one arm."""
    tokens, token_preds = [], []
    for trial in trials:
        model = answers.model(trial)
        tokens.append(collect_class_tokens(model, parts[trial.seed].test))
        token_preds.append(token_answers(model, parts[trial.seed], tokens[-1]))
    return ArmTokens(tokens, token_preds, seed)
