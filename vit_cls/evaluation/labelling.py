"""One ``predict``: from a model and paths to rows in a folder, on a terminal or in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from vit_cls.evaluation.features import feature_chunks, feature_function
from vit_cls.evaluation.predict_files import FeatureFile, RowBatch, RowFile, Saved, save_rows
from vit_cls.evaluation.predictions import check_top_k, predict_batches
from vit_cls.evaluation.row_formats import FORMATS, Value, as_record, columns_of
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier
from vit_cls.signals import StopSignals


@dataclass(frozen=True)
class Request:
    """What a user wants of ``predict``.

    Args:
        model: As the user named it.
        row_format: A row of `FORMATS`, or ``table``.
        top_k: Classes a row.
        features: The tokens wanted instead of predictions; None means predictions.
        resume: Whether to continue an interrupted run.
        config: How the model is run.
    """

    model: str
    row_format: str
    top_k: int
    features: str | None
    resume: bool
    config: InferenceConfig


def label(
    classifier: ImageClassifier,
    paths: Iterator[str],
    request: Request,
    *,
    table: RowFile | None,
    stdout: TextIO,
    as_json: bool,
) -> dict[str, Any]:
    """Carry out a request.

    Args:
        classifier: Is moved to the device.
        paths: Read as they are needed.
        request: What is wanted.
        table: Where rows go; None means ``stdout``.
        stdout: Where rows go then.
        as_json: Whether they are to be part of the result instead.

    Returns:
        The object of ``--json``.

    Raises:
        VitClsError: If the request cannot be carried out, or a signal came.
    """
    predictions: list[Mapping[str, Value]] | None = None
    if request.features is not None:
        assert table is not None
        saved = _save_features(classifier, paths, request, request.features, table)
    else:
        check_top_k(classifier, request.top_k)

        def work(some: Iterator[str]) -> Iterator[RowBatch]:
            for rows in predict_batches(classifier, some, top_k=request.top_k, config=request.config):
                yield [as_record(row, request.top_k) for row in rows], None

        if table is not None:
            saved = save_rows(
                table,
                paths,
                work,
                facts=_facts(classifier, request),
                resume=request.resume,
            )
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
    }
    return data if predictions is None else {**data, "predictions": predictions}


def _save_features(
    classifier: ImageClassifier, paths: Iterator[str], request: Request, what: str, table: RowFile
) -> Saved:
    compute, shape = feature_function(classifier, what)

    return save_rows(
        table,
        paths,
        lambda some: feature_chunks(classifier, some, compute, shape, request.config),
        facts=_facts(classifier, request),
        resume=request.resume,
        features=FeatureFile(
            table.path.with_name("features.safetensors"),
            shape,
            {"features": what, "model": request.model, "paths": table.path.name},
        ),
    )


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
        try:
            if kept is None:
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
                    stdout.write(raw)
                    stdout.flush()
        except BrokenPipeError:  # `| head`: without this Python complains at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
            raise
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
            cells.append(f"{str(name or '')[:width]:<{width}} {number:>6}")
        path = str(record["path"])
        if record["error"] is not None:
            return f"{path}: {record['error']}\n"
        return "  ".join([*cells, path if len(path) <= room else f"...{path[3 - room :]}"]) + "\n"

    names = [f"{'prediction':<{width}} {'prob':>6}"] * request.top_k
    return "  ".join([*names, "path"]) + "\n", line


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
        "--precision": "bf16" if request.config.bf16 else "32",
    }
