"""``study position``: what do positions do, and what does the class token's own one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit_cls.lab.features import logits_of
from vit_cls.lab.results import Figure, Table, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.study import (
    FROM_TO,
    Measured,
    Study,
    verdict_line,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import DIFFERS, EQUAL, LESS, Claim, Finding

LEARNED, UNPLACED = "cls, learned", "cls, class token without"
FIXED, NONE = "cls, sincos2d", "cls, none"
GAP_LEARNED, GAP_NONE = "gap, learned", "gap, none"
CLAIMS = (
    ("A class token does as well without a position.", LEARNED, UNPLACED, EQUAL),
    ("Fixed positions do as well as learned ones.", LEARNED, FIXED, EQUAL),
    ("Without positions, cls does worse.", LEARNED, NONE, LESS),
    ("Without positions, gap does worse.", GAP_LEARNED, GAP_NONE, LESS),
)


class PositionStudy(Study):
    """Learned, fixed and no positions, with and without one for the class token.

    A learned class token and its learned position are added before anything reads them: with the position or
    without it, the models are the same functions, trained along other paths. An encoder without any position
    cannot tell the order of the patches at all; that is checked on the trained models by shuffling patches.

    Source:
        Positions: ViT, https://arxiv.org/abs/2010.11929, appendix D.4. Fixed ones: MAE,
        https://arxiv.org/abs/2111.06377.
    """

    name = "position"
    question = "What do positions do, and what does the class token's own one?"
    arms_title, arms_note = "Kinds of positions", "Names are those of the positions."
    why_fresh = "the weights have learned with positions of their own"
    remarks = (
        "With fixed positions the class token has none of its own: zeros stand in its place.",
        "Classes that differ in what their patches hold, in whatever order, need no positions.",
    )

    def arms(self) -> dict[str, list[Trial]]:
        """Trials by arm, a seed each; the first is what others are compared with."""
        cls, gap = (self.setup.head(pool) for pool in ("cls", "gap"))
        learned = {"pos_embed": "learn", "no_embed_class": False}
        return self.setup.arms(
            {
                LEARNED: {**cls, **learned},
                UNPLACED: {**cls, "pos_embed": "learn", "no_embed_class": True},
                FIXED: {**cls, "pos_embed": "sincos2d", "no_embed_class": False},
                NONE: {**cls, "pos_embed": "none"},
                GAP_LEARNED: {**gap, **learned},
                GAP_NONE: {**gap, "pos_embed": "none"},
            }
        )

    def measure(self, answers: Answers) -> Measured:
        """Beside what is right, the same on shuffled patches, and how far probabilities move, by arm."""
        arms = self.arms()
        shuffled = {arm: [without_order(answers, trial) for trial in trials] for arm, trials in arms.items()}
        moved = {
            arm: (np.stack([right for right, _ in rows]), max(change for _, change in rows))
            for arm, rows in shuffled.items()
        }
        return Measured.of(answers, arms, moved)

    def claims(self, measured: Measured) -> list[Claim]:
        """What each kind of position costs or gives; last, whether cls and gap need them alike."""
        right, margin = measured.right, self.setup.margin
        of_gap = right[GAP_LEARNED].astype(np.float64) - right[GAP_NONE]
        of_cls = right[LEARNED].astype(np.float64) - right[NONE]
        names = "what positions give to gap", "what positions give to cls"
        text = "cls and gap need positions to a different degree."
        degree = Claim(text, of_gap, of_cls, DIFFERS, margin, names, words=("larger", "smaller"))
        return [*measured.claims(CLAIMS, margin), degree]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """The class token's position, and what cls loses without any."""
        return verdict_line(findings[0], findings[2].sentence)

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        rows: list[list[Any]] = []
        for arm, (after, change) in measured.more.items():
            mean = mean_interval(after)
            drop = paired_difference(measured.right[arm], after, seed=self.setup.seed)
            rows.append([arm, mean.estimate, *mean.ci95, drop.estimate, *drop.ci95, change])
        columns = ["arm", "top-1 (%)", *FROM_TO, "change (%)", *FROM_TO, "largest change of a probability"]
        note = (
            "The patches of every test image in one random order for each seed. A model without positions "
            "cannot notice: what is left there is rounding."
        )
        return [
            *super().tables(measured, findings),
            Table("The same models on shuffled patches", columns, rows, note),
        ]

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        labels = [f"{other} minus {one}" for _, one, other, _ in CLAIMS]
        differences = dict(zip(labels, findings, strict=False))
        return [*forest("Difference to learned positions", differences, self.setup.margin)]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        return {
            **super().values(measured, findings),
            "top1_shuffled_patches": {arm: after.mean(axis=1) for arm, (after, _) in measured.more.items()},
            "shuffled_patches_largest_change": {arm: change for arm, (_, change) in measured.more.items()},
        }


def without_order(answers: Answers, trial: Trial) -> tuple[np.ndarray, float]:
    """What a trained model answers when the patches come in a random order.

    Returns:
        Which test images it has right then, bool, shape ``(images,)``; and the largest change of a
        probability.
    """
    classifier = answers.model(trial)
    count = classifier.model.layout.num_patches
    order = torch.randperm(count, generator=torch.Generator().manual_seed(trial.seed))

    def shuffle(module: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        return patches[:, order]

    embed = classifier.model.patch_embed
    assert isinstance(embed, nn.Module)
    handle = embed.register_forward_hook(shuffle)
    try:
        found = logits_of(classifier, trial.data.parts(trial.seed).test)
    finally:
        handle.remove()
    probs = classifier.probs(torch.from_numpy(found.logits)).numpy()
    before, targets = answers.probs(trial)
    return probs.argmax(axis=1) == targets, float(np.abs(probs - before).max())
