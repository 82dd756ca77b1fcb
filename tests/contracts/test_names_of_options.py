"""An option that a text of the package names is one that some verb has."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import jsonargparse
import pytest

import vit_cls
from vit_cls.cli import COMMANDS
from vit_cls.commands import compare, doctor, evaluate, export, fit, models, predict, probe, study, verify
from vit_cls.commands.parsing import known_keys
from vit_cls.commands.words import ALIASES, LISTS
from vit_cls.lab.probes.head_fits import HeadRecipe
from vit_cls.lab.probes.table import PROBES
from vit_cls.lab.studies.table import STUDIES
from vit_cls.model.config import ViTConfig

PACKAGE = Path(vit_cls.__file__).parent
VERBS = (compare, doctor, evaluate, export, fit, models, predict, probe, study, verify)
QUESTIONS = {probe: PROBES, study: STUDIES}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_]*(?:\.[a-z_]+)*)")
KEY = re.compile(r"(?<![\w./-])((?:data|model|optim|trainer)\.[a-z]\w*(?:\.\w+)*)(?![\w(/])")
WITHOUT_PARSER = {"json", "debug", "no_verify", "import", "help", "version", "print_config"}
"""What every verb takes before its parser sees the words, and what parsers have of their own."""
NO_OPTIONS = {"model.safetensors", "data.pkl", "key"}
"""Files, and the word that stands for any key."""
OTHER_PROGRAMS = {
    "environment.py": {"error", "porcelain"},
    "loader.py": {"shm"},
    "watch.py": {"shm"},
    "svg.py": {"line", "series"},
}
"""Options of git and of docker, and variables of CSS."""


class _Stopped(Exception):
    """Carries the parser of a verb, which is about to parse."""


@pytest.fixture
def options(monkeypatch) -> set[str]:
    """Every option of every verb, dotted; and what Python users set of an architecture by name."""

    def stop(parser, *_, **__):
        raise _Stopped(parser)

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", stop)
    found = {f"model.{field.name}" for field in dataclasses.fields(ViTConfig)}
    found |= {
        f"recipe.{field.name}" for field in dataclasses.fields(HeadRecipe)
    }  # of a probe, null as a whole
    for verb in VERBS:
        for words in [[name] for name in QUESTIONS[verb]] if verb in QUESTIONS else [[]]:
            with pytest.raises(_Stopped) as stopped:
                verb.run(words)
            found |= set(known_keys(stopped.value.args[0]))
    return found


def _texts(node: ast.AST, loops: dict[str, list[str]]) -> Iterator[str]:
    """All texts; an f-string for each name of the loop over names that it stands in, else with spaces."""
    if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
        first = node.target.elts[0] if isinstance(node.target, ast.Tuple) else node.target
        names = [one.elts[0] if isinstance(one, ast.Tuple) else one for one in node.iter.elts]
        if isinstance(first, ast.Name) and all(isinstance(one, ast.Constant) for one in names):
            loops = loops | {first.id: [str(one.value) for one in names]}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [
            [one.value] if isinstance(one, ast.Constant) else loops.get(ast.unparse(one.value), [" "])
            for one in node.values
        ]
        yield from map("".join, itertools.product(*parts))
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child, loops)


def _named(source: str) -> list[str]:
    """Options in the texts of a module: flags, and keys of `fit` but for docstrings, which name Python."""
    tree = ast.parse(source)
    flags = [name for text in _texts(tree, {}) for name in FLAG.findall(text)]
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return [*flags, *(name for text in _texts(tree, {}) for name in KEY.findall(text))]


def test_names_are_found_in_messages_and_where_a_loop_writes_them():
    source = '''
def check(self):
    """Not data.parts, which is Python; but --pools."""
    for name, why in (("alpha", 1), ("beta", 2)):
        raise ConfigError(f"data.mix.{name} is {why}, --recipe.{name} too. "
                          f"Use model.pool, not vit_cls.model.pool or model.build().")
'''
    keys = {"data.mix.alpha", "data.mix.beta", "model.pool"}
    assert set(_named(source)) == {*keys, "recipe.alpha", "recipe.beta", "pools"}


def test_every_option_that_a_text_names_is_one(options):
    assert {module.__name__ for module in VERBS} == {module for _, module in COMMANDS.values()}
    named = {
        path.relative_to(PACKAGE): [
            name for name in _named(path.read_text()) if name not in OTHER_PROGRAMS.get(path.name, ())
        ]
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    known = options | WITHOUT_PARSER | NO_OPTIONS | {flag.lstrip("-") for flag in ALIASES}
    unknown = {str(path): set(names) - known for path, names in named.items()}
    assert {path: names for path, names in unknown.items() if names} == {}
    assert {flag.removeprefix("--") for flag in LISTS} <= options
    assert len(options) > 150
    found = [name for names in named.values() for name in names]
    assert len(found) > 400
    assert len(set(found)) > 120
