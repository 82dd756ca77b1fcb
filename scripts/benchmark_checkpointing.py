"""What ``model.grad_checkpointing`` saves and costs: bytes kept for the gradient, and the time of a step.

Run: ``python scripts/benchmark_checkpointing.py [--models NAME ...] [--pairs N] [--json FILE]``, on a CPU.

Bytes are counted, each storage once, without the weights: what autograd keeps between forward and backward.
Times are of one training step with checkpointing over one without, in interleaved pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from pairs import Row, Settings, check_target, command, cpu_name, heading, in_turn, paired_stats

from vit_cls import create_model
from vit_cls.model.token_model import TokenModel

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224")


def kept_bytes(model: TokenModel, images: torch.Tensor) -> int:
    """What a forward pass keeps for the gradient, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
    found = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return found


def step_seconds(model: TokenModel, images: torch.Tensor, checkpointing: bool) -> float:
    """One forward and backward pass."""
    model.grad_checkpointing = checkpointing
    model.zero_grad()
    started = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - started


def measure(name: str, settings: Settings) -> Row:
    """One row of the report."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000).train()
    images = torch.randn(settings.batch_size, 3, *model.config.image_hw)
    kept = {}
    for checkpointing in (False, True):
        model.grad_checkpointing = checkpointing
        kept[checkpointing] = kept_bytes(model, images)
    plain, checkpointed = in_turn(
        lambda: step_seconds(model, images, False), lambda: step_seconds(model, images, True), settings.pairs
    )
    return {
        "model": name,
        "batch_size": settings.batch_size,
        "kept_bytes": kept[False],
        "kept_bytes_checkpointed": kept[True],
        "time_ratio": paired_stats(plain, checkpointed),
    }


def run(settings: Settings) -> Row:
    """The whole report."""
    versions = {"torch": torch.__version__}
    rows = [measure(name, settings) for name in settings.models]
    return {**heading(versions, cpu_name()), "threads": torch.get_num_threads(), "rows": rows}


def table(report: Row) -> str:
    """One line a model."""
    lines = [
        f"{row['model']}: {row['kept_bytes'] / 2**20:.0f} MiB kept, checkpointed "
        f"{row['kept_bytes_checkpointed'] / 2**20:.0f} MiB; time {row['time_ratio']['median']:.2f} "
        f"({row['time_ratio']['q1']:.2f} to {row['time_ratio']['q3']:.2f})"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def parse() -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    check_target("json", settings.json)
    return settings


if __name__ == "__main__":
    sys.exit(command(parse, run, table, option="json"))
