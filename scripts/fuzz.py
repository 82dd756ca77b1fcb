"""Spoil configurations, model files, checkpoints, tables and images at random: an answer or one refusal.

Run:    .venv/bin/python scripts/fuzz.py [--rounds 3000] [--seed 0] [--only images] [--output FILE.json]
        .venv/bin/python scripts/fuzz.py --only images --seed 17 --rounds 1 --keep spoiled   (one case again)
Expect: some hundred cases a second and kind, ten for configurations; a table of cases, answers, refusals and
        faults by kind, and exit 1 if there was a fault. Needs Linux.

A fault is an exception that is not ours, a file that is read otherwise than it was written, a case that
takes more than 20 seconds or 6 GB, or the end of the process. Each case follows from its kind and number
alone. Cases run in a process of their own, which is started again behind one that ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vit_cls.cli import main as vit_cls_main
from vit_cls.data.decode import decode_image
from vit_cls.data.manifest import inspect_manifest, read_manifest
from vit_cls.environment import environment
from vit_cls.errors import ImageError, VitClsError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.training.runs import RunFolder
from vit_cls.weights.bundle import METADATA_KEY, load_classifier, save_classifier
from vit_cls.weights.digest import DIGEST_KEY, seal, tensor_digests

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CASE_SECONDS, CASE_BYTES = 20, 6_000_000_000
ANSWER, REFUSAL, FAULT = "answers", "refusals", "faults"
NUMBERS = (0, 1, -1, 7, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320, float("inf"), float("nan"))
# fmt: off
TEXTS = (
    "", " ", "\0", "\n", "a" * 3000, "é", "\ud800", "\x1b[2J", "../../etc/passwd", "/dev/zero", "0", "null",
    "🙂", "True", "1e3", "nan", "-", ":", "=1+1", "cls", "gap", "{}", "[1", "http://127.0.0.1:9/x",
)
WORDS = (
    "null", "~", "true", "[]", "{}", "[[]]", "-1", "0", "1e400", ".nan", "-.inf", "9" * 400, "0x1F", "1_0",
    "1e-3", "2026-11-30", "''", '"', "'", "&a", "*a", "<<: *a", "!!python/name:os.system", "!!binary aa", "|",
    ">", "%", "@", "`", "? a", "- - -", "[" * 300, "class_path: torch.nn.Linear", "init_args:", "\t", "\0",
    "\ufeff", "é", "auto", "cls", "gap:3", "all", "cuda:99", "16-mixed", "1:2", "digits",
)
CELLS = (
    "", '"', '""', "\r", "\n", "\0", ";", "\t", ",", "'", "=1", "nan", "-1", "1e999", "train", "TEST",
    "x" * 9999, "../a.png", "/dev/zero", "é", "path", "label", "split", "weight", "group", "\udcff", "\ufeff",
)
# fmt: on


class Done(Exception):
    """A run would begin here."""


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    """A bit flipped, or some of: bytes set, pieces cut, doubled, moved, zeroed, noise put in, the end off."""
    content = bytearray(data)
    if draw.random() < 0.3:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        return bytes(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = (
            draw.randrange(len(content) + 1)
            if draw.random() < 0.5
            else draw.randrange(min(len(content), 256) + 1)
        )
        size = draw.choice((1, 2, 4, 8, 64, 1000))
        piece = bytes(content[at : at + size])
        match draw.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(content):
                content[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del content[at : at + size]
            case 3:
                content[at:at] = piece
            case 4:
                to = draw.randrange(len(content) + 1)
                content[to : to + size] = piece
            case 5:
                content[at : at + size] = bytes(len(piece))
            case 6:
                content[at:at] = draw.randbytes(size)
            case 7 if draw.random() < 0.3:
                del content[at:]
    return bytes(content)


def spoil_lines(text: str, draw: random.Random, words: Sequence[str]) -> str:
    """Some of: a line left out, doubled, moved, indented; a word replaced or put in."""
    lines = text.splitlines(keepends=True) or [""]
    for _ in range(draw.choice((1, 1, 2, 4, 10))):
        at = draw.randrange(len(lines))
        parts = lines[at].rstrip("\n").replace(",", " , ").split(" ")
        match draw.randrange(7):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(at, draw.choice(lines))
            case 2:
                lines.insert(draw.randrange(len(lines)), lines.pop(at))
            case 3:
                lines[at] = draw.choice((" ", "  ", "\t", "- ")) + lines[at]
            case 4 | 5:
                parts[draw.randrange(len(parts))] = draw.choice(words)
                lines[at] = " ".join(parts).replace(" , ", ",") + "\n"
            case 6:
                lines[at] = lines[at].rstrip("\n") + draw.choice(words) + "\n"
    return "".join(lines)


def spoil_value(value: Any, draw: random.Random) -> Any:
    """Plain data of which one place, at any depth, is another value, is gone, or has another name."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        match draw.randrange(8):
            case 0:
                return rest
            case 1:
                return {**rest, draw.choice(TEXTS): value[key]}
            case 2:
                return {**value, draw.choice((*TEXTS, *value)): odd_value(draw)}
            case _:
                return {**value, key: spoil_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        at = draw.randrange(len(value))
        return [*value[:at], spoil_value(value[at], draw), *value[at + 1 :]]
    return near(value, draw) if draw.random() < 0.5 else odd_value(draw)


def near(value: Any, draw: random.Random) -> Any:
    """Another value of the same kind, where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, value * 2, -value, value * 1000, 0))
    if isinstance(value, float):
        return draw.choice((value * 2, value / 3, -value, value * 1e6, 0.0, 1.0))
    if isinstance(value, str) and value:
        return draw.choice((value.upper(), value[:-1], value + value, value[::-1], *TEXTS))
    return odd_value(draw)


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """A value of any kind that JSON has."""
    match draw.randrange(8 if depth < 3 else 5):
        case 0:
            return draw.choice(NUMBERS)
        case 1:
            return draw.choice(TEXTS)
        case 2:
            return draw.choice((None, True, False))
        case 3:
            return draw.randrange(-3, 300)
        case 4:
            return draw.choice(([], {}, [[]], [0] * 5000))
        case 5:
            return [odd_value(draw, depth + 1) for _ in range(draw.randrange(5))]
        case _:
            return {draw.choice(TEXTS): odd_value(draw, depth + 1) for _ in range(draw.randrange(4))}


@dataclass(frozen=True)
class Kind:
    """What is spoiled, and what must come of it."""

    spoil: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    """Raises what reading raises; AssertionError if the answer is wrong."""


def classifier() -> ImageClassifier:
    """Tiny; always the same."""
    torch.manual_seed(0)
    config = ViTConfig(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3, pool="cls+gap"
    )
    return ImageClassifier(VisionTransformer(config), Preprocess((8, 8)), ["a", "b", "c"])


def images() -> Kind:
    """Photos of every format, decoded to pixels, the same ones twice."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    whole = []
    for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):  # not every format has every mode
                picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
                picture = picture or Image.fromarray(pixels).convert(mode)
                exif = Image.Exif()
                exif[0x0112] = 6
                more = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
                picture.save(file, form, **more, **({"progressive": True} if mode == "L" else {}))
                whole.append(file.getvalue())

    def decoded(data: bytes) -> torch.Tensor | ImageError:
        try:
            return decode_image(data)
        except ImageError as error:
            return error

    def read(data: bytes) -> object:
        image, again = decoded(data), decoded(data)
        assert type(image) is type(again), "decoded twice, it is an image once"
        if isinstance(image, ImageError):
            raise image
        assert image.dtype == torch.uint8
        assert image.ndim == len(image) == 3
        assert torch.equal(image, again), "decoded twice, it has two answers"  # type: ignore[arg-type]
        return image

    return Kind(lambda draw: spoil_bytes(draw.choice(whole), draw), read)


