"""What a finished run has to show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vit_cls.errors import RunError
from vit_cls.stats.intervals import wilson_interval
from vit_cls.training.runs import RunFolder
from vit_cls.weights.bundle import EMA, RAW


@dataclass(frozen=True)
class FitResult:
    """What a finished run has to show, for its best validation.

    Args:
        epochs: Epochs trained in all.
        best_epoch: Epoch of the model file, from 0.
        correct: Validation images whose class was predicted.
        images: Validation images.
        top5: Share of them whose class was among the first five (or all, where there are fewer).
        seconds: Wall time of all epochs, those before a resume included.
        train_images_per_second: Median over the epochs.
        history: One row an epoch, and one for each validation within an epoch.
        best_step: Optimiser steps that the model of the file had made.
        weights: Those of the model file: ``raw``, or ``ema``, their running average.
        kept: Whether the folder is still there; a ``fast_dev_run`` leaves none.
    """

    folder: RunFolder
    epochs: int
    best_epoch: int
    correct: int
    images: int
    top5: float
    seconds: float
    train_images_per_second: float
    history: list[dict[str, float]]
    best_step: int | None = None
    weights: str = RAW
    kept: bool = True

    @property
    def top1(self) -> float:
        """Correct over images."""
        return self.correct / self.images

    @property
    def top1_ci95(self) -> tuple[float, float]:
        """Wilson's 95 % interval of it."""
        return wilson_interval(self.correct, self.images)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data that JSON can hold."""
        return {
            "run_dir": str(self.folder.path) if self.kept else None,
            "top1": self.top1,
            "top1_ci95": list(self.top1_ci95),
            "top5": self.top5,
            "correct": self.correct,
            "images": self.images,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_step": self.best_step,
            "seconds": round(self.seconds, 3),
            "train_images_per_second": round(self.train_images_per_second, 1),
            "model": str(self.folder.model_file) if self.kept else None,
            "weights": self.weights,
        }


def result_of(folder: RunFolder, rows: list[dict[str, float]]) -> FitResult:
    """What the rows of ``metrics.csv`` say; RunError where nothing was validated."""
    validated = [row for row in rows if "val/acc1" in row]
    if not validated:
        raise RunError(
            "no epoch was validated, so there is no best model; check trainer.max_steps, trainer.max_time "
            "and trainer.check_val_every_n_epoch."
        )
    best = max(
        reversed(validated), key=lambda row: row["val/acc1"]
    )  # the last of equals, as in RunCheckpoint
    epochs = [row for row in rows if "seconds" in row]
    speeds = sorted(row["train_images_per_second"] for row in epochs)
    return FitResult(
        folder=folder,
        epochs=int(rows[-1]["epoch"]) + 1,
        best_epoch=int(best["epoch"]),
        best_step=int(best["step"]),
        correct=int(best["val/correct"]),
        images=int(best["val/images"]),
        top5=best["val/acc5"],
        seconds=sum(row["seconds"] for row in epochs),
        train_images_per_second=speeds[len(speeds) // 2],
        history=rows,
        weights=EMA if best.get("val/kept_ema") else RAW,
    )
