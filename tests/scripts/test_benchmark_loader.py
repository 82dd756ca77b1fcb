"""The loader benchmark reads the same photos on both sides, compares the pixels, and only then the times."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit_cls.data import transforms

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*unclosed file:pytest.PytestUnraisableExceptionWarning"),  # timm's
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(scope="module")
def loader(benchmark):
    return benchmark.benchmark_loader


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six smooth JPEGs of different sizes, some in a folder of their own."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for i in range(6):
        y, x = np.mgrid[: 40 + 5 * i, : 70 - 6 * i]
        pixels = np.stack([50 + y, 60 + x, 250 - x - y], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(root / ("more" if i % 2 else ".") / f"{i}.jpg", quality=90)
    (root / "notes.txt").write_text("no photo")
    return root


def _arguments(photos: Path, *more: str) -> list[str]:
    return ["loader", "--data", str(photos), "--pairs", "2", "--size", "32", *more]


def test_report_has_a_row_for_each_suite_from_memory_and_through_the_loaders(
    benchmark, photos, tmp_path, capsys
):
    target = tmp_path / "report.json"
    arguments = _arguments(photos, "--workers", "0", "--batch_size", "4", "--output", str(target))
    threads = torch.get_num_threads()
    assert benchmark.main(arguments) == 0
    assert torch.get_num_threads() == threads
    report = json.loads(target.read_text())
    keys = "date device_name photos rows schema_version settings threads versions"
    assert " ".join(sorted(report)) == keys
    assert {"python", "pillow", "simplejpeg", "torch", "torchvision", "timm", "vit_cls"} < set(
        report["versions"]
    )
    assert report["photos"]["count"] == 6
    assert str(photos) not in target.read_text()  # where they lie on this disk is nobody's business
    suites = ("train", "eval", "eval_exact")
    in_memory = [*suites, "train to float", "eval to float"]
    expected = [(suite, "memory") for suite in in_memory] + [(suite, "0 workers") for suite in suites]
    assert [(row["suite"], row["from"]) for row in report["rows"]] == expected
    shown = capsys.readouterr().out
    for row in report["rows"]:
        assert row["agreement"]["decoded"] == 0
        assert row["agreement"].get("pixels", 0) <= (2 if row["suite"].startswith("eval") else 0)
        assert row["ratio"]["pairs"] == 2
        assert f"{row['ratio']['median']:.3f}" in shown
        for side in ("ours", "timm"):
            seconds = row[side]["seconds_per_image"]
            assert len(seconds) == 2
            assert all(math.isfinite(number) and number > 0 for number in seconds)
            assert row[side]["images_per_second"] == pytest.approx(1 / row[side]["median_seconds_per_image"])


def test_workers_are_optional_and_photos_are_drawn_by_the_seed(benchmark, loader, photos, tmp_path):
    target = tmp_path / "report.json"
    assert benchmark.main(_arguments(photos, "--images", "3", "--output", str(target))) == 0
    report = json.loads(target.read_text())
    assert {row["from"] for row in report["rows"]} == {"memory"}
    assert report["photos"]["count"] == report["settings"]["images"] == 3
    draws = [loader.find_photos(photos, 3, seed) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) > 1
    assert len(loader.find_photos(photos, None, 0)) == 6


@pytest.mark.parametrize("suite", ["train", "eval", "eval_exact"])
def test_both_sides_go_over_every_photo_once_a_pass(loader, photos, suite, monkeypatch):
    settings = loader.parse(_arguments(photos)[1:])
    contents = [path.read_bytes() for path in loader.find_photos(photos, None, 0)]
    seen = {"ours": [], "timm": []}
    for side, module, name in (("ours", transforms, "decode_image"), ("timm", loader, "timm_decode")):
        original = getattr(module, name)

        def spy(data, *background, side=side, original=original):
            seen[side].append(data)
            return original(data, *background)

        monkeypatch.setattr(module, name, spy)
    assert [one_pass() for one_pass in loader.memory_passes(suite, contents, settings)] == [6, 6]
    assert seen == {"ours": contents, "timm": contents}


def test_training_passes_draw_other_crops_each_time(loader, photos, monkeypatch):
    settings = loader.parse(_arguments(photos)[1:])
    contents = [path.read_bytes() for path in loader.find_photos(photos, None, 0)]
    keys = []
    monkeypatch.setattr(transforms, "keyed", lambda transform, image, key: keys.append(key))
    one_pass, _ = loader.memory_passes("train", contents, settings)
    one_pass()
    one_pass()
    assert len(set(keys)) == 12


def test_pixels_that_differ_are_refused_before_anything_is_timed(
    benchmark, loader, photos, monkeypatch, capsys
):
    monkeypatch.setattr(loader, "measure", lambda *args: pytest.fail("it was timed"))
    our_reader = loader.our_reader
    monkeypatch.setattr(loader, "our_reader", lambda *args: lambda image: our_reader(*args)(image) ^ 8)
    assert benchmark.main(_arguments(photos)) == 1
    assert "eval differs from timm's by" in capsys.readouterr().err


def test_decoder_that_differs_in_one_level_is_refused(benchmark, loader, photos, monkeypatch, capsys):
    decode = loader.decode_image
    monkeypatch.setattr(loader, "decode_image", lambda data: decode(data) ^ 1)
    assert benchmark.main(_arguments(photos)) == 1
    assert "is decoded to other pixels than timm's" in capsys.readouterr().err


def test_photo_that_timm_would_leave_on_its_side_is_refused(benchmark, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert benchmark.main(_arguments(tmp_path)) == 1
    assert "Is it turned by EXIF?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "1"], "--pairs must be at least 2; got 1."),
        (["--images", "7"], "--images must be at most 6, as many as --data has; got 7."),
        (["--workers", "-1"], "--workers must be at least 0; got -1."),
        (["--data", "/nowhere"], "--data /nowhere is not a folder."),
        (["--output", "/"], "--output / cannot be written: / is a folder."),
        (["--output", "/nowhere/report.json"], "--output cannot be written: No such file or directory."),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(photos, arguments, message, refuses):
    refuses([*_arguments(photos), *arguments], message)


def test_folder_without_photos_and_damaged_photos_are_bad_input(benchmark, tmp_path, capsys):
    assert benchmark.main(_arguments(tmp_path)) == 2
    assert "has no .jpg files" in capsys.readouterr().err
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert benchmark.main(_arguments(tmp_path)) == 2
    assert "1.jpg cannot be read: it is not an image of a known format" in capsys.readouterr().err


def test_loader_is_a_word_of_the_benchmarks_own_command_line(benchmark, capsys):
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["loader", "--help"])
    assert "benchmark.py loader" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["loader"])
    assert "--data" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["--help"])
    assert "loader --help" in capsys.readouterr().out
