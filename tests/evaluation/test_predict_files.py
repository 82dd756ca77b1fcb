"""Any number of paths in, one row each out: evaluate's pixels, constant memory, nothing lost on the way."""

from __future__ import annotations

import csv
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.models import tiny_classifier
from vit_cls.data.dataset import FolderSource, ImageDataset
from vit_cls.data.transforms import model_reader
from vit_cls.errors import ConfigError, DataError, ModelFileError
from vit_cls.evaluation import predict_files as files
from vit_cls.evaluation.predict import iter_paths
from vit_cls.evaluation.predict_files import RowFile, save_rows
from vit_cls.evaluation.predictions import Row, images_for_model, predict_batches, predict_index
from vit_cls.evaluation.row_formats import FORMATS, as_record, columns_of
from vit_cls.inference import InferenceConfig, batches
from vit_cls.model.classifier import Preprocess
from vit_cls.signals import Stopped

THREE = ("blue", "green", "red")
ON_CPU = {"device": "cpu", "num_workers": 0}


def _paths(image_root) -> list[str]:
    return list(iter_paths([str(image_root / "train")], io.BytesIO()))


def _rows(*given, **options) -> Iterator[Row]:
    return itertools.chain.from_iterable(predict_batches(*given, **options))


@pytest.fixture
def photos(image_root, tmp_path):
    """val/ with a transparent and a damaged image."""
    shutil.copytree(image_root / "val", tmp_path / "val")
    Image.new("RGBA", (30, 20), (255, 0, 0, 90)).save(tmp_path / "val/red/clear.png")
    (tmp_path / "val/blue/1.png").write_bytes(b"")
    return tmp_path / "val"


@pytest.mark.parametrize("exact", [False, True])
def test_pixels_and_probabilities_are_those_of_evaluate(exact, photos):
    classifier = tiny_classifier(THREE)
    classifier.temperature = 1.7
    source = images_for_model(photos, classifier).source
    index = source.index
    paths = [str(index.path(i)) for i in range(len(index))]
    config = InferenceConfig(**ON_CPU, batch_size=4, exact=exact)
    expected = predict_index(classifier, source, config)
    rows = list(_rows(classifier, paths, top_k=3, config=config))
    assert [row.path for row in rows] == paths
    assert (
        {i: row.error for i, row in enumerate(rows) if row.error}
        == expected.errors
        == {1: "the file is empty"}
    )
    for i in expected.scored:
        assert [name for name, _ in rows[i].best] == [
            classifier.class_names[k] for k in np.argsort(-expected.probs[i])
        ]
        np.testing.assert_allclose([p for _, p in rows[i].best], -np.sort(-expected.probs[i]), atol=1e-7)

    pixels = []
    for outputs in batches(
        classifier, paths, lambda images: pixels.append(images) or images[:, 0, 0, :1], config
    ):
        assert len(outputs.places) == len(outputs.values)
    reader = model_reader(classifier.preprocess, exact=exact)
    dataset = ImageDataset(FolderSource(index), reader)
    evaluated = torch.stack([dataset[0, int(i)].image for i in expected.scored])
    assert torch.equal(torch.cat(pixels), evaluated)


def test_the_order_of_rows_is_that_of_paths_for_any_number_of_workers(image_root):
    paths = _paths(image_root) * 2 + ["nowhere.jpg"]
    random.Random(0).shuffle(paths)
    classifier, reference = tiny_classifier(THREE), None
    for batch_size, num_workers in ((49, 0), (5, 0), (4, 2), (50, 1), (7, None)):
        config = InferenceConfig("cpu", batch_size=batch_size, num_workers=num_workers)
        rows = list(_rows(classifier, paths, config=config))
        assert [row.path for row in rows] == paths
        assert [row.path for row in rows if row.error] == ["nowhere.jpg"]
        probs = [row.best[0][1] for row in rows if row.best]
        reference = probs if reference is None else reference
        np.testing.assert_allclose(probs, reference, atol=1e-6)


