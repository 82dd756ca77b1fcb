"""Compare the speed and memory of vit_cls with timm, same weights and inputs, in interleaved pairs.

Run: ``python scripts/benchmark.py [model] [train] --device cpu|cuda [--json FILE]``; no suite means all.
Images instead of models: ``python scripts/benchmark.py loader --data FOLDER``; see `benchmark_loader`.

A ratio is timm's seconds over ours: above 1, ours is faster. Nothing is timed before both sides are seen to
compute the same. Exit status: 0 done, 1 the sides differ, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if importlib.util.find_spec("vit_cls") is None:  # run from a checkout, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # the files beside this one, if it is imported

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once: the profiler talks on stderr otherwise

import benchmark_loader
import timm
import torch
import torch.nn.functional as F
from pairs import SPREAD, Mismatch, Row, Settings, check_target, command, cpu_name, heading, in_turn
from pairs import paired_stats as paired_stats
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

import vit_cls
from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model import linear
from vit_cls.model.config import ViTConfig
from vit_cls.model.presets import PRESETS, preset_config
from vit_cls.model.vit import VisionTransformer

TIMM_POOLS = {"cls": "token", "gap": "avg", "max": "max"}
CHECK_STEPS = 3  # warm-up steps whose results are compared; more than one, so that gradients count too
BATCH_SIZES = {"cpu": (16, 768), "cuda": (256, 1024)}  # images a step; the width from which it is half that
TOLERANCE = {"32": 1e-4, "bf16": 5e-2}  # of the largest magnitude; weights that differ are far outside
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
MEMORY = "weights, optimizer state and batch of that side and, in one step, the peak growth of what is "
MEMORY_MEASURED = {
    "cpu": MEMORY + "handed out by torch's CPU allocator (torch.profiler; not the scratch of MKL and oneDNN)",
    "cuda": MEMORY + "allocated (torch.cuda.max_memory_allocated, reset before the step)",
}

Step = Callable[[], Tensor]


def build_pair(name: str, pool: str, num_classes: int = 1000) -> tuple[VisionTransformer, nn.Module]:
    """Our model and timm's, with the same weights, on the CPU.

    Args:
        name: A row of `PRESETS`. A name that timm does not know is built from timm's class with our sizes.
        pool: A row of `TIMM_POOLS`.
        num_classes: Classes of both heads.

    Raises:
        Mismatch: If their parameters differ in name, shape or count.
    """
    ours = VisionTransformer(preset_config(name, pool=pool, num_classes=num_classes))
    options: Row = {"global_pool": TIMM_POOLS[pool], "num_classes": num_classes}
    if timm.is_model(name):
        theirs = timm.create_model(name, **options)
    else:
        fields = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
        sizes = {field: getattr(ours.config, field) for field in fields}
        theirs = timm.models.VisionTransformer(**sizes, **options)
    shapes = [{key: value.shape for key, value in model.named_parameters()} for model in (ours, theirs)]
    if shapes[0] != shapes[1]:
        odd = sorted(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
        raise Mismatch(f"{name}: the parameters of ours and timm's differ: {', '.join(odd)}.")
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gflop_per_image(config: ViTConfig, *, train: bool) -> float:
    """Arithmetic of the whole model on one image, in GFLOP; a multiply-add is two.

    Both sides are charged this, so work that a side manages to skip counts as speed. The backward pass is
    twice the forward, less the gradient of the pixels, which nobody needs.
    """
    patches, dim = config.grid_size[0] * config.grid_size[1], config.embed_dim
    tokens = patches + config.class_token + config.reg_tokens
    block = (4 + 2 * config.mlp_ratio) * tokens * dim**2 + 2 * tokens**2 * dim
    embed = patches * config.in_chans * config.patch_size**2 * dim
    forward = config.depth * block + embed + dim * config.num_classes
    return 2e-9 * (3 * forward - embed if train else forward)


def make_step(model: nn.Module, images: Tensor, targets: Tensor, settings: Settings, *, train: bool) -> Step:
    """What is timed; it holds no gradients between calls.

    Args:
        model: Its weights are trained in place if ``train``.
        images: One batch, used in every step.
        targets: Classes of the images.
        settings: From `parse`.
        train: False for a forward pass that returns the logits; True for forward, cross entropy, backward
            and AdamW, returning the loss.
    """
    forward = torch.compile(model.train(train), dynamic=False) if settings.compile else model.train(train)
    autocast = torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def infer() -> Tensor:
        with torch.inference_mode(), autocast:
            return forward(images)

    def fit() -> Tensor:
        with autocast:
            loss = F.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return fit if train else infer


def difference(ours: Tensor, theirs: Tensor, *, what: str, precision: str) -> float:
    """The largest absolute difference, if rounding can explain it; else, `Mismatch` about ``what``."""
    found = (ours.float() - theirs.float()).abs().max().item()
    allowed = TOLERANCE[precision] * theirs.float().abs().max().item()
    if not found <= allowed:
        raise Mismatch(f"{what} differ by {found:.3g}; rounding explains {allowed:.3g}. Nothing was timed.")
    return found


def time_pairs(ours: Step, theirs: Step, settings: Settings) -> tuple[list[float], list[float]]:
    """Seconds a step of both sides in turn; who goes first alternates, so that drift cancels."""
    once = (lambda: _time_once(ours, settings)), (lambda: _time_once(theirs, settings))
    return in_turn(*once, settings.rounds)


def _time_once(step: Step, settings: Settings) -> float:
    synchronize = getattr(torch, settings.device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(settings.steps):
        step()
    synchronize()
    return (time.perf_counter() - start) / settings.steps


def peak_step_bytes(step: Step, device: str) -> int:
    """Peak bytes that one step allocates beyond what was held before it; see `MEMORY_MEASURED`."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:  # the trace file is the public way to single allocations
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes))


