"""Compare how fast vit_cls and timm turn the same JPEG files into pixels, on the CPU, in interleaved pairs.

Run: ``python scripts/benchmark.py loader --data FOLDER [--workers N] [--output FILE]``

In memory: one thread, bytes of the whole file to a uint8 tensor of the model's size. With ``--workers``, also
through the loaders, files to uint8 batches; timm's prefetcher, which goes on to normalise, is left out. A
ratio is timm's seconds over ours. Nothing is timed before the pixels of both sides are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision
from pairs import (
    SPREAD,
    Mismatch,
    Row,
    Settings,
    check_target,
    command,
    cpu_name,
    heading,
    in_turn,
    paired_stats,
)
from PIL import Image, features
from timm.data import ImageDataset as TimmDataset
from timm.data import create_loader, create_transform
from torch import Tensor

import vit_cls
from vit_cls.data.dataset import FolderSource, ImageDataset
from vit_cls.data.decode import FAST_JPEG, decode_image
from vit_cls.data.index import index_folder
from vit_cls.data.loader import make_loader
from vit_cls.data.sampler import EpochSampler, sample_seed
from vit_cls.data.transforms import Reader, eval_reader, train_reader
from vit_cls.errors import ConfigError, ImageError

SUITES = ("train", "eval", "eval_exact")
"""Random crop and flip; resize and centre crop; the same, but our resize is Pillow's: to the bit timm's."""
FLOAT = " to float"
"""Behind the name of a suite: timm's transform goes on to normalised floats, as `create_transform` does where
nothing else is asked for. Ours ends at uint8: the model normalises whole batches on their device."""
CROP_PCT, INTERPOLATION = 0.9, "bicubic"  # of both sides
MAX_DIFFERENCE = {"eval": 4, "eval_exact": 0}
"""Grey levels in which the pixels of an evaluation may differ from timm's."""
Pass = Callable[[], int]
"""One pass over the photos; returns how many came."""


def our_reader(suite: str, size: int) -> Reader:
    """Ours, from a file or decoded pixels to uint8 pixels; ``suite`` is a row of `SUITES`."""
    if suite.startswith("train"):
        return train_reader(size, augment="crop_flip", interpolation=INTERPOLATION)
    return eval_reader(size, crop_pct=CROP_PCT, interpolation=INTERPOLATION, exact=suite == "eval_exact")


def timm_options(suite: str) -> Row:
    """The settings of timm's transform that make it ours: random crop and flip alone, or resize and crop."""
    return {
        "is_training": suite.startswith("train"),
        "color_jitter": None,
        "crop_pct": CROP_PCT,
        "interpolation": INTERPOLATION,
        "use_prefetcher": not suite.endswith(FLOAT),  # the transform ends at uint8
    }


def timm_decode(data: bytes) -> Image.Image:
    """As timm's dataset reads a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def find_photos(folder: Path, count: int | None, seed: int) -> list[Path]:
    """JPEG files below a folder, in order of their paths.

    Args:
        folder: Searched with all its folders.
        count: How many of them, drawn at random; None takes all.
        seed: Of the draw.

    Raises:
        ConfigError: If there are fewer, or none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise ConfigError(f"--data {folder} has no .jpg files. Give a folder of photos.")
    if count is None:
        return found
    if count > len(found):
        raise ConfigError(f"--images must be at most {len(found)}, as many as --data has; got {count}.")
    return sorted(random.Random(seed).sample(found, count))


