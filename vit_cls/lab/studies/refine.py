"""``study refine``: is what can be read off the class token after a block also used by what comes after?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vit_cls import formatting as fmt
from vit_cls.checks import check_range
from vit_cls.errors import ConfigError
from vit_cls.lab.results import Figure, Line, LineChart, Table
from vit_cls.lab.studies.answers import Answers
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.refinement import Refinement, check_reads_class_token, refinement
from vit_cls.lab.studies.study import FROM_TO, Measured, Setup, Study, bounded, verdict_line
from vit_cls.lab.studies.trials import Trial
from vit_cls.stats.random_effects import mean_interval
from vit_cls.stats.verdicts import EQUIVALENT, LESS, SUPPORTED, Claim, Finding
from vit_cls.weights.factory import load


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
        """None where the user gave a model, which is checked before anything begins."""
        if self.model is not None:
            check_reads_class_token(load(self.model).model)
            return {}
        return self.setup.arms({"cls": self.setup.head("cls")})

    def settings(self) -> dict[str, Any]:
        """Without a recipe where nothing is trained."""
        found = super().settings()
        return found if self.model is None else {key: v for key, v in found.items() if key != "recipe"}

    def measure(self, answers: Answers) -> Measured:
        """What was found of each model, by its seed; all permutations of a user's model in one."""
        setup, count = self.setup, self.permutations
        if self.model is not None:
            parts = setup.trial_data.parts(setup.seed)
            found = refinement(load(self.model), parts, seeds=setup.all_seeds, permutations=count)
            return Measured(answers, {}, {}, Refinements({str(setup.seed): found}))
        models = {
            str(trial.seed): refinement(
                answers.model(trial), trial.data.parts(trial.seed), seeds=[trial.seed], permutations=count
            )
            for trial in self.arms()["cls"]
        }
        return Measured(answers, {}, {}, Refinements(models))

    def claims(self, measured: Measured) -> list[Claim]:
        models: Refinements = measured.more
        return [
            Claim(
                f"Class tokens exchanged between images after block {layer} make test top-1 lower.",
                models.unchanged.astype(np.float64),
                models.by_layer["shuffled"][:, layer],
                LESS,
                self.setup.margin,
                ("an unchanged one", f"a class token shuffled after block {layer}"),
            )
            for layer in range(1, models.depth + 1)
        ]

    def headline(self, measured: Measured, findings: Sequence[Finding]) -> str:
        return headline(findings, measured.more.by_layer["ridge probe"])

    def tables(self, measured: Measured, findings: Sequence[Finding]) -> list[Table]:
        return [_shuffle_table(measured.more, findings), _layer_table(measured.more)]

    def figures(self, measured: Measured, findings: Sequence[Finding]) -> list[Figure]:
        models: Refinements = measured.more
        return [
            LineChart(
                "Decodable and used",
                "block",
                "test top-1",
                [_line(name, scores) for name, scores in models.by_layer.items()],
                marks={"unchanged": float(models.unchanged.mean())},
                note=(
                    "0 is before the first block; bands are 95 % intervals. Probe and lens rise where the "
                    "class token comes to hold the class; shuffled and mean fall where what it holds is used."
                ),
            ),
            LineChart(
                "How far answers move when class tokens are shuffled",
                "block",
                "KL divergence (nats)",
                [_line("shuffled", models.stacked("kl"), float("inf"))],
                percent=False,
                note="Of the probabilities before to those after, mean over images; band: 95 % interval.",
            ),
        ]

    def values(self, measured: Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        models, used = measured.more, used_layers(findings)
        each = models.by_seed.values()
        return {
            "top1": models.unchanged.mean(axis=1),
            **{name.replace(" ", "_"): rows.mean(axis=(0, 2)) for name, rows in models.by_layer.items()},
            "kl": models.stacked("kl").mean(axis=(0, 2)),
            "used_layers": used,
            "first_used_layer": used[0] if used else None,
            "permuted_logits_top1": float(np.mean([one.permuted for one in each])),
            "shuffle_layer0_max_change": max(one.layer0_change for one in each),
            "shuffle_last_layer_max_distance_to_permuted_logits": max(one.last_change for one in each),
        }

    def predictions(self, measured: Measured) -> dict[str, Any]:
        """Everything per image: classes, and shares of permutations."""
        models: Refinements = measured.more
        first = models.first

        def by_seed(name: str) -> dict[str, Any]:
            return {seed: getattr(one, name).tolist() for seed, one in models.by_seed.items()}

        names = ("replaced", "inserted", "lens", "ridge")
        return {
            "class_names": first.class_names,
            "paths": list(first.rows.paths),
            "targets": first.targets.tolist(),
            "predictions": {"cls": by_seed("preds")},
            "by_layer": {name: by_seed(name) for name in names if getattr(first, name) is not None},
            "shuffled_right_share": by_seed("shuffled"),
            "shuffled_kl": by_seed("kl"),
        }

    def data(self, measured: Measured) -> dict[str, Any]:
        if self.model is None:
            return super().data(measured)
        parts = self.setup.trial_data.parts(self.setup.seed)
        failures = measured.more.first.failures
        return {"origin": parts.origin, **parts.counts(), "failed": len(failures), "failures": failures}

    def notes(self, measured: Measured) -> list[str]:
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
            notes += [
                f"One model, {count} permutations, averaged for each image: what is found holds for this "
                "model and images like these.",
                "If the model was trained on images of the train or validation part, what is read off its "
                "class token there, and the probe that is fitted to it, are not as on images new to it; "
                "images of the test part must be new to it.",
            ]
        if measured.more.first.inserted is None:
            notes.append(
                "The class token was not inserted late: attention has a causal mask, rotary positions or "
                "relative position biases, which are made for all tokens."
            )
        return notes


@dataclass(frozen=True)
class Refinements:
    """What was found of all models, by seed; they answered for the same images."""

    by_seed: Mapping[str, Refinement]

    @property
    def first(self) -> Refinement:
        """That of the first seed."""
        return next(iter(self.by_seed.values()))

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.first.shuffled) - 1

    @property
    def unchanged(self) -> np.ndarray:
        """Which images the models have right as they are, bool, shape ``(seeds, images)``."""
        return self.right("preds")

    def stacked(self, name: str) -> np.ndarray:
        """An array of each model, shape ``(seeds, ...)``."""
        assert all(np.array_equal(one.targets, self.first.targets) for one in self.by_seed.values())
        return np.stack([getattr(one, name) for one in self.by_seed.values()])

    def right(self, name: str) -> np.ndarray:
        """Where answers are right, bool, shape ``(seeds, ..., images)``."""
        return self.stacked(name) == self.first.targets

    @cached_property
    def by_layer(self) -> dict[str, np.ndarray]:
        """What is right at each layer, by what it is called, each of shape ``(seeds, layers, images)``."""
        found = {
            "ridge probe": self.right("ridge"),
            "class lens": self.right("lens"),
            "shuffled": self.stacked("shuffled"),
            "mean class token instead": self.right("replaced"),
        }
        late = {} if self.first.inserted is None else {"inserted here only": self.right("inserted")}
        return {**found, **late}


