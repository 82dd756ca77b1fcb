"""``vit-cls doctor``: what is wrong with images, before hours are spent on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import add_data_arguments, add_flag, make_parser, parse
from vit_cls.data.decode import read_file
from vit_cls.data.doctor.report import examine
from vit_cls.files import output_folder
from vit_cls.locks import alone_in


def run(words: list[str]) -> Outcome:
    """Examine images: the problems, and exit code 1 if one is an error."""
    parser = make_parser("doctor", "Look for what is wrong with images. Exit 1: there are errors.")
    add_data_arguments(parser, split="the part to look at: train, val or test (default: all of them)")
    parser.add_argument("--output", type=str | None, default=None, help="folder for files; made if needed")
    add_flag(parser, "--near_duplicates", "also pictures alike")
    parser.add_argument("--num_workers", type=int | None, default=None, help="reading processes; 0 for none")
    args = parse(parser, words)
    output = output_folder(args.output)
    with alone_in(output), _as_files(args.data) as data:
        report = examine(
            data,
            near_duplicates=args.near_duplicates,
            num_workers=args.num_workers,
            show_progress=sys.stderr.isatty(),
            split=args.split,
        )
        root, report = Path(report.root), replace(report, root=args.data)
        if output is not None:
            # Here: the libraries of charts take seconds to load, and only files need them.
            from vit_cls.data.thumbnails import thumbnails
            from vit_cls.reports.folder import write_folder

            write_folder(output, report, thumbnails=partial(thumbnails, lambda path: read_file(root / path)))
    parts = [part for part in report.classes if part]
    scanned = {"split": args.split, "origin": f"{', '.join(parts)} of {args.data}" if parts else args.data}
    return Outcome.of(report, scanned, output, code=0 if report.ok else 1)


@contextmanager
def _as_files(data: str) -> Iterator[str]:
    """The data as files: the embedded digits are written for as long as they are looked at."""
    if data != "digits" or Path(data).is_dir():
        yield data
        return
    from vit_cls.data.digits import write_digits  # with torchvision: seconds, for this alone

    with TemporaryDirectory() as folder:
        for part in ("train", "test"):
            write_digits(Path(folder, part), part)
        yield folder
