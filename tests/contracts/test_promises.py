"""docs/promises.md names a test for each promise, and the tests stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "promise" and not set(row[0]) <= {"-"}]


def test_every_promise_names_tests_that_exist() -> None:
    for row in _rows():
        assert len(row) == 3, row
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[2])
        assert tests, f"no test is named for: {row[0]}"
        for file, name in tests:
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{file} has no {name}"
