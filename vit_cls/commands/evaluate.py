"""``vit-cls evaluate``: top-1, calibration and other metrics on an image folder."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

from vit_cls.checks import check_range
from vit_cls.commands.outcome import Outcome, path_or_none, tell_unreadable
from vit_cls.commands.parsing import (
    DATA_HELP,
    MODEL_HELP,
    add_data_arguments,
    add_flag,
    add_runtime_arguments,
    inference_config,
    make_parser,
    parse,
)
from vit_cls.data.thumbnails import reader_by_path, thumbnails
from vit_cls.evaluation.calibration import calibratable_file, calibrate, fit_text
from vit_cls.evaluation.predictions import check_tta, images_for_model, predict_index
from vit_cls.evaluation.results import evaluate_predictions
from vit_cls.files import output_folder
from vit_cls.locks import alone_in
from vit_cls.reports.folder import write_folder
from vit_cls.weights.factory import load


def run(words: list[str]) -> Outcome:
    """Evaluate a model: its metrics."""
    parser = make_parser("evaluate", "Score a model on a folder with one sub-folder a class.")
    parser.add_argument("--model", type=str, required=True, help=MODEL_HELP)
    add_data_arguments(parser)
    add_flag(parser, "--exact", "Pillow's resize, timm's pixels")
    add_flag(parser, "--restrict", "predict only classes that the folder has")
    parser.add_argument("--tta", type=str, default="none", help="none, or flip: mean with the mirror image")
    parser.add_argument(
        "--calibrate",
        type=str | None,
        default=None,
        help="validation images to fit a temperature on, which is stored in the model file: the val part of "
        f"{DATA_HELP}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals")
    add_runtime_arguments(parser)
    args = parse(parser, words)
    check_tta(args.tta)
    check_range("--seed", args.seed, at_least=0)
    output = output_folder(args.output)
    file = None if args.calibrate is None else calibratable_file(args.model)
    config = inference_config(args, show_progress=sys.stderr.isatty())
    with alone_in(output):
        classifier = load(args.model)
        images = images_for_model(args.data, classifier, split=args.split)
        fit = None if file is None else calibrate(classifier, file, args.calibrate, images, config)
        predictions = predict_index(classifier, images.source, config, restrict=args.restrict, tta=args.tta)
        result = evaluate_predictions(predictions, seed=args.seed)
        if output is not None:
            write_folder(
                output,
                result,
                predictions=predictions,
                model=args.model,
                data=images.origin,
                thumbnails=partial(thumbnails, reader_by_path(images.source)),
                licence=classifier.weights_licence,
                source=classifier.weights_source,
            )
    tell_unreadable(predictions)
    told = {
        "split": images.split,
        "origin": images.origin,
        "weights_licence": classifier.weights_licence,
        "calibration": None if fit is None else {"data": args.calibrate, **dataclasses.asdict(fit)},
        "output": path_or_none(output),
    }
    calibration = [] if fit is None else fit_text(fit, file, args.calibrate)
    return Outcome.of(result, told, output, above=[*calibration, images.words])
