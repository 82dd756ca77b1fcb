"""``study any-token``: does any token do as well as the class token, if trained to be read there?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError
from vit_cls.lab.results import Figure, Table, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.patch_tokens import (
    CLS,
    GAP,
    TOKENS,
    chosen_patches,
    frozen_claims,
    frozen_table,
    grid_of,
    heat_maps,
    read_frozen,
)
from vit_cls.lab.studies.study import ARM_COLUMNS, Measured, Setup, Study, score_cells
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
TRAINED = {
    SCRATCH: ("Trained", "", " for each read-out"),
    FINETUNED: ("Fine-tuned", " from a CLS-trained model", " from the CLS-trained model"),
}
"""What is done in a mode, in the order of a report; what follows in its claims, and in its table's title."""


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
        wanted = {CLS: CLS, **(self.pools if SCRATCH in self.modes else {})}
        if FROZEN in self.modes:
            wanted.setdefault(GAP, GAP)
        return self.setup.arms({name: self.setup.head(pool) for name, pool in wanted.items()})

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

    def label(self, trial: Trial) -> str:
        return f"{trial.variant} {trial.arm}".lstrip()

    @property
    def compared(self) -> dict[str, dict[str, str]]:
        """Labels of the arms that are compared, by trained mode and read-out; cls first."""
        names = dict.fromkeys([CLS, *self.pools])
        prefix = {SCRATCH: "", FINETUNED: f"{FINETUNED} "}
        return {mode: {name: prefix[mode] + name for name in names} for mode in TRAINED if mode in self.modes}

    def measure(self, answers: Answers) -> Measured:
        """Beside what is right, the probes on frozen tokens, by what their model was trained to read."""
        trained = self.scratch()
        reads = {
            pool: read_frozen(answers, trained[pool], f"{pool.upper()}-trained")
            for pool in (CLS, GAP)
            if FROZEN in self.modes
        }
        return dataclasses.replace(super().measure(answers), more=reads)

    def judge(self, measured: Measured) -> list[Finding]:
        """Each mode is a question of its own, and is adjusted for the number of its own claims."""
        groups = [self._claims(mode, measured) for mode in self.compared]
        if measured.more:
            groups.append(frozen_claims(measured.more[CLS], measured.more[GAP], margin=self.setup.margin))
        return [one for claims in groups for one in judge_all(claims, seed=self.setup.seed)]

    def _words(self, name: str) -> str:
        return f"{name} patch (token {self.patches[name]})" if name in self.patches else name

    def _claims(self, mode: str, measured: Measured) -> list[Claim]:
        labels, (how, behind, _) = self.compared[mode], TRAINED[mode]
        return [
            Claim(
                f"{how}{behind} to be read at the {self._words(name)}, a model does as well as read at its "
                "class token.",
                measured.right[labels[CLS]],
                measured.right[labels[name]],
                EQUAL,
                self.setup.margin,
                (f"{mode} cls", f"{mode} {self._words(name)}"),
            )
            for name in self.patches
        ]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """One verdict, that of the first mode; and a sentence for each."""
        size, sentences = len(self.patches), []
        for i, (mode, labels) in enumerate(self.compared.items()):
            shape = measured.right[labels[CLS]].shape
            sentences.append(self._sentence(TRAINED[mode][0], findings[i * size : (i + 1) * size], *shape))
        if measured.more:
            cls, gap = (
                100 * (reads.pooled[own] - reads.single).mean() for own, reads in measured.more.items()
            )
            sentences.append(
                f"Frozen, the class token is {cls:+.1f} points from the average single patch of the "
                f"CLS-trained model, and the mean of the patches {gap:+.1f} points in the GAP-trained one."
            )
        verdict = overall(findings[:size]) if self.compared else findings[0].verdict
        text = " ".join(sentences)
        return f"{verdict.capitalize()}: {text[0].lower()}{text[1:]}"

    def _sentence(self, how: str, findings: Sequence[Finding], seeds: int, images: int) -> str:
        sizes = [100 * (one.estimate or 0.0) for one in findings]
        counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in VERDICT_WORDS}
        told = ", ".join(f"{VERDICT_WORDS[verdict]}: {count}" for verdict, count in counts.items() if count)
        spread = f"{sizes[0]:+.1f}" if len(sizes) == 1 else f"{min(sizes):+.1f} to {max(sizes):+.1f}"
        patches = "one patch is" if len(sizes) == 1 else f"{len(sizes)} patches are"
        return (
            f"{how} to be read there, {patches} {spread} points from the class token ({told}, within "
            f"{100 * self.setup.margin:g} points; {seeds} seed{'s' if seeds > 1 else ''}, "
            f"{fmt.count(images)} images)."
        )

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        reads = list(measured.more.values())
        trained = [self._table(mode, measured) for mode in self.compared]
        return [*trained, *([frozen_table(reads)] if reads else [])]

    def _table(self, mode: str, measured: Measured) -> Table:
        labels, (how, _, behind) = self.compared[mode], TRAINED[mode]
        cls = measured.right[labels[CLS]]
        rows: list[list[Any]] = []
        for name, label in labels.items():
            right = measured.right[label]
            differs = paired_difference(cls, right) if name != CLS else None
            difference = [None] * 3 if differs is None else [differs.estimate, *differs.ci95]
            rows.append([name, self.patches.get(name), *score_cells(right), *difference])
        note = "Test images. Intervals of differences are not adjusted for how many there are."
        return Table(how + behind, ["read-out", "token", *ARM_COLUMNS, *DIFFERENCE_COLUMNS], rows, note)

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        right, seed = measured.right, self.setup.seed
        figures: list[Figure] = []
        for mode, labels in self.compared.items():
            cls = right[labels[CLS]]
            differences = {
                f"{self._words(name)} minus cls": paired_difference(cls, right[label], seed=seed)
                for name, label in labels.items()
                if name != CLS
            }
            title = f"{TRAINED[mode][0]}: difference to the class token"
            figures += forest(title, differences, self.setup.margin)
        return [*figures, *heat_maps(list(measured.more.values()))]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        return {
            "patches": self.patches,
            "top1": {
                mode: {name: measured.right[label].mean(axis=1) for name, label in labels.items()}
                for mode, labels in self.compared.items()
            },
            "frozen": {reads.name: reads.values() for reads in measured.more.values()},
        }

    def predictions(self, measured: Measured) -> dict[str, Any]:
        frozen = {reads.name: reads.predictions() for reads in measured.more.values()}
        return {**super().predictions(measured), "frozen": frozen}

    def notes(self, measured: Measured) -> list[str]:
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
        if FROZEN in self.modes:
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
