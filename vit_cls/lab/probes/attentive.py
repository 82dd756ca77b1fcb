"""What learned queries over frozen tokens find that the class token does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.inference import choose_device
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.base import FrozenParts, Probe, Subject
from vit_cls.lab.probes.common import described
from vit_cls.lab.probes.head_fits import (
    HeadFit,
    HeadRecipe,
    NormedTokens,
    fit_head,
    heads_that_fit,
)
from vit_cls.lab.results import Figure, LabResult, ScatterChart, Table, forest
from vit_cls.model.token_reader import TokenReader
from vit_cls.stats.least_squares import chosen_classifier
from vit_cls.stats.random_effects import Mean, mean_interval
from vit_cls.stats.verdicts import GREATER, Claim, judge_all


@dataclass(frozen=True, kw_only=True)
class AttentiveProbe(Probe):
    """Train heads on the frozen tokens of one layer, all in one way, and compare them with the class token.

    Learning rate and epoch of each head are chosen on validation images; test images are read once by each.
    The number of queries is chosen on validation too, and the accuracy of that choice reported. The class
    token is read by a linear probe that is trained like the heads, and by ridge regression; heads are
    compared with the one that is better on validation.

    Args:
        margin: The largest difference of accuracy that does not matter, in (0, 1).
        seed: Of the first one of the trainings and of the intervals.
        heads: As in ``model.pool``. None means `HEADS`, less what does not fit the model.
        layer: Whose tokens are read, after the final norm; None means those of the last block.
        recipe: How every head is trained.
        num_seeds: Trainings of every head, at least 1; they differ in first weights and order of images.

    Raises:
        ConfigError: If a number is impossible.

    Source:
        Efficient probing, https://arxiv.org/abs/2506.10178; attentive probes: V-JEPA,
        https://arxiv.org/abs/2404.08471.
    """

    heads: Sequence[str] | None = None
    layer: int | None = None
    recipe: HeadRecipe | None = None
    num_seeds: int = 1

    name = "attentive"
    question = "Does a head that looks at all tokens find more than the class token tells?"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--num_seeds", self.num_seeds, at_least=1)
        if isinstance(self.recipe, Mapping):  # as the command line gives it
            object.__setattr__(self, "recipe", HeadRecipe(**self.recipe))

    def measure(self, subject: Subject) -> LabResult:
        """See `Probe.measure`."""
        wanted, notes = heads_that_fit(self.heads, subject.classifier)
        recipe = self.recipe or HeadRecipe()
        recipe = replace(recipe, device=str(choose_device(recipe.device or subject.config.device)))
        frozen = subject.freeze(None if self.layer is None else [self.layer])
        layer = frozen.train.depth if self.layer is None else self.layer
        train, val, test = (NormedTokens(part, layer) for part in frozen.by_name.values())
        classes, seeds = len(subject.parts.class_names), [self.seed + i for i in range(self.num_seeds)]
        context = TokenReader(subject.classifier.model, "--heads").context
        fits = {
            head: [
                fit_head(head, context, (train, val, test), num_classes=classes, recipe=recipe, seed=seed)
                for seed in seeds
            ]
            for head in wanted
        }
        ridge = ridge_preds(frozen, layer, wanted[0])
        heads = TrainedHeads(fits, ridge, frozen.test, self.seed, self.margin)
        settings = {"architecture": described(subject.classifier.model), "heads": wanted, "layer": layer}
        data: dict[str, Any] = {"origin": frozen.origin}
        for name, part in frozen.by_name.items():
            data |= {name: len(part), f"{name} failures": part.failures}
        return self.result(
            heads.headline(),
            heads.findings,
            tables=[_table(heads)],
            figures=_figures(heads),
            settings={**settings, **asdict(recipe), "margin": self.margin, "seeds": seeds},
            parts=frozen.rows,
            data=data,
            values=heads.values(),
            predictions=heads.predictions(),
            notes=[*notes, *_notes(heads, recipe)],
        )


def ridge_preds(frozen: FrozenParts, layer: int, baseline: str) -> tuple[np.ndarray, float]:
    """Classes of the test images by ridge regression on the baseline's vector; its validation accuracy."""
    train, val, test = frozen.train, frozen.val, frozen.test
    x_val = val.read(baseline, layer)
    classes = len(train.class_names)
    fit = chosen_classifier(train.read(baseline, layer), train.labels, x_val, val.labels, num_classes=classes)
    preds = fit(test.read(baseline, layer)).argmax(axis=1)
    return preds, float((fit(x_val).argmax(axis=1) == val.labels).mean())


class TrainedHeads:
    """Answers of every head on the test images, and what may be said of them."""

    def __init__(
        self,
        fits: dict[str, list[HeadFit]],
        ridge: tuple[np.ndarray, float],
        test: FrozenTokens,
        seed: int,
        margin: float,
    ) -> None:
        targets = test.labels
        self.fits, self.targets, self.paths, self.margin = fits, targets, list(test.paths), margin
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


def _notes(found: TrainedHeads, recipe: HeadRecipe) -> list[str]:
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


def _table(found: TrainedHeads) -> Table:
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


def _figures(found: TrainedHeads) -> list[Figure]:
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
