"""Reads of many layers, computed once: `freeze_reads` with a memory on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from vit_cls.data.dataset import ImageSource
from vit_cls.errors import DataError
from vit_cls.files import replacing
from vit_cls.lab.extraction import Rows, Running
from vit_cls.lab.fingerprints import joined_digest
from vit_cls.lab.frozen import cache_key, freeze_reads
from vit_cls.model.classifier import ImageClassifier

FAILURES = "failures"


def kept_reads(
    classifier: ImageClassifier,
    source: ImageSource,
    layers: Sequence[int],
    ways: Sequence[str],
    *,
    running: Running | None = None,
) -> tuple[dict[tuple[str, int], np.ndarray], Rows]:
    """Read many layers in one pass, or take what an earlier call left in the cache.

    Args:
        classifier: Is moved to the device and put in evaluation mode, where it has to run.
        source: The images.
        layers: Where to read; 0 is before the first block.
        ways: See `vit_cls.lab.reads.READS`.
        running: How the model is run; its ``cache`` keeps one file, None keeps none.

    Returns:
        Float32, shape ``(n, dim)``, for each way and layer, and which images the rows are.

    Raises:
        ConfigError: If the model cannot be read that way or has no such layer.
        DataError: If no image can be read, or the cache cannot be written.
        ModelFileError: If tokens are not finite.
    """
    running = running or Running()
    if running.cache is None:
        return freeze_reads(classifier, source, layers, ways, running=running)
    wanted = sorted(set(layers))
    key = cache_key(classifier, source, wanted, precision=running.precision, device=running.device)
    file = running.cache / f"{joined_digest(key, 'reads', *ways)}.npz"
    names = [f"{way} {layer}" for way in ways for layer in wanted]
    if file.is_file():
        with np.load(file) as stored:
            failures = {int(k): v for k, v in json.loads(stored[FAILURES].tobytes()).items()}
            pairs = [(way, layer) for way in ways for layer in wanted]
            found = {pair: stored[name] for pair, name in zip(pairs, names, strict=True)}
        return found, Rows.of(source, failures)
    found, rows = freeze_reads(classifier, source, wanted, ways, running=running)
    missing = set(range(len(source.index))) - set(rows.positions.tolist())
    reasons = {i: rows.failures[source.index.paths[i]] for i in sorted(missing)}
    arrays = dict(zip(names, found.values(), strict=True))
    arrays[FAILURES] = np.frombuffer(json.dumps(reasons).encode(), dtype=np.uint8)
    try:
        running.cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
    except OSError as error:
        raise DataError(
            f"the cache {running.cache} cannot be written: {error.strerror or error}. Use another folder."
        ) from error
    return found, rows
