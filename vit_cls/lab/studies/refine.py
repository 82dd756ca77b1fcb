"""``study refine``: is what can be read off the class token after a block also used by what comes after?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.errors import ConfigError
from vit_cls.lab.results import LabResult, Line, LineChart, Table
from vit_cls.lab.studies.heads import head_settings
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.refinement import Refinement, check_reads_class_token, refinement
from vit_cls.lab.studies.study import Answers, Setup, Study, train_arms
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import Mean, mean_interval
from vit_cls.stats.verdicts import EQUIVALENT, LESS, SUPPORTED, Claim, Finding, judge_all
from vit_cls.weights.factory import load

RESULT_COLUMNS = ("(%)", "from (%)", "to (%)")


class RefineStudy(Study):
    """Shuffle, replace and insert the class token at every layer, next to what a probe reads off it there.

    Without ``model``, models that read their class token are trained, one a seed. With it nothing is trained,
    and the seeds are those of the permutations alone: what is found holds for that model.

    Args:
        setup: What all studies share.
        model: Anything that ``--model`` takes, with pool ``cls`` and the classes of the data; null trains.
        permutations: How often, for each seed, class tokens are shuffled over the test images.

    Raises:
        ConfigError: If ``permutations`` is below 1, or the recipe is set though nothing is trained.

    Source:
        Probes by layer: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644. Interventions by exchange:
        Geiger et al. 2021, https://arxiv.org/abs/2106.02997. A class token for the last blocks alone: CaiT,
        https://arxiv.org/abs/2103.17239.
    """

    name = "refine"
    question = "Is what can be read off the class token after each block also used?"

    def __init__(self, setup: Setup, model: str | None = None, permutations: int = 5) -> None:
        super().__init__(setup)
        self.model = model
        self.permutations = permutations
        check_range("--permutations", permutations, at_least=1)
        if model is not None and setup.recipe != Recipe().resolved(setup.data):
            raise ConfigError(
                f"--recipe says how models are trained, but --model {model} is given, so that nothing is. "
                "Leave one of the two out."
            )

    def arms(self) -> dict[str, list[Trial]]:
        """See `Study.arms`; none where the user gave a model, which is checked before anything begins."""
        if self.model is not None:
            check_reads_class_token(load(self.model).model)
            return {}
        model = head_settings("cls", pretrained=self.setup.recipe.pretrained is not None)
        return train_arms(self.setup, {"cls": model})

    def settings(self) -> dict[str, Any]:
        """See `Study.settings`; without a recipe where nothing is trained."""
        found = super().settings()
        return found if self.model is None else {key: v for key, v in found.items() if key != "recipe"}

    def analyse(self, answers: Answers) -> LabResult:
        """See `Study.analyse`."""
        measured = self._measure(answers)
        curves = Curves.of(list(measured.values()))
        claims = [
            Claim(
                f"Class tokens exchanged between images after block {layer} make test top-1 lower.",
                curves.unchanged.astype(np.float64),
                curves.shuffled[:, layer],
                LESS,
                self.setup.margin,
                ("an unchanged one", f"a class token shuffled after block {layer}"),
            )
            for layer in range(1, curves.depth + 1)
        ]
        findings = judge_all(claims, seed=self.setup.seed)
        used = [layer for layer, one in enumerate(findings, 1) if one.verdict == SUPPORTED]
        return self.result(
            answers,
            headline(curves, findings, used),
            findings,
            tables=[_shuffle_table(curves, findings), _layer_table(curves)],
            figures=[_curve_chart(curves), _kl_chart(curves)],
            data=self._data(answers, measured),
            values=_values(curves, measured, used),
            predictions=_predictions(measured),
            notes=self._notes(curves),
        )

    def _measure(self, answers: Answers) -> dict[str, Refinement]:
        """What was found of each model, by its seed; all of the user's permutations in one."""
        setup, count = self.setup, self.permutations
        if self.model is not None:
            parts = setup.trial_data.parts(setup.seed)
            found = refinement(load(self.model), parts, seeds=setup.all_seeds, permutations=count)
            return {str(setup.seed): found}
        return {
            str(trial.seed): refinement(
                answers.model(trial), trial.data.parts(trial.seed), seeds=[trial.seed], permutations=count
            )
            for trial in self.trials()
        }

    def _data(self, answers: Answers, measured: dict[str, Refinement]) -> dict[str, Any]:
        if self.model is None:
            return self.data_record(answers, self.trials())
        parts = self.setup.trial_data.parts(self.setup.seed)
        failures = next(iter(measured.values())).failures
        return {"origin": parts.origin, **parts.counts(), "failed": len(failures), "failures": failures}

    def _notes(self, curves: Curves) -> list[str]:
        notes = [
            "Layer 0 is before the first block, where the class token is the same for every image, so that "
            "shuffling it changes nothing. After the last block, shuffling it permutes the logits.",
            "A permutation may leave images their own token, or give them one of their own class: accuracy "
            "falls to about that of permuted answers, not to 0.",
            "The model was not trained with tokens that are shuffled, replaced or inserted: a drop says that "
            "what was there is used, not that a model trained otherwise would need it there.",
            "That a probe can read the class off a layer does not say that the model uses it.",
        ]
        if self.model is not None:
            count = self.setup.seeds * self.permutations
            notes.append(
                f"One model, {count} permutations, averaged for each image: what is found holds for this "
                "model and images like these."
            )
            notes.append(
                "If the model was trained on images of the train or validation part, what is read off its "
                "class token there, and the probe that is fitted to it, are not as on images new to it; "
                "images of the test part must be new to it."
            )
        if curves.inserted is None:
            notes.append(
                "The class token was not inserted late: attention has a causal mask, rotary positions or "
                "relative position biases, which are made for all tokens."
            )
        return notes


