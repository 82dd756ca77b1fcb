"""Documented parameters are the signature's, and what is public is documented."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import vit_cls

TOLD_IN_A_SENTENCE = 2
"""So many arguments the first sentence can tell; more need lines of their own, if only those worth a word."""


def _modules():
    names = [
        m.name for m in pkgutil.walk_packages(vit_cls.__path__, "vit_cls.") if not m.name.endswith("__main__")
    ]
    return [importlib.import_module(name) for name in ["vit_cls", *names]]


def _public():
    """(name, object) of every public function, class and method that the package defines."""
    for module in _modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            elif inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing
                for method_name, method in vars(thing).items():
                    if inspect.isfunction(method) and not method_name.startswith("_"):
                        yield f"{module.__name__}.{name}.{method_name}", method


PUBLIC = dict(_public())


def _used_in_other_rooms() -> set[str]:
    """Names that a file of another room imports: those have their arguments documented."""
    root = Path(vit_cls.__file__).parent
    used: set[str] = set()
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            parts = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if len(parts) > 1 and parts[0] == "vit_cls" and parts[1] != room:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
    return used


USED_IN_OTHER_ROOMS = _used_in_other_rooms()


def _documented(docstring: str) -> list[str]:
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    return re.findall(r"^ {4}(\w+):", section[1], re.MULTILINE) if section else []


def _parameters(thing) -> list[str]:
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            return [field.name for field in dataclasses.fields(thing) if field.init]
        if "__init__" not in vars(thing) or getattr(thing, "_is_protocol", False):
            return []
        thing = thing.__init__
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def test_the_sweep_found_the_public_names():
    assert len(PUBLIC) >= 120
    assert "vit_cls.model.vit.VisionTransformer.embed_tokens" in PUBLIC
    assert len(USED_IN_OTHER_ROOMS) >= 100


def test_every_module_opens_with_a_sentence():
    for module in _modules():
        assert module.__doc__, module.__name__
        assert module.__doc__.strip(), module.__name__


@pytest.mark.parametrize("name", PUBLIC)
def test_documented_parameters_are_the_signatures(name):
    thing = PUBLIC[name]
    docstring = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if docstring is None and _is_hook(name):
        return
    assert docstring, f"{name} has no docstring"
    if dataclasses.is_dataclass(thing) and docstring.startswith(f"{thing.__name__}("):
        pytest.fail(f"{name} has only the generated docstring")
    documented = _documented(docstring)
    if documented:
        names = iter(_parameters(thing))
        assert all(one in names for one in documented), name  # in their order; what needs no words has none
    elif name not in USED_IN_OTHER_ROOMS:
        return
    elif inspect.isclass(thing):
        inherited = any(
            _parameters(base) == _parameters(thing) for base in thing.__mro__[1:-1] if base.__doc__
        )
        assert inherited or len(_parameters(thing)) <= TOLD_IN_A_SENTENCE, f"{name} documents no arguments"
    elif not _is_hook(name):
        assert len(_parameters(thing)) <= TOLD_IN_A_SENTENCE, f"{name} documents no arguments"


def _is_hook(name: str) -> bool:
    """Methods that a base class defines too: what they do, and their arguments, is documented there."""
    path, _, method = name.rpartition(".")
    module, _, owner = path.rpartition(".")
    thing = getattr(sys.modules.get(module), owner, None)
    return inspect.isclass(thing) and any(hasattr(base, method) for base in thing.__mro__[1:-1])
