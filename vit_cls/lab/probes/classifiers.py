"""Probes that classify: a classifier of each pool, chosen on validation, and compared on the test part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vit_cls.lab.probes.base import FrozenParts, PoolProbe
from vit_cls.lab.probes.common import (
    ACCURACY_COLUMNS,
    accuracy_cells,
    accuracy_text,
    predictions_of,
    reference_pool,
    sentence_on,
)
from vit_cls.lab.results import LabResult, Table, forest


@dataclass(frozen=True, kw_only=True)
class ClassifierProbe(PoolProbe):
    """A classifier of each pool; what `fit` gives has ``val_right`` and ``predict(features)``."""

    title: ClassVar[str]
    """Of the table."""
    metric: ClassVar[str]
    """What differences are of."""
    winner: ClassVar[str]
    """How the headline names the best pool on validation."""

    @abstractmethod
    def fit(self, pool: str, frozen: FrozenParts) -> Any:
        """The classifier of one pool, chosen on validation."""

    @abstractmethod
    def columns(self, fits: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Further columns of the table, by header, a cell a pool."""

    @abstractmethod
    def table_note(self, frozen: FrozenParts) -> str:
        """How the choice was made."""

    @abstractmethod
    def details(self, fits: Mapping[str, Any], frozen: FrozenParts) -> tuple[dict[str, Any], dict[str, Any]]:
        """Further settings and values of the result."""

    @abstractmethod
    def notes(self, fits: Mapping[str, Any], frozen: FrozenParts) -> list[str]:
        """What to bear in mind."""

    def tested(self, pools: Sequence[str], reference: str, best: str) -> list[str]:
        """The pools that are tested; all, unless choosing among them is a part of the protocol."""
        return list(pools)

    def analyse(self, frozen: FrozenParts) -> LabResult:
        """See `PoolProbe.analyse`."""
        pools, notes = self.chosen(frozen.train.reader)
        fits = {pool: self.fit(pool, frozen) for pool in pools}
        best = max(pools, key=lambda pool: fits[pool].val_right)  # of equal ones the first
        reference, test = reference_pool(pools), frozen.test
        preds = {p: fits[p].predict(test.read(p)) for p in self.tested(pools, reference, best)}
        right = {pool: values == test.labels for pool, values in preds.items()}
        findings = self.compare(reference, right)
        chosen = f"{self.winner.format(best)}, the best on {len(frozen.val)} validation images"
        settings, values = self.details(fits, frozen)
        return self.result(
            f"{chosen}: {accuracy_text(right[best])}.{sentence_on(best, findings)}",
            list(findings.values()),
            tables=[self._table(fits, right, frozen)],
            figures=forest(f"{self.metric} less that of {reference}", findings, self.margin),
            settings=self.settings(pools, reference=reference, **settings),
            parts=frozen.rows,
            origin=frozen.origin,
            values={
                "top1": {pool: float(values.mean()) for pool, values in right.items()},
                **values,
                "val_right": {pool: fit.val_right for pool, fit in fits.items()},
                "best_on_val": best,
            },
            predictions=predictions_of(test.rows, preds),
            notes=[*notes, *self.notes(fits, frozen)],
        )

    def _table(self, fits: Mapping[str, Any], right: Mapping[str, np.ndarray], frozen: FrozenParts) -> Table:
        more = self.columns(fits)
        rows = [
            [
                pool,
                *(accuracy_cells(right[pool]) if pool in right else (None,) * len(ACCURACY_COLUMNS)),
                fit.val_right / len(frozen.val),
                fit.val_right,
                *cells,
            ]
            for (pool, fit), *cells in zip(fits.items(), *more.values(), strict=True)
        ]
        note = f"Intervals: Wilson's, 95 %. {self.table_note(frozen)}"
        if len(right) < len(fits):
            note += " A dash: not tested, for it was not chosen."
        return Table(self.title, ["read", *ACCURACY_COLUMNS, "val top-1 (%)", "val right", *more], rows, note)