@dataclass(frozen=True)
class Curves:
    """Scores of all models: what is right, image by image.

    Args:
        unchanged: bool, shape ``(seeds, images)``.
        shuffled: Share of the permutations, float64, shape ``(seeds, layers, images)``.
        kl: In nats, likewise.
        replaced: bool, likewise.
        inserted: bool, likewise; None where blocks need the class token.
        lens: bool, likewise.
        ridge: bool, likewise.
    """

    unchanged: np.ndarray
    shuffled: np.ndarray
    kl: np.ndarray
    replaced: np.ndarray
    inserted: np.ndarray | None
    lens: np.ndarray
    ridge: np.ndarray

    @classmethod
    def of(cls, measured: Sequence[Refinement]) -> Curves:
        """Put models together that answered for the same images."""
        targets = measured[0].targets
        assert all(np.array_equal(one.rows.positions, measured[0].rows.positions) for one in measured)

        def right(name: str) -> np.ndarray:
            return np.stack([getattr(one, name) == targets for one in measured])

        return cls(
            right("preds"),
            np.stack([one.shuffled for one in measured]),
            np.stack([one.kl for one in measured]),
            right("replaced"),
            None if any(one.inserted is None for one in measured) else right("inserted"),
            right("lens"),
            right("ridge"),
        )

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.shuffled.shape[1] - 1

    def by_layer(self) -> dict[str, np.ndarray]:
        """Everything that is an accuracy at each layer, by what it is called."""
        found = {
            "ridge probe": self.ridge,
            "class lens": self.lens,
            "shuffled": self.shuffled,
            "mean class token instead": self.replaced,
        }
        return found if self.inserted is None else {**found, "inserted here only": self.inserted}


def _interval(scores: np.ndarray, most: float = 1.0) -> tuple[Mean, tuple[float, float]]:
    mean = mean_interval(scores)
    return mean, (max(0.0, mean.ci95[0]), min(most, mean.ci95[1]))


def headline(curves: Curves, findings: Sequence[Finding], used: Sequence[int]) -> str:
    """What may be said in one sentence."""
    depth = curves.depth
    if not used:
        return f"{findings[-1].verdict.capitalize()}: {findings[-1].sentence}"
    first = used[0]
    if len(used) < depth + 1 - first:
        blocks = f"blocks {', '.join(map(str, used[:-1]))} and {used[-1]}" if used[1:] else f"block {first}"
        rest = f"the class token is used after {blocks} of {depth}; after the others no drop was shown"
        return f"{SUPPORTED.capitalize()}: {rest}: {findings[first - 1].sentence}"
    probe = f"A ridge probe reads {fmt.percent(curves.ridge[:, first].mean())} off it there"
    if first == 1:
        what, before = f"what the class token holds after the first block of {depth} is used", "."
    else:
        what = f"the class token is used from block {first} of {depth} on"
        if all(one.verdict == EQUIVALENT for one in findings[: first - 1]):
            what += ", and not before"
        else:
            what += " at the latest; whether it is before cannot be told"
        before = f", and {fmt.percent(curves.ridge[:, first - 1].mean())} one block earlier."
    return f"{SUPPORTED.capitalize()}: {what}: {findings[first - 1].sentence} {probe}{before}"


def _place(layer: int, depth: int) -> str:
    return "0, before the first block" if layer == 0 else f"{layer}, last" if layer == depth else str(layer)


