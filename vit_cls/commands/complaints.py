"""What a parser complains of, as one clear paragraph."""

from __future__ import annotations

import re

from vit_cls.errors import did_you_mean


def explain(message: str, keys: list[str]) -> str:
    """A complaint in one paragraph; the nearest of the known keys is named."""
    if match := re.search(r"[Uu]nrecognized arguments: (.+)", message):
        words = match[1].split()
        flag = next((word for word in words if word.startswith("-")), None)
        if flag is None:
            return f"unexpected word(s): {match[1]}. Options are written --key value; see --help."
        return _unknown(flag.lstrip("-").partition("=")[0], keys, written=flag.partition("=")[0])
    if match := re.search(r"[Gg]roup '([^']+)' does not accept option '([^']+)'", message):
        return _unknown(f"{match[1]}.{match[2]}", keys)
    if match := re.search(r"[Oo]ption '([^']+)' is not accepted", message):
        return _unknown(match[1], keys)
    if match := re.search(r'Parser key "([^"]+)":(.*)', message, re.DOTALL):
        return _wrong_value(match[1], match[2])
    return f"{' '.join(message.split())} (see --help)"


def _unknown(key: str, keys: list[str], *, written: str | None = None) -> str:
    return f"unknown key {written or key}.{did_you_mean(key, keys)} `--help` lists every key."


def _wrong_value(key: str, details: str) -> str:
    """jsonargparse lists every type it tried; the user needs the types and the value."""
    value = re.search(r"(?:Given value|Got value): (.*)", details)
    types = list(dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", details)))
    words = {
        "NoneType": "null",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
    }
    if value and types:
        return f"{key} must be {' or '.join(words.get(t, t) for t in types)}; got {value[1].strip()!r}."
    return f"{key}: {' '.join(details.split())}"
