"""Imports point one way: a room may use the rooms before it, and each heavy library has its rooms."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import vit_cls

PACKAGE = Path(vit_cls.__file__).parent

# What any room may use, before the rooms; a room may use those of the lines above its own.
BASE = {
    "__version__",
    "errors",
    "files",
    "locks",
    "environment",
    "boundary",
    "checks",
    "formatting",
    "signals",
    "workers",
    "own_code",
    "verification",
    "texts",
    "streams",
}
ORDER: tuple[set[str], ...] = (
    BASE,
    {"data", "model"},
    {"weights"},
    {"inference"},
    {"stats"},
    {"evaluation", "training"},
    {"export"},
    {"lab"},
    {"api"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
NOT_EVEN = {"evaluation": {"training"}, "export": {"training"}, "lab": {"training"}}
"""A study is given the function that trains."""
RESULTS = {"data.doctor", "evaluation", "lab.results", "stats"}
"""The result dataclasses that `reports` sees; the commands alone see it."""

# library: where it may be imported, as prefixes of paths in the package
ONLY_IN: dict[str, tuple[str, ...]] = {
    "timm": ("weights/", "export/"),
    "lightning": ("training/", "data/datamodule.py", "commands/fit_parser.py"),
    "matplotlib": ("reports/",),
    "jinja2": ("reports/",),
    "jsonargparse": ("commands/", "cli.py"),
    "sklearn": ("data/digits.py", "stats/", "evaluation/", "lab/"),
}
MODEL_LIBRARIES = {"torch", "einops"}

MOST_LINES = 400
LONGER: set[str] = set()
"""Files that have more lines still; the set only shrinks."""


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _allowed(room: str) -> set[str]:
    if room == "__init__":
        return {"api", "data", "model", "training", "weights"}  # where the public names are defined
    if room == "reports":
        return BASE | RESULTS | {room}
    level = next(i for i, rooms in enumerate(ORDER) if room in rooms)
    own = BASE if level == 0 else {room}
    before = set().union(*ORDER[:level]) - NOT_EVEN.get(room, set())
    return own | before | ({"reports"} if room == "commands" else set())


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
    relative, room = path.relative_to(PACKAGE), _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "vit_cls":
            imported = {parts[1], ".".join(parts[1:3])}  # the room, and the file in it
            assert imported & _allowed(room), f"{relative} imports {name}"
        only = ONLY_IN.get(parts[0])
        assert only is None or relative.as_posix().startswith(only), f"{relative} imports {name}"
        if room == "model" and parts[0] not in MODEL_LIBRARIES | {"vit_cls"}:
            assert parts[0] in sys.stdlib_module_names, f"{relative} imports {name}"


def test_every_room_is_known_and_was_read():
    known = set().union(*ORDER) | {"reports", "__init__"}
    assert {_room(path) for path in _files()} <= known
    assert len(_files()) >= 40


def test_no_file_imports_itself_by_way_of_others():
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in _files()
    }
    graph = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in _imports(path)
            if name.startswith("vit_cls.")
        }
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, set())):
                visit(name, (*above, module))
            done.add(module)

    del graph["vit_cls"]  # whose public names load when they are used
    for module in sorted(graph):
        visit(module, ())
    assert len(done) >= 40


def test_no_file_is_too_long_to_read():
    long = {
        path.relative_to(PACKAGE).as_posix()
        for path in _files()
        if len(path.read_text().splitlines()) > MOST_LINES
    }
    assert long == LONGER


def test_no_pickle_is_opened():
    for path in _files():
        source = path.read_text()
        assert "import pickle" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
