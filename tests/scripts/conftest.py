"""The scripts as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Makes a module of a script, by its name without ending."""
    path, loaded = list(sys.path), []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"vit_cls_{name}_script", SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = path
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="session")
def benchmark(load_script) -> ModuleType:
    return load_script("benchmark")


@pytest.fixture
def refuses(benchmark, capsys):
    """Checks that arguments are refused with a message: one sentence, status 2, nothing on stdout."""

    def check(arguments: list[str], message: str) -> None:
        assert benchmark.main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    return check
