"""Configuration files, read with limits: some kilobytes must not take all memory, or end the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vit_cls.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000
"""Aliases count as often as they are repeated: ten lines can stand for billions of values."""
MAX_DIGITS = 300
MOST_QUOTED = 5
"""How often YAML in a text in YAML is looked into."""
_NUMBER = re.compile(r"[-+]?(?:[0-9]|0[xob])[0-9a-fA-F_:.+-]*")


def read_config(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        ConfigError: If it cannot be read, is no YAML of plain values, or breaks a limit of `check_config`.
    """
    text = check_config(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}.") from error


def check_config(path: Path) -> str:
    """The text of a YAML file, whose size, depth, aliases and numbers are within limits.

    What is no YAML at all is left to the parser of options, whose message names the place.

    Raises:
        ConfigError: If it cannot be read, or a limit is broken.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error
    too_much = f"it has more than {MAX_BYTES} bytes" if len(data) > MAX_BYTES else _excess(text)
    if too_much is not None:
        raise ConfigError(f"{path} is not read as a configuration: {too_much}.")
    return text


def _excess(text: str, level: int = 0) -> str | None:
    """Which limit a YAML text breaks; None where it breaks none, or is no YAML from some place on."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and nodes so far, from the outside in
    try:
        for event in _events(text):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, inside = open_nodes.pop()
                if anchor is not None:
                    sizes[anchor] = inside
                open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + inside)
                continue
            count = sizes.get(event.anchor or "", MAX_NODES) if isinstance(event, yaml.AliasEvent) else 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count))
            else:
                open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + count)
                if isinstance(event, yaml.ScalarEvent):
                    sizes[event.anchor or ""] = 1
                    if (excess := _excess_of(event.value, text, level)) is not None:
                        return excess
            if len(open_nodes) > MAX_DEPTH:
                return f"its values are nested more than {MAX_DEPTH} deep"
            if sum(nodes for _, nodes in open_nodes) > MAX_NODES:
                return f"it stands for more than {MAX_NODES} values"
    except (yaml.YAMLError, ValueError):
        return None
    return None


def _events(text: str) -> Iterator[yaml.NodeEvent | yaml.CollectionEndEvent]:
    """Those of nodes; Python's own parser, which holds one event at a time and does not recurse."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
            yield event


def _excess_of(scalar: str, text: str, level: int) -> str | None:
    if len(scalar) > MAX_DIGITS and _NUMBER.fullmatch(scalar):
        return f"a number has {len(scalar)} digits, more than {MAX_DIGITS}"
    # A text may be taken for YAML again, by an option whose values are lists.
    again = MAX_DEPTH < len(scalar) < len(text.strip()) and level < MOST_QUOTED
    return _excess(scalar, level + 1) if again else None