def tables(place: Path) -> Kind:
    """Tables of labels, of text."""
    file = place / "rows.csv"
    head = "path{0}label{0}split{0}group{0}weight\n"
    row = "{1}.png{0}{2}{0}{3}{0}{1}{0}1.5\n"
    cells = [(label, part) for part in ("train", "val", "test") for label in ("cat", "dog")]
    for i in range(len(cells)):
        Image.new("RGB", (4, 4)).save(place / f"{i}.png")
    whole = [
        head.format(by) + "".join(row.format(by, i, *both) for i, both in enumerate(cells)) for by in ",;\t"
    ]

    def spoil(draw: random.Random) -> bytes:
        data = draw.choice(whole)
        if draw.random() < 0.7:
            data = spoil_lines(data, draw, CELLS)
        encoding = draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
        content = data.encode(encoding, errors="replace")
        return spoil_bytes(content, draw) if draw.random() < 0.5 else content

    def read(data: bytes) -> object:
        file.write_bytes(data)
        with contextlib.suppress(VitClsError):
            inspect_manifest(file)
        manifest = read_manifest(file)
        return [manifest.index(part).labels for part in manifest.parts]

    return Kind(spoil, read)


def model_files(place: Path) -> Kind:
    """Model files with flipped, lost and foreign bytes: read as they were, or refused."""
    source = classifier()
    data = with_sorted_header(save_classifier(source, place / "whole.safetensors").read_bytes())
    torch.save(checkpoint_of(source), place / "whole.ckpt")
    whole = {".safetensors": data, ".ckpt": (place / "whole.ckpt").read_bytes()}
    state = source.model.state_dict()

    def spoil(draw: random.Random) -> tuple[str, bytes]:
        ending = draw.choice(list(whole))
        return ending, spoil_bytes(whole[ending], draw)

    def read(spoiled: tuple[str, bytes]) -> object:
        ending, content = spoiled
        file = place / f"model{ending}"
        file.write_bytes(content)
        found = load_classifier(file)
        assert found.class_names == source.class_names
        for name, tensor in found.model.state_dict().items():
            assert torch.equal(tensor, state[name]), f"{name} is read otherwise than it was written"
        return found

    return Kind(spoil, read)


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file that is the same each time: the order of its metadata is drawn as it is written."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return data[:8] + text.encode().ljust(end - 8) + data[end:]


