"""``vit-cls doctor``: what is wrong with images, before hours are spent on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from vit_cls import formatting as fmt
from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import add_data_arguments, make_parser, parse
from vit_cls.data.doctor.issues import SEVERITIES, DatasetReport, Problem
from vit_cls.data.doctor.report import examine
from vit_cls.files import output_folder, writing


def run(words: list[str]) -> Outcome:
    """Examine images.

    Args:
        words: The words after ``doctor``.

    Returns:
        The problems, with exit code 1 if one is an error; files in ``--output`` where one is given.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
    parser = make_parser("doctor", "Look for what is wrong with images. Exit 1: there are errors.")
    add_data_arguments(parser, split="the part to look at: train, val or test (default: all of them)")
    parser.add_argument("--output", type=str | None, default=None, help="folder for files; made if needed")
    parser.add_argument(
        "--near_duplicates", type=bool, nargs="?", const=True, default=False, help="also pictures alike"
    )
    parser.add_argument("--num_workers", type=int | None, default=None, help="reading processes; 0 for none")
    args = parse(parser, words)
    output = output_folder(args.output)
    with _as_files(args.data) as data:
        report = examine(
            data,
            near_duplicates=args.near_duplicates,
            num_workers=args.num_workers,
            show_progress=sys.stderr.isatty(),
            split=args.split,
        )
        root, report = Path(report.root), replace(report, root=args.data)
        if output is not None:
            _write(output, report, root)
    parts = [part for part in report.classes if part]
    scanned = {"split": args.split, "origin": f"{', '.join(parts)} of {args.data}" if parts else args.data}
    return Outcome(report.to_dict() | scanned, _text(report, output), code=0 if report.ok else 1)


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


def _write(output: Path, report: DatasetReport, root: Path) -> None:
    # Here: the libraries of charts take seconds to load, and only files need them.
    from vit_cls.data.decode import read_file
    from vit_cls.data.thumbnails import thumbnails
    from vit_cls.environment import environment
    from vit_cls.reports.doctor import pictures_wanted, write_doctor_report, write_problems_table

    pictures = thumbnails(lambda path: read_file(root / path), pictures_wanted(report))
    versions = environment()["versions"]
    with writing(output):
        write_problems_table(output / "problems.csv", report)
        write_doctor_report(output / "report.html", report, thumbnails=pictures, versions=versions)


def _text(report: DatasetReport, output: Path | None) -> str:
    totals = {split: sum(counts.values()) for split, counts in report.classes.items() if split}
    splits = [f"{split} {fmt.count(total)}" for split, total in totals.items()]
    parts = f" ({', '.join(splits)})" if splits else ""
    names = len(report.class_names)
    lines = [
        f"{fmt.count(report.images)} images of {names} class{'es' * (names != 1)}{parts}; "
        f"{fmt.count(report.unreadable)} could not be read",
        *(line for problem in report.problems for line in _lines(problem)),
    ]
    tally = [(sum(p.severity == s for p in report.problems), s) for s in SEVERITIES]
    counted = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in tally if count)
    lines.append(f"{counted or 'nothing is wrong'}; {fmt.duration(report.seconds)}")
    if output is not None:
        lines.append(f"files in {output}")
    return _printable("\n".join(lines))


def _lines(problem: Problem) -> list[str]:
    """What and how many, one example, what to do."""
    indent, first = " " * 17, problem.offenders[0]
    example = " ".join(f"{first.path}: {first.detail}".removesuffix(": ").splitlines())
    return [
        f"{problem.severity:<7}  {problem.count:>6,}  {problem.title}",
        f"{indent}{example}{' ...' if problem.count > 1 else ''}",
        f"{indent}{problem.advice}",
    ]


def _printable(text: str) -> str:
    """Names that the terminal cannot show, or that would command it, are escaped."""
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
