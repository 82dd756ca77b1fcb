"""``vit-cls compare``: two or more models on the same images, and what may be said about them."""

from __future__ import annotations

import sys
from functools import partial

from jsonargparse import Namespace

from vit_cls.checks import check_range
from vit_cls.commands.outcome import Outcome, path_or_none, tell_unreadable
from vit_cls.commands.parsing import (
    MODEL_HELP,
    add_data_arguments,
    add_flag,
    add_runtime_arguments,
    inference_config,
    make_parser,
    parse,
)
from vit_cls.data.dataset import ImageSource
from vit_cls.data.folders import find_parts
from vit_cls.data.thumbnails import reader_by_path, thumbnails
from vit_cls.errors import ConfigError
from vit_cls.evaluation.comparison import (
    MARGIN,
    Answers,
    align,
    answers_of,
    compare_answers,
    disagreements,
)
from vit_cls.evaluation.predictions import AS_IS, ScoredImages, Scoring, images_for_model, predict_index
from vit_cls.evaluation.row_formats import read_predictions
from vit_cls.files import output_folder
from vit_cls.locks import alone_in
from vit_cls.reports.folder import write_folder
from vit_cls.reports.html import no_pictures
from vit_cls.weights.factory import load

MOST_MODELS = 26


def run(words: list[str]) -> Outcome:
    """Compare models: counts, differences and verdicts."""
    parser = make_parser("compare", "Two or more models on the same images: is one better, and by how much?")
    parser.add_argument("--model", action="append", help=f"{MODEL_HELP}; give it once for each model")
    parser.add_argument("--predictions", action="append", help="instead: predictions.csv of `evaluate`, each")
    add_data_arguments(parser, required=False)  # with --predictions for the pictures alone
    parser.add_argument("--margin", type=float, default=MARGIN, help="difference that does not matter: 0.01")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    add_flag(parser, "--exact", "Pillow's resize, timm's pixels")
    add_runtime_arguments(parser)
    args = parse(parser, words)
    _check(args)
    output = output_folder(args.output)
    files, names = args.predictions or [], args.model or []
    images: ScoredImages | None = None
    scoring = AS_IS
    with alone_in(output):
        source = _source(args) if files else None
        answers = [answers_of(path, read_predictions(path)) for path in files]
        for name in names:
            each, images, scoring = _predict(name, args)
            answers.append(each)
        answers = align(answers)
        result = compare_answers(answers, margin=args.margin, seed=args.seed)
        if output is not None:
            source = source if images is None else images.source
            pictures = no_pictures if source is None else partial(thumbnails, reader_by_path(source))
            found = disagreements(answers)
            write_folder(
                output, result, found=found, data=args.data, computed=scoring.computed, thumbnails=pictures
            )
    told = {
        "split": None if images is None else images.split,
        "origin": None if images is None else images.origin,
        "device": scoring.device,
        "device_name": scoring.device_name,
        "precision": scoring.precision,
        "output": path_or_none(output),
    }
    return Outcome.of(result, told, output, above=[] if images is None else [images.words])


def _check(args: Namespace) -> None:
    if args.model and args.predictions:
        raise ConfigError("--model and --predictions exclude each other: give models and --data, or files.")
    given = args.predictions or args.model or []
    if not 2 <= len(given) <= MOST_MODELS:
        flag = "--predictions" if args.predictions else "--model"
        example = "vit-cls compare --model A --model B --data FOLDER"
        raise ConfigError(
            f"compare needs {flag} two to {MOST_MODELS} times; got {len(given)}. Example: {example}."
        )
    if args.model and args.data is None:
        raise ConfigError("--model needs --data, the image folder that the models are compared on.")
    if args.split is not None and args.data is None:
        raise ConfigError(f"--split {args.split} has no effect without --data. Leave it out.")
    check_range("--margin", args.margin, above=0, below=1, hint="0.01 is one point.")
    check_range("--seed", args.seed, at_least=0)


def _predict(name: str, args: Namespace) -> tuple[Answers, ScoredImages, Scoring]:
    classifier = load(name)
    images = images_for_model(args.data, classifier, split=args.split)
    config = inference_config(args, show_progress=sys.stderr.isatty())
    predictions = predict_index(classifier, images.source, config)
    tell_unreadable(predictions)
    return answers_of(name, predictions.rows()), images, predictions.scoring


def _source(args: Namespace) -> ImageSource | None:
    """The pictures beside predictions that were read from files."""
    if args.data is None:
        return None
    parts = find_parts(args.data)
    return parts.read(parts.choose(args.split))