def agreement(suite: str, photos: Sequence[tuple[Path, bytes]], size: int) -> dict[str, int]:
    """The largest difference of decoded pixels and of results, in grey levels; `Mismatch` if it is too large.

    Random crops are compared in size and type only: both sides draw their own.
    """
    ours, theirs = our_reader(suite, size), create_transform(size, **timm_options(suite))
    worst = {"decoded": 0} if suite == "train" else {"decoded": 0, "pixels": 0}
    for path, data in photos:
        try:
            image, reference = decode_image(data), timm_decode(data)
        except (ImageError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Leave it out.") from error
        pixels = torchvision.transforms.functional.pil_to_tensor(reference)
        worst["decoded"] = max(worst["decoded"], _difference(path, image, pixels))
        if worst["decoded"]:
            raise Mismatch(f"{path} is decoded to other pixels than timm's. Nothing was timed.")
        results = ours(image), theirs(reference)
        difference = _difference(path, *results)
        if suite != "train":
            worst["pixels"] = max(worst["pixels"], difference)
            if difference > MAX_DIFFERENCE[suite]:
                raise Mismatch(
                    f"{path}: {suite} differs from timm's by {difference} levels. Nothing was timed."
                )
    return worst


def _difference(path: Path, a: Tensor, b: Tensor) -> int:
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        # timm leaves photos lying on their side
        raise Mismatch(
            f"{path} becomes {tuple(a.shape)} here and {tuple(b.shape)} in timm. Is it turned by EXIF?"
        )
    return int((a.int() - b.int()).abs().max())


def memory_passes(suite: str, photos: Sequence[bytes], settings: Settings) -> tuple[Pass, Pass]:
    """One pass of both sides over bytes in memory, each photo in turn, in this thread."""
    ours, theirs = our_reader(suite, settings.size), create_transform(settings.size, **timm_options(suite))
    passes = itertools.count()

    def our_pass() -> int:
        epoch = next(passes)
        for i, data in enumerate(photos):
            # the draws of training are keyed, as in the dataset
            ours(data, sample_seed(settings.seed, epoch, i) if suite.startswith("train") else None)
        return len(photos)

    def timm_pass() -> int:
        for data in photos:
            theirs(timm_decode(data))
        return len(photos)

    return our_pass, timm_pass


def loader_passes(suite: str, folder: Path, settings: Settings) -> tuple[Pass, Pass]:
    """One pass of both sides through their loaders, whose workers stay alive in between.

    Args:
        suite: A row of `SUITES`.
        folder: Holds the photos in class folders.
        settings: From `parse`.
    """
    train, source = suite == "train", FolderSource(index_folder(folder))
    dataset = ImageDataset(source, our_reader(suite, settings.size), seed=settings.seed if train else None)
    sampler = EpochSampler(len(dataset), seed=settings.seed, shuffle=train)
    sizes: Row = {"batch_size": settings.batch_size, "num_workers": settings.workers}
    ours = make_loader(dataset, sampler, **sizes)
    theirs = create_loader(
        TimmDataset(str(folder)),
        (3, settings.size, settings.size),
        device=torch.device("cpu"),
        **sizes,
        **timm_options(suite),
    ).loader  # inside the prefetcher
    epochs = itertools.count()

    def our_pass() -> int:
        sampler.set_epoch(next(epochs))
        return sum(len(batch.images) for batch in ours)

    def timm_pass() -> int:
        return sum(len(images) for images, _ in theirs)  # in training it drops the last, smaller batch

    return our_pass, timm_pass


def _seconds_per_image(one_pass: Pass) -> float:
    start = time.perf_counter()
    count = one_pass()
    return (time.perf_counter() - start) / count


def measure(passes: tuple[Pass, Pass], settings: Settings) -> Row:
    """Time both sides in turn."""
    ours, theirs = passes
    seconds = in_turn(lambda: _seconds_per_image(ours), lambda: _seconds_per_image(theirs), settings.pairs)
    row: Row = {"ratio": paired_stats(*seconds)}
    for side, taken in zip(("ours", "timm"), seconds, strict=True):
        median = statistics.median(taken)
        row[side] = {"images_per_second": 1 / median, "median_seconds_per_image": median}
        row[side]["seconds_per_image"] = taken
    return row


def read_photos(paths: Sequence[Path]) -> list[bytes]:
    """The files' bytes; ConfigError if one cannot be read."""
    try:
        return [path.read_bytes() for path in paths]
    except OSError as error:
        raise ConfigError(f"--data: {error.filename} cannot be read: {error.strerror}.") from error


def _rows(paths: Sequence[Path], contents: Sequence[bytes], settings: Settings) -> Iterator[Row]:
    photos = list(zip(paths, contents, strict=True))
    shared: dict[str, Row] = {
        suite: {"suite": suite, "agreement": agreement(suite, photos, settings.size)} for suite in SUITES
    }
    for suite in (*SUITES, f"train{FLOAT}", f"eval{FLOAT}"):
        passes = memory_passes(suite, contents, settings)
        row = {**shared[suite.removesuffix(FLOAT)], "suite": suite, "from": "memory"}
        yield {**row, **measure(passes, settings)}
    if settings.workers is None:
        return
    source = f"{settings.workers} worker{'' if settings.workers == 1 else 's'}"
    with tempfile.TemporaryDirectory() as folder:
        for i, path in enumerate(paths):  # the photos that were drawn, and no others, for both sides
            link = Path(folder, f"class{i % 2}", f"{i:06d}.jpg")
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        for suite in SUITES:
            passes = loader_passes(suite, Path(folder), settings)
            yield {**shared[suite], "from": source, **measure(passes, settings)}


def run(settings: Settings) -> Row:
    """Measure everything that was asked for, into plain data that JSON can hold; may raise `Mismatch`."""
    paths = find_photos(settings.data, settings.images, settings.seed)
    contents = read_photos(paths)
    random.seed(settings.seed)  # timm's draws
    torch.manual_seed(settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for row in _rows(paths, contents, settings):
            rows.append(row)
            name = f"{row['suite']}, {row['from']}"
            print(f"{name}: {row['ratio']['median']:.3f}", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
    modules = {"pillow": PIL, "torch": torch, "torchvision": torchvision}
    versions: dict[str, Any] = {name: module.__version__ for name, module in modules.items()}
    versions |= {
        "simplejpeg": FAST_JPEG or "absent",
        "libjpeg_turbo of pillow": features.version("libjpeg_turbo"),
    }
    versions |= {"timm": timm.__version__, "vit_cls": vit_cls.__version__}
    shown = {key: value for key, value in vars(settings).items() if key not in ("data", "output")}
    return {
        **heading(versions, cpu_name()),
        "threads": 1,
        "settings": {**shown, "crop_pct": CROP_PCT, "interpolation": INTERPOLATION},
        "photos": {
            "folder": "/".join(settings.data.resolve().parts[-2:]),
            "count": len(paths),
            "mean_bytes": statistics.mean(map(len, contents)),
            "digest": hashlib.blake2b(b"".join(contents), digest_size=16).hexdigest(),
        },
        "rows": rows,
    }


def table(report: Row) -> str:
    """The report as text: two lines a row, ours and timm's."""
    settings, photos = report["settings"], report["photos"]
    asked = [f"{settings['size']} px", f"{CROP_PCT} crop_pct", INTERPOLATION, f"seed {settings['seed']}"]
    asked += [f"{name} {version}" for name, version in report["versions"].items()]
    lines = [
        f"{report['date']}: {report['device_name']}, 1 thread, {', '.join(asked)}",
        f"{photos['count']} photos of {photos['mean_bytes']:.0f} bytes on average",
        f"{'suite':<16}{'from':<12}side  images/s  timm/ours: median (quartiles; range; ours faster)",
    ]
    for row in report["rows"]:
        differ = ", ".join(f"{what} {levels}" for what, levels in row["agreement"].items())
        notes = {
            "ours": SPREAD.format(**row["ratio"]),
            "timm": f"largest difference in grey levels: {differ}",
        }
        for side, note in notes.items():
            name = f"{row['suite']:<16}{row['from']:<12}" if side == "ours" else " " * 28
            lines.append(f"{name}{side}{row[side]['images_per_second']:>10.1f}  {note}")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> Settings:
    """Read and check the command line.

    Args:
        argv: Arguments after ``loader``.

    Raises:
        ConfigError: If a value is impossible here.
    """
    parser = argparse.ArgumentParser(
        prog="benchmark.py loader", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="photos: .jpg files, in folders or not")
    add("--images", type=int, metavar="N", help="how many of them, drawn at random (default: all)")
    add("--pairs", type=int, default=9, metavar="N", help="pairs of measurements (default: 9)")
    add("--size", type=int, default=224, help="side of the result in pixels (default: 224)")
    add("--workers", type=int, metavar="N", help="also through the loaders, with N processes each")
    add("--batch_size", type=int, default=32, help="of the loaders (default: 32)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="FILE", help="also write the report, and every measurement, here")
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        raise ConfigError(f"--data {args.data} is not a folder.")
    for option, least in (("images", 2), ("pairs", 2), ("size", 1), ("workers", 0), ("batch_size", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ConfigError(f"--{option} must be at least {least}; got {value}.")
    check_target("output", args.output)
    return args


def main(argv: Sequence[str]) -> int:
    """Run the command line and return its exit status; ``argv`` is as for `parse`."""
    return command(lambda: parse(argv), run, table, option="output")
