"""One ``predict``: from what a user names to image paths, and on to rows in a folder or on a terminal."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from vit_cls.boundary import printing
from vit_cls.data.index import EXTENSIONS
from vit_cls.errors import DataError
from vit_cls.evaluation.features import feature_chunks, feature_function
from vit_cls.evaluation.predict_files import FeatureFile, RowBatch, RowFile, Saved, save_rows
from vit_cls.evaluation.predictions import check_top_k, predict_batches
from vit_cls.evaluation.row_formats import FORMATS, Value, as_record, columns_of
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier
from vit_cls.signals import StopSignals
from vit_cls.texts import printable

STDIN = "-"
READ_BYTES = 65536


@dataclass(frozen=True)
class Request:
    """What a user wants of ``predict``.

    Args:
        row_format: A row of `FORMATS`, or ``table``.
        top_k: Classes a row.
        features: The pooling, or ``tokens``, wanted instead of predictions; None means predictions.
    """

    model: str
    row_format: str
    top_k: int
    features: str | None
    resume: bool
    config: InferenceConfig


def predict(
    classifier: ImageClassifier,
    paths: Iterator[str],
    request: Request,
    *,
    table: RowFile | None,
    stdout: TextIO,
    as_json: bool,
) -> dict[str, Any]:
    """Carry out a request, and return the object of ``--json``.

    Args:
        paths: Read as they are needed.
        table: Where rows go; None means ``stdout``, or with ``as_json`` the result.

    Raises:
        VitClsError: If the request cannot be carried out, or a signal came.
    """
    predictions: list[Mapping[str, Value]] | None = None
    if request.features is not None:
        assert table is not None
        compute, shape = feature_function(classifier, request.features)
        metadata = {"features": request.features, "model": request.model, "paths": table.path.name}
        saved = save_rows(
            table,
            paths,
            lambda paths: feature_chunks(classifier, paths, compute, shape, request.config),
            facts=_facts(classifier, request),
            resume=request.resume,
            features=FeatureFile(table.path.with_name("features.safetensors"), shape, metadata),
        )
    else:
        check_top_k(classifier, request.top_k)

        def work(paths: Iterator[str]) -> Iterator[RowBatch]:
            for rows in predict_batches(classifier, paths, top_k=request.top_k, config=request.config):
                yield [as_record(row, request.top_k) for row in rows], None

        if table is not None:
            facts = _facts(classifier, request)
            saved = save_rows(table, paths, work, facts=facts, resume=request.resume)
        else:
            predictions = [] if as_json else None
            saved = _print_rows(work(paths), classifier, request, stdout, predictions)
    done = saved.images - saved.resumed
    data = {
        "images": saved.images,
        "failed": saved.failed,
        "resumed": saved.resumed,
        "output": None if table is None else str(table.path.parent),
        "calibrated": classifier.calibrated,
        "temperature": classifier.temperature,
        "seconds": round(saved.seconds, 3),
        "images_per_second": round(done / saved.seconds, 1),
        **request.config.record,
    }
    return data if predictions is None else {**data, "predictions": predictions}


def _print_rows(
    chunks: Iterator[RowBatch],
    classifier: ImageClassifier,
    request: Request,
    stdout: TextIO,
    kept: list[Mapping[str, Value]] | None,
) -> Saved:
    started = time.perf_counter()
    images = failed = 0
    head, line = _text_format(classifier, request)
    with StopSignals() as stop:
        if kept is None:
            with printing(stdout):
                stdout.write(head)
        for records, _ in chunks:
            stop.check()
            images += len(records)
            failed += sum(record["error"] is not None for record in records)
            if kept is not None:
                kept += records
            else:
                text = "".join(map(line, records))
                # names that are not UTF-8 go out as they came in
                raw = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                with printing(stdout):
                    stdout.write(printable(raw) if stdout.isatty() else raw)
    return Saved(images, failed, 0, time.perf_counter() - started)


def _text_format(
    classifier: ImageClassifier, request: Request
) -> tuple[str, Callable[[Mapping[str, Value]], str]]:
    """First line, and what makes a line of a row."""
    if request.row_format != "table":
        row_format = FORMATS[request.row_format]
        return row_format.head(columns_of(request.top_k)), row_format.line
    width = min(max(len("prediction"), *map(len, classifier.class_names)), 40)
    room = max(20, shutil.get_terminal_size().columns - (width + 9) * request.top_k - 2)

    def line(record: Mapping[str, Value]) -> str:
        cells = []
        for ending in ("", *(f"_{k}" for k in range(2, request.top_k + 1))):
            name, probability = record[f"prediction{ending}"], record[f"probability{ending}"]
            number = "" if probability is None else f"{probability:.4f}"
            cells.append(f"{_one_line(name or '')[:width]:<{width}} {number:>6}")
        path = _one_line(record["path"])
        if record["error"] is not None:
            return f"{path}: {_one_line(record['error'])}\n"
        return "  ".join([*cells, path if len(path) <= room else f"...{path[3 - room :]}"]) + "\n"

    names = [f"{'prediction':<{width}} {'prob':>6}"] * request.top_k
    return "  ".join([*names, "path"]) + "\n", line


def _one_line(text: object) -> str:
    return printable(str(text)).replace("\n", "\\n")


def _facts(classifier: ImageClassifier, request: Request) -> dict[str, Any]:
    """What rows depend on besides their paths, by the option that sets it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((classifier.class_names, classifier.preprocess)).encode())
    for name, tensor in sorted(classifier.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return {
        "--model": digest.hexdigest(),
        "temperature": classifier.temperature,
        "--top_k": request.top_k,
        "--features": request.features,
        "--exact": request.config.exact,
        "--precision": request.config.computes_in.name,
    }


def iter_paths(words: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    """Paths of images, lazily, in the order of the words.

    Args:
        words: Files, which need not exist; folders, of which all visible image files are taken, at any depth
            and in lexicographic order; quoted globs, of which the files that match are taken (``**`` for any
            depth); or ``-``.
        stdin: Read where a word is ``-``: one path a line, or closed by NUL bytes. Paths are taken as they
            are.

    Raises:
        DataError: If a folder holds no image, a glob matches no file, ``-`` is not alone, or there is no
            path; before the first path is handed out.
    """
    if STDIN in words and len(words) > 1:
        raise DataError("PATH - takes the paths from stdin; it cannot be combined with others.")
    parts = [_from_stdin(stdin) if word == STDIN else _expand(word) for word in words]
    paths = itertools.chain.from_iterable(parts)
    first = next(paths, None)
    if first is None:
        given = "stdin holds no path." if words else "PATH is missing."
        raise DataError(f"{given} Give image files, folders, quoted globs, or - for paths on stdin.")
    return itertools.chain([first], paths)


def _expand(word: str) -> Iterator[str]:
    if os.path.isdir(word):
        if next(_walk(word), None) is None:
            raise DataError(
                f"folder {word} holds no image file. Files with these extensions are taken: "
                f"{' '.join(sorted(EXTENSIONS))}."
            )
        return _walk(word)
    if glob.has_magic(word) and not os.path.lexists(word):
        files = sorted(path for path in glob.iglob(word, recursive=True) if not os.path.isdir(path))
        if not files:
            raise DataError(
                f"glob {word} matches no file. Check it with ls; ** matches folders of any depth, and a "
                "folder can be given by its name alone."
            )
        return iter(files)
    return iter([word])


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Image files below a folder, sorted as whole paths; a sub-folder that cannot be read is a path."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted(_name(entry) for entry in entries if entry.name[0] != ".")
    except OSError:
        yield folder
        return
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link that leads back to a folder it is in
        return
    for name in names:
        if name[-1] == "/":
            yield from _walk(os.path.join(folder, name[:-1]), above | {here})
        elif os.path.splitext(name)[1].lower() in EXTENSIONS:
            yield os.path.join(folder, name)


def _name(entry: os.DirEntry[str]) -> str:
    return f"{entry.name}/" if entry.is_dir() else entry.name


def _from_stdin(stdin: BinaryIO) -> Iterator[str]:
    separator, rest = b"", b""
    read = getattr(stdin, "read1", stdin.read)
    while data := read(READ_BYTES):
        separator = separator or (b"\0" if b"\0" in data else b"\n" if b"\n" in data else b"")
        rest += data
        if separator:
            *whole, rest = rest.split(separator)
            yield from filter(None, map(_path, whole))
    yield from filter(None, map(_path, rest.split(separator or b"\n")))


def _path(line: bytes) -> str:
    return os.fsdecode(line.removesuffix(b"\r"))
