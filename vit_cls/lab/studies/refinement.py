"""What the class token holds after each block, and what comes of changing it there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_cls.checks import check_range
from vit_cls.data.dataset import ImageSource
from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig, batches, layer_tokens
from vit_cls.lab.features import Rows
from vit_cls.lab.interventions import changed_tokens, insert_tokens, replace_token
from vit_cls.lab.probes.base import check_rows
from vit_cls.lab.probes.linear_fits import LinearSettings, fit_linear
from vit_cls.lab.studies.class_tokens import CONFIG, class_tokens_by_layer
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.token_model import TokenModel
from vit_cls.model.token_reader import TokenReader


@dataclass(frozen=True)
class Refinement:
    """The class token of one model, layer by layer, on the images of the test part.

    Layer 0 is before the first block, layer ``l`` after block ``l``. Answers are classes in the model's
    order, int64, shape ``(layers, images)``; shares and divergences are float64, of the same shape.

    Args:
        targets: True classes, shape ``(images,)``.
        preds: What the unchanged model says, shape ``(images,)``.
        shuffled: Share of the permutations under which an image is still classified right.
        kl: Divergence of the probabilities after shuffling from those before, in nats, mean over the
            permutations.
        replaced: Answers with the mean class token of the training images.
        inserted: Answers where the blocks up to the layer run without a class token; None where they cannot.
        lens: What the model's own norm and head say of the class token.
        ridge: What a ridge probe says of it.
        permuted: Share of the permutations under which an image is right by permuted logits, shape
            ``(images,)``.
        layer0_change: The largest change of a logit by shuffling before the first block.
        last_change: The largest distance between logits with class tokens shuffled after the last block and
            permuted logits.
        failures: Why an image of any part could not be read, by its path.
    """

    rows: Rows
    targets: np.ndarray
    preds: np.ndarray
    shuffled: np.ndarray
    kl: np.ndarray
    replaced: np.ndarray
    inserted: np.ndarray | None
    lens: np.ndarray
    ridge: np.ndarray
    permuted: np.ndarray
    layer0_change: float
    last_change: float
    failures: dict[str, str]
    class_names: list[str]


@torch.inference_mode()
def refinement(
    classifier: ImageClassifier,
    partition: Partition,
    *,
    seeds: Sequence[int] = (0,),
    permutations: int = 5,
    config: InferenceConfig = CONFIG,
) -> Refinement:
    """Probe the class token at every layer, and shuffle, replace and insert it there.

    Shuffling gives each image the class token that another image of the test part, or by chance itself, has
    at that layer. The blocks before the layer, and all other tokens, stay as they are. Means and probes come
    from the train and validation part.

    Raises:
        ConfigError: If the head reads anything but the class token, or a number is out of range.
        DataError: If a part is too small, or a class is not the model's.

    Source:
        Interchanging activations between inputs: Geiger et al. 2021, https://arxiv.org/abs/2106.02997.
        Class token only in late blocks: CaiT, https://arxiv.org/abs/2103.17239.
    """
    check_range("--permutations", permutations, at_least=1)
    check_reads_class_token(classifier.model)
    names, sources = classifier.class_names, dict(zip(PARTS, partition.sources, strict=True))
    labelled = {part: source.index.with_class_names(names).labels for part, source in sources.items()}
    held = {part: class_tokens_by_layer(classifier, source, config) for part, source in sources.items()}
    rows = {part: of_part for part, (_, of_part) in held.items()}
    check_rows(rows)
    labels = {part: labelled[part][rows[part].positions] for part in PARTS}
    reader = TokenReader(classifier.model).on_cpu()
    tokens = {part: found[:, :, 0] for part, (found, _) in held.items()}
    features = {part: reader.normed(found) for part, found in tokens.items()}
    lens = _head(classifier.model, features["test"])
    generators = [np.random.default_rng(seed) for seed in seeds]
    orders = [one.permutation(len(labels["test"])) for one in generators for _ in range(permutations)]
    given = _Given(tokens["test"], tokens["train"].mean(dim=0), np.stack(orders), labels["test"], lens[:, -1])
    permuted = lens[:, -1].argmax(dim=-1).numpy()[given.orders] == given.targets
    return Refinement(
        rows["test"],
        labels["test"],
        lens=lens.argmax(dim=-1).numpy().T,
        ridge=_ridge(features, labels, len(names)),
        permuted=permuted.mean(axis=0),
        failures={path: why for one in rows.values() for path, why in one.failures.items()},
        class_names=list(names),
        **_effects(classifier, sources["test"], config, given),
    )


def check_reads_class_token(model: TokenModel) -> None:
    """Refuse a model whose head reads anything but its one class token.

    Raises:
        ConfigError: If it does.
    """
    if model.config.pool != "cls":
        raise ConfigError(
            "the head must read the class token alone (pool cls), so that what is done to it shows; got "
            f"a model with pool {model.config.pool}. Give another, or leave out --model to train some."
        )


def can_do_without(model: TokenModel) -> bool:
    """Whether blocks run on a sequence that lacks the class token.

    A causal mask, rotary positions and relative position biases are made for all tokens.
    """
    body: Any = getattr(model, "body", None)
    bound = [getattr(body, "rope", None), getattr(body, "rel_pos_bias", None)]
    bound += [getattr(one, "relative_position_bias_table", None) for one in model.blocks.modules()]
    return not getattr(model.config, "causal", False) and all(one is None for one in bound)


def _ridge(features: dict[str, Tensor], labels: dict[str, np.ndarray], classes: int) -> np.ndarray:
    preds = []
    for layer in range(features["test"].shape[1]):
        train, val, test = (features[part][:, layer].numpy() for part in PARTS)
        fit = fit_linear(
            (train, labels["train"]), (val, labels["val"]), num_classes=classes, settings=LinearSettings()
        )
        preds.append(fit.predict(test))
    return np.stack(preds)


def _head(model: TokenModel, features: Tensor) -> Tensor:
    """Logits of features that passed the final norm, on the CPU."""
    where = next(model.parameters()).device
    return torch.stack([model.head(one.to(where)).float().cpu() for one in features.unbind(dim=1)], dim=1)


def _logits(model: TokenModel, tokens: Tensor) -> Tensor:
    """From the encoder's input on, as the model itself goes on."""
    found = model.run_blocks(tokens, model.pool.read, model.pool.num_layers)
    return model.head(model.head_drop(model.fc_norm(model.pool(model.norm(found))))).float()


