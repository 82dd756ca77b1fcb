"""``vit-cls probe``: what the frozen tokens of a model know."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from vit_cls.checks import check_range
from vit_cls.commands.outcome import Outcome, path_or_none
from vit_cls.commands.parsing import (
    MODEL_HELP,
    add_data_arguments,
    add_runtime_arguments,
    inference_config,
    make_parser,
    parse,
)
from vit_cls.commands.words import comma_lists, name_and_rest
from vit_cls.data.partition import partition_data
from vit_cls.errors import ConfigError
from vit_cls.files import output_folder
from vit_cls.lab.probes.base import Subject
from vit_cls.lab.probes.common import described
from vit_cls.lab.probes.overlap import find_record, overlap_note
from vit_cls.lab.probes.table import PROBES
from vit_cls.locks import alone_in
from vit_cls.reports.folder import write_folder
from vit_cls.weights.factory import load

log = logging.getLogger("vit_cls")


def run(words: list[str]) -> Outcome:
    """Freeze a model, read its tokens: verdicts and numbers."""
    started = time.perf_counter()
    example = "vit-cls probe linear --model runs/x --data photos"
    name, rest = name_and_rest("probe", words, PROBES, usage="--model M --data DIR", example=example)
    kind = PROBES[name]
    parser = make_parser(f"probe {name}", kind.question)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_data_arguments(parser)
    parser.add_argument(
        "--val_fraction", type=float | None, default=None, help="share to choose by, if split here; 0.2"
    )
    parser.add_argument(
        "--test_fraction", type=float | None, default=None, help="share to report on, likewise; 0.25"
    )
    parser.add_argument(
        "--cache",
        type=str | None,
        default=None,
        help="folder that keeps frozen tokens, so that they are not computed again; may be deleted at any "
        "time (default: vit_cls/tokens in $XDG_CACHE_HOME or ~/.cache)",
    )
    add_runtime_arguments(parser)
    parser.add_class_arguments(kind, None)
    args = parse(parser, comma_lists(rest, kind))
    if args.compile:
        raise ConfigError("--compile has no effect on a probe: tokens are computed once. Leave it out.")
    check_range("--seed", args.seed, at_least=0)
    options = args.as_dict()
    probe = kind(**{field.name: options[field.name] for field in fields(kind)})
    config = inference_config(args, show_progress=sys.stderr.isatty())
    output, cache = output_folder(args.output), cache_folder(args.cache)
    with alone_in(output):
        classifier = load(args.model)
        fractions = {key: args[key] for key in ("val_fraction", "test_fraction") if args[key] is not None}
        parts = partition_data(args.data, seed=args.seed, split=args.split, **fractions)
        parts.refuse_unused(fractions)
        result = probe.run(Subject(classifier, parts, config, cache))
        architecture = described(classifier.model)
        settings = {"model": args.model, "architecture": architecture, "data": args.data, **config.record}
        settings |= result.settings
        notes = [*result.notes, *overlap_note(find_record(args.model), parts, args.data)]
        seconds = time.perf_counter() - started
        result = replace(result, settings=settings, notes=notes, seconds=seconds)
        if output is not None:
            write_folder(output, result)
    told = {"split": parts.split, "output": path_or_none(output)}
    return Outcome.of(result, told, output, below=[f"scored on {parts.split}: {parts.origin}"])


def cache_folder(cache: str | None) -> Path | None:
    """Where frozen tokens are kept; creates nothing.

    Args:
        cache: The folder as the user wrote it; None means ``vit_cls/tokens`` in the user's cache.

    Returns:
        The folder; None, and a warning, where none was asked for and the user's cache cannot be written.

    Raises:
        ConfigError: If ``cache`` is a file, or cannot be made or written.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if cache is not None:
        return output_folder(cache, "--cache")
    try:
        return output_folder(home / "vit_cls" / "tokens", "the cache")
    except ConfigError as error:
        log.warning(f"tokens are not kept; --cache FOLDER keeps them: {error}")
        return None
