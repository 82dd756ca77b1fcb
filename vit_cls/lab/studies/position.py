"""``study position``: what do positions do, and what does the class token's own one?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vit_cls.lab.features import logits_of
from vit_cls.lab.results import LabResult, Table, forest
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.study import (
    LAST_EPOCH,
    ONE_RATE,
    PAIRED,
    Answers,
    Setup,
    Study,
    arms_table,
    headline,
    refuse_pretrained,
    train_arms,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import DIFFERS, EQUAL, LESS, Claim, judge_all

LEARNED, UNPLACED = "cls, learned", "cls, class token without"
FIXED, NONE = "cls, sincos2d", "cls, none"
GAP_LEARNED, GAP_NONE = "gap, learned", "gap, none"


class PositionStudy(Study):
    """Learned, fixed and no positions, with and without one for the class token.

    A learned class token and its learned position are added before anything reads them: with the position or
    without it, the models are the same functions, trained along other paths. An encoder without any position
    cannot tell the order of the patches at all; that is checked on the trained models by shuffling patches.

    Args:
        setup: What all studies share.

    Raises:
        ConfigError: If weights are to be loaded.

    Source:
        Positions: ViT, https://arxiv.org/abs/2010.11929, appendix D.4. Fixed ones: MAE,
        https://arxiv.org/abs/2111.06377.
    """

    name = "position"
    question = "What do positions do, and what does the class token's own one?"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        refuse_pretrained(setup, self.name, "the weights have learned with positions of their own")

    def arms(self) -> dict[str, list[Trial]]:
        """Trials by arm, a seed each; the first is what others are compared with."""
        cls, gap = (head_settings(head, pretrained=False) for head in ("cls", "gap"))
        learned = {"pos_embed": "learn", "no_embed_class": False}
        return train_arms(
            self.setup,
            {
                LEARNED: {**cls, **learned},
                UNPLACED: {**cls, "pos_embed": "learn", "no_embed_class": True},
                FIXED: {**cls, "pos_embed": "sincos2d", "no_embed_class": False},
                NONE: {**cls, "pos_embed": "none"},
                GAP_LEARNED: {**gap, **learned},
                GAP_NONE: {**gap, "pos_embed": "none"},
            },
        )

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        arms = self.arms()
        right = {arm: answers.correct(trials) for arm, trials in arms.items()}
        shuffled = {arm: [without_order(answers, trial) for trial in trials] for arm, trials in arms.items()}
        findings = judge_all(self._claims(right), seed=self.setup.seed)
        labels = [f"{arm} minus {LEARNED}" for arm in (UNPLACED, FIXED, NONE)]
        differences = dict(zip([*labels, f"{GAP_NONE} minus {GAP_LEARNED}"], findings, strict=False))
        return self.result(
            answers,
            headline(findings[0], findings[2].sentence),
            findings,
            tables=[
                arms_table("Kinds of positions", answers, arms, "Names are those of the positions."),
                self._order_table(right, shuffled),
            ],
            figures=forest("Difference to learned positions", differences, self.setup.margin),
            values={
                "top1": {arm: rows.mean(axis=1) for arm, rows in right.items()},
                "top1_shuffled_patches": {
                    arm: np.stack([one for one, _ in rows]).mean(axis=1) for arm, rows in shuffled.items()
                },
                "shuffled_patches_largest_change": {
                    arm: max(change for _, change in rows) for arm, rows in shuffled.items()
                },
            },
            predictions=answers.predictions(arms),
            notes=[
                PAIRED,
                "With fixed positions the class token has none of its own: zeros stand in its place.",
                "Classes that differ in what their patches hold, in whatever order, need no positions.",
                ONE_RATE,
                LAST_EPOCH,
            ],
        )

    def _claims(self, right: Mapping[str, np.ndarray]) -> list[Claim]:
        margin = self.setup.margin
        claims = [
            Claim(text, right[one], right[other], expect, margin, (one, other))
            for text, one, other, expect in (
                ("A class token does as well without a position.", LEARNED, UNPLACED, EQUAL),
                ("Fixed positions do as well as learned ones.", LEARNED, FIXED, EQUAL),
                ("Without positions, cls does worse.", LEARNED, NONE, LESS),
                ("Without positions, gap does worse.", GAP_LEARNED, GAP_NONE, LESS),
            )
        ]
        losses = [
            right[one].astype(np.float64) - right[other]
            for one, other in ((GAP_LEARNED, GAP_NONE), (LEARNED, NONE))
        ]
        names = "what positions give to gap", "what positions give to cls"
        text = "cls and gap need positions to a different degree."
        words = "larger", "smaller"
        return [*claims, Claim(text, losses[0], losses[1], DIFFERS, margin, names, words=words)]

    def _order_table(
        self, right: Mapping[str, np.ndarray], shuffled: Mapping[str, list[tuple[np.ndarray, float]]]
    ) -> Table:
        rows: list[list[str | int | float | None]] = []
        for arm, one in shuffled.items():
            after = np.stack([correct for correct, _ in one])
            mean, drop = mean_interval(after), paired_difference(right[arm], after, seed=self.setup.seed)
            rows.append(
                [arm, mean.estimate, *mean.ci95, drop.estimate, *drop.ci95, max(change for _, change in one)]
            )
        columns = ["arm", "top-1 (%)", "from (%)", "to (%)", "change (%)", "from (%)", "to (%)"]
        return Table(
            "The same models on shuffled patches",
            [*columns, "largest change of a probability"],
            rows,
            "The patches of every test image in one random order for each seed. A model without positions "
            "cannot notice: what is left there is rounding.",
        )


def without_order(answers: Answers, trial: Trial) -> tuple[np.ndarray, float]:
    """What a trained model answers when the patches come in a random order.

    Returns:
        Which test images it has right then, bool, shape ``(images,)``; and the largest change of a
        probability.

    Raises:
        RunError: If its training failed.
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
