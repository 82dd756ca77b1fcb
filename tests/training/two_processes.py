"""What each of two processes does in `test_company`: several small runs, and what it saw of them.

python two_processes.py FOLDER ROOT    in an environment that says which of the processes it is
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from tests.training.runs import run_tiny, weights_of
from vit_cls.errors import DataError, VitClsError
from vit_cls.training.launch import is_first_process

STEPS = {"epochs": 7, "optim": {"weight_decay": 0.1}}
"""21 steps of 8 images, nothing of which depends on the number of processes."""
TIMES = ("seconds", "train_images_per_second", "data_wait")
ALIKE = {"model": {"drop_path_rate": 0.0}, **STEPS}


class Losses(Callback):
    """The loss of every step in this process, and the seed that its dropout draws by; acts after one."""

    def __init__(self, act: Callable[[], None] | None = None, after: int = 0) -> None:
        self.act, self.after = act, after
        self.losses: list[float] = []
        self.seeds: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.seeds.append(torch.initial_seed())
        if self.act is not None and len(self.losses) == self.after:
            self.act()


def train(root: Path, folder: Path | None, processes: int = 1, **settings: Any) -> dict[str, Any]:
    """One run; its losses, the last weights, what was validated, and its rows but for times."""
    seen = Losses()
    several = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    trainer = {"callbacks": [seen], "logger": False, **several, **settings.pop("trainer", {})}
    data = {"batch_size": 8 // processes, **settings.pop("data", {})}
    result, _ = run_tiny(root, folder, data=data, trainer=trainer, **settings)
    found = {
        "losses": seen.losses,
        "seeds": seen.seeds,
        "images": [row["val/images"] for row in result.history],
    }
    found["rows"] = [{k: v for k, v in row.items() if k not in TIMES} for row in result.history]
    if is_first_process():
        weights = weights_of(result.folder.path).values()
        found["weights"] = [value for tensor in weights for value in tensor.double().flatten().tolist()]
        found["val_loss"] = [row["val/loss"] for row in result.history]
    return found


def ended(root: Path, folder: Path, act: Callable[[], None] | None = None, **settings: Any) -> dict[str, Any]:
    """How a run ends in this process, which does something in the midst of it: class, text or code, steps."""
    seen = Losses(act, after=4)
    trainer = {"callbacks": [seen], "logger": False, "devices": 2, "strategy": "ddp"}
    try:
        run_tiny(root, folder, trainer=trainer, **settings)
    except (VitClsError, SystemExit) as error:
        return {"class": type(error).__name__, "said": str(error), "steps": len(seen.losses)}
    return {}


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise DataError("this disk is gone.")


def main(folder: Path, root: Path, few: Path) -> None:
    """Write what this process saw as JSON."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        precision: train(root, folder / precision, 2, trainer={"precision": precision}, **ALIKE)
        for precision in ("32-true", "64-true")
    }
    found["drop path"] = train(root, folder / "drop", 2, epochs=2)
    found["few"] = train(few, folder / "few", 2, epochs=1, metrics=["auroc", "f1"])
    is_second = not is_first_process()
    found["other data"] = ended(root, folder / "other", seed=int(is_second))
    found["SIGTERM"] = ended(root, folder / "stop", stop if is_second else None, epochs=3)
    five = {"batch_size": 5}
    found["resumed"] = train(root, None, 2, data=five, epochs=3, resume=str(folder / "stop"))
    found["whole"] = train(root, folder / "whole", 2, data=five, epochs=3)
    found["failure"] = ended(root, folder / "fail", fail if is_second else None, epochs=9)  # parts them
    (folder / ("second.json" if is_second else "first.json")).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
