"""Words of a verb before its parser gets them: names, lists with commas, old spellings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from vit_cls.errors import ConfigError, did_you_mean

LISTS = ("--recipe.learning_rates",)
"""Options inside others that hold several values, which people write with commas."""
ALIASES = {"--ways": "--pools"}
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def name_and_rest(
    verb: str, words: list[str], table: Mapping[str, Any], *, usage: str, example: str
) -> tuple[str, list[str]]:
    """The name that comes first after a verb such as ``probe``, and the words behind it.

    Args:
        verb: The verb.
        words: The words after it; ``--help`` alone prints the names and exits.
        table: By name, things with a ``question``.
        usage: What is to be written behind the name.
        example: A line that works.

    Raises:
        ConfigError: If there is no name, or an unknown one.
    """
    known = ", ".join(table)
    if words and words[0] in ("-h", "--help"):
        print(f"usage: vit-cls {verb} NAME {usage} [options]\n")
        print("\n".join(f"  {name:<11} {kind.question}" for name, kind in table.items()))
        print(f"\n  vit-cls {verb} NAME --help   the options of a {verb}")
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{verb} needs a name: {known}. Example: {example}.")
    if words[0] not in table:
        raise ConfigError(f"there is no {verb} {words[0]!r}.{did_you_mean(words[0], table)} Known: {known}.")
    return words[0], words[1:]


def comma_lists(words: list[str], kind: type) -> list[str]:
    """``--heads cls,gap`` as the list that the parser wants, and old spellings as today's.

    Args:
        words: The words after the verb.
        kind: A class whose arguments are the options; those that are sequences are lists.

    Example:
        >>> from vit_cls.lab.probes.knn import KnnProbe
        >>> comma_lists(["--pools", "cls,gem:3", "--neighbours=1,2", "--temperatures", ".07,1e-1"], KnnProbe)
        ['--pools', '["cls", "gem:3"]', '--neighbours=[1, 2]', '--temperatures', '[0.07, 0.1]']
        >>> comma_lists(["--ways=cls"], KnnProbe)
        ['--pools=["cls"]']
    """
    words = [re.sub(r"^--\w+", lambda flag: ALIASES.get(flag[0], flag[0]), word) for word in words]
    options = inspect.signature(kind).parameters.values()
    lists = {*LISTS, *(f"--{option.name}" for option in options if "Sequence[" in str(option.annotation))}
    found = list(words)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in lists and equals:
            found[i] = f"{flag}={_list(value)}"
        elif word in lists and i + 1 < len(words):
            found[i + 1] = _list(words[i + 1])
    return found


def _list(text: str) -> str:
    if text.startswith("[") or text == "null":
        return text
    parts = [part.strip() for part in text.split(",")]
    written = (_number(part) if NUMBER.fullmatch(part) else json.dumps(part) for part in parts if part)
    return f"[{', '.join(written)}]"


def _number(text: str) -> str:
    """As JSON has it, which knows no ``.5`` and no ``+1``."""
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return repr(float(text))
