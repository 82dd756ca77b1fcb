"""``vit-cls predict``: label image files, one row a path."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from vit_cls.checks import check_choice
from vit_cls.commands.outcome import CALLER, Outcome
from vit_cls.commands.parsing import (
    MODEL_HELP,
    add_runtime_arguments,
    inference_config,
    make_parser,
    parse,
)
from vit_cls.errors import ConfigError
from vit_cls.evaluation.features import TOKENS
from vit_cls.evaluation.predict import Request, iter_paths, predict
from vit_cls.evaluation.predict_files import RowFile
from vit_cls.evaluation.row_formats import FORMATS, check_parquet, columns_of
from vit_cls.files import output_folder
from vit_cls.locks import LOCK, alone_in
from vit_cls.model.pooling import parse_pool
from vit_cls.weights.factory import load

TABLE = "table"
PATH_HELP = "image files, folders, quoted globs, or - for paths on stdin, one a line or NUL-separated"


def run(words: list[str]) -> Outcome:
    """Predict: counts; the rows go to ``--output``, or to stdout as they come."""
    parser = make_parser(
        "predict", "Label image files; an image that cannot be read is a row with its error."
    )
    parser.add_argument("--model", type=str, required=True, help=MODEL_HELP)
    parser.add_argument("paths", metavar="PATH", nargs="*", type=str, help=PATH_HELP)
    parser.add_argument("--format", type=str | None, default=None, help="csv, jsonl, parquet or table")
    parser.add_argument("--top_k", type=int, default=1, help="classes a row")
    parser.add_argument(
        "--features",
        type=str | None,
        default=None,
        help="a pooling, such as cls or gap; or tokens",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--exact", action="store_true", help="Pillow's resize, timm's pixels")
    add_runtime_arguments(parser)
    args = parse(parser, words)
    caller = CALLER.get()
    row_format = args.format or (TABLE if args.output is None and caller.stdout.isatty() else "csv")
    output = output_folder(args.output)
    _check(row_format, args)
    # Rows on a terminal and a bar would be in each other's way.
    config = inference_config(args, show_progress=output is not None and sys.stderr.isatty())
    table = None
    if output is not None:
        stem, columns = ("features", ("path", "error")) if args.features else ("predictions", None)
        table = RowFile(output, stem, row_format, columns or columns_of(args.top_k))
        table.check_part(args.resume)
    paths = iter_paths(args.paths or [], sys.stdin.buffer)
    request = Request(args.model, row_format, args.top_k, args.features, args.resume, config)
    with alone_in(output, name=LOCK if table is None else f"{LOCK}-{table.path.name}"):
        data = predict(
            load(args.model), paths, request, table=table, stdout=caller.stdout, as_json=caller.as_json
        )
    told = f"features in {output}" if args.features else _calibration(data["temperature"])
    shown = [
        f"{data['images']} images, {data['failed']} of them could not be read; {told}",
        f"{data['images_per_second']:.0f} images/s",
    ]
    if output is not None:
        return Outcome(data, [*shown, f"files in {output}"])
    if not caller.as_json:
        print("\n".join(shown), file=sys.stderr)  # the rows have stdout
    return Outcome(data, shown, silent=not caller.as_json)


def _calibration(temperature: float) -> str:
    how = "not calibrated" if temperature == 1.0 else f"calibrated (temperature {temperature:.4g})"
    return f"probabilities are {how}"


def _check(row_format: str, args: Namespace) -> None:
    check_choice("--format", row_format, (*FORMATS, TABLE))
    if args.features not in (None, TOKENS):
        parse_pool(args.features, "--features")
    if args.output is None:
        for name in ("features", "resume"):
            if getattr(args, name):
                raise ConfigError(f"--{name} needs --output DIR: the folder of its files.")
        if row_format == "parquet":
            raise ConfigError("--format parquet needs --output DIR; stdout takes csv, jsonl or table.")
    elif row_format == TABLE:
        raise ConfigError("--format table is for the terminal; with --output use csv, jsonl or parquet.")
    if args.features and (row_format != "csv" or args.top_k != 1):
        raise ConfigError("--features writes features.safetensors and .csv; leave --format and --top_k out.")
    if row_format == "parquet":
        check_parquet()
