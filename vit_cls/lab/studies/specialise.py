"""``study specialise``: do several class tokens come to know different things?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_choice
from vit_cls.data.dataset import ImageSource
from vit_cls.data.transforms import model_reader
from vit_cls.errors import ConfigError
from vit_cls.lab.results import MOST_LINES, Figure, HeatMap, Line, LineChart, Pictures, Table, forest
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.class_tokens import (
    COLLAPSED,
    ArmTokens,
    ClassTokens,
    collapse,
    cosine_matrix,
    information_test,
    measure_arm,
)
from vit_cls.lab.studies.study import (
    ARM_COLUMNS,
    FROM_TO,
    Measured,
    Setup,
    Study,
    bounded,
    score_cells,
    verdict_line,
)
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.metrics import METRICS, Scored
from vit_cls.stats.random_effects import mean_interval, paired_difference
from vit_cls.stats.verdicts import GREATER, LESS, REFUTED, SUPPORTED, Claim, Finding

EXAMPLES = 6
VARIANTS = {"mean": "multicls", "concat": "multicls-concat", "diverse": "multicls-diverse"}
"""Poolings by the word that is typed."""
ONE, REGISTER = "cls", "extra register"
COSINE = "of cosine"
COSINE_MARGIN = 0.01
"""The largest difference of cosines that does not matter; the margin of a study is of accuracies."""


class SpecialiseStudy(Study):
    """Models with 1, 2, 4 ... class tokens, and with one class token and a register.

    Per seed all arms start from the same encoder and see the same images in the same order. Class tokens
    start apart: equal ones would stay equal for ever.

    Args:
        setup: What all studies share.
        counts: Numbers of class tokens, 1 among them: the one that others are compared with.
        variants: How the head reads several: ``mean``, always there; ``concat`` side by side; ``diverse``, a
            sum of differently weighted tokens in which equal ones cancel.

    Raises:
        ConfigError: If a count or a variant is unknown, named twice, or missing.

    Source:
        Two class tokens that end with a cosine of 0.999: DeiT, https://arxiv.org/abs/2012.12877, section 5.3.
        ``diverse``: Multi-CLS BERT, https://arxiv.org/abs/2210.05043. Registers:
        https://arxiv.org/abs/2309.16588.
    """

    name = "specialise"
    question = "Do several class tokens come to know different things?"

    def __init__(
        self,
        setup: Setup,
        counts: Sequence[int] = (1, 2, 4),
        variants: Sequence[str] = ("mean", "concat", "diverse"),
    ) -> None:
        super().__init__(setup)
        self.counts = sorted(counts)
        self.variants = list(variants)
        given, named = (", ".join(map(str, values)) or "none" for values in (counts, variants))
        if 1 not in self.counts or self.counts[0] < 1 or len(self.counts) < 2:
            raise ConfigError(
                f"--counts needs 1, which others are compared with, and a larger number; got {given}. "
                "Write --counts 1,2,4."
            )
        for variant in self.variants:
            check_choice("--variants", variant, VARIANTS)
        if "mean" not in self.variants:
            raise ConfigError(f"--variants needs mean, which others are compared with; got {named}.")
        for option, values in (("--counts", self.counts), ("--variants", self.variants)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{option} must name each one once; got {', '.join(map(str, values))}.")

    @property
    def several(self) -> dict[str, str]:
        """Poolings of the arms with several class tokens."""
        return {f"{word} {k}": f"{VARIANTS[word]}:{k}" for word in self.variants for k in self.counts[1:]}

    def arms(self) -> dict[str, list[Trial]]:
        models: dict[str, dict[str, Any]] = {ONE: {"pool": "cls"}, REGISTER: {"pool": "cls", "reg_tokens": 1}}
        return self.setup.arms(models | {arm: {"pool": pool} for arm, pool in self.several.items()})

    def measure(self, answers: Answers) -> Measured:
        """Beside what is right, the class tokens of each arm that has several."""
        arms, seed = self.arms(), self.setup.seed
        parts = {trial.seed: trial.data.parts(trial.seed) for trial in arms[ONE]}
        tokens = {arm: measure_arm(answers, arms[arm], parts, seed) for arm in self.several}
        return Measured.of(answers, arms, tokens)

    def claims(self, measured: Measured) -> list[Claim]:
        tokens: dict[str, ArmTokens] = measured.more
        counts = self.counts[:0:-1]  # from the most tokens to two
        parallel = [
            Claim(
                f"{k} class tokens read by their mean end parallel: their cosine is above {COLLAPSED}.",
                np.zeros_like(tokens[f"mean {k}"].cosines),
                tokens[f"mean {k}"].cosines,
                GREATER,
                COSINE_MARGIN,
                ("0", f"the cosine of {k} tokens"),
                COSINE,
                at_least=COLLAPSED,
            )
            for k in counts
        ]
        gains = [
            (f"{k} class tokens read by their mean beat {words}.", arm, f"mean {k}", GREATER)
            for k in counts
            for arm, words in ((ONE, "one"), (REGISTER, "one and a register"))
        ]
        lower = [
            Claim(
                f"The diverse head lowers the cosine of {k} class tokens.",
                tokens[f"mean {k}"].cosines,
                tokens[f"diverse {k}"].cosines,
                LESS,
                COSINE_MARGIN,
                (f"the cosine of mean {k}", f"that of diverse {k}"),
                COSINE,
                words=("higher", "lower"),
            )
            for k in counts
            if "diverse" in self.variants
        ]
        return [*parallel, *measured.claims(gains, self.setup.margin), *lower]

    def judge(self, measured: Measured) -> list[Finding]:
        """Claims on the cosine alone get sentences of their own."""
        findings = super().judge(measured)
        for i, k in enumerate(self.counts[:0:-1]):
            findings[i] = _with_sentence(findings[i], k, measured.more[f"mean {k}"])
        return findings

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        """Of the most tokens: whether they are parallel, and what they gain."""
        return verdict_line(findings[0], findings[len(self.counts) - 1].sentence)

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        return [alike_table(measured.more), knowledge_table(measured.more), self._accuracy(measured)]

    def _accuracy(self, measured: Measured) -> Table:
        right, answers = measured.right, measured.answers
        rows: list[list[Any]] = []
        for arm, trials in measured.arms.items():
            note = answers.note(trials[0])
            scored = [(*answers.probs(trial), trial.seed) for trial in trials]
            errors = [
                METRICS["ece"].estimate(Scored(probs.astype(np.float64), targets, seed)).value
                for probs, targets, seed in scored
            ]
            gains: list[float | None] = []
            for other in (ONE, REGISTER):
                gain = paired_difference(right[other], right[arm], seed=self.setup.seed)
                gains += [None] * 3 if arm == other else [gain.estimate, *gain.ci95]
            calibration = [float(np.mean(errors)), min(errors), max(errors)]
            rows.append(
                [arm, note["tokens"], note["parameters"], *score_cells(right[arm]), *gains, *calibration]
            )
        columns = ["arm", "tokens", "parameters", *ARM_COLUMNS, f"minus {ONE} (%)", *FROM_TO]
        columns += [f"minus {REGISTER} (%)", *FROM_TO, "ECE", "lowest seed", "highest seed"]
        how_to_read = "Test images. Intervals of differences are paired and not adjusted for their number."
        return Table("Accuracy", columns, rows, how_to_read)

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        right, tokens = measured.right, measured.more
        gains = {
            f"{arm} minus {other}": paired_difference(right[other], right[arm], seed=self.setup.seed)
            for other in (ONE, REGISTER)
            for arm in tokens
        }
        most = [f"{word} {self.counts[-1]}" for word in ("mean", "diverse") if word in self.variants]
        first = {arm: tokens[arm].tokens[0] for arm in most}
        trial = measured.arms[ONE][0]
        return [
            layer_chart(tokens),
            *forest("Accuracy against one class token", gains, self.setup.margin),
            *(cosine_map(arm, one) for arm, one in first.items()),
            *token_pictures(trial.data.parts(trial.seed).test, first),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        tokens: dict[str, ArmTokens] = measured.more
        return {
            **super().values(measured, findings),
            "output_cosine": {arm: each.cosines.mean(axis=1) for arm, each in tokens.items()},
            "layer_cosine": {arm: each.layer_cosines.mean(axis=2).T for arm, each in tokens.items()},
            "other_image_cosine": {arm: each.other_image_cosine for arm, each in tokens.items()},
            "token_top1": {
                arm: [answers.right.mean(axis=0) for answers in each.answers] for arm, each in tokens.items()
            },
            "independent_models": {
                arm: None if each.against_seeds is None else vars(each.against_seeds)
                for arm, each in tokens.items()
            },
            "attention_apart": {
                arm: [None if one.overlap is None else one.overlap.mean() for one in each.tokens]
                for arm, each in tokens.items()
            },
        }

    def derived_settings(self) -> dict[str, Any]:
        return {"cosine_margin": COSINE_MARGIN}

    def notes(self, measured: Measured) -> list[str]:
        assert self.setup.recipe.lr is not None
        notes = [
            f"One learning rate for all arms, {self.setup.recipe.lr:g}, not tuned.",
            "Several class tokens start apart (standard deviation 0.02; a single one 1e-6): equal ones would "
            "stay equal for ever.",
            f"The arm {REGISTER} has as many tokens as two class tokens, and a head that reads one of them.",
            "A head that reads the mean reads each token alone as well. With other heads each token has a "
            "ridge classifier, its penalty chosen on validation: the two kinds are not comparable in level.",
            "Tokens have no order that holds from seed to seed; worst and best token are of any seed, on the "
            "test images, and so too far apart.",
            "Parallel tokens say little where the same token is as parallel to itself on other images.",
        ]
        if self.setup.seeds == 1:
            notes.append(
                "Whether class tokens of one model are more parallel than those of independent models takes "
                "two seeds at least, and was not tested."
            )
        if any(each.overlaps is None for each in measured.more.values()):
            notes.append("Attention weights are not known for this architecture, and were left out.")
        return notes


def _with_sentence(finding: Finding, count: int, measured: ArmTokens) -> Finding:
    """A claim on one quantity, not on a difference: a sentence of its own, and what to compare it with."""
    low, high = finding.ci95 or (0.0, 0.0)
    seeds, images = finding.counts["seeds"], finding.counts["images"]
    place = {SUPPORTED: "above", REFUTED: "below"}.get(finding.verdict, "not told from")
    others = ""
    if (chance := measured.against_seeds) is not None:
        others = f", tokens of independent models {chance.independent:.3f} (p {fmt.p_value(chance.p)})"
    needed = f"; needed: {finding.needed}" if finding.needed else ""
    sentence = (
        f"the mean cosine of {count} class tokens after the final norm is {finding.estimate:.3f} "
        f"({fmt.interval((low, min(1.0, high)), fmt.three_decimals)}; {seeds} "
        f"seed{'s' if seeds > 1 else ''}, {fmt.count(images)} images), {place} {COLLAPSED:g}; "
        f"the same token on another image has {measured.other_image_cosine:.3f}{others}{needed}."
    )
    return dataclasses.replace(finding, sentence=sentence)


def alike_table(measured: Mapping[str, ArmTokens]) -> Table:
    """Cosines and attention of the class tokens of each arm."""
    rows: list[list[Any]] = []
    for arm, each in measured.items():
        mean, seeds = mean_interval(each.cosines), each.cosines.mean(axis=1)
        likeness = [*bounded(mean, -1.0), collapse(mean), float(seeds.min()), float(seeds.max())]
        others = [each.other_image_cosine, float(each.layer_cosines[0].mean())]
        chance = dataclasses.astuple(each.against_seeds) if each.against_seeds else [None] * 3
        apart = [None] * 3 if each.overlaps is None else bounded(mean_interval(each.overlaps))
        rows.append([arm, *likeness, *others, *chance, *apart, mean.seeds, mean.images])
    columns = ["arm", "cosine", "from", "to", "collapsed", "lowest seed", "highest seed"]
    columns += ["same token, other image", "at the input", "independent models", "p", "smallest p"]
    columns += ["attention apart", "from", "to", "seeds", "images"]
    return Table(
        "How alike the class tokens are",
        columns,
        rows,
        "Cosine of the output tokens after the final norm, the mean over pairs and images. Collapsed: the "
        f"interval lies above {COLLAPSED:g}. Independent models: a token of one seed and one of another, on "
        "the same image; p by dealing all tokens out anew over the models, not adjusted for the number of "
        "arms; smallest p: what so few seeds and tokens allow. Attention apart: Jensen-Shannon divergence in "
        "the last block, 0 where tokens look at the same patches, 1 where at different ones.",
    )


def knowledge_table(measured: Mapping[str, ArmTokens]) -> Table:
    """What each class token of each arm says on its own."""
    rows: list[list[Any]] = []
    for arm, each in measured.items():
        right = np.stack([answers.right for answers in each.answers])  # (seeds, images, K)
        tokens, single = right.mean(axis=1), mean_interval(right.mean(axis=2))
        differ = mean_interval(np.stack([answers.disagreement for answers in each.answers]))
        oracle = mean_interval(np.asarray(right.any(axis=2)))
        most_confident = np.stack([answers.most_confident for answers in each.answers])
        bits = information_test(most_confident, each.answers[0].targets, seed=each.seed)
        own = [*bounded(single), float(tokens.min()), float(tokens.max())]
        shares = [*bounded(differ), *bounded(oracle)]
        rows.append([arm, each.answers[0].read_by, *own, *shares, *bits, single.seeds, single.images])
    columns = ["arm", "read by", "one token (%)", *FROM_TO, "worst (%)", "best (%)"]
    columns += ["pairs that disagree (%)", *FROM_TO, "any token right (%)", *FROM_TO]
    columns += ["most confident token tells (bits)", "by chance (bits)", "p", "seeds", "images"]
    return Table(
        "What each class token knows",
        columns,
        rows,
        "Test images, each token classified on its own. Any token right: what a perfect choice of the token "
        "would reach. Bits: mutual information of the most confident token and the class; p by permuting "
        "classes.",
    )


def layer_chart(measured: Mapping[str, ArmTokens]) -> LineChart:
    """Cosine of the class tokens, block by block."""
    lines = []
    for arm, each in list(measured.items())[:MOST_LINES]:
        means = [bounded(mean_interval(values), -1.0) for values in each.layer_cosines]
        points = [(float(layer), estimate) for layer, (estimate, _, _) in enumerate(means)]
        lines.append(Line(arm, points, [(low, high) for _, low, high in means]))
    return LineChart(
        "Cosine of the class tokens by layer",
        "block",
        "cosine",
        lines,
        percent=False,
        marks={f"{COLLAPSED:g}": COLLAPSED},
        note="As the blocks left the tokens; 0: the learned tokens and their positions. At most "
        f"{MOST_LINES} arms are drawn; bands are 95 % intervals over seeds and images.",
    )


def cosine_map(arm: str, tokens: ClassTokens) -> HeatMap:
    """Cosine of each output token with each, averaged over images."""
    matrix = cosine_matrix(tokens.output).mean(axis=0)
    labels = [f"token {k + 1}" for k in range(len(matrix))]
    note = "Mean over the test images, of the first seed's model."
    title = f"Cosine of the output tokens, {arm}"
    return HeatMap(title, matrix.tolist(), labels, labels, percent=False, limits=(-1.0, 1.0), note=note)


def token_pictures(source: ImageSource, measured: Mapping[str, ClassTokens]) -> list[Pictures]:
    """Where each class token of some models attends to, beside an image of each class; of known weights."""
    shown = {arm: tokens for arm, tokens in measured.items() if tokens.maps is not None}
    if not shown:
        return []
    first = next(iter(shown.values()))
    labels = first.rows.labels
    repeat = np.array([int((labels[:i] == label).sum()) for i, label in enumerate(labels)])
    chosen = np.lexsort((labels, repeat))[:EXAMPLES].tolist()
    reader = model_reader(first.preprocess)
    rows = []
    for i in chosen:
        pixels = reader(source.read(int(first.rows.positions[i])))
        row = [np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())]
        for tokens in shown.values():
            assert tokens.maps is not None
            row += [_picture(values, tokens.grid_size, row[0].shape[:2]) for values in tokens.maps[i]]
        rows.append(row)
    counts = {arm: tokens.output.shape[1] for arm, tokens in shown.items()}
    columns = [f"{arm}: token {k + 1}" for arm, count in counts.items() for k in range(count)]
    title = "Attention of each class token to the patches, last block"
    row_labels = [first.rows.class_names[int(labels[i])] for i in chosen]
    note = "Mean over heads, of the first seed's models. In each map the highest value is white, 0 is black."
    return [Pictures(title, ["image", *columns], rows, row_labels, note)]


def _picture(values: np.ndarray, grid_size: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """A map of patches as grey pixels in the size of the image."""
    grid = values.reshape(grid_size) / max(float(values.max()), 1e-12)
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, grid_size, strict=True))
    grey = np.rint(255 * grid[rows][:, columns]).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
