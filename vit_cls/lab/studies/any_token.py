"""``study any-token``: does any token do as well as the class token, if trained to be read there?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError
from vit_cls.lab.results import Figure, LabResult, Table, forest
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.patch_tokens import (
    CLS,
    GAP,
    TOKENS,
    FrozenReads,
    chosen_patches,
    frozen_claims,
    frozen_table,
    grid_of,
    heat_maps,
    read_frozen,
)
from vit_cls.lab.studies.study import ARM_COLUMNS, Answers, Setup, Study
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import paired_difference
from vit_cls.stats.verdicts import CANNOT_TELL, EQUAL, EQUIVALENT, REFUTED, Claim, Finding, judge_all

FROZEN, FINETUNED, SCRATCH = "frozen", "finetuned", "scratch"
MODES = (FROZEN, FINETUNED, SCRATCH)
FINETUNE_EPOCHS = 1 / 3
"""Epochs of fine-tuning over those of the recipe."""
FINETUNE_LR = 0.25
"""Its learning rate over the recipe's."""
VERDICT_WORDS = {EQUIVALENT: "the same", REFUTED: "not the same", CANNOT_TELL: "cannot tell"}
DIFFERENCE_COLUMNS = ("less cls (%)", "less cls, from (%)", "less cls, to (%)")