def _shuffle_table(curves: Curves, findings: Sequence[Finding]) -> Table:
    rows: list[list[Any]] = []
    for layer in range(curves.depth + 1):
        mean, ends = _interval(curves.shuffled[:, layer])
        cells: list[Any] = [_place(layer, curves.depth), mean.estimate, *ends]
        if layer:
            one = findings[layer - 1]
            cells += [one.estimate, *(one.ci95 or (None, None)), one.p_holm]
        else:
            cells += [None] * 4
        rows.append([*cells, float(curves.kl[:, layer].mean()), mean.seeds, mean.images])
    unchanged, ends = _interval(curves.unchanged)
    columns = [
        "after block", *(f"shuffled {one}" for one in RESULT_COLUMNS),
        *(f"less unchanged {one}" for one in RESULT_COLUMNS), "p (Holm)", "KL (nats)", "models", "images",
    ]  # fmt: skip
    note = (
        f"Test top-1 unchanged: {fmt.percent(unchanged.estimate)} "
        f"({fmt.interval(ends, fmt.bare_percent)}). KL is of the answers before shuffling to "
        "those after, mean over images."
    )
    return Table("Class tokens exchanged between images", columns, rows, note)


def _layer_table(curves: Curves) -> Table:
    """Every accuracy at every layer, with its interval."""
    found = curves.by_layer()
    rows: list[list[Any]] = []
    for layer in range(curves.depth + 1):
        for name, scores in found.items():
            mean, ends = _interval(scores[:, layer])
            rows.append([_place(layer, curves.depth), name, mean.estimate, *ends, mean.seeds, mean.images])
    note = (
        "Ridge probe and class lens (the model's own norm and head) read the class token at that layer. The "
        "mean is over the training images. Inserted: the blocks before ran without a class token."
    )
    columns = ["after block", "what", "top-1 (%)", "from (%)", "to (%)", "models", "images"]
    return Table("What the class token holds, and what comes of changing it", columns, rows, note)


def _line(label: str, scores: np.ndarray, most: float = 1.0) -> Line:
    found = [_interval(scores[:, layer], most) for layer in range(scores.shape[1])]
    points = [(float(layer), mean.estimate) for layer, (mean, _) in enumerate(found)]
    return Line(label, points, [ends for _, ends in found])


def _curve_chart(curves: Curves) -> LineChart:
    return LineChart(
        "Decodable and used",
        "block",
        "test top-1",
        [_line(name, scores) for name, scores in curves.by_layer().items()],
        marks={"unchanged": float(curves.unchanged.mean())},
        note=(
            "0 is before the first block; bands are 95 % intervals. Probe and lens rise where the class "
            "token comes to hold the class; shuffled and mean fall where what it holds is used."
        ),
    )


def _kl_chart(curves: Curves) -> LineChart:
    return LineChart(
        "How far answers move when class tokens are shuffled",
        "block",
        "KL divergence (nats)",
        [_line("shuffled", curves.kl, float("inf"))],
        percent=False,
        note="Of the probabilities before to those after, mean over images; band: 95 % interval.",
    )


def _values(curves: Curves, measured: dict[str, Refinement], used: Sequence[int]) -> dict[str, Any]:
    found = {name.replace(" ", "_"): scores.mean(axis=(0, 2)) for name, scores in curves.by_layer().items()}
    return {
        "top1": curves.unchanged.mean(axis=1),
        **found,
        "kl": curves.kl.mean(axis=(0, 2)),
        "used_layers": list(used),
        "first_used_layer": used[0] if used else None,
        "permuted_logits_top1": float(np.mean([one.permuted for one in measured.values()])),
        "shuffle_layer0_max_change": max(one.layer0_change for one in measured.values()),
        "shuffle_last_layer_max_distance_to_permuted_logits": max(
            one.last_change for one in measured.values()
        ),
    }


def _predictions(measured: dict[str, Refinement]) -> dict[str, Any]:
    """Everything per image: classes, and shares of permutations."""
    first = next(iter(measured.values()))
    names = [name for name in ("replaced", "inserted", "lens", "ridge") if getattr(first, name) is not None]
    return {
        "class_names": first.class_names,
        "paths": list(first.rows.paths),
        "targets": first.targets.tolist(),
        "predictions": {"cls": {seed: one.preds.tolist() for seed, one in measured.items()}},
        "by_layer": {
            name: {seed: getattr(one, name).tolist() for seed, one in measured.items()} for name in names
        },
        "shuffled_right_share": {seed: one.shuffled.tolist() for seed, one in measured.items()},
        "shuffled_kl": {seed: one.kl.tolist() for seed, one in measured.items()},
    }
