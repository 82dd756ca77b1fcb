"""Make the golden files: what today's code trains, writes and says, for the code of tomorrow to repeat.

Run:    OMP_NUM_THREADS=1 python -m tests.golden.record NAME ...   (trained, losses, or names of COMMANDS)
Only where a change of results is wanted; the commit says why. Everything is tiny, on the embedded digits.
The models that the commands read (run/, gap.safetensors) stay as an old version wrote them; trained/ is what
today's code makes of the same settings.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open

from vit_cls.cli import main
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.digits import write_digits
from vit_cls.data.mixing import MixOptions
from vit_cls.training.fit import fit
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions

GOLDEN = Path(__file__).parent
THREADS = 1
TRAINED = "trained"
"""The model and the metrics of `train`."""
LOSSES = "losses"
"""The losses of `losses`, and the machine that they were recorded on."""
STEPS = 50
TRAINING = (
    *("--data.name", "digits", "--data.batch_size", "8", "--data.augment", "none"),
    *("--data.num_workers", "0", "--optim.lr", "5e-3", "--trainer.max_epochs", "3"),
    *("--model.name", "vit_pico_patch7_28", "--model.img_size", "16", "--model.patch_size", "4"),
    *("--model.embed_dim", "32", "--model.depth", "2", "--model.num_heads", "2"),
    *("--trainer.accelerator", "cpu"),
)
ON_CPU = ("--device", "cpu", "--num_workers", "0")
RECIPE = (
    *("--recipe.img_size", "16", "--recipe.patch_size", "4", "--recipe.embed_dim", "24"),
    *("--recipe.num_heads", "2", "--recipe.epochs", "2", "--recipe.batch_size", "128"),
)
# name: the words after vit-cls, run in a folder that holds run/, gap.safetensors and digits_test/
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "--model", "run", "--data", "digits_test", *ON_CPU),
    "compare": ("compare", "--model", "run", "--model", "gap.safetensors", "--data", "digits_test", *ON_CPU),
    "probe_linear": ("probe", "linear", "--model", "run", "--data", "digits", "--cache", "cache", *ON_CPU),
    "study_depth": (
        *("study", "depth", "--data", "digits", "--seeds", "2", "--depths", "1,2"),
        *("--jobs", "1", "--output", "study", *RECIPE),
    ),
}
VOLATILE = frozenset(("seconds", "images_per_second", "versions", "environment", "output", "commit"))
"""Keys whose values tell of the moment or the machine, not of the result."""


def vit_cls(*words: str, cwd: Path) -> dict[str, Any]:
    """Run the command in this process, at one thread.

    Args:
        words: After ``vit-cls``; ``--json`` is added.
        cwd: Where it runs.
    """
    threads, printed = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(THREADS)
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(printed):
            code = main([*words, "--json"])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    return json.loads(printed.getvalue())


def train(folder: Path) -> Path:
    """Three epochs on the digits; gives the run folder, ``folder/run``.

    Args:
        folder: Where the run folder goes.
    """
    vit_cls("fit", *TRAINING, "--model.pool", "cls", "--run_dir", "run", cwd=folder)
    return folder / "run"


class _Look(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def losses(folder: Path, *, threads: int = THREADS) -> list[float]:
    """The losses of `STEPS` steps with all that is random: augmentation, mixing, dropout and drop path.

    Args:
        folder: Where the run folder goes.
        threads: Of torch.
    """
    look, before = _Look(), torch.get_num_threads()
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = ModelOptions("vit_pico_patch7_28", **tiny, drop_path_rate=0.1, proj_drop_rate=0.1)
    options = FitOptions(model, OptimOptions(lr=5e-3, ema_decay="auto"), run_dir=str(folder / "run"))
    mix = MixOptions(mixup_alpha=0.4, cutmix_alpha=1.0, mix_prob=0.3, erase_prob=0.2)
    data = ImageDataModule(name="digits", batch_size=64, augment="affine", num_workers=0, mix=mix)
    torch.set_num_threads(threads)
    try:
        fit(options, data, {"max_steps": STEPS, "accelerator": "cpu", "logger": False, "callbacks": [look]})
    finally:
        torch.set_num_threads(before)
    return look.losses


def answer(name: str, folder: Path) -> Any:
    """What one of `COMMANDS` says of the golden models, without what is volatile.

    Args:
        name: A key of `COMMANDS`.
        folder: An empty folder to work in.
    """
    shutil.copytree(GOLDEN / "run", folder / "run")
    shutil.copy(GOLDEN / "gap.safetensors", folder)
    if not name.startswith(("probe", "study")):
        write_digits(folder / "digits_test")
    return _without_volatile(vit_cls(*COMMANDS[name], cwd=folder))


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model file, by its key.

    Args:
        file: A safetensors file.
    """
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, no dict


def machine() -> dict[str, str | int]:
    """What decides the last bits of a result."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines()]
        facts = {name.strip(): value.strip() for name, value in (line for line in lines if len(line) == 2)}
        processor = " ".join(facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": THREADS,
    }


def _without_volatile(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_volatile(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: _without_volatile(v) for k, v in value.items() if k not in VOLATILE}
    if VOLATILE & set(kept.get("columns", ())):  # of a table: the column stays, its values go
        keep = [column not in VOLATILE for column in kept["columns"]]
        kept["rows"] = [[v if k else None for v, k in zip(row, keep, strict=True)] for row in kept["rows"]]
    return kept


def _record(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if TRAINED in names:
            (GOLDEN / TRAINED).mkdir(exist_ok=True)
            run = train(Path(scratch))
            for file in ("metrics.csv", "model.safetensors"):
                shutil.copy(run / file, GOLDEN / TRAINED)
        if LOSSES in names:
            found = {"machine": machine(), "losses": losses(Path(scratch) / LOSSES)}
            (GOLDEN / f"{LOSSES}.json").write_text(json.dumps(found, indent=1) + "\n")
        for name in (name for name in names if name in COMMANDS):
            folder = Path(scratch) / name
            folder.mkdir()
            text = json.dumps(answer(name, folder), indent=1, ensure_ascii=False)
            (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if set(names) - {LOSSES}:
        (GOLDEN / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")


if __name__ == "__main__":
    _record(sys.argv[1:])
