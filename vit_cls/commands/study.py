"""``vit-cls study``: a question about the class token, answered by training and by statistics."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import DATA_HELP, comma_lists, make_parser, parse
from vit_cls.data.parts import PARTS
from vit_cls.environment import environment
from vit_cls.errors import ConfigError, RunError, VitClsError, did_you_mean
from vit_cls.files import write_text, writing
from vit_cls.lab.results import plain
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.lab.studies.runner import Spread, default_jobs, is_done, run_trials
from vit_cls.lab.studies.study import Answers, Setup, Study
from vit_cls.lab.studies.table import STUDIES
from vit_cls.lab.studies.trials import Trial
from vit_cls.reports.lab import write_lab_report
from vit_cls.reports.lab_words import lab_text
from vit_cls.signals import Stopped, StopSignals
from vit_cls.training.trial import train_trial

RECORD = "study.json"


def run(words: list[str]) -> Outcome:
    """Train what the question takes, or what is left of it, and answer.

    Args:
        words: The words after ``study``; the first is the question's name.

    Returns:
        The verdict; or, with ``--shard``, how much is left for other machines.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    started = time.perf_counter()
    name, rest = _name(words)
    kind = STUDIES[name]
    parser = make_parser(f"study {name}", kind.question)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--output", type=str | None, default=None, help="the study's folder; studies/NAME")
    parser.add_class_arguments(Setup, None, skip={"data", "folder", "recipe"})
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(kind, None, skip={"setup"})
    parser.add_argument("--jobs", type=int | None, default=None, help="processes; null suits the machine")
    parser.add_argument("--shard", type=str | None, default=None, help="i/n: train the i-th part of n here")
    args = parse(parser, comma_lists(rest))
    study, folder = _study(name, kind, args)
    spread = Spread.parse(default_jobs(study.setup.data) if args.jobs is None else args.jobs, args.shard)
    trials = study.trials()
    parts = study.setup.trial_data.parts(study.setup.seed)
    fractions = {
        key: args[key] for key in ("val_fraction", "test_fraction") if args[key] != getattr(Setup, key)
    }
    parts.refuse_unused(fractions)
    images = {part: getattr(parts, part).index.fingerprint() for part in PARTS}
    left = _train(trials, folder, spread, new=_claim_folder(folder, study, images))
    if left:
        text = f"{left} of {len(trials)} trainings are left for other shards; their results merge in {folder}"
        return Outcome({"kind": f"study {name}", "left": left, "trainings": len(trials)}, text)
    result = replace(study.analyse(Answers(folder)), seconds=time.perf_counter() - started)
    write_lab_report(folder, result, versions=environment()["versions"])
    told = {"split": parts.split, "output": str(folder)}
    return Outcome(
        result.to_dict() | told,
        f"{lab_text(result)}\nscored on {parts.split}: {parts.origin}\nfiles in {folder}",
    )


def _name(words: list[str]) -> tuple[str, list[str]]:
    known = ", ".join(STUDIES)
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print("usage: vit-cls study NAME --data DIR [options]\n")
            print("\n".join(f"  {name:<11} {kind.question}" for name, kind in STUDIES.items()))
            print("\n  vit-cls study NAME --help   the options of a study")
            raise SystemExit(0)
        raise ConfigError(f"study needs a name: {known}. Example: vit-cls study heads --data digits.")
    if words[0] not in STUDIES:
        raise ConfigError(f"there is no study {words[0]!r}.{did_you_mean(words[0], STUDIES)} Known: {known}.")
    return words[0], words[1:]


def _study(name: str, kind: type[Study], args: Namespace) -> tuple[Study, Path]:
    stem = "digits" if args.data == "digits" else Path(args.data).resolve().name
    folder = Path(args.output) if args.output is not None else Path("studies") / f"{name}_{stem}"
    own = ("data", "output", "jobs", "shard", "recipe", "seeds", "seed", "margin")
    shared = {key: args[key] for key in ("seeds", "seed", "margin", "val_fraction", "test_fraction")}
    recipe = Recipe(**vars(args.recipe))
    setup = Setup(data=args.data, folder=folder, recipe=recipe, **shared)
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in (*own, *shared)}
    return kind(setup, **options), folder


def _train(trials: Sequence[Trial], folder: Path, spread: Spread, *, new: bool) -> int:
    """Train what is left; a new folder goes away again if the request was wrong."""

    def num_done() -> int:
        return sum(is_done(folder, trial) for trial in trials)

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


def _claim_folder(folder: Path, study: Study, images: dict[str, str]) -> bool:
    """Begin there, or go on where the same study began; gives whether it begins."""
    record = {"study": study.name, "images": images, **plain(study.settings())}
    file = folder / RECORD
    if file.is_file():
        before, now = _flat(_read(file)), _flat(record)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            if key.startswith("images."):
                raise RunError(
                    f"--output {folder} holds a study of other images: in the {key.partition('.')[2]} part "
                    f"of {study.setup.data} files were added, removed or renamed since. Give a new folder."
                )
            raise RunError(
                f"--output {folder} holds a study with another {key}: {before.get(key)!r} there, "
                f"{now.get(key)!r} now. Give another folder, or the same settings to go on."
            )
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"--output {folder} is not empty, and holds no study. Give a new folder.")
    with writing(folder):
        write_text(file, json.dumps(record, indent=1) + "\n")
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({error}); it says what the study in that folder is. Give a new --output."
        ) from error


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings, and the images, by their dotted names."""
    nested = ("recipe", "images")
    dotted = {f"{name}.{key}": value for name in nested for key, value in record.get(name, {}).items()}
    return {key: value for key, value in record.items() if key not in nested} | dotted