@pytest.mark.parametrize(("num_workers", "ahead"), [(0, 1), (2, 5)])
def test_an_endless_source_is_read_only_a_few_batches_ahead(num_workers, ahead, image_root):
    taken, paths = itertools.count(), itertools.cycle(_paths(image_root))
    last = 0

    def source():
        nonlocal last
        for path in paths:
            last = next(taken)
            yield path

    rows = _rows(
        tiny_classifier(THREE), source(), config=InferenceConfig("cpu", batch_size=8, num_workers=num_workers)
    )
    for done, _ in enumerate(itertools.islice(rows, 400)):
        assert last - done <= 8 * (ahead + 1)


def test_memory_does_not_grow_with_the_number_of_paths(tmp_path, monkeypatch):
    """30,000 rows through the whole chain, from stdin to a file; a list of them would be many megabytes."""
    total = 30_000
    monkeypatch.setattr(files, "CHUNK_ROWS", 1000)
    classifier = tiny_classifier(THREE, preprocess=Preprocess((16, 16), crop_pct=1.0))
    black = torch.zeros(3, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr("vit_cls.data.dataset.read_file", lambda path: black)
    name = f"{tmp_path}/./x.ppm"
    peaks = {}

    class Stdin(io.RawIOBase):
        left = total

        def readable(self):
            return True

        def readinto(self, buffer):
            lines = min(self.left, 200)
            data = (name + "\n").encode() * lines
            self.left -= lines
            buffer[: len(data)] = data
            return len(data)

    def work(paths):
        config = InferenceConfig(**ON_CPU, batch_size=100)
        for number, outputs in enumerate(batches(classifier, paths, lambda x: x[:, 0, 0, :1], config)):
            if number in (20, total // 100 - 1):
                peaks[number] = tracemalloc.get_traced_memory()[1]
                tracemalloc.reset_peak()
            yield [as_record(Row(path, (("red", 0.5),)), 1) for path in outputs.items], None

    table = RowFile(tmp_path / "out", "predictions", "csv", columns_of(1))
    tracemalloc.start()
    try:
        paths = iter_paths(["-"], io.BufferedReader(Stdin(), 16384))
        saved = save_rows(table, paths, work, facts={})
    finally:
        tracemalloc.stop()
    early, late = peaks.values()
    assert saved.images == total
    assert (tmp_path / "out/predictions.csv").read_bytes().count(b"\n") == total + 1
    assert late < early + 300_000


def _predict_into(
    folder, classifier, paths, *, fmt="csv", resume=False, stop_after=None, facts=None, top_k=2
):
    """What predict --output does; a stop is a signal that comes after some batches."""

    def work(some):
        rows = _rows(classifier, some, top_k=top_k, config=InferenceConfig(**ON_CPU, batch_size=4))
        for number in itertools.count():
            if number == stop_after:
                os.kill(os.getpid(), 15)
            part = list(itertools.islice(rows, 4))
            if not part:
                return
            yield [as_record(row, top_k) for row in part], None

    table = RowFile(folder, "predictions", fmt, columns_of(top_k))
    facts = {"--model": 1, "--top_k": top_k} | (facts or {})
    return save_rows(table, iter(paths), work, facts=facts, resume=resume)


def _odd_paths(image_root, tmp_path) -> list[str]:
    """With names that CSV must quote, one that is not UTF-8, and failures in between."""
    paths = _paths(image_root)[:18]
    for number, name in enumerate(
        ['a,"b".png', "line\nend.png", "return\rx.png", os.fsdecode(b"\xff\xfe.png")]
    ):
        shutil.copy(paths[0], tmp_path / name)
        paths.insert(4 * number + 1, str(tmp_path / name))
    return [*paths[:9], "gone\n.png", *paths[9:]]


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
@pytest.mark.parametrize("chunk_rows", [4, 8, 1000])
def test_interrupted_and_resumed_is_uninterrupted_byte_for_byte(
    fmt, chunk_rows, image_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "CHUNK_ROWS", chunk_rows)
    classifier, paths = tiny_classifier(THREE), _odd_paths(image_root, tmp_path)
    whole = _predict_into(tmp_path / "whole", classifier, paths, fmt=fmt)
    folder = tmp_path / "parts"
    for resume in (False, True):
        with pytest.raises(Stopped, match=r"stopped by SIGTERM; \d+ rows are kept .*--resume") as stopped:
            _predict_into(folder, classifier, paths, fmt=fmt, stop_after=2, resume=resume)
        assert stopped.value.signum == 15
        assert not (folder / f"predictions.{fmt}").exists()
    (folder / f".predictions.{fmt}.part/.000004.torn").touch()  # what kill -9 leaves of a chunk
    saved = _predict_into(folder, classifier, paths, fmt=fmt, resume=True)
    assert (saved.images, saved.failed) == (whole.images, whole.failed) == (23, 1)
    assert saved.resumed == 16
    assert os.listdir(folder) == [f"predictions.{fmt}"]
    text = (folder / f"predictions.{fmt}").read_bytes()
    assert text == (tmp_path / f"whole/predictions.{fmt}").read_bytes()
    decoded = text.decode("utf-8", "surrogateescape")
    rows = (
        list(csv.DictReader(io.StringIO(decoded, newline="")))
        if fmt == "csv"
        else [json.loads(line) for line in decoded.splitlines()]
    )
    assert [row["path"] for row in rows] == paths


def test_a_signal_while_an_image_is_decoded_makes_no_row_of_it(image_root, tmp_path, monkeypatch):
    classifier, paths = tiny_classifier(THREE), _paths(image_root)
    done = itertools.count()
    original = Image.open

    def open_and_be_stopped(*args, **kwargs):
        if next(done) == 6:
            os.kill(os.getpid(), 2)
        return original(*args, **kwargs)

    monkeypatch.setattr(Image, "open", open_and_be_stopped)
    with pytest.raises(Stopped, match="stopped by SIGINT; 4 rows are kept"):
        _predict_into(tmp_path, classifier, paths)
    assert _predict_into(tmp_path, classifier, paths, resume=True).failed == 0


def test_resume_without_a_part_begins_at_the_first_path(image_root, tmp_path):
    saved = _predict_into(tmp_path / "new", tiny_classifier(THREE), _paths(image_root), resume=True)
    assert (saved.images, saved.resumed) == (24, 0)


def test_a_part_is_not_continued_with_what_does_not_fit(image_root, tmp_path):
    classifier, paths = tiny_classifier(THREE), _paths(image_root)
    with pytest.raises(Stopped):
        _predict_into(tmp_path, classifier, paths, stop_after=3)
    part = tmp_path / ".predictions.csv.part"
    before = {path.name: path.read_bytes() for path in part.iterdir()}
    cases = [
        (
            {"paths": [*paths[:5], "other.png", *paths[6:]]},
            r"rows 5 to 12 of .* are of other paths than those given now",
        ),
        ({"paths": paths[:5]}, r"rows 5 to 12 of .* are of other paths"),
        ({"paths": paths, "facts": {"--model": 2}}, r"was made with another --model"),
        ({"paths": paths, "top_k": 3}, r"was made with another --top_k"),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            _predict_into(tmp_path, classifier, resume=True, **changes)
        assert {path.name: path.read_bytes() for path in part.iterdir()} == before
    with pytest.raises(ConfigError, match=r"holds the rows of an interrupted run. Continue it with --resume"):
        _predict_into(tmp_path, classifier, paths)
    assert {path.name: path.read_bytes() for path in part.iterdir()} == before


def test_a_flipped_bit_in_a_part_is_told_and_its_rows_are_made_again(
    image_root, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(files, "CHUNK_ROWS", 4)
    classifier, paths, draws = tiny_classifier(THREE), _paths(image_root), random.Random(0)
    _predict_into(tmp_path / "whole", classifier, paths)
    with pytest.raises(Stopped):
        _predict_into(tmp_path / "parts", classifier, paths, stop_after=4)
    for number in range(8):
        folder = tmp_path / f"parts_{number}"
        shutil.copytree(tmp_path / "parts", folder)
        chunk = draws.choice(sorted(folder.glob(".predictions.csv.part/0*")))
        content = bytearray(chunk.read_bytes())
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        chunk.write_bytes(content)
        caplog.clear()
        saved = _predict_into(folder, classifier, paths, resume=True)
        assert saved.resumed == 4 * int(chunk.name)
        assert f"{chunk.name} is damaged" in caplog.text
        whole = (tmp_path / "whole/predictions.csv").read_bytes()
        assert (folder / "predictions.csv").read_bytes() == whole


def test_a_full_disk_keeps_the_rows_and_says_so(image_root, tmp_path, monkeypatch):
    classifier, paths, fsync = tiny_classifier(THREE), _paths(image_root), os.fsync
    monkeypatch.setattr(files, "CHUNK_ROWS", 4)
    chunks = itertools.count()

    def fsync_until_full(descriptor):
        if next(chunks) > 5:  # the facts, and two chunks, each a file and its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    with pytest.raises(ConfigError, match=r"No space left on device; 8 rows are kept .*--resume"):
        _predict_into(tmp_path, classifier, paths)
    monkeypatch.undo()
    assert _predict_into(tmp_path, classifier, paths, resume=True).resumed == 8


def test_a_model_that_diverged_is_refused_and_leaves_nothing(image_root, tmp_path):
    classifier = tiny_classifier(THREE)
    torch.nn.init.constant_(classifier.model.head.bias, float("nan"))
    with pytest.raises(ModelFileError, match=r"not finite for .*blue/0.png"):
        _predict_into(tmp_path / "a/b", classifier, _paths(image_root))
    assert os.listdir(tmp_path) == []


def test_parquet_holds_what_jsonl_holds(image_root, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    classifier, paths = tiny_classifier(THREE), [*_paths(image_root), "gone.png"]
    with pytest.raises(Stopped):
        _predict_into(tmp_path / "p", classifier, paths, fmt="parquet", stop_after=2)
    _predict_into(tmp_path / "p", classifier, paths, fmt="parquet", resume=True)
    _predict_into(tmp_path / "j", classifier, paths, fmt="jsonl")
    assert os.listdir(tmp_path / "p") == ["predictions.parquet"]
    lines = (tmp_path / "j/predictions.jsonl").read_text().splitlines()
    assert parquet.read_table(tmp_path / "p/predictions.parquet").to_pylist() == [
        json.loads(x) for x in lines
    ]


def test_settings_are_checked(image_root):
    with pytest.raises(ConfigError, match="--top_k must be from 1 to the model's 3 classes; got 4"):
        predict_batches(tiny_classifier(THREE), _paths(image_root), top_k=4)
    with pytest.raises(ModelFileError, match=r"no head.*linear_probe"):
        predict_batches(tiny_classifier(()), _paths(image_root))


def test_every_format_reads_back_what_it_wrote():
    rows = [
        Row('a,"\r\n.jpg', (("x, y", 0.75), ('"z"', 0.25))),
        Row("b", (), "it is, not\nan image"),
        Row("c", (("x", 0.5), ("y", 0.25)), None, "y"),
    ]
    assert len(FORMATS) == 3
    for row_format in FORMATS.values():
        for row in rows:
            record, line = as_record(row, 2), row_format.line(as_record(row, 2))
            if row_format.ending == "csv":
                texts = [
                    "" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in record.values()
                ]
                assert list(csv.reader(io.StringIO(line, newline=""))) == [list(map(str, texts))]
            else:
                assert json.loads(line) == record


def test_rows_of_an_earlier_version_are_refused_and_stay(image_root, tmp_path):
    (tmp_path / "predictions.csv.part").write_text("path,label\n")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"csv.part holds the rows of a run that an earlier version"):
            _predict_into(tmp_path, tiny_classifier(THREE), _paths(image_root), resume=resume)
    assert (tmp_path / "predictions.csv.part").read_text() == "path,label\n"


def _save_slowly(folder):
    def work(paths):
        for path in paths:
            time.sleep(0.0005)
            yield [{"path": path, "error": None}], None

    table = RowFile(folder, "x", "jsonl", ("path", "error"))
    save_rows(table, iter(f"{i}.png" for i in range(2000)), work, facts={}, resume=True)


def test_a_run_that_is_killed_at_any_moment_ends_with_the_bytes_of_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 50)
    random.seed(0)
    for killed in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which this child does not use
            process = multiprocessing.get_context("fork").Process(target=_save_slowly, args=(tmp_path,))
            process.start()
        while not (tmp_path / f".x.jsonl.part/{10 * killed:06d}").exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(random.random() / 10)
        process.kill()
        process.join()
    assert not (tmp_path / "x.jsonl").exists()
    _save_slowly(tmp_path)
    expected = "".join(json.dumps({"path": f"{i}.png", "error": None}) + "\n" for i in range(2000))
    assert (tmp_path / "x.jsonl").read_text() == expected
    assert os.listdir(tmp_path) == ["x.jsonl"]