@dataclass(frozen=True)
class _Given:
    """What interventions put in the place of class tokens, and what comes out is compared with.

    Args:
        tokens: Class tokens, shape ``(images, layers, dim)``.
        means: Mean class tokens of the training images, shape ``(layers, dim)``.
        orders: Whose token each image gets, shape ``(permutations, images)``.
        logits: Of the unchanged model, shape ``(images, classes)``.
    """

    tokens: Tensor
    means: Tensor
    orders: np.ndarray
    targets: np.ndarray
    logits: Tensor

    def of(self, part: slice) -> _Given:
        """The same for some of the images; tokens and logits stay, for they are given to others."""
        return replace(self, orders=self.orders[:, part], targets=self.targets[part])


def _effects(
    classifier: ImageClassifier, source: ImageSource, config: InferenceConfig, given: _Given
) -> dict[str, Any]:
    """Every change of every image, batch by batch, so that each file is decoded once."""
    found: list[dict[str, Any]] = []
    start = 0
    for outputs in batches(classifier, source, layer_tokens(classifier, [0]), config):
        if (tokens := outputs.values) is not None:
            stop = start + len(tokens[0])
            found.append(_of_batch(classifier, tokens[0], given.of(slice(start, stop))))
            start = stop
    joined: dict[str, Any] = {}
    for name in found[0]:
        parts = [one[name] for one in found]
        if parts[0] is None:
            joined[name] = None
        else:
            joined[name] = max(parts) if name.endswith("_change") else np.concatenate(parts, axis=-1)
    return joined


def _of_batch(classifier: ImageClassifier, inputs: Tensor, given: _Given) -> dict[str, Any]:
    model, depth = classifier.model, len(classifier.model.blocks)
    inputs = inputs.to(next(model.parameters()).device)
    plain = _logits(model, inputs)
    before = (plain.double() / classifier.temperature).log_softmax(dim=-1)
    right, kl = (np.zeros((depth + 1, len(inputs))) for _ in range(2))
    replaced, inserted = [], []
    changes = {0: 0.0, depth: 0.0}
    for layer in range(depth + 1):
        for order in given.orders:
            with changed_tokens(model, layer, replace_token(0, given.tokens[order, layer])):
                logits = _logits(model, inputs)
            after = (logits.double() / classifier.temperature).log_softmax(dim=-1)
            right[layer] += logits.argmax(dim=-1).cpu().numpy() == given.targets
            kl[layer] += (before.exp() * (before - after)).sum(dim=-1).cpu().numpy()
            if layer in changes:
                wanted = plain if layer == 0 else given.logits[order].to(plain)
                changes[layer] = max(changes[layer], float((logits - wanted).abs().max()))
        with changed_tokens(model, layer, replace_token(0, given.means[layer])):
            replaced.append(_logits(model, inputs).argmax(dim=-1).cpu().numpy())
        if can_do_without(model):
            inserted.append(_late(model, inputs, layer).argmax(dim=-1).cpu().numpy())
    return {
        "preds": plain.argmax(dim=-1).cpu().numpy(),
        "shuffled": right / len(given.orders),  # counts first: shares that are all must be exactly 1
        "kl": kl / len(given.orders),
        "replaced": np.stack(replaced),
        "inserted": np.stack(inserted) if inserted else None,
        "layer0_change": changes[0],
        "last_change": changes[depth],
    }


def _late(model: TokenModel, inputs: Tensor, layer: int) -> Tensor:
    """Logits where the class token, as it enters the encoder, joins the others at a layer only."""
    constant = inputs[:1, 0]  # token and position: the same for every image
    with contextlib.ExitStack() as stack:
        stack.enter_context(changed_tokens(model, 0, lambda tokens: tokens[:, 1:]))
        stack.enter_context(changed_tokens(model, layer, insert_tokens(0, constant)))
        return _logits(model, inputs)