def gemm_tflops(settings: Settings) -> float:
    """Median rate of torch's ``a @ b`` on large random squares: what this device can be asked for."""
    side = GEMM_SIDE[settings.device]
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=settings.device).to(dtype) for _ in range(2))
    seconds = [_time_once(lambda: a @ b, settings) for _ in range(13)]
    return 2e-12 * side**3 / statistics.median(seconds[2:])  # two to warm up


def compare(name: str, settings: Settings, *, train: bool) -> Row:
    """Check, time and weigh one architecture on both sides; raises `Mismatch` if they differ."""
    torch.manual_seed(settings.seed)
    if settings.compile:
        torch.compiler.reset()  # else all rows share one limit of recompilations
    pair = build_pair(name, settings.pool)
    config, device, precision = pair[0].config, settings.device, settings.precision
    full, wide = BATCH_SIZES[device]
    batch_size = settings.batch_size or (full if config.embed_dim < wide else full // 2)
    images = torch.randn(batch_size, config.in_chans, *config.image_hw).to(device)
    targets = torch.randint(config.num_classes, (batch_size,)).to(device)
    models = [model.to(device) for model in pair]
    eager = argparse.Namespace(**{**vars(settings), "compile": False})
    logits = [make_step(model, images, targets, eager, train=False)() for model in models]
    logits_diff = difference(*logits, what=f"{name}: the logits", precision=precision)

    steps = [make_step(model, images, targets, settings, train=train) for model in models]
    output = "loss" if train else "logits"
    what = f"{name}: the {output} of the timed steps"
    pairs = ([step() for step in steps] for _ in range(CHECK_STEPS))
    step_diff = max(difference(*results, what=what, precision=precision) for results in pairs)
    seconds = time_pairs(steps[0], steps[1], settings)
    gflop = gflop_per_image(config, train=train)
    copies = 3 if train else 1  # AdamW keeps two moments of each weight
    held = copies * sum(p.nbytes for p in models[0].parameters()) + images.nbytes + targets.nbytes
    row: Row = {
        "model": name,
        "batch_size": batch_size,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "gflop_per_image": gflop,
        "agreement": {"logits_max_abs_diff": logits_diff, f"step_{output}_max_abs_diff": step_diff},
        "ratio": paired_stats(*seconds),
    }
    for side, step, taken in zip(("ours", "timm"), steps, seconds, strict=True):
        median = statistics.median(taken)
        row[side] = {
            "median_seconds": median,
            "images_per_second": batch_size / median,
            "tflops": 1e-3 * gflop * batch_size / median,
            "peak_bytes": held + peak_step_bytes(step, device),
            "seconds": taken,
        }
    return row


# What yields the rows of each suite, one at a time.
SUITES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "model": lambda settings: (compare(name, settings, train=False) for name in settings.models),
    "train": lambda settings: (compare(name, settings, train=True) for name in settings.models),
}


