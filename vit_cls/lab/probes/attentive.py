"""What learned queries over frozen tokens find that the class token does not say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS
from vit_cls.errors import ConfigError
from vit_cls.inference import InferenceConfig, choose_device
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.common import (
    MARGIN,
    check_margin,
    checked_parts,
    described,
    failures_note,
    freeze_parts,
)
from vit_cls.lab.probes.head_fits import HeadFit, HeadRecipe, check_pooling, fit_head
from vit_cls.lab.results import Figure, LabResult, ScatterChart, Table, forest
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.pooling import make_pooling
from vit_cls.model.pooling_base import PoolingContext
from vit_cls.stats.least_squares import chosen_classifier
from vit_cls.stats.random_effects import Mean, mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, judge_all

QUESTION = "Does a head that looks at all tokens find more than the class token tells?"
QUERIES = (1, 2, 4, 8, 16, 32)
HEADS = ("cls", "gap", *(f"ep:{count}" for count in QUERIES))
IN_MEMORY = 1 << 28
"""Up to so many numbers (1 GB), normed tokens are kept; else they are normed batch by batch."""


class NormedTokens:
    """Frozen tokens of one layer after the final norm, by rows."""

    def __init__(self, frozen: FrozenTokens, layer: int) -> None:
        self.labels = frozen.labels
        self._frozen = frozen
        self._layer = layer
        size = len(frozen) * frozen.layout.num_tokens * frozen.embed_dim
        self._kept = torch.from_numpy(frozen.normed(layer)) if size <= IN_MEMORY else None

    def rows(self, rows: np.ndarray | slice) -> Tensor:
        """Tokens of those images, float32, shape ``(rows, tokens, dim)``."""
        if self._kept is not None:
            return self._kept[rows]
        return torch.from_numpy(self._frozen.normed(self._layer, rows))


def attentive(
    classifier: ImageClassifier,
    parts: Partition,
    *,
    heads: Sequence[str] | None = None,
    layer: int | None = None,
    recipe: HeadRecipe | None = None,
    margin: float = MARGIN,
    seed: int = 0,
    num_seeds: int = 1,
    config: InferenceConfig | None = None,
    cache: Path | None = None,
) -> LabResult:
    """Train heads on the frozen tokens of one layer, all in one way, and compare them with the class token.

    Learning rate and epoch of each head are chosen on validation images; test images are read once by each.
    The number of queries is chosen on validation too, and the accuracy of that choice reported. The class
    token is read by a linear probe that is trained like the heads, and by ridge regression; heads are
    compared with the one that is better on validation.

    Args:
        classifier: Its encoder is frozen; its own head is not used.
        parts: Images to fit on, to choose by and to report on.
        heads: As in ``model.pool``. None means `HEADS`, less what does not fit the model.
        layer: Whose tokens are read, after the final norm; None means those of the last block.
        recipe: How every head is trained.
        margin: The largest difference of accuracy that does not matter, in (0, 1).
        seed: Of the first one of the trainings and of the intervals.
        num_seeds: Trainings of every head, at least 1; they differ in first weights and order of images.
        config: How the model is run; None takes the defaults.
        cache: A folder that keeps tokens; None keeps none.

    Raises:
        ConfigError: If a head, the layer or a number is impossible.
        DataError: If no image of a part can be read.

    Source:
        Efficient probing, https://arxiv.org/abs/2506.10178; attentive probes: V-JEPA,
        https://arxiv.org/abs/2404.08471.
    """
    start = time.perf_counter()
    check_range("--num_seeds", num_seeds, at_least=1)
    check_margin(margin)
    wanted, notes = heads_that_fit(heads, classifier)
    config = config or InferenceConfig()
    recipe = recipe or HeadRecipe()
    recipe = dataclasses.replace(recipe, device=str(choose_device(recipe.device or config.device)))
    frozen = freeze_parts(classifier, parts.sources, config, cache, None if layer is None else [layer])
    checked_parts(*(one.rows for one in frozen))
    layer = frozen[0].depth if layer is None else layer
    train, val, test = (NormedTokens(one, layer) for one in frozen)
    context, classes, seeds = (
        _context(classifier),
        len(parts.class_names),
        [seed + i for i in range(num_seeds)],
    )
    fits = {
        head: [
            fit_head(head, context, (train, val, test), num_classes=classes, recipe=recipe, seed=one)
            for one in seeds
        ]
        for head in wanted
    }
    ridge = _ridge(frozen, layer, wanted[0], classes)
    settings = {"architecture": described(classifier.model), "heads": wanted, "layer": layer}
    settings |= {**dataclasses.asdict(recipe), "margin": margin, "seeds": seeds}
    data: dict[str, Any] = {"origin": parts.origin}
    for name, one in zip(PARTS, frozen, strict=True):
        data |= {name: len(one), f"{name} failures": one.failures}
    found = _Found(fits, ridge, frozen[2].labels, list(frozen[2].paths), seed, margin)
    return LabResult(
        "probe attentive",
        QUESTION,
        found.headline(),
        found.findings,
        [_table(found)],
        _figures(found),
        settings,
        data,
        found.values(),
        found.predictions(),
        [*notes, *_notes(found, recipe), *failures_note(dict(zip(PARTS, frozen, strict=True)))],
        time.perf_counter() - start,
    )


def heads_that_fit(heads: Sequence[str] | None, classifier: ImageClassifier) -> tuple[list[str], list[str]]:
    """The heads to train, the baseline first, and sentences about those that were left out.

    Args:
        heads: As the user wrote them; None means `HEADS`.

    Returns:
        Heads, without repetitions: first ``cls``, or ``gap`` where the model has no class token; and notes.

    Raises:
        ConfigError: If there are no heads, or one of them does not fit the model.
    """
    model, notes = classifier.model, []
    baseline = "cls" if model.layout.class_token else "gap"
    if heads is None:
        dim = model.config.embed_dim
        odd = [count for count in QUERIES if dim % count]
        heads = [head for head in HEADS if head not in {f"ep:{count}" for count in odd}]
        if odd:
            left_out = ", ".join(f"ep:{count}" for count in odd)
            notes.append(f"Left out: {left_out}, for the number of queries must divide the width, {dim}.")
        if baseline == "gap":
            heads = [head for head in heads if head != "cls"]
            notes.append("Left out: cls, for the model has no class token; gap is compared with instead.")
    if not heads:
        raise ConfigError(f"--heads must name at least one head, such as {', '.join(HEADS[:3])}; got none.")
    wanted = list(dict.fromkeys([baseline, *heads]))
    with seeded(0):  # building draws weights
        for head in wanted:
            check_pooling(head, make_pooling(head, _context(classifier)))
    return wanted, notes


def _context(classifier: ImageClassifier) -> PoolingContext:
    context = classifier.model.pooling_context
    return dataclasses.replace(context, include_prefix=False, setting="--heads")


def _ridge(
    frozen: Sequence[FrozenTokens], layer: int, baseline: str, num_classes: int
) -> tuple[np.ndarray, float]:
    """Classes of the test images by ridge regression on the baseline's vector; its validation accuracy."""
    x, x_val, x_test = (one.read(baseline, layer) for one in frozen)
    labels, labels_val = frozen[0].labels, frozen[1].labels
    fit = chosen_classifier(x, labels, x_val, labels_val, num_classes=num_classes)
    return fit(x_test).argmax(axis=1), float((fit(x_val).argmax(axis=1) == labels_val).mean())