def used_layers(findings: Sequence[Finding]) -> list[int]:
    """Blocks after which exchanged class tokens made top-1 lower."""
    return [layer for layer, one in enumerate(findings, 1) if one.verdict == SUPPORTED]


def headline(findings: Sequence[Finding], ridge: np.ndarray) -> str:
    """What may be said in one sentence, and what a probe reads off where that begins to hold.

    Args:
        findings: One for each block.
        ridge: Which images a probe has right, shape ``(seeds, layers, images)``.
    """
    depth, used = len(findings), used_layers(findings)
    if not used:
        return verdict_line(findings[-1])
    first = used[0]
    if len(used) < depth + 1 - first:
        blocks = f"blocks {', '.join(map(str, used[:-1]))} and {used[-1]}" if used[1:] else f"block {first}"
        rest = f"the class token is used after {blocks} of {depth}; after the others no drop was shown"
        return f"{SUPPORTED.capitalize()}: {rest}: {findings[first - 1].sentence}"
    probe = f"A ridge probe reads {fmt.percent(ridge[:, first].mean())} off it there"
    if first == 1:
        what, before = f"what the class token holds after the first block of {depth} is used", "."
    else:
        what = f"the class token is used from block {first} of {depth} on"
        if all(one.verdict == EQUIVALENT for one in findings[: first - 1]):
            what += ", and not before"
        else:
            what += " at the latest; whether it is before cannot be told"
        before = f", and {fmt.percent(ridge[:, first - 1].mean())} one block earlier."
    return f"{SUPPORTED.capitalize()}: {what}: {findings[first - 1].sentence} {probe}{before}"


def _place(layer: int, depth: int) -> str:
    return "0, before the first block" if layer == 0 else f"{layer}, last" if layer == depth else str(layer)


def _shuffle_table(models: Refinements, findings: Sequence[Finding]) -> Table:
    rows: list[list[Any]] = []
    for layer in range(models.depth + 1):
        mean = mean_interval(models.by_layer["shuffled"][:, layer])
        judged: list[float | None] = [None] * 4
        if layer:
            finding = findings[layer - 1]
            judged = [finding.estimate, *(finding.ci95 or (None, None)), finding.p_holm]
        kl = float(models.stacked("kl")[:, layer].mean())
        rows.append([_place(layer, models.depth), *bounded(mean), *judged, kl, mean.seeds, mean.images])
    shares = ("(%)", *FROM_TO)
    columns = ["after block", *(f"shuffled {one}" for one in shares)]
    columns += [*(f"less unchanged {one}" for one in shares), "p (Holm)", "KL (nats)", "models", "images"]
    unchanged = mean_interval(models.unchanged)
    note = (
        f"Test top-1 unchanged: {fmt.percent(unchanged.estimate)} "
        f"({fmt.interval(unchanged.ci95, fmt.bare_percent)}). KL is of the answers before shuffling to those "
        "after, mean over images."
    )
    return Table("Class tokens exchanged between images", columns, rows, note)


def _layer_table(models: Refinements) -> Table:
    """Every accuracy at every layer, with its interval."""
    rows: list[list[Any]] = []
    for layer in range(models.depth + 1):
        for name, scores in models.by_layer.items():
            mean = mean_interval(scores[:, layer])
            rows.append([_place(layer, models.depth), name, *bounded(mean), mean.seeds, mean.images])
    note = (
        "Ridge probe and class lens (the model's own norm and head) read the class token at that layer. The "
        "mean is over the training images. Inserted: the blocks before ran without a class token."
    )
    columns = ["after block", "what", "top-1 (%)", *FROM_TO, "models", "images"]
    return Table("What the class token holds, and what comes of changing it", columns, rows, note)


def _line(label: str, scores: np.ndarray, most: float = 1.0) -> Line:
    means = [bounded(mean_interval(scores[:, layer]), most=most) for layer in range(scores.shape[1])]
    points = [(float(layer), estimate) for layer, (estimate, _, _) in enumerate(means)]
    return Line(label, points, [(low, high) for _, low, high in means])
