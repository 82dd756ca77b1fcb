"""Whether a model has seen the images of a probe, as far as its run's record tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_cls.data.folders import DIGITS
from vit_cls.data.partition import Partition
from vit_cls.data.parts import PARTS

RECORD_FILE = "run.json"
UNKNOWN = (
    "There is no record of what the model was trained on: where images of the parts below were among it, "
    "accuracies and choices made on validation are too good."
)


def find_record(model: str | Path) -> dict[str, Any] | None:
    """``run.json`` of the run folder that ``--model`` names or lies in; None where there is none."""
    path = Path(model)
    folders = [path] if path.is_dir() else list(path.parents)[:2] if path.is_file() else []
    for folder in folders:  # a checkpoint lies one folder deeper than the model file
        try:
            record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return record if isinstance(record, dict) else None
    return None


def overlap_note(record: Mapping[str, Any] | None, parts: Partition, data: str) -> list[str]:
    """A sentence on images that are among those that the model was trained on, if there are some.

    Args:
        record: Of the run that the model came from, if there is one.
        data: What ``--data`` says.
    """
    if record is None:
        return [UNKNOWN]
    if not _same_data(record, parts, data):
        return []
    if _test_was_apart(record, parts):
        return [
            "The model was trained on this data: it has seen images of the train and validation parts, with "
            "their labels, so choices made on validation lean towards what it memorised. It has not seen the "
            "test part."
        ]
    return [
        "The model was trained on this data, and the parts were made anew here: images of the test part may "
        "have been trained on or have chosen its epoch, so accuracies may be too good. A folder with train/, "
        "val/ and test/ keeps them apart."
    ]


def _same_data(record: Mapping[str, Any], parts: Partition, data: str) -> bool:
    told, identity = record.get("data") or {}, record.get("identity") or {}
    fingerprints = {getattr(parts, part).index.fingerprint() for part in PARTS}
    if fingerprints & {identity.get("train_fingerprint"), identity.get("val_fingerprint")}:
        return True
    if told.get("root") is None:
        return bool(told.get("name") == DIGITS == data)
    mine, its = Path(data).resolve(), Path(told["root"]).resolve()
    return mine == its or its in mine.parents or mine in its.parents


def _test_was_apart(record: Mapping[str, Any], parts: Partition) -> bool:
    """Training never reads a test part; earlier it did where there was no validation part."""
    validated_on = (record.get("identity") or {}).get("val_fingerprint")
    return parts.split == "test" and parts.test.index.fingerprint() != validated_on