class _Found:
    """Answers of every head on the test images, and what may be said of them."""

    def __init__(
        self,
        fits: dict[str, list[HeadFit]],
        ridge: tuple[np.ndarray, float],
        targets: np.ndarray,
        paths: list[str],
        seed: int,
        margin: float,
    ) -> None:
        self.fits, self.targets, self.paths, self.margin = fits, targets, paths, margin
        self.ridge, self.ridge_val_accuracy = ridge
        self.baseline = next(iter(fits))
        # Of equal ones ridge regression: it had fewer choices to make on the same images.
        self.by_ridge = self.ridge_val_accuracy >= self.val_accuracy(self.baseline)
        self.reference = f"{self.baseline} by {'ridge regression' if self.by_ridge else 'AdamW'}"
        self.learned = [h for h in fits if h.startswith("ep:")] or [h for h in fits if h != self.baseline]
        self.chosen = max(self.learned, key=self._worth) if self.learned else None
        # What is asked first is answered first.
        rest = [head for head in fits if head not in (self.chosen, self.baseline)]
        self.order = [self.chosen, *rest] if self.chosen else rest
        right = {head: np.stack([one.preds == targets for one in some]) for head, some in fits.items()}
        self.means = {head: mean_interval(one) for head, one in right.items()}
        self.ridge_mean = mean_interval(self.ridge == targets)
        self.reference_mean = self.ridge_mean if self.by_ridge else self.means[self.baseline]
        own = right[self.baseline]
        if self.by_ridge:  # the same for every seed
            own = np.tile(self.ridge == targets, (len(own), 1))
        self.findings = judge_all([self._claim(head, own, right[head]) for head in self.order], seed=seed)

    def _worth(self, head: str) -> tuple[float, int]:
        """Validation accuracy; of equal ones, fewer weights."""
        return self.val_accuracy(head), -self.fits[head][0].params

    def val_accuracy(self, head: str) -> float:
        """Mean over the seeds."""
        return float(np.mean([one.val_accuracy for one in self.fits[head]]))

    def _claim(self, head: str, own: np.ndarray, right: np.ndarray) -> Claim:
        text = f"A head {head} on frozen tokens classifies better than a linear probe of {self.reference}."
        return Claim(text, own, right, GREATER, self.margin, (self.reference, head))

    def headline(self) -> str:
        """The verdict on the head that validation chose."""
        own, images = self.reference_mean, len(self.targets)
        if self.chosen is None:
            return (
                f"A linear probe of {self.reference} has {fmt.percent(own.estimate)} of {images} test images "
                f"right ({fmt.interval(own.ci95, fmt.bare_percent)}); there was no other head to "
                "compare it with."
            )
        its = self.means[self.chosen]
        several = f", which validation chose among {', '.join(self.learned)},"
        among = several if len(self.learned) > 1 else ""
        return (
            f"{self.findings[0].claim[:-1]}: {self.findings[0].verdict}. Of {images} test images "
            f"{self.chosen}{among} has {fmt.percent(its.estimate)} right "
            f"({fmt.interval(its.ci95, fmt.bare_percent)}), {self.reference} "
            f"{fmt.percent(own.estimate)} ({fmt.interval(own.ci95, fmt.bare_percent)})."
        )

    def values(self) -> dict[str, Any]:
        """Numbers for scripts."""
        values: dict[str, Any] = {
            head: {
                "accuracy": self.means[head].estimate,
                "ci95": self.means[head].ci95,
                "val_accuracy": self.val_accuracy(head),
                "params": some[0].params,
                "macs": some[0].macs,
                "learning_rate": [one.learning_rate for one in some],
                "epoch": [one.epoch for one in some],
                "tried": [one.tried for one in some],
            }
            for head, some in self.fits.items()
        }
        ridge = {"accuracy": self.ridge_mean.estimate, "ci95": self.ridge_mean.ci95}
        ridge |= {"val_accuracy": self.ridge_val_accuracy}
        return values | {
            f"ridge {self.baseline}": ridge,
            "chosen": self.chosen,
            "compared_with": f"ridge {self.baseline}" if self.by_ridge else self.baseline,
        }

    def predictions(self) -> dict[str, Any]:
        """Per image."""
        found = {head: [one.preds for one in some] for head, some in self.fits.items()}
        common = {"paths": self.paths, "targets": self.targets, f"ridge {self.baseline}": self.ridge}
        return {**common, **found}