def run(settings: Settings) -> Row:
    """Measure everything that was asked for, into plain data that JSON can hold; may raise `Mismatch`."""
    torch.backends.cudnn.allow_tf32 = False  # so that `32` means it: the patch embedding is a convolution
    torch.manual_seed(settings.seed)
    before = gemm_tflops(settings)
    rows: list[Row] = []
    for suite in settings.suites:
        for row in SUITES[suite](settings):
            rows.append({"suite": suite, **row})
            print(f"{suite} {row['model']}: {row['ratio']['median']:.3f}", file=sys.stderr, flush=True)
    ceiling = max(before, gemm_tflops(settings))  # a slow spell of the machine is no ceiling
    for side in itertools.chain.from_iterable((row["ours"], row["timm"]) for row in rows):
        side["gemm_fraction"] = side["tflops"] / ceiling
    name = torch.cuda.get_device_name() if settings.device == "cuda" else cpu_name()
    return {
        **heading({module.__name__: module.__version__ for module in (torch, timm, vit_cls)}, name),
        "threads": torch.get_num_threads(),
        "settings": {key: value for key, value in vars(settings).items() if key != "json"},
        "memory_measured": MEMORY_MEASURED[settings.device],
        "gemm_ceiling": {"tflops": ceiling, "side": GEMM_SIDE[settings.device]},
        "rows": rows,
    }


def table(report: Row) -> str:
    """The report as text: two lines a row, ours and timm's."""
    settings, gemm = report["settings"], report["gemm_ceiling"]
    asked = [f"{key} {settings[key]}" for key in ("precision", "compile", "pool", "seed", "steps")]
    asked += [f"{name} {version}" for name, version in report["versions"].items()]
    heads = "".join(f"{head:>9}" for head in ("s/step", "images/s", "peak MiB", "TFLOP/s", "of GEMM"))
    lines = [
        f"{report['date']}: {report['device_name']}, {report['threads']} threads, {', '.join(asked)}",
        f"GEMM ceiling {gemm['tflops']:.4g} TFLOP/s: a @ b in torch, {gemm['side']} cubed",
        f"{'suite':<6}{'model':<23}batch side{heads}  timm/ours: median (quartiles; range; ours faster)",
    ]
    for row in report["rows"]:
        differ = ", ".join(f"{key.split('_max')[0]} {value:.1e}" for key, value in row["agreement"].items())
        notes = {"ours": SPREAD.format(**row["ratio"]), "timm": f"largest difference: {differ}"}
        name = f"{row['suite']:<6}{row['model']:<23}{row['batch_size']:>5}"
        for side, note in notes.items():
            c = row[side]
            cells = f"{c['median_seconds']:>9.4f}{c['images_per_second']:>9.1f}"
            cells += f"{c['peak_bytes'] / 2**20:>9.0f}{c['tflops']:>9.4g}{c['gemm_fraction']:>9.1%}"
            lines.append(f"{name if side == 'ours' else '':<34} {side}{cells}  {note}")
    return "\n".join([*lines, f"peak MiB: {report['memory_measured']}."])


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read and check the command line, and fill in the defaults that depend on the device.

    Args:
        argv: Arguments after the program's name; None means those of this process.

    Raises:
        ConfigError: If a value is unknown, or impossible here.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="For images instead of models: benchmark.py loader --help",
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)} (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", type=Path, metavar="FILE", help="also write the report, and every measurement, here")
    add("--models", nargs="+", metavar="NAME", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    add("--pool", choices=tuple(TIMM_POOLS), default="cls")
    add("--precision", choices=tuple(TOLERANCE), help="bf16 is autocast (default: 32 on cpu, bf16 on cuda)")
    add("--batch_size", type=int, help="images a step (default: 16 on cpu, 256 on cuda, half if wide)")
    add("--rounds", type=int, default=15, help="pairs of measurements (default: 15)")
    add("--steps", type=int, help="steps in each measurement (default: 1 on cpu, 10 on cuda)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile both (default: on cuda only)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0)
    add(
        "--same_linear",
        action="store_true",
        help="F.linear on our side too: shows the model's own savings alone",
    )
    args = parser.parse_args(argv)
    for names, known, what in ((args.suites, SUITES, "SUITE"), (args.models, PRESETS, "--models")):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or f" Choose from {', '.join(known)}."
                raise ConfigError(f"{what} {name!r} is not known.{hint}")
    for option, least in (("batch_size", 1), ("rounds", 2), ("steps", 1), ("threads", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ConfigError(f"--{option} must be at least {least}; got {value}.")
    check_target("json", args.json)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use, and there is none here.")
    args.suites = args.suites or list(SUITES)
    args.precision = args.precision or ("bf16" if cuda else "32")
    args.steps = args.steps or (10 if cuda else 1)
    args.compile = cuda if args.compile is None else args.compile
    return args


def _prepared(argv: Sequence[str]) -> Settings:
    settings = parse(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.same_linear:
        linear.USE_ONEDNN = False
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; ``argv`` is as for `parse`."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == ["loader"]:
        return benchmark_loader.main(argv[1:])
    return command(lambda: _prepared(argv), run, table, option="json")


if __name__ == "__main__":
    sys.exit(main())
