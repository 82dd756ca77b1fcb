"""A weights file to a dict of tensors, whatever its format; no code in it ever runs."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vit_cls.errors import ModelFileError
from vit_cls.weights.archives import asked_for, check_archive, check_pickle, check_tensors
from vit_cls.weights.digest import check_seal

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", ".npz", *PICKLE_SUFFIXES)
"""What a weights file may end with."""

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "teacher",
    "state_dict",
    "model",
    "module",
    "encoder",
    "target_encoder",
)
"""Names under which training scripts keep a model's tensors; of several the first is taken, and said."""

PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.", "net.")
"""What compiling, data parallelism, Lightning and self-distillation put in front of every key."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a source, ready to be converted."""

    raw: Mapping[str, Tensor | None]  # under the file's own names; None: not read
    state: dict[str, Tensor]  # under timm's names, for the grid of the target
    config: Any  # tokens and classes as found in the file
    remarks: tuple[str, ...] = ()  # for the user


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every tensor of a weights file, and remarks: which of several models in it was taken.

    What is no safetensors file is a pickle: opened for tensors and plain data alone, nothing in it runs.
    ModelFileError if the file is missing, damaged, or holds anything else.
    """
    check_weights_file(path)
    if path.suffix == ".safetensors":
        try:
            return strip_prefixes(load_file(path)), ()
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{path} is damaged or no safetensors file: {error}. Copy or download it again."
            ) from error
    return _unwrap(_read_pickle(path), path)


def check_weights_file(path: Path) -> None:
    """ModelFileError for what is missing, or no weights file by its name or first bytes (an error page)."""
    if not path.is_file():
        raise ModelFileError(f"there is no file {str(path)!r}.")
    if path.suffix not in SUFFIXES:
        raise ModelFileError(
            f"{path} does not look like a weights file: known endings are {', '.join(SUFFIXES)}."
        )
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ModelFileError(f"{path} is empty. Copy or download it again.")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ModelFileError(
            f"{path} is a web page, not weights: the download was answered with a page (a login, an error). "
            "Open the address in a browser, or download the file again."
        )
    if text.startswith(b"version https://git-lfs"):
        raise ModelFileError(
            f"{path} is a pointer of Git LFS, not the weights themselves. Run `git lfs pull` where it came "
            "from."
        )


def _read_pickle(path: Path) -> Any:
    check_archive(path)
    check_pickle(path)
    try:
        # timm's own training checkpoints hold their options as a Namespace: plain data, like a dict.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch about how the file was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        if "TorchScript" in str(error):
            raise ModelFileError(
                f"{path} is a TorchScript program, not weights: nothing of it was run. Ask for a "
                ".safetensors file, or save the state dict alone."
            ) from error
        if names := _forbidden(path, error):
            raise ModelFileError(
                f"{path} holds more than tensors and plain data, and that may be a program: nothing of it "
                f"was run. It asks for {', '.join(names[:5])}. Ask for a .safetensors file, or save the "
                "state dict alone."
            ) from error
        whole = zipfile.is_zipfile(path)
        problem = "is not a file of torch's" if whole else "is damaged (truncated?) or no file of torch's"
        raise ModelFileError(f"{path} {problem}{_reason(error)}. Copy or download it again.") from error
    check_tensors(content, path)
    if isinstance(content, dict):  # also one of ours that is too damaged to be told as such
        check_seal(content, path)
    return content


def _forbidden(path: Path, error: Exception) -> list[str]:
    """What a pickle asks for that is neither a tensor nor plain data; nothing of it is run to find out."""
    named = re.findall(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))
    if named:
        return list(dict.fromkeys(named))
    # torch refuses pickles of protocol 4 and later before it looks at what they ask for
    return asked_for(path, pickles=1)[0]


def _reason(error: Exception) -> str:
    """torch's reason, less its advice to open the file by running it."""
    return "" if "weights_only" in str(error) else f": {_first_line(error)}"


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(". This ")[0].rstrip(".")


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    remarks: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content):
        models = [name for name in WRAPPERS if isinstance(content.get(name), Mapping) and content[name]]
        if not models:
            break
        if len(models) > 1:
            remarks.append(f"the file holds {', '.join(models)}; {models[0]} was taken")
        content = content[models[0]]
    if not isinstance(content, Mapping) or not _is_state(content):
        keys = (
            f" (it has {', '.join(map(str, list(content)[:5]))})"
            if isinstance(content, Mapping) and content
            else ""
        )
        raise ModelFileError(f"{path} holds no state dict of tensors{keys}.")
    state = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return strip_prefixes(state), tuple(remarks)


def _is_state(content: Mapping[Any, Any]) -> bool:
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    return tensors > 0 and tensors >= len(content) / 2


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers put in front of every key: ``module.``, ``_orig_mod.`` and the like."""
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                changed = True
    return state
