"""Whether the configuration of a run may be followed that is resumed: the folder may be anybody's.

A class path in it makes Lightning's parser import a module and call what it names, and so may any text in its
place, or in that of a function.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vit_cls.errors import ConfigError
from vit_cls.own_code import OPTION, imported

LIGHTNING = (
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies"),
    *("lightning.pytorch.profilers", "lightning.pytorch.accelerators", "lightning.pytorch.plugins"),
    *("lightning.pytorch.plugins.environments", "lightning.pytorch.plugins.io"),
    "lightning.pytorch.plugins.precision",
)
"""Whose public classes a run may name."""

TEXTS = ("model", "optim", "data")
"""Groups of settings that are our own, plain values; what they name is looked up in tables, or is a path."""
CALLED = ("data.augment",)
"""Settings of `TEXTS` that may be a function."""
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_TRUST = "--trust_config"


def check_trust(values: Any, file: Path) -> None:
    """Refuse a configuration that names anything to import but classes of Lightning's and known own code.

    Own code is known where its module was named again by ``--import``. Nothing is imported to find out.

    Args:
        values: As YAML gives them, within the limits of a configuration file.
        file: Where they are from.

    Raises:
        ConfigError: With the first name that is not known.
    """
    for key, name in _named(values, "", file.parent):
        if not _is_known(name):
            module = name.partition(".")[0]
            raise ConfigError(
                f"{file} names {name} for {key or 'itself'}. A run that is resumed may be anybody's, so it "
                "may name classes of Lightning's (callbacks, loggers, strategies, profilers, plugins) alone. "
                f"If it is your own code, name its module again ({OPTION} {module}); if you know this file, "
                f"give {_TRUST}."
            )


def _named(value: Any, key: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Each setting, dotted, and what it may make a parser import or read."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            inner_key = f"{key}.{name}".lstrip(".")
            if name == "class_path" and isinstance(inner, str):
                yield key, inner
            else:
                yield from _named(inner, inner_key, folder)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _named(inner, key, folder)
    elif isinstance(value, str):
        yield from _named_in(value, key, folder)


def _named_in(text: str, key: str, folder: Path) -> Iterator[tuple[str, str]]:
    group, _, name = key.partition(".")
    if group in TEXTS and name and key not in CALLED:
        return
    if group == "config" or _is_file(Path(text)) or _is_file(folder / text):
        yield key, f"the file {text}"
        return
    try:
        inner = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError):
        inner = None
    if isinstance(inner, (Mapping, list)):
        yield from _named(inner, key, folder)
    # As an expression of types: whitespace and brackets mean nothing there, and wide letters are narrow.
    for match in _PATH.finditer(re.sub(r"[\s()\\]", "", unicodedata.normalize("NFKC", text))):
        if _is_importable(match[0].partition(".")[0]):
            yield key, match[0]


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _is_importable(module: str) -> bool:
    """Whether there is a top module of that name; such a module is not imported by asking."""
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return True


def _is_known(name: str) -> bool:
    if "." not in name:  # a class that is there already, by its own name
        return name.isidentifier()
    module, _, attribute = name.rpartition(".")
    if module.startswith("lightning."):
        return name in lightning_classes()
    top = module.partition(".")[0]
    if top != "vit_cls" and top not in {own.partition(".")[0] for own in imported().values()}:
        return False
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    ours = str(getattr(found, "__module__", "")).partition(".")[0] == top
    return ours and (isinstance(found, type) or (top != "vit_cls" and callable(found)))


def lightning_classes() -> set[str]:
    """Every public class of `LIGHTNING`, by both its paths: where it is found, and where it is defined."""
    names: set[str] = set()
    for place in LIGHTNING:
        module = importlib.import_module(place)
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__.startswith("lightning.") and name[0] != "_":
                names |= {f"{place}.{name}", f"{value.__module__}.{value.__qualname__}"}
    return names