class AnyTokenStudy(Study):
    """Heads on single patches against a head on the class token, in three ways.

    ``scratch`` trains a model for each read-out; one that does not read a class token has none.
    ``finetuned`` goes on from each seed's CLS-trained model with another read-out, for a third of the epochs
    at a quarter of the learning rate; the class token's own model goes on in the same way. ``frozen`` trains
    a model on the class token and one on the mean of the patches, and fits a ridge probe on every patch of
    each.

    Args:
        setup: What all studies share.
        tokens: Read-outs of the trained modes: ``cls``, which others are compared with; ``gap``; patches by
            name (``first``, ``corner``: the last one, ``centre``, ``random``: drawn once by the seed) or by
            number (``token:5``, in raster order).
        modes: Any of ``frozen``, ``finetuned`` and ``scratch``.

    Raises:
        ConfigError: If a token or mode is unknown, or there is nothing to compare the class token with.

    Source:
        Single tokens of frozen models trained on the class token or on the mean: Raghu et al. 2021,
        https://arxiv.org/abs/2108.08810, figure 11. Training with a patch as the class token: big_vision's
        ``pool_type="0"``, https://github.com/google-research/big_vision/blob/main/big_vision/models/vit.py.
    """

    name = "any-token"
    question = "Does any token do as well as the class token?"

    def __init__(self, setup: Setup, tokens: Sequence[str] = TOKENS, modes: Sequence[str] = MODES) -> None:
        super().__init__(setup)
        self.tokens = list(dict.fromkeys(tokens))
        self.modes = [mode for mode in MODES if mode in modes]
        for mode in modes:
            check_choice("--modes", mode, MODES)
        if not self.modes:
            raise ConfigError(f"--modes needs one or more of {', '.join(MODES)}; got none.")
        self.patches, self.left_out = chosen_patches(self.tokens, grid_of(setup.recipe), setup.seed)
        trained = [mode for mode in self.modes if mode != FROZEN]
        if trained and (CLS not in self.tokens or not self.patches):
            raise ConfigError(
                f"--tokens needs cls and one patch at least, such as cls,centre; got {', '.join(tokens)}"
                f"{' (' + '; '.join(self.left_out) + ')' if self.left_out else ''}."
            )

    @property
    def pools(self) -> dict[str, str]:
        """The pooling of each read-out, by its name."""
        plain = {name: name for name in self.tokens if name in (CLS, GAP)}
        patches = {name: f"token:{patch}" for name, patch in self.patches.items()}
        return {name: {**plain, **patches}[name] for name in self.tokens if name in plain or name in patches}

    def scratch(self) -> dict[str, list[Trial]]:
        """Trainings of their own, by read-out: what ``scratch`` compares, and what other modes start from."""
        wanted = dict(self.pools) if SCRATCH in self.modes else {}
        wanted = {CLS: CLS, **wanted}
        if FROZEN in self.modes:
            wanted.setdefault(GAP, GAP)
        pretrained = self.setup.recipe.pretrained is not None
        return {
            name: [
                self.setup.trial(name, seed, model=head_settings(pool, pretrained=pretrained))
                for seed in self.setup.all_seeds
            ]
            for name, pool in wanted.items()
        }

    def finetuned(self) -> dict[str, list[Trial]]:
        """Trainings that go on from the CLS-trained model of their seed, by read-out."""
        if FINETUNED not in self.modes:
            return {}
        recipe = self.setup.recipe
        assert recipe.epochs is not None
        epochs = max(1, round(recipe.epochs * FINETUNE_EPOCHS))
        shorter = {}
        if recipe.warmup_epochs is not None:
            shorter["warmup_epochs"] = recipe.warmup_epochs * epochs / recipe.epochs
        return {
            name: [
                self.setup.trial(
                    name,
                    start.seed,
                    model={"pool": pool},
                    optim=shorter,
                    lr_factor=FINETUNE_LR,
                    epochs=epochs,
                    variant=FINETUNED,
                    after=start,
                )
                for start in self.scratch()[CLS]
            ]
            for name, pool in self.pools.items()
        }

    def arms(self) -> dict[str, dict[str, list[Trial]]]:
        """Trials by mode and read-out, a seed each."""
        return {SCRATCH: self.scratch(), FINETUNED: self.finetuned()}

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        arms = self._compared()
        right = {mode: {k: answers.correct(t) for k, t in one.items()} for mode, one in arms.items()}
        reads = self._frozen(answers)
        margin = self.setup.margin
        groups = {mode: self._claims(mode, one) for mode, one in right.items()}
        groups |= {FROZEN: frozen_claims(reads[CLS], reads[GAP], margin=margin)} if reads else {}
        # Each mode is a question of its own, and is adjusted for the number of its own claims.
        findings = {mode: judge_all(claims, seed=self.setup.seed) for mode, claims in groups.items()}
        everything = {**self.scratch(), **{f"{FINETUNED} {k}": t for k, t in self.finetuned().items()}}
        return self.result(
            answers,
            self._headline(right, reads, findings),
            [one for group in findings.values() for one in group],
            tables=[
                *(self._table(mode, answers, arms[mode], right[mode]) for mode in arms),
                *([frozen_table(list(reads.values()))] if reads else []),
            ],
            figures=self._figures(right, reads),
            values={
                "patches": self.patches,
                "top1": {
                    mode: {name: rows.mean(axis=1) for name, rows in one.items()}
                    for mode, one in right.items()
                },
                "frozen": {one.name: one.values() for one in reads.values()},
            },
            predictions={
                **answers.predictions(everything),
                "frozen": {one.name: one.predictions() for one in reads.values()},
            },
            notes=self._notes(reads),
        )

    def _compared(self) -> dict[str, dict[str, list[Trial]]]:
        """Trials of the trained modes, by mode and read-out; cls first."""
        found: dict[str, dict[str, list[Trial]]] = {}
        if SCRATCH in self.modes:
            found[SCRATCH] = {name: self.scratch()[name] for name in self.pools}
        if FINETUNED in self.modes:
            found[FINETUNED] = self.finetuned()
        return {mode: {CLS: arms[CLS], **arms} for mode, arms in found.items()}

    def _frozen(self, answers: Answers) -> dict[str, FrozenReads]:
        if FROZEN not in self.modes:
            return {}
        trained = self.scratch()
        return {name: read_frozen(answers, trained[name], f"{name.upper()}-trained") for name in (CLS, GAP)}

    def _words(self, name: str) -> str:
        return f"{name} patch (token {self.patches[name]})" if name in self.patches else name

    def _claims(self, mode: str, right: Mapping[str, np.ndarray]) -> list[Claim]:
        how = "Trained" if mode == SCRATCH else "Fine-tuned from a CLS-trained model"
        return [
            Claim(
                f"{how} to be read at the {self._words(name)}, a model does as well as read at its class "
                "token.",
                right[CLS],
                right[name],
                EQUAL,
                self.setup.margin,
                (f"{mode} cls", f"{mode} {self._words(name)}"),
            )
            for name in self.patches
        ]

    def _headline(
        self,
        right: Mapping[str, Mapping[str, np.ndarray]],
        reads: Mapping[str, FrozenReads],
        findings: Mapping[str, Sequence[Finding]],
    ) -> str:
        """One verdict, that of the first mode; and a sentence for each."""
        sentences = [self._sentence(mode, findings[mode], right[mode][CLS]) for mode in right]
        if reads:
            cls, gap = reads[CLS], reads[GAP]
            ahead, behind = (
                100 * (one.pooled[own] - one.single).mean() for one, own in ((cls, CLS), (gap, GAP))
            )
            sentences.append(
                f"frozen, the class token is {ahead:+.1f} points from the average single patch of the "
                f"CLS-trained model, and the mean of the patches {behind:+.1f} points in the GAP-trained one."
            )
        first = next(iter(findings.values()))
        verdict = overall(first) if right else first[0].verdict
        others = [one[0].upper() + one[1:] for one in sentences[1:]]
        return f"{verdict.capitalize()}: {' '.join([sentences[0], *others])}"

    def _sentence(self, mode: str, findings: Sequence[Finding], reference: np.ndarray) -> str:
        how = "trained" if mode == SCRATCH else "fine-tuned"
        sizes = [100 * (one.estimate or 0.0) for one in findings]
        counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in VERDICT_WORDS}
        told = ", ".join(f"{VERDICT_WORDS[verdict]}: {count}" for verdict, count in counts.items() if count)
        seeds, images = reference.shape
        spread = f"{sizes[0]:+.1f}" if len(sizes) == 1 else f"{min(sizes):+.1f} to {max(sizes):+.1f}"
        patches = "one patch is" if len(sizes) == 1 else f"{len(sizes)} patches are"
        return (
            f"{how} to be read there, {patches} {spread} points from the class token ({told}, within "
            f"{100 * self.setup.margin:g} points; {seeds} seed{'s' if seeds > 1 else ''}, "
            f"{fmt.count(images)} images)."
        )

    def _table(
        self,
        mode: str,
        answers: Answers,
        arms: Mapping[str, Sequence[Trial]],
        right: Mapping[str, np.ndarray],
    ) -> Table:
        rows: list[list[Any]] = []
        for name, trials in arms.items():
            differs = paired_difference(right[CLS], right[name]) if name != CLS else None
            cells = [None] * 3 if differs is None else [differs.estimate, *differs.ci95]
            rows.append([name, self.patches.get(name), *answers.cells(trials), *cells])
        title = "Trained for each read-out" if mode == SCRATCH else "Fine-tuned from the CLS-trained model"
        note = "Test images. Intervals of differences are not adjusted for how many there are."
        return Table(title, ["read-out", "token", *ARM_COLUMNS, *DIFFERENCE_COLUMNS], rows, note)

    def _figures(
        self, right: Mapping[str, Mapping[str, np.ndarray]], reads: Mapping[str, FrozenReads]
    ) -> list[Figure]:
        found: list[Figure] = []
        for mode, arms in right.items():
            differences = {
                f"{self._words(name)} minus cls": paired_difference(arms[CLS], rows, seed=self.setup.seed)
                for name, rows in arms.items()
                if name != CLS
            }
            title = f"{'Trained' if mode == SCRATCH else 'Fine-tuned'}: difference to the class token"
            found += forest(title, differences, self.setup.margin)
        return [*found, *heat_maps(list(reads.values()))]

    def _notes(self, reads: Mapping[str, FrozenReads]) -> list[str]:
        pretrained = self.setup.recipe.pretrained
        notes = [
            "Per seed all models start from the same encoder and see the same images in the same order.",
            "The model after the last epoch counts; no epoch was selected. One learning rate for all "
            "read-outs: one that suits another rate would look worse here (`vit-cls study heads` tunes it).",
            *(f"Left out: {reason}." for reason in self.left_out),
        ]
        if SCRATCH in self.modes:
            notes.append(
                "Models that do not read a class token are trained without one."
                if pretrained is None
                else f"Nothing is trained from scratch: all start from {pretrained} and keep its class token."
            )
        if FINETUNED in self.modes:
            notes.append(
                "Fine-tuning keeps the head, trained on the class token, and the class token itself: "
                "other tokens still see it."
            )
        if reads:
            notes.append(
                "Frozen: a ridge probe of its own on each patch, its penalty chosen on validation. The "
                "average single patch is, for each image, the share of its patches whose probe was right."
            )
            if self.setup.recipe.fc_norm is not False and pretrained is None:
                notes.append(
                    "Frozen: a model trained from scratch on the mean has its final norm behind the pooling, "
                    "as in timm. Probes norm its patches one by one, which training never did; with "
                    "--recipe.fc_norm false single patches come out nearer to the mean."
                )
        return notes


def overall(findings: Sequence[Finding]) -> str:
    """One verdict on claims of equality together.

    Args:
        findings: At least one.

    Returns:
        Refuted where one is; equivalent where all are; else it cannot be told.
    """
    verdicts = {one.verdict for one in findings}
    if REFUTED in verdicts:
        return REFUTED
    return EQUIVALENT if verdicts == {EQUIVALENT} else CANNOT_TELL
