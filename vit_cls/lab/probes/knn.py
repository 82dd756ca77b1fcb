"""The probe ``knn``: how well the nearest training images vote, for each read of the frozen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_cls.errors import ConfigError
from vit_cls.inference import choose_device
from vit_cls.lab.probes.base import FrozenParts
from vit_cls.lab.probes.classifiers import ClassifierProbe

NEIGHBOURS = (20, 10, 100, 200)
"""The usual first: of equal validation accuracies the first is taken."""
TEMPERATURES = (0.07, 0.02, 0.2, 1.0)
AT_ONCE = 1 << 25
"""Similarities that are held at a time: 128 MB."""


def clipped(neighbours: Sequence[int], images: int) -> list[int]:
    """Numbers of neighbours that there are, each once, in their order."""
    return list(dict.fromkeys(min(count, images) for count in neighbours))


def votes(similarities: Tensor, neighbour_labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """What the neighbours of each query say for each class.

    Args:
        similarities: Of the neighbours, shape ``(queries, neighbours)``, the nearest first.
        neighbour_labels: Their classes, int64, of the same shape.
        temperature: A neighbour weighs ``exp(similarity / temperature)``.

    Returns:
        Shape ``(queries, classes)``; each row is scaled by the weight of its nearest neighbour, which changes
        no order and overflows for no temperature.

    Example:
        >>> votes(torch.tensor([[0.9, 0.8]]), torch.tensor([[1, 0]]), 0.1, 2)
        tensor([[0.3679, 1.0000]])

    Source:
        DINO, ``eval_knn.py``; Wu et al. 2018, https://arxiv.org/abs/1805.01978. DINOv2 divides the weights by
        their sum, which changes no order either.
    """
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    found = torch.zeros(len(weights), num_classes, dtype=weights.dtype, device=weights.device)
    return found.scatter_add_(1, neighbour_labels, weights)


def knn_predict(
    train: tuple[np.ndarray, np.ndarray],
    queries: np.ndarray,
    choices: Sequence[tuple[int, float]],
    *,
    num_classes: int,
    device: str = "cpu",
) -> dict[tuple[int, float], np.ndarray]:
    """The class of each query for each number of neighbours and temperature; neighbours are sought once.

    Args:
        train: Features, shape ``(rows, dim)``, and labels, int64, shape ``(rows,)``.
        choices: Numbers of neighbours, at most ``rows``, and temperatures.

    Returns:
        int64, shape ``(queries,)``, for each choice.
    """
    where = choose_device(device)
    bank = F.normalize(torch.from_numpy(np.asarray(train[0], dtype=np.float32)).to(where), dim=1)
    labels = torch.from_numpy(np.asarray(train[1], dtype=np.int64)).to(where)
    most = max(count for count, _ in choices)
    step = max(1, AT_ONCE // len(bank))
    found: dict[tuple[int, float], list[np.ndarray]] = {choice: [] for choice in choices}
    for start in range(0, len(queries), step):
        part = torch.from_numpy(np.asarray(queries[start : start + step], dtype=np.float32))
        similarities, nearest = (F.normalize(part.to(where), dim=1) @ bank.T).topk(most, dim=1)
        for count, temperature in choices:
            said = votes(similarities[:, :count], labels[nearest[:, :count]], temperature, num_classes)
            found[count, temperature].append(said.argmax(dim=1).cpu().numpy())
    empty = np.empty(0, dtype=np.int64)
    return {choice: np.concatenate([empty, *values]) for choice, values in found.items()}


@dataclass(frozen=True)
class Neighbours:
    """The vote of the nearest training images of ``frozen`` by one read."""

    pool: str
    frozen: FrozenParts
    choice: tuple[int, float]
    val_right: int

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The class of each row, int64, shape ``(rows,)``."""
        return neighbours_say(self.pool, self.frozen, features, [self.choice])[self.choice]


def neighbours_say(
    pool: str, frozen: FrozenParts, queries: np.ndarray, choices: Sequence[tuple[int, float]]
) -> dict[tuple[int, float], np.ndarray]:
    """`knn_predict` with the training images as a pool reads them."""
    train = frozen.train
    bank, classes = (train.read(pool), train.labels), len(train.class_names)
    return knn_predict(bank, queries, choices, num_classes=classes, device=frozen.device)


@dataclass(frozen=True, kw_only=True)
class KnnProbe(ClassifierProbe):
    """Let the nearest training images vote; neighbours and temperature are chosen on validation.

    Args:
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.
        pools: What is read; none means the usual pools that the model has.
        neighbours: Numbers of neighbours to choose from; those above the number of training images are that.
        temperatures: Temperatures to choose from.

    Raises:
        ConfigError: If a number is out of range.

    Source:
        DINO, https://arxiv.org/abs/2104.14294, and its ``eval_knn.py``.
    """

    neighbours: Sequence[int] = NEIGHBOURS
    temperatures: Sequence[float] = TEMPERATURES

    name = "knn"
    question = "By which read of the frozen tokens are the nearest training images of the same class?"
    claim = "Reading {} and reading {} give different k-NN top-1."
    title = "Nearest neighbours on frozen reads, test part"
    metric = "k-NN top-1"
    winner = "Neighbours by {}"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("--neighbours", self.neighbours), ("--temperatures", self.temperatures)):
            if not values or min(values) <= 0:
                raise ConfigError(f"{name} must be numbers above 0; got {list(values)}.")

    def fit(self, pool: str, frozen: FrozenParts) -> Neighbours:
        """See `ClassifierProbe.fit`."""
        counts = clipped(self.neighbours, len(frozen.train))
        choices = [(count, temperature) for count in counts for temperature in self.temperatures]
        said = neighbours_say(pool, frozen, frozen.val.read(pool), choices)
        right = {choice: int((said[choice] == frozen.val.labels).sum()) for choice in choices}
        best = max(choices, key=lambda choice: right[choice])  # of equal ones the first
        return Neighbours(pool, frozen, best, right[best])

    def columns(self, fits: Mapping[str, Neighbours]) -> dict[str, list[Any]]:
        """See `ClassifierProbe.columns`."""
        counts, temperatures = zip(*(fit.choice for fit in fits.values()), strict=True)
        return {"neighbours": list(counts), "temperature": list(temperatures)}

    def table_note(self, frozen: FrozenParts) -> str:
        """See `ClassifierProbe.table_note`."""
        return f"Neighbours and temperature: chosen on {len(frozen.val)} validation images."

    def details(
        self, fits: Mapping[str, Neighbours], frozen: FrozenParts
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `ClassifierProbe.details`."""
        return {"neighbours": clipped(self.neighbours, len(frozen.train)), "device": frozen.device}, {
            "neighbours": {pool: fit.choice[0] for pool, fit in fits.items()},
            "temperature": {pool: fit.choice[1] for pool, fit in fits.items()},
        }

    def notes(self, fits: Mapping[str, Neighbours], frozen: FrozenParts) -> list[str]:
        """See `ClassifierProbe.notes`."""
        return [
            "Features are scaled to length 1; a neighbour's vote weighs exp(cosine / temperature). Chosen on "
            f"validation from {', '.join(map(str, clipped(self.neighbours, len(frozen.train))))} neighbours "
            f"and temperatures {', '.join(f'{value:g}' for value in self.temperatures)}; of equal accuracies "
            "the first. The train part alone votes."
        ]
