"""The benchmark script as a module."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="session")
def benchmark() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("vit_cls_benchmark_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


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