def checkpoint_of(source: ImageClassifier) -> dict[str, Any]:
    """As `fit` writes one, of what is read of it."""
    weights = {f"classifier.model.{name}": tensor for name, tensor in source.model.state_dict().items()}
    metadata = {"format_version": 2, **source.to_metadata()}
    content = {"state_dict": weights, "vit_cls_metadata": metadata, "vit_cls_position": {}}
    seal(content)
    return content


def metadata(place: Path) -> Kind:
    """Model files whose metadata are nonsense, with digests that agree with it."""
    whole = save_classifier(classifier(), place / "whole.safetensors")
    with safe_open(whole, framework="pt") as file:
        known = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    spoiled = place / "model.safetensors"

    def read(values: Any) -> object:
        text = json.dumps(values)
        save_file(tensors, spoiled, {METADATA_KEY: text, DIGEST_KEY: tensor_digests(tensors, text)})
        found = load_classifier(spoiled)
        pixels = torch.zeros(2, found.preprocess.in_chans, *found.preprocess.img_size, dtype=torch.uint8)
        with torch.inference_mode():
            probs = found.probs(found(pixels))
        assert probs.shape == (2, len(found.class_names))
        return found

    return Kind(lambda draw: spoil_value(known, draw), read)


def records(place: Path) -> Kind:
    """What a run says of itself, damaged."""
    folder = RunFolder(place / "run")
    folder.path.mkdir()
    rows = [{"epoch": 0.0, "step": 3.0, "train/loss": 1.25, "val/acc1": 0.5}] * 3
    folder.write_history(rows)
    folder.write_record({"status": "finished", "identity": {"optim.lr": 0.1}, "imports": {}, "segments": []})
    whole = {file: file.read_bytes() for file in (folder.record_file, folder.path / "metrics.csv")}

    def spoil(draw: random.Random) -> dict[Path, bytes]:
        return {file: spoil_bytes(data, draw) for file, data in whole.items()}

    def read(files: dict[Path, bytes]) -> object:
        for file, data in files.items():
            file.write_bytes(data)
        with contextlib.suppress(VitClsError):
            folder.read_record()
        return folder.read_history()

    return Kind(spoil, read)


def configs(place: Path) -> Kind:
    """Configurations of a training that ends where it would begin to write."""
    file = place / "config.yaml"
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    model = {"name": "vit_pico_patch7_28", "depth": 1, "embed_dim": 8, "num_heads": 2, "pool": "cls"}
    own = {
        "seed": 3,
        "metrics": ["f1"],
        "model": model,
        "data": {"name": "digits", "batch_size": 32, "val_fraction": 0.2, "augment": "affine", "repeats": 1},
        "optim": {
            "lr": 1e-3,
            "ema_decay": 0.99,
            "warmup_epochs": 1,
            "weight_decay": 0.1,
            "loss": "cross_entropy",
        },
        "trainer": {
            "max_epochs": 2,
            "precision": "32-true",
            "callbacks": [timer],
            "accumulate_grad_batches": 2,
        },
    }
    texts = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]
    texts.append(yaml.safe_dump(own, sort_keys=False))

    def spoil(draw: random.Random) -> bytes:
        if draw.random() < 0.6:
            return yaml.safe_dump(spoil_value(own, draw), sort_keys=False).encode(errors="replace")
        content = spoil_lines(draw.choice(texts), draw, WORDS).encode(errors="replace")
        return spoil_bytes(content, draw) if draw.random() < 0.3 else content

    def read(data: bytes) -> object:
        file.write_bytes(data)
        said = io.StringIO()
        words = ["fit", "--config", str(file), "--run_dir", str(place / "run"), "--debug"]
        with contextlib.redirect_stderr(said), mock.patch("vit_cls.training.fit._run_folder", _begins):
            vit_cls_main(words)
        raise AssertionError(f"a run was neither begun nor refused: {said.getvalue()[-300:]}")

    return Kind(spoil, read)


