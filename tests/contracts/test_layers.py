"""Imports point one way: a room may use the rooms before it, and each heavy library has its rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vit_cls

PACKAGE = Path(vit_cls.__file__).parent

BASE = {"errors", "files", "environment", "__version__"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "environment": {"__version__"},
    "data": BASE,
    "model": BASE,
    "weights": BASE | {"data", "model"},
    "training": BASE | {"data", "model", "weights"},
    "evaluation": BASE | {"data", "model", "weights"},
    "lab": BASE | {"data", "model", "weights", "evaluation"},  # not training: a study is given it
    "reports": BASE | {"evaluation", "data.diagnosis", "lab.results"},  # result dataclasses
    "commands": BASE | {"data", "model", "weights", "training", "evaluation", "lab", "reports"},
    "cli": BASE | {"commands"},
    "__main__": {"cli"},
    "__init__": {"model", "weights"},
}

# library: where it may be imported, as prefixes of paths in the package
ONLY_IN: dict[str, tuple[str, ...]] = {
    "timm": ("weights/",),
    "lightning": ("training/", "data/datamodule.py", "commands/fit.py"),
    "matplotlib": ("reports/",),
    "jinja2": ("reports/",),
    "jsonargparse": ("commands/", "cli.py"),
    "sklearn": ("data/digits.py", "evaluation/", "lab/"),
}

MODEL_LIBRARIES = {"torch", "einops"}


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_file_imports_only_rooms_before_its_own(path):
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "vit_cls":
            seen = {parts[1], ".".join(parts[1:3])}  # the room, and the file in it
            assert seen & (MAY_IMPORT[room] | {room}), f"{relative} imports {name}"
        allowed = ONLY_IN.get(parts[0])
        assert allowed is None or relative.as_posix().startswith(allowed), f"{relative} imports {name}"
        if room == "model" and parts[0] not in MODEL_LIBRARIES | {"vit_cls"}:
            import sys

            assert parts[0] in sys.stdlib_module_names, f"{relative} imports {name}"


def test_every_room_is_known_and_was_read():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _files()}
    assert rooms == set(MAY_IMPORT)
    assert len(_files()) >= 40


def test_no_pickle_is_opened():
    for path in _files():
        source = path.read_text()
        assert "import pickle" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
