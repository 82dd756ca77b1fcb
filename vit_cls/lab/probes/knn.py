"""The probe ``knn``: how well the nearest training images vote, for each read of the frozen tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_cls.errors import ConfigError
from vit_cls.inference import choose_device
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    MARGIN,
    accuracy_cells,
    accuracy_text,
    check_margin,
    checked_parts,
    chosen_pools,
    compare_with,
    data_of,
    failures_note,
    predictions_of,
    reference_pool,
    sentence_on,
    settings_record,
)
from vit_cls.lab.results import LabResult, Table, forest

NEIGHBOURS = (20, 10, 100, 200)
"""The usual first: of equal validation accuracies the first is taken."""
TEMPERATURES = (0.07, 0.02, 0.2, 1.0)
AT_ONCE = 1 << 25
"""Similarities that are held at a time: 128 MB."""


@dataclass(frozen=True)
class KnnSettings:
    """Choices of the probe.

    Args:
        pools: What is read; none means the usual pools that the model has.
        neighbours: Numbers of neighbours to choose from; those above the number of training images are that.
        temperatures: Temperatures to choose from.
        margin: The largest difference of accuracies that does not matter.
        seed: Of the resampling; nothing else is random.
        device: Where similarities are computed: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        ConfigError: If a number is out of range.
    """

    pools: Sequence[str] = ()
    neighbours: Sequence[int] = NEIGHBOURS
    temperatures: Sequence[float] = TEMPERATURES
    margin: float = MARGIN
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_margin(self.margin)
        for name, values in (("--neighbours", self.neighbours), ("--temperatures", self.temperatures)):
            if not values or min(values) <= 0:
                raise ConfigError(f"{name} must be numbers above 0; got {list(values)}.")


def clipped(neighbours: Sequence[int], images: int) -> list[int]:
    """Numbers of neighbours that there are, each once, in their order.

    Args:
        neighbours: Any, above 0.

    Example:
        >>> clipped([20, 10, 100, 200], 50)
        [20, 10, 50]
    """
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
        queries: Features, shape ``(queries, dim)``.
        choices: Numbers of neighbours, at most ``rows``, and temperatures.

    Returns:
        int64, shape ``(queries,)``, for each choice.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_predict((x, np.array([0, 1])), np.array([[2.0, 1.0]]), [(1, 0.07)], num_classes=2)
        {(1, 0.07): array([0])}
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


def knn(
    train: FrozenTokens,
    val: FrozenTokens,
    test: FrozenTokens,
    *,
    settings: KnnSettings | None = None,
    origin: str = "",
) -> LabResult:
    """Let the nearest training images vote; neighbours and temperature are chosen on validation.

    Args:
        settings: Choices; None means the defaults.

    Raises:
        ConfigError: If the model cannot be read by a pool.
        DataError: If the parts do not belong together or are too small.

    Source:
        DINO, https://arxiv.org/abs/2104.14294, and its ``eval_knn.py``.
    """
    started = time.perf_counter()
    settings = settings or KnnSettings()
    parts = checked_parts(train.rows, val.rows, test.rows)
    pools, notes = chosen_pools(settings.pools, train.reader)
    counts = clipped(settings.neighbours, len(train))
    choices = [(count, temperature) for count in counts for temperature in settings.temperatures]
    chosen: dict[str, tuple[int, float]] = {}
    val_right: dict[str, int] = {}
    preds: dict[str, np.ndarray] = {}
    classes = len(train.class_names)
    for pool in pools:
        bank = train.read(pool), train.labels
        said = knn_predict(bank, val.read(pool), choices, num_classes=classes, device=settings.device)
        scores = {choice: int((values == val.labels).sum()) for choice, values in said.items()}
        chosen[pool] = best = max(choices, key=lambda choice: scores[choice])
        val_right[pool] = scores[best]
        said = knn_predict(bank, test.read(pool), [best], num_classes=classes, device=settings.device)
        preds[pool] = said[best]
    right = {pool: values == test.labels for pool, values in preds.items()}
    reference, winner = reference_pool(pools), max(pools, key=lambda pool: val_right[pool])
    claim = "Reading {} and reading {} give different k-NN top-1."
    findings = compare_with(reference, right, claim, margin=settings.margin, seed=settings.seed)
    headline = (
        f"Neighbours by {winner}, the best on {len(val)} validation images: {accuracy_text(right[winner])}."
    )
    return LabResult(
        "probe knn",
        "By which read of the frozen tokens are the nearest training images of the same class?",
        headline + sentence_on(winner, findings),
        list(findings.values()),
        [_table(pools, right, chosen, val_right, len(val))],
        forest(f"k-NN top-1 less that of {reference}", findings, settings.margin),
        settings_record(settings, pools, reference=reference) | {"neighbours": counts},
        data_of(origin, parts),
        {
            "top1": {pool: float(values.mean()) for pool, values in right.items()},
            "neighbours": {pool: choice[0] for pool, choice in chosen.items()},
            "temperature": {pool: choice[1] for pool, choice in chosen.items()},
            "val_right": val_right,
            "best_on_val": winner,
        },
        predictions_of(test.rows, preds),
        [*notes, *_notes(settings, counts), *failures_note(parts)],
        time.perf_counter() - started,
    )


def _table(
    pools: Sequence[str],
    right: dict[str, np.ndarray],
    chosen: dict[str, tuple[int, float]],
    val_right: dict[str, int],
    val_images: int,
) -> Table:
    columns = ["read", *ACCURACY_COLUMNS, "val top-1 (%)", "val right", "neighbours", "temperature"]
    rows: list[list[str | int | float | None]] = [
        [pool, *accuracy_cells(right[pool]), val_right[pool] / val_images, val_right[pool], *chosen[pool]]
        for pool in pools
    ]
    note = f"Intervals: Wilson's, 95 %. Neighbours and temperature: chosen on {val_images} validation images."
    return Table("Nearest neighbours on frozen reads, test part", columns, rows, note)


def _notes(settings: KnnSettings, counts: Sequence[int]) -> list[str]:
    return [
        "Features are scaled to length 1; a neighbour's vote weighs exp(cosine / temperature). Chosen on "
        f"validation from {', '.join(map(str, counts))} neighbours and temperatures "
        f"{', '.join(f'{one:g}' for one in settings.temperatures)}; of equal accuracies the first. The train "
        "part alone votes."
    ]
