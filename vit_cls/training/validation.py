"""What is counted while a model is validated, in memory and time linear in the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

from vit_cls.errors import ConfigError
from vit_cls.own_code import register
from vit_cls.weights.bundle import EMA, RAW

TOP_K = 5
VAL_METRICS: dict[str, Callable[[int], Metric]] = {
    "f1": lambda classes: MulticlassF1Score(classes, average="macro", validate_args=False),
    "auroc": lambda classes: MulticlassAUROC(classes, average="macro", validate_args=False),
}
"""Further metrics of each validation, by the names of ``metrics``; called with the number of classes."""


def register_metric(name: str, make: Callable[[int], Metric]) -> None:
    """Let ``metrics`` name a metric of your own: ``val/NAME`` in ``metrics.csv`` and for every logger.

    Args:
        name: What will be written: small letters, digits and hyphens; not that of another metric.
        make: From the number of classes to a torchmetrics ``Metric`` whose ``update`` takes logits, float32,
            ``(batch, classes)``, and classes, int64, ``(batch,)``, and whose ``compute`` gives one number.

    Raises:
        ConfigError: If the name is taken, or cannot be written.

    Example:
        >>> from torchmetrics.classification import MulticlassCohenKappa
        >>> register_metric("kappa", MulticlassCohenKappa)
    """
    ours = {f"{kind}{name}" for name in ("loss", *ClassCounts.NAMES) for kind in ("", "raw_", "ema_")}
    if name in ours or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"the metric {name} is there already. Choose another name.")
    register(VAL_METRICS, "metric", name, make)


class ClassCounts(Metric):
    """Images and correct ones by class, the top-k hits, and the sum of the losses.

    A batch costs a few additions into buffers and no look from the host; processes are added up once, when
    `compute` is called. torchmetrics' own stat scores build a matrix of classes squared for every batch.
    Logits that make no probabilities (NaN, infinite) are a wrong answer, and no class 0; their loss is NaN.

    Args:
        classes: How many there are.
    """

    NAMES = ("acc1", "acc5", "balanced_acc1", "correct", "images")
    full_state_update = False
    images: Tensor
    correct: Tensor
    hits: Tensor
    loss: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.top_k = min(TOP_K, classes)
        self.add_state("images", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits, float32, ``(batch, classes)``, and classes, int64, ``(batch,)``."""
        ones = torch.ones_like(targets)
        usable = logits.amax(dim=1).isfinite()
        self.images.index_add_(0, targets, ones)
        self.correct.index_add_(0, targets, ((logits.argmax(dim=1) == targets) & usable).long())
        hits = logits.topk(self.top_k, dim=1).indices == targets[:, None]
        self.hits += (hits & usable[:, None]).sum()
        self.loss += F.cross_entropy(logits, targets, reduction="sum")

    def compute(self) -> dict[str, Tensor]:
        """``loss`` and `NAMES`; float32, each with no dimension."""
        right, support = self.correct.float(), self.images.float()
        correct, images = self.correct.sum().float(), self.images.sum().float()
        return {
            "loss": self.loss / images,
            "acc1": correct / images,
            "acc5": self.hits.float() / images,
            "balanced_acc1": (right / support.clamp_min(1)).sum() / (support > 0).sum(),
            "correct": correct,
            "images": images,
        }


class Validation(nn.Module):
    """`ClassCounts` of one model, and further metrics.

    Args:
        classes: How many there are.
        metrics: By their names in the log.
    """

    def __init__(self, classes: int, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.counts = ClassCounts(classes)
        self.metrics = nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        self.counts.update(logits, targets)
        for metric in self._metrics():
            metric.update(logits, targets)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, over all processes, and begin anew; ConfigError where one is no number.

        Where logits made no probabilities further metrics are NaN: they would take them for class 0.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._take_part()
        values = self.counts.compute()
        self.counts.reset()
        for name, metric in zip(self.metrics, self._metrics(), strict=True):
            value = metric.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ConfigError(
                    f"the metric {name} must compute one number; it gave {value!r}. Average over the classes."
                )
            values[name] = torch.where(values["loss"].isnan(), torch.nan, value.reshape(()).float())
            metric.reset()
        return values

    def _take_part(self) -> None:
        """Let a process that had no image add none to a metric that keeps them: it would send nothing, and
        the others wait for it.
        """
        images = self.counts.images
        none = images.new_zeros(0, len(images), dtype=torch.float32), images.new_zeros(0)
        for metric in self._metrics():
            if not metric.update_called and any(isinstance(kept, list) for kept in metric._defaults.values()):
                metric.update(*none)

    def _metrics(self) -> list[Metric]:
        return [metric for metric in self.metrics.values() if isinstance(metric, Metric)]


def better_of(raw: dict[str, Tensor], ema: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Which of `RAW` and `EMA` has more correct images, if equal the lower loss; a few metrics of both.

    The metrics are those of the better ones, and their names in the log.
    """
    scores = [(float(found["correct"]), -float(found["loss"].nan_to_num(math.inf))) for found in (raw, ema)]
    better = EMA if scores[1] >= scores[0] else RAW
    both = {
        f"{which}_{name}": found[name]
        for which, found in ((RAW, raw), (EMA, ema))
        for name in ("acc1", "loss")
    }
    kept = ema if better == EMA else raw
    return better, {**kept, **both, "kept_ema": torch.tensor(float(better == EMA))}


def make_metrics(names: list[str], classes: int) -> dict[str, Metric]:
    """The metrics of `VAL_METRICS` with these names; ConfigError where an own one makes no ``Metric``."""
    metrics = {name: VAL_METRICS[name](classes) for name in names}
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise ConfigError(
                f"the metric {name} must be made as a torchmetrics Metric, from the number of classes; got "
                f"{metric!r}."
            )
    return metrics