def _notes(found: _Found, recipe: HeadRecipe) -> list[str]:
    notes = [
        "Every head is trained in one way, by AdamW; ridge regression of the baseline, in closed form, has "
        "no such choices to make."
    ]
    ridge, own = fmt.percent(found.ridge_val_accuracy), fmt.percent(found.val_accuracy(found.baseline))
    notes.append(
        f"Heads are compared with {found.reference}, the linear probe that does no worse on validation: "
        f"ridge regression has {ridge} right there, AdamW {own}."
    )
    ends = {min(recipe.learning_rates), max(recipe.learning_rates)}
    at_end = [h for h, some in found.fits.items() if any(one.learning_rate in ends for one in some)]
    if at_end and len(recipe.learning_rates) > 1:
        notes.append(
            f"The best rate of {', '.join(at_end)} is at an end of those tried; a better one may be beyond."
        )
    return notes


def _table(found: _Found) -> Table:
    rows: list[list[str | int | float | None]] = []
    for head, some in found.fits.items():
        rates = dict.fromkeys(f"{one.learning_rate:g}" for one in some)
        epochs = ", ".join(str(one.epoch) for one in some)
        cost = [some[0].params, some[0].macs]
        share = found.val_accuracy(head)
        rows.append(
            [
                head,
                _share(found.means[head]),
                share,
                *cost,
                ", ".join(rates),
                epochs,
            ]
        )
    rows.append(
        [
            f"{found.baseline}, ridge regression",
            _share(found.ridge_mean),
            found.ridge_val_accuracy,
            *(None,) * 4,
        ]
    )
    columns = ["head", "test accuracy [95 %]", "validation (%)", "weights", "MACs", "learning rate", "epoch"]
    note = (
        "Learning rate and epoch, and the penalty of ridge regression, were chosen on validation images, so "
        "the accuracy there flatters. MACs: multiply-adds of pooling and classifier for one image, beyond "
        "the encoder's; values are projected after the weighted sum over tokens."
    )
    return Table("Heads on frozen tokens", columns, rows, note)


def _share(mean: Mean) -> str:
    return fmt.estimate_cell(mean.estimate, mean.ci95)


def _figures(found: _Found) -> list[Figure]:
    figures: list[Figure] = [
        ScatterChart(
            f"Accuracy against {what}",
            what,
            "test accuracy",
            [
                (head, float(getattr(some[0], field)), found.means[head].estimate, found.means[head].ci95)
                for head, some in found.fits.items()
            ],
        )
        for what, field in (("weights of the head", "params"), ("MACs of the head", "macs"))
    ]
    findings = dict(zip(found.order, found.findings, strict=True))
    return [*figures, *forest(f"Accuracy less that of {found.reference}", findings, found.margin)]
