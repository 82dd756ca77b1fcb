"""Code of the user's own: modules that ``--import`` names, and what they make known by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from vit_cls.errors import ConfigError, did_you_mean

Row = TypeVar("Row")

OPTION = "--import"
HINT = f"One of your own is known after {OPTION} MODULE."
"""For messages about a name that is in no table."""
NAME = r"[a-z][a-z0-9_-]*"
"""What a name may be, where a kind has no grammar of its own."""

_IMPORTED: dict[str, str] = {}
_OWN: dict[tuple[str, str], tuple[object, str]] = {}
"""Kind and name of what was registered: what was given, and by which module."""
_importing: list[str] = []


def take_imports(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Words of a command line without ``--import MODULE`` and ``--import=MODULE``, and those modules.

    Raises:
        ConfigError: If nothing follows ``--import``.

    Example:
        >>> take_imports(["--data", "photos", "--import", "own.pools", "--import=losses.py"])
        (['--data', 'photos'], ['own.pools', 'losses.py'])
    """
    rest: list[str] = []
    modules: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag != OPTION:
            rest.append(word)
            continue
        value = value if equals else next(left, "")
        if not value or value.startswith("--"):
            raise ConfigError(
                f"{OPTION} needs a module or a .py file behind it; got {value or 'nothing'}. Example: "
                f"{OPTION} own_code.py."
            )
        modules.append(value)
    return rest, modules


def import_modules(words: Iterable[str]) -> None:
    """Import the modules of this command line, and remember them as such: see `imported`.

    Args:
        words: Dotted names, found from the current folder or on Python's path, or paths of ``.py`` files.

    Raises:
        ConfigError: If one cannot be imported; the message has the reason, with file and line.
    """
    _IMPORTED.clear()
    for word in words:
        _importing.append(word)
        try:
            _IMPORTED[word] = _import(word)
        finally:
            _importing.pop()


def imported() -> dict[str, str]:
    """What was given to ``--import``, as it was written, and the name of the module that it is."""
    return dict(_IMPORTED)


def file_digests(modules: Mapping[str, str]) -> dict[str, str]:
    """A digest of the file of each module of `imported`, by the word."""
    files = {word: getattr(sys.modules.get(module), "__file__", None) for word, module in modules.items()}
    return {
        word: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32] for word, file in files.items() if file
    }


def import_options(words: Iterable[str] | None = None) -> str:
    """The options that import those modules, each with a space before it; None means those of `imported`.

    Example:
        >>> import_options(["own.py"])
        ' --import own.py'
    """
    return "".join(f" {OPTION} {word}" for word in (_IMPORTED if words is None else words))


def not_imported(modules: Mapping[str, str]) -> list[str]:
    """The words, of what `imported` gave once, whose module is not there now."""
    return [word for word, module in modules.items() if module not in sys.modules]


def register(
    table: dict[str, Row], kind: str, name: str, row: Row, given: object = None, *, pattern: str = NAME
) -> None:
    """Add a row of the user's to a table, and note which module did so; for functions ``register_...`` alone.

    Args:
        kind: What the table holds, for messages: ``pooling``.
        given: What the user gave, where the row is made of it; it decides what is the same.
        pattern: What a name may be.

    Raises:
        ConfigError: If the name cannot be written, or is taken by another. The same may come again, as from
            a module with two names, or a cell that is run twice.
    """
    if not isinstance(name, str) or not re.fullmatch(pattern, name):
        end = "" if pattern == NAME else ", ending with a letter"
        article = "an" if kind[0] in "aeiou" else "a"
        raise ConfigError(
            f"the name of {article} {kind} must be small letters, digits and hyphens{end}; got {name!r}."
        )
    given = row if given is None else given
    if name in table and not _same(_OWN.get((kind, name), (table[name], ""))[0], given):
        raise ConfigError(f"the {kind} {name} is there already. Choose another name.")
    if table.get(name) is given and (kind, name) not in _OWN:
        return  # one of ours
    table[name] = row
    caller = sys._getframe(2).f_globals.get("__name__", "__main__")
    _OWN[kind, name] = (given, _importing[-1] if _importing else caller)


def origin(kind: str, name: str) -> str | None:
    """Which module registered a name, as it was given to ``--import`` if it was; None for a row of ours."""
    return _OWN[kind, name][1] if (kind, name) in _OWN else None


def _same(first: object, second: object) -> bool:
    """Whether two rows have the same source: one file's class or function, or objects that read alike."""
    if first is second:
        return True
    names = [getattr(row, "__qualname__", None) for row in (first, second)]
    if None in names:
        return type(first) is type(second) and repr(first) == repr(second)
    files = [_source(str(getattr(row, "__module__", ""))) for row in (first, second)]
    return names[0] == names[1] and files[0] == files[1] and "<lambda>" not in str(names[0])


def _source(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or module


def _import(word: str) -> str:
    """Import one module, and give its name."""
    name, folder = word, Path.cwd()
    if word.endswith(".py"):
        path = Path(word).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"{OPTION} {word}: there is no such file.")
        name, folder = path.stem, path.parent
    if not all(re.fullmatch(r"\w[\w-]*", part) for part in name.split(".")) or (name != word and "." in name):
        raise ConfigError(
            f"{OPTION} takes a module, such as own_code or package.own_code, or a file that ends with .py; "
            f"got {word!r}."
        )
    # Last, so that nothing there hides a library. Processes that are started get this path too.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    _refuse_another(word, name.partition(".")[0], folder)
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{OPTION} {word} {_reason(name, folder, error)}") from error
    return name


def _refuse_another(word: str, name: str, folder: Path) -> None:
    """A file that is named like another module would not be the one that is imported."""
    wanted = [path for path in (folder / name / "__init__.py", folder / f"{name}.py") if path.is_file()]
    if not wanted:
        return
    module = sys.modules.get(name)
    known = (
        getattr(module, "__file__", None)
        if module
        else getattr(importlib.util.find_spec(name), "origin", None)
    )
    if known is None or not any(path.samefile(known) for path in wanted if Path(known).is_file()):
        raise ConfigError(
            f"{OPTION} {word}: {wanted[0]} is named like the module {name} that Python knows already "
            f"({known or 'built in'}). Rename it."
        )


def _reason(name: str, folder: Path, error: BaseException) -> str:
    """Why a module cannot be imported, in words; ``name`` is its own."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent is not None and f"{name}.".startswith(f"{absent}."):
        files = [path.stem for path in folder.glob("*.py")]
        return (
            f"cannot be imported: there is no module {absent} in {folder} or on Python's path."
            f"{did_you_mean(name, files)}"
        )
    if isinstance(error, SyntaxError):
        return f"cannot be imported: {error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    frames = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    theirs = [frame for frame in frames if Path(frame.filename).parent == Path(frames[0].filename).parent]
    place = f"{theirs[-1].filename}:{theirs[-1].lineno}: " if theirs else ""
    said = " ".join(str(error).split()).rstrip(".")
    return f"cannot be imported: {place}{type(error).__name__}{f': {said}' if said else ''}."
