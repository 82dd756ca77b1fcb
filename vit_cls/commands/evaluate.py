"""``vit-cls evaluate``: top-1 and the rest of the truth on an image folder."""

from __future__ import annotations

import sys
from pathlib import Path

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import MODEL_HELP, add_runtime_arguments, make_parser, parse
from vit_cls.environment import environment
from vit_cls.evaluation.metrics import Evaluation, evaluate_predictions
from vit_cls.evaluation.output import check_output, write_tables
from vit_cls.evaluation.predictions import index_for_model, predict_index
from vit_cls.reports.html import write_evaluation_report
from vit_cls.weights.factory import load


def run(words: list[str]) -> Outcome:
    """Evaluate.

    Args:
        words: The words after ``evaluate``.

    Returns:
        The metrics; files in ``--output`` where one is given.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
    parser = make_parser("evaluate", "Score a model on a folder with one sub-folder a class.")
    parser.add_argument("--model", type=str, required=True, help=MODEL_HELP)
    parser.add_argument("--data", type=str, required=True, help="the image folder")
    parser.add_argument(
        "--exact", type=bool, nargs="?", const=True, default=False, help="Pillow's resize, timm's pixels"
    )
    add_runtime_arguments(parser)
    args = parse(parser, words)
    output = check_output(args.output)
    classifier = load(args.model)
    index = index_for_model(args.data, classifier)
    predictions = predict_index(
        classifier,
        index,
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        compile=args.compile,
        exact=args.exact,
        show_progress=sys.stderr.isatty(),
    )
    result = evaluate_predictions(predictions)
    if output is not None:
        write_tables(output, predictions, result)
        failures = [(index.paths[position], reason) for position, reason in predictions.errors.items()]
        write_evaluation_report(
            output / "report.html",
            result,
            model=args.model,
            data=args.data,
            failures=failures,
            versions=environment()["versions"],
        )
    for position, reason in list(predictions.errors.items())[:5]:
        print(f"could not be read: {index.path(position)}: {reason}", file=sys.stderr)
    return _outcome(result, output)


def _outcome(result: Evaluation, output: Path | None) -> Outcome:
    low, high = result.top1_ci95
    data = {
        "images": result.images,
        "failed": result.failed,
        "scored": result.scored,
        "correct": result.correct,
        "top1": result.top1,
        "top1_ci95": [low, high],
        "top5": result.top5,
        "balanced_accuracy": result.balanced_accuracy,
        "nll": result.nll,
        "ece": result.ece,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(result.images / result.seconds, 1),
        "classes": len(result.per_class),
        "classes_present": result.classes_present,
        "output": None if output is None else str(output),
    }
    missing = [row.name for row in result.per_class if not row.support]
    coverage = f"; {result.classes_present} of the model's {len(result.per_class)} classes" if missing else ""
    text = (
        f"{result.correct} of {result.scored} images right ({result.failed} could not be read{coverage})\n"
        f"top-1              {result.top1:.4f}   95 % interval {low:.4f} to {high:.4f}\n"
        f"top-{min(5, len(result.per_class))}              {result.top5:.4f}\n"
        f"balanced accuracy  {result.balanced_accuracy:.4f}\n"
        f"NLL                {result.nll:.4f}\n"
        f"ECE (15 bins)      {result.ece:.4f}\n"
        f"{result.images / result.seconds:.0f} images/s"
    )
    if missing:
        text += f"\nno images of: {', '.join(missing[:20])}{' ...' if len(missing) > 20 else ''}"
    if output is not None:
        text += f"\nfiles in {output}"
    return Outcome(data, text)
