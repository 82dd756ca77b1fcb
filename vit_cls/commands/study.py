"""``vit-cls study``: a question about the class token, answered by training and by statistics."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import DATA_HELP, make_parser, parse
from vit_cls.commands.words import comma_lists, name_and_rest
from vit_cls.data.parts import PARTS
from vit_cls.errors import VitClsError
from vit_cls.inference import AUTO_DEVICE, choose_device
from vit_cls.lab.studies.folder import claim_folder
from vit_cls.lab.studies.jobs import default_jobs
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.study import Answers, Setup, Study
from vit_cls.lab.studies.table import STUDIES
from vit_cls.lab.studies.trials import Spread, Trial, check_models, is_done, run_trials
from vit_cls.locks import LOCK, alone_in
from vit_cls.reports.folder import write_folder
from vit_cls.signals import Stopped, StopSignals
from vit_cls.training.trial import train_trial


def run(words: list[str]) -> Outcome:
    """Train what the question takes, or what is left of it: the verdict, or how much is left for others."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    started = time.perf_counter()
    example = "vit-cls study heads --data digits"
    name, rest = name_and_rest("study", words, STUDIES, usage="--data DIR", example=example)
    kind = STUDIES[name]
    parser = make_parser(f"study {name}", kind.question)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--output", type=str | None, default=None, help="the study's folder; studies/NAME")
    parser.add_class_arguments(Setup, None, skip={"data", "folder", "recipe"})
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(kind, None, skip={"setup"})
    parser.add_argument("--jobs", type=int | None, default=None, help="processes; null suits the machine")
    parser.add_argument("--device", default="auto", help="auto (job i on GPU i), cpu, cuda or mps")
    parser.add_argument("--shard", type=str | None, default=None, help="i/n: train the i-th part of n here")
    args = parse(parser, comma_lists(rest, kind))
    choose_device(args.device)
    before = AUTO_DEVICE.set(args.device)
    try:
        return _run(name, kind, args, started)
    finally:
        AUTO_DEVICE.reset(before)


def _run(name: str, kind: type[Study], args: Namespace, started: float) -> Outcome:
    study, folder = _study(name, kind, args)
    spread = Spread.parse(default_jobs(study.setup.data) if args.jobs is None else args.jobs, args.shard)
    trials = study.trials()
    check_models(trials)
    parts = study.setup.trial_data.parts(study.setup.seed)
    fractions = {
        key: args[key] for key in ("val_fraction", "test_fraction") if args[key] != getattr(Setup, key)
    }
    parts.refuse_unused(fractions)
    images = {part: getattr(parts, part).index.fingerprint() for part in PARTS}
    shard = "" if spread.shards == 1 else f"-{spread.shard}-of-{spread.shards}"
    with alone_in(folder, name=f"{LOCK}{shard}"):
        left = _train(trials, folder, spread, new=claim_folder(folder, study, images))
        if left:
            counts = {"left": left, "trainings": len(trials)}
            text = f"{left} of {len(trials)} trainings are left for other shards; their results merge in"
            return Outcome({"kind": f"study {name}", **counts}, [f"{text} {folder}"])
        result = replace(study.analyse(Answers(folder)), seconds=time.perf_counter() - started)
        write_folder(folder, result)
    told = {"split": parts.split, "output": str(folder)}
    return Outcome.of(result, told, folder, below=[f"scored on {parts.split}: {parts.origin}"])


def _study(name: str, kind: type[Study], args: Namespace) -> tuple[Study, Path]:
    stem = "digits" if args.data == "digits" else Path(args.data).resolve().name
    folder = Path(args.output) if args.output is not None else Path("studies") / f"{name}_{stem}"
    own = ("data", "output", "jobs", "shard", "device", "recipe", "seeds", "seed", "margin")
    shared = {key: args[key] for key in ("seeds", "seed", "margin", "val_fraction", "test_fraction")}
    recipe = Recipe(**vars(args.recipe))
    setup = Setup(data=args.data, folder=folder, recipe=recipe, **shared)
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in (*own, *shared)}
    return kind(setup, **options), folder


def _train(trials: Sequence[Trial], folder: Path, spread: Spread, *, new: bool) -> int:
    """Train what is left; a new folder goes away again if the request was wrong."""

    def num_done() -> int:
        return sum(is_done(folder, trial.key) for trial in trials)

    def hint() -> str:
        return f"{num_done()} of {len(trials)} trainings are done, and the same command goes on from here"

    try:
        with StopSignals(hint):
            return run_trials(trials, folder, train_trial, spread)
    except Stopped:
        raise
    except VitClsError:
        if new and not num_done():
            shutil.rmtree(folder, ignore_errors=True)
        raise