def _begins(*_: Any) -> Any:
    raise Done


KINDS: dict[str, Callable[[Path], Kind]] = {
    "images": lambda _: images(),
    "tables": tables,
    "model files": model_files,
    "metadata": metadata,
    "records": records,
    "configs": configs,
}


def outcome_of(kind: Kind, name: str, number: int, keep: Path | None = None) -> tuple[str, str]:
    """Answer, refusal or fault, and what was said."""
    spoiled = kind.spoil(random.Random(f"{name} {number}"))
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}_{number}").write_bytes(
            spoiled if isinstance(spoiled, bytes) else repr(spoiled).encode()
        )
    signal.alarm(CASE_SECONDS)  # not caught: the process ends, and is told
    try:
        kind.read(spoiled)
    except Done:
        return ANSWER, ""
    except VitClsError as error:
        said = str(error)
        return (FAULT if len(said) < 10 or "object at 0x" in said else REFUSAL), said
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "vit_cls" in frame.filename]
        place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return FAULT, f"{type(error).__name__}: {str(error)[:200]}{place}"
    finally:
        signal.alarm(0)
    return ANSWER, ""


def cases(name: str, numbers: Sequence[int], keep: Path | None = None) -> Iterator[tuple[int, str, str]]:
    """Number, outcome and words of each case, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
        for number in numbers:
            yield number, *outcome_of(kind, name, number, keep)


def serve(name: str, first: int, end: int, keep: Path | None) -> None:
    """Cases in a process of their own: a line as each begins, and one as it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (CASE_BYTES + _address_space(), resource.RLIM_INFINITY))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is none of the answer
    print("ready", file=out)
    for number, outcome, said in cases(name, range(first, end), keep):
        print(json.dumps([number, outcome, said]), file=out)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def fuzz(name: str, first: int, rounds: int, keep: Path | None = None) -> tuple[Counter[str], dict[int, str]]:
    """Counts by outcome, and the words of each fault by its case."""
    counts: Counter[str] = Counter()
    faults: dict[int, str] = {}
    at, end = first, first + rounds
    while at < end:
        words = [sys.executable, __file__, "--serve", name, str(at), str(end), str(keep or "")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                raise SystemExit(f"the cases of {name} cannot be made: {' '.join(words[:3])} ... fails")
            for line in child.stdout:
                number, outcome, said = json.loads(line)
                counts[outcome] += 1
                if outcome == FAULT:
                    faults[number] = said
                at = number + 1
        if at < end:
            counts[FAULT] += 1
            faults[at] = f"the process ended with {child.returncode}"
            at += 1
    return counts, faults


def main(arguments: list[str] | None = None) -> int:
    """0 if there was no fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=KINDS, help="one kind")
    parser.add_argument("--keep", type=Path, help="a folder for the spoiled files")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        name, first, end, keep = options.serve
        serve(name, int(first), int(end), Path(keep) if keep else None)
        return 0
    table = {}
    for name in [options.only] if options.only else KINDS:
        started = time.monotonic()
        counts, faults = fuzz(name, options.seed, options.rounds, options.keep)
        seconds = round(time.monotonic() - started, 1)
        table[name] = {key: counts[key] for key in (ANSWER, REFUSAL, FAULT)} | {"seconds": seconds}
        print(
            f"{name:<12}", *(f"{counts[key]:>7} {key}" for key in (ANSWER, REFUSAL, FAULT)), f"{seconds:>8} s"
        )
        for number, said in sorted(faults.items())[:20]:
            print(f"  case {number}: {said}")
    if options.output:
        record = {"seed": options.seed, "rounds": options.rounds, "kinds": table, **environment()}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    found = sum(row[FAULT] for row in table.values())
    print(f"{options.rounds} cases of {len(table)} kinds: {found} faults")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
