"""The probe ``retrieval``: whether images of the same class are found by each read of the frozen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import DataError
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.probes.base import FrozenParts, PoolProbe, data_of
from vit_cls.lab.probes.common import reference_pool
from vit_cls.lab.results import LabResult, Table, forest
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.ranking import RECALL_AT, Rankings, Whitening, fit_whitening, rank
from vit_cls.stats.verdicts import Finding

GALLERIES = ("test", "train")
CHANGES = ("raw", "centred", "whitened")


def rank_changed(
    train: np.ndarray,
    test: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray],
    *,
    gallery: str,
) -> dict[str, Rankings]:
    """Rank by features as they are, centred, and whitened; what is fitted is fitted on the train part."""
    whitening = fit_whitening(train)
    changes = {
        "raw": Whitening(np.zeros(train.shape[1])),
        "centred": Whitening(whitening.mean),
        "whitened": whitening,
    }
    searched = gallery == "train"
    return {
        name: rank(
            change(test), labels[1], change(train) if searched else None, labels[0] if searched else None
        )
        for name, change in changes.items()
    }


@dataclass(frozen=True, kw_only=True)
class RetrievalProbe(PoolProbe):
    """Search for images of each test image's class, by cosine similarity.

    Args:
        margin: The largest difference of mean average precisions that does not matter.
        seed: Kept with the result; nothing here is random.
        pools: What is read; none means the usual pools that the model has.
        gallery: What is searched: ``test``, the other test images, or ``train``.

    Raises:
        ConfigError: If a choice is unknown or the margin is no share.
    """

    gallery: str = "test"

    name = "retrieval"
    question = "By which read of the frozen tokens are images of the same class found?"
    claim = "Searching by {} and by {} gives different mean average precision."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--gallery", self.gallery, GALLERIES)

    def analyse(self, frozen: FrozenParts) -> LabResult:
        """See `PoolProbe.analyse`.

        Raises:
            DataError: If fewer than two queries have a positive.
        """
        train, test = frozen.train, frozen.test
        pools, notes = self.chosen(train.reader)
        labels = train.labels, test.labels
        found = {
            (pool, change): rankings
            for pool in pools
            for change, rankings in rank_changed(
                train.read(pool), test.read(pool), labels, gallery=self.gallery
            ).items()
        }
        first = found[pools[0], "raw"]
        if len(first.queries) < 2:
            raise DataError(
                f"only {len(first.queries)} of {len(test)} test images have another image of their class in "
                "the gallery; a comparison needs at least two. Give more test images, or --gallery train."
            )
        reference = reference_pool(pools)
        findings = self._findings(found, pools, reference)
        means = {key: float(rankings.average_precision.mean()) for key, rankings in found.items()}
        mean = f"{fmt.percent(means[reference, 'raw'])} over {len(first.queries)} queries"
        parts = {"train": train.rows, "test": test.rows}
        return self.result(
            f"Mean average precision by {reference}: {mean}. {next(iter(findings.values())).sentence}",
            list(findings.values()),
            tables=[_table(found)],
            figures=forest(f"Mean average precision less that of {reference}", findings, self.margin),
            settings=self.settings(pools, reference=reference, changes=CHANGES),
            parts=parts,
            data={
                **data_of(frozen.origin, parts),
                "queries_without_positive": first.without_positive,
            },
            values={
                "map": {f"{pool} {change}": value for (pool, change), value in means.items()},
                "map_by_chance": float(first.chance.mean()),
            },
            predictions=_predictions(test, found),
            notes=[*notes, *_notes(self.gallery, first, len(test))],
        )

    def _findings(
        self, found: Mapping[tuple[str, str], Rankings], pools: Sequence[str], reference: str
    ) -> dict[str, Finding]:
        """Each pool as it is, then the reference changed, against the reference as it is; by label."""
        compared = [(pool, "raw") for pool in pools if pool != reference]
        compared.sort(key=lambda pair: pair[0] != "gap")  # what is claimed most often comes first
        compared += [(reference, change) for change in CHANGES[1:]]
        scores = {reference: found[reference, "raw"].average_precision}
        scores |= {
            pool if change == "raw" else f"{change} {pool}": found[pool, change].average_precision
            for pool, change in compared
        }
        labels = [pool if change == "raw" else f"{pool}, {change}" for pool, change in compared]
        return dict(zip(labels, self.compare(reference, scores).values(), strict=True))


def _table(found: Mapping[tuple[str, str], Rankings]) -> Table:
    recalls = [f"recall@{k} (%)" for k in RECALL_AT]
    columns = ["read", "features", "mAP (%)", "from (%)", "to (%)", "R-precision (%)", *recalls, "queries"]
    rows: list[list[str | int | float | None]] = []
    for (pool, change), one in found.items():
        mean = mean_interval(one.average_precision)
        low, high = max(0.0, mean.ci95[0]), min(1.0, mean.ci95[1])
        recall = one.recall.mean(axis=0).tolist()
        rows.append(
            [pool, change, mean.estimate, low, high, float(one.r_precision.mean()), *recall, len(one.queries)]
        )
    first = next(iter(found.values()))
    rows.append(
        [
            "random order",
            "expected",
            float(first.chance.mean()),
            *(None,) * (len(columns) - 4),
            len(first.queries),
        ]
    )
    note = (
        "mAP: the mean over queries of the average precision, with the 95 % interval over queries. "
        "R-precision: the share of positives among the first P, where there are P. Recall@k: the share of "
        "queries with a positive among the first k."
    )
    return Table("Retrieval of images of the same class", columns, rows, note)


def _predictions(test: FrozenTokens, found: Mapping[tuple[str, str], Rankings]) -> dict[str, Any]:
    first = next(iter(found.values()))
    return {
        "paths": [test.paths[i] for i in first.queries.tolist()],
        "labels": test.labels[first.queries],
        "class_names": list(test.class_names),
        "average_precision": {
            f"{pool} {change}": one.average_precision for (pool, change), one in found.items()
        },
    }


def _notes(searched: str, first: Rankings, images: int) -> list[str]:
    gallery = "the other test images" if searched == "test" else "the train part"
    notes = [
        f"Searched: {gallery}, by cosine similarity. Average precision is the mean of the precision at the "
        "rank of each positive, without the trapezoid rule that some retrieval benchmarks use. Centred: the "
        "mean of the train part is taken away; whitened: PCA of the train part, each axis divided by its "
        "standard deviation."
    ]
    if searched == "test":
        notes.append(
            "Queries stand in each other's galleries, so their average precisions are not independent; the "
            "intervals and tests take them as if they were, so they are approximate. --gallery train has no "
            "such dependence."
        )
    if first.without_positive:
        notes.append(
            f"{first.without_positive} of {images} test images have no other image of their class in the "
            "gallery; they are no queries and in no number here."
        )
    return notes
