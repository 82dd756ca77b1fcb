"""What README and docs tell people to type runs: every command and every block of Python, on tiny data."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vit_cls import create_model
from vit_cls.cli import main
from vit_cls.data.transforms import AUGMENTS
from vit_cls.lab.probes.table import PROBES
from vit_cls.lab.studies.table import STUDIES
from vit_cls.model.pooling import POOLINGS
from vit_cls.stats.metrics import METRICS
from vit_cls.training.losses import LOSSES
from vit_cls.training.optimizers import OPTIMIZERS
from vit_cls.training.validation import VAL_METRICS
from vit_cls.weights.bundle import save_classifier
from vit_cls.weights.factory import create_classifier

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "bash scripts/quickstart.sh": "sets up an environment, and trains for two minutes",
    "bash scripts/test.sh": "runs this test",
    "bash scripts/gpu_check.sh": "needs a GPU, or a minute; tests/scripts/test_gpu_check.py has its parts",
    "source .venv/bin/activate": "a matter of the shell",
}
"""Lines of bash blocks that no test can run, by their start, and why."""

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
PRETRAINED = "vit_tiny_patch16_224 --model.pretrained weights.safetensors --model.img_size 32"
STAND_INS = {
    # published weights cannot be fetched here: a file of fresh ones stands for them
    "vit_small_patch16_224.augreg_in21k_ft_in1k": PRETRAINED,
    "vit_small_patch14_dinov2.lvd142m": PRETRAINED,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": f"{TAG}=weights.safetensors",
    # one small architecture instead of fourteen
    "*dinov2*": "vit_tiny_patch16_224",
    "configs/": f"{ROOT}/configs/",
}
"""What stands for what in a command."""

TINY_MODEL = (
    "--model.img_size 16 --model.patch_size 4 --model.embed_dim 24 --model.depth 1 --model.num_heads 2"
)
TINY_RUN = "--trainer.max_epochs 1 --data.num_workers 0 --data.batch_size 4 --trainer.accelerator cpu"
TINY_RECIPE = (
    "--recipe.epochs 1 --recipe.embed_dim 8 --recipe.depth 1 --recipe.num_heads 2 --seeds 1 --jobs 1"
)
SMALLER = {"doctor": "--num_workers 0", "fit": TINY_RUN, "study": TINY_RECIPE + " --lr_grid 1"}
"""Options that make a verb quick."""


def _blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text())]


COMMANDS = list(
    dict.fromkeys(
        command
        for _, text in _blocks("bash")
        for command in (re.sub(r"\s+#.*", "", line) for line in text.splitlines())
        if command and not command.startswith(tuple(NOT_RUN))
    )
)
PYTHON = _blocks("python")


def _photos(folder: Path, parts: dict[str, int], classes: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Photos, runs and weights under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    _photos(folder / "photos", {"train": 6, "val": 3, "test": 3}, ("bird", "cat", "dog"))
    _photos(folder / "imagenet", {"val": 1}, ("n01440764", "n01443537"))
    _photos(folder, {"new_photos": 2}, ("",))
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for run, names, changes in (
        ("photos", ["bird", "cat", "dog"], small),
        ("cls", ["bird", "cat", "dog"], small),
        ("gap", ["bird", "cat", "dog"], {**small, "pool": "gap"}),
        ("quickstart_cls_0", [str(digit) for digit in range(10)], {}),
    ):
        (folder / "runs" / run).mkdir(parents=True)
        torch.manual_seed(0)
        model = create_classifier("vit_pico_patch7_28", names, **changes)
        save_classifier(model, folder / "runs" / run / "model.safetensors")
    save_file(create_model("vit_tiny_patch16_224").state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    place = tmp_path / "place"
    shutil.copytree(template, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


def _words(command: str) -> list[str]:
    """The words after ``vit-cls``, with the stand-ins and what makes the verb quick."""
    for name, other in STAND_INS.items():
        command = command.replace(name, other)
    words = shlex.split(command)[1:]
    if "--help" in words:
        return words
    words += SMALLER.get(words[0], "").split()
    if words[0] == "fit" and "--model.pretrained" not in words:
        words += TINY_MODEL.split()
    return words


def test_the_sweep_finds_what_the_pages_say():
    assert len(PAGES) >= 7
    assert len(COMMANDS) >= 18
    assert len(PYTHON) >= 7
    lines = [line for _, text in _blocks("bash") for line in text.splitlines()]
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN)
    assert [command for command in COMMANDS if "vit-cls " not in command] == []
    assert [name for name in STAND_INS if not any(name in command for command in COMMANDS)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command, place, monkeypatch, capfd):
    before, _, command = command.rpartition("| ")
    if before:
        paths = subprocess.run(["bash", "-c", before], capture_output=True, check=True).stdout
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(paths)))
    words = _words(command)
    if "--run_dir" in words:
        shutil.rmtree(words[words.index("--run_dir") + 1])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
    else:
        assert main(words) == 0, capfd.readouterr().err


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[page for page, _ in PYTHON])
def test_a_block_of_python_runs(page, text, place, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # of a block that imports what it wrote
    tables = (
        POOLINGS,
        AUGMENTS,
        METRICS,
        OPTIMIZERS,
        LOSSES,
        VAL_METRICS,
        PROBES,
        STUDIES,
    )  # to which a block may add a row
    before = [dict(table) for table in tables]
    try:
        exec(text, {})
    finally:
        sys.modules.pop("own_code", None)
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)
    assert "vit-cls: " not in capfd.readouterr().err  # what a command would complain of


def test_links_between_pages_lead_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^):]+\.md)\)", page.read_text())]
    assert len(links) >= 8
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
