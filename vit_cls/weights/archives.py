"""What a file of weights asks for, looked at before it is opened: none takes memory without end."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickletools import genops
from typing import IO, Any

import torch
from torch import Tensor

from vit_cls.errors import ModelFileError

MAX_RATIO = 20
"""Bytes that an archive may unpack to, for each that it has; weights are stored as they are."""
FREE_BYTES = 64_000_000
"""What any archive may unpack to."""
PICKLES = 5
"""Of which the oldest format of torch's consists, one after the other."""
_GROWING = ("hex", "base64", "uu", "quopri", "quotedprintable", "bz2", "zlib", "zip")
"""Codecs of bytes to bytes; a pickle writes bytes by latin1 alone."""


def check_archive(path: Path) -> None:
    """Refuse (ModelFileError) an archive that would unpack to far more than it holds, by its list of entries.

    What is no archive passes. torch and numpy believe the same list: an entry that holds more is an error.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        size = path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, UnicodeError):
        return  # who opens it says what is wrong
    if unpacked > max(FREE_BYTES, MAX_RATIO * size):
        raise ModelFileError(
            f"{path} is an archive of {size} bytes that unpacks to {unpacked}: no file of weights does that. "
            "Nothing of it was read."
        )


def check_pickle(path: Path) -> None:
    """Refuse (ModelFileError) a pickle that makes memory of nothing by what torch takes for plain data."""
    _check_one_pickle(path)
    names, texts = asked_for(path)
    if any(name.rpartition(".")[2] == "bytearray" for name in names):
        reason = "bytearray"
    elif any(name == "_codecs.encode" for name in names) and any(map(_grows, texts)):
        reason = "_codecs.encode of another kind than latin1"
    else:
        return
    raise ModelFileError(
        f"{path} asks for {reason}, which no file of weights needs. Nothing of it was read. Ask for a "
        ".safetensors file, or save the state dict alone."
    )


def _check_one_pickle(path: Path) -> None:
    """Refuse a file in which another pickle would be looked at than torch reads."""
    try:
        if not zipfile.is_zipfile(path):  # which looks at the end of the file, and torch at its start
            return
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            pickles = sum(name.endswith("data.pkl") for name in archive.namelist())
            file.seek(0)
            is_one = file.read(2) == b"PK" and pickles <= 1
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, UnicodeError):
        return  # who opens it says what is wrong
    if not is_one:
        raise ModelFileError(
            f"{path} is several files in one, which no program writes. Nothing of it was read."
        )


def asked_for(path: Path, pickles: int = PICKLES) -> tuple[list[str], list[str]]:
    """The functions and classes that a pickle names, and its short texts; nothing of it is run."""
    names: list[str] = []
    texts: list[str] = []
    try:
        with open_pickle(path) as file:
            for _ in range(pickles):
                for opcode, argument, _ in genops(file):
                    if opcode.name == "STACK_GLOBAL":
                        names.append(".".join(texts[-2:]))
                    elif opcode.name == "GLOBAL":
                        names.append(str(argument).replace(" ", "."))
                    elif isinstance(argument, str) and len(argument) < 1000:
                        texts.append(argument)
    except Exception:  # no pickle, or cut off: what was found until then counts
        pass
    return list(dict.fromkeys(names)), texts


def open_pickle(path: Path) -> IO[bytes]:
    """The pickle itself: of an archive of torch's its entry, else the file."""
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _grows(text: str) -> bool:
    return "".join(filter(str.isalnum, text.lower())).removesuffix("codec") in _GROWING


def check_tensors(content: Any, path: Path) -> None:
    """Refuse (ModelFileError) tensors without values: one that is repeated a billion times, or none at all.

    Args:
        content: What the file holds; tensors in dicts and lists of any depth are looked at, each once.
    """
    for name, tensor in _tensors(content):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelFileError(
                f"{path} holds the tensor {str(name)[:100]!r} of shape {tuple(tensor.shape)}, but not the "
                "values for all of it. Copy or download it again."
            )


def _tensors(content: Any) -> Iterator[tuple[Any, Tensor]]:
    seen: set[int] = set()
    waiting: list[tuple[Any, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.items() if isinstance(value, Mapping) else ((name, inner) for inner in value)
