"""``vit-cls compare``: two or more models on the same images, and what may be said about them."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import Namespace

from vit_cls.checks import check_range
from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import (
    MODEL_HELP,
    add_runtime_arguments,
    inference_config,
    make_parser,
    parse,
)
from vit_cls.data.thumbnails import thumbnails
from vit_cls.environment import environment
from vit_cls.errors import ConfigError
from vit_cls.evaluation.answers import Answers, align, answers_of, read_answers
from vit_cls.evaluation.comparison import MARGIN, Comparison, compare_answers, disagreements
from vit_cls.evaluation.predictions import index_for_model, predict_index
from vit_cls.files import output_folder, writing
from vit_cls.reports import compare as page
from vit_cls.weights.factory import load

MOST_MODELS = 26


def run(words: list[str]) -> Outcome:
    """Compare.

    Args:
        words: The words after ``compare``.

    Returns:
        Counts, differences and verdicts; files in ``--output`` where one is given.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
    parser = make_parser("compare", "Two or more models on the same images: is one better, and by how much?")
    parser.add_argument("--model", action="append", help=f"{MODEL_HELP}; give it once for each model")
    parser.add_argument("--predictions", action="append", help="instead: predictions.csv of `evaluate`, each")
    parser.add_argument("--data", help="the image folder; with --predictions for the pictures alone")
    parser.add_argument("--margin", type=float, default=MARGIN, help="difference that does not matter: 0.01")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument(
        "--exact", type=bool, nargs="?", const=True, default=False, help="Pillow's resize, timm's pixels"
    )
    add_runtime_arguments(parser)
    args = parse(parser, words)
    _check(args)
    output = output_folder(args.output)
    files, names = args.predictions or [], args.model or []
    answers = align([*(read_answers(path) for path in files), *(_predict(name, args) for name in names)])
    result = compare_answers(answers, margin=args.margin, seed=args.seed)
    if output is not None:
        _write(output, result, answers, args.data)
    data = result.to_dict() | {"output": None if output is None else str(output)}
    return Outcome(data, page.comparison_text(result) + ("" if output is None else f"\nfiles in {output}"))


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
    if args.predictions and args.data is not None and not Path(args.data).is_dir():
        raise ConfigError(f"--data {args.data} is no folder. Leave it out for a page without pictures.")
    check_range("--margin", args.margin, above=0, below=1, hint="0.01 is one point.")
    check_range("--seed", args.seed, at_least=0)


def _predict(name: str, args: Namespace) -> Answers:
    classifier = load(name)
    index = index_for_model(args.data, classifier)
    config = inference_config(args, show_progress=sys.stderr.isatty())
    predictions = predict_index(classifier, index, config)
    for position, reason in list(predictions.errors.items())[:5]:
        print(f"could not be read: {index.path(position)}: {reason}", file=sys.stderr)
    return answers_of(name, predictions)


def _write(output: Path, result: Comparison, answers: list[Answers], data: str | None) -> None:
    found = disagreements(answers)
    pictures = {} if data is None else thumbnails(data, page.pictures_wanted(found))
    with writing(output):
        page.write_disagreements(output / "comparison.csv", found, len(answers))
        more = {"data": data, "thumbnails": pictures, "versions": environment()["versions"]}
        page.write_compare_report(output / "report.html", result, found, **more)
