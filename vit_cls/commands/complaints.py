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
    key = re.match(r'Parser key "([^"]+)":', message)
    if key and (reason := _about_a_class(message)):
        hint = " By one word: --logger csv." if key[1] == "trainer.logger" else ""
        return f"{key[1]}: {reason}{hint}"
    if match := re.search(r"[Gg]roup '([^']+)' does not accept option '([^']+)'", message):
        return _unknown(f"{match[1]}.{match[2]}", keys)
    if match := re.search(r"[Oo]ption '([^']+)' is not accepted", message):
        return _unknown(match[1], keys)
    if match := re.search(r'Parser key "([^"]+)":(.*)', message, re.DOTALL):
        return _wrong_value(match[1], match[2])
    return f"{' '.join(message.split())} (see --help)"


def explain_object(message: str) -> str:
    """Why an object of the configuration could not be made, in one paragraph: a package is missing, say."""
    errors = re.findall(r"^ *- (.*(?:\n {4,}.*)*)", message.partition("Errors:")[2], re.MULTILINE)
    reasons = [
        re.sub(r"^Problem with given class_path '[^']+': ", "", " ".join(error.split()))
        for error in errors
        if not error.startswith(("Expected ", "Not a valid subclass"))
    ]
    names = dict.fromkeys(re.findall(r"class_path='([^']+)'", message))
    if not names:
        return f"the configuration cannot be carried out: {' '.join(message.split())}"
    reason = "; ".join(dict.fromkeys(reasons)) or "a package or a value is missing (--debug shows more)"
    return f"{' or '.join(names)} cannot be made: {reason}"


def _about_a_class(message: str) -> str | None:
    """What is wrong with a class that the user named; None where none is the matter."""
    if match := re.search(r"Problem with given class_path '([^']+)':\s*(.*(?:\n {8,}.*)*)", message):
        name, reason = match[1], " ".join(match[2].split())
        if option := re.search(r"Option '([^']+)' is not accepted", reason):
            return f"{name} has no option {option[1]}."
        if inner := re.search(r'Parser key "([^"]+)":(.*)', reason):
            return f"{name}: {_wrong_value(inner[1], inner[2])}"
        if "No module named" in reason or "cannot import" in reason.lower():
            return (
                f"{name} cannot be imported: {reason}. Its package must be installed, or its file stand "
                "in this folder."
            )
        return f"{name}: {reason.partition(' - ')[0]}."
    if match := re.search(r"Expected a dot import path string: (.+)", message):
        return (
            f"there is no class {match[1]!r}. Give one of Lightning's by its name, such as EarlyStopping, or "
            "any other by its path, such as package.module.Class."
        )
    if match := re.search(r"does not correspond to a subclass of (\w+)", message):
        value = re.search(r"Given value: (.+)", message)
        return f"{value[1] if value else 'what was given'} is no {match[1]}."
    return None


def _unknown(key: str, keys: list[str], *, written: str | None = None) -> str:
    return f"unknown key {written or key}.{did_you_mean(key, keys)} `--help` lists every key."


def _wrong_value(key: str, details: str) -> str:
    """jsonargparse lists every type it tried; the user needs the types and the value."""
    value = re.search(r"(?:Given value|Got value): (.*)", details)
    if value and (made := re.match(r"Namespace\(class_path='([^']+)'", value[1])):
        return (
            f"{key}: {made[1]} lacks an argument, or has a value that is not possible; see its documentation."
        )
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
