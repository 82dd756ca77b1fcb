"""Digests of what a file holds, kept inside it: a flipped bit is told, and never computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_cls.errors import ModelFileError
from vit_cls.verification import VERIFY

DIGEST_KEY = "vit_cls_digest"
"""Of a model file's metadata: digests by tensor, and that of the other metadata; of a checkpoint: of all."""
RUN_KEY = "vit_cls_position"
"""A checkpoint that has this is of `fit`, and so has a digest."""


def digest_of(content: Any) -> str:
    """SHA-256 of nested plain data and tensors: of names, kinds, dtypes, shapes and bytes.

    Args:
        content: Dictionaries, lists, tuples, sets, tensors, numbers, texts, None; of others what they print.

    Example:
        >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(2)})
        True
        >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        digest.update(f"T{content.dtype}{tuple(content.shape)}".encode())
        plain = content.detach().cpu()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        elif plain.is_quantized:
            plain = plain.int_repr()
        flat = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.stride() != (1,):  # of one value, which is contiguous for any stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(content, Mapping):
        digest.update(f"D{len(content)}".encode())
        if (versions := getattr(content, "_metadata", None)) is not None:  # of a module's state_dict
            _add(digest, versions)
        for key, value in content.items():
            _add(digest, key)
            _add(digest, value)
    elif isinstance(content, list | tuple):
        digest.update(f"{'L' if isinstance(content, list) else 'P'}{len(content)}".encode())
        for value in content:
            _add(digest, value)
    elif isinstance(content, set | frozenset):  # their order is another in each process
        digest.update(f"S{len(content)}{''.join(sorted(map(digest_of, content)))}".encode())
    else:
        text = repr(content).encode("utf-8", errors="surrogatepass")
        digest.update(f"{type(content).__name__}{len(text)}:".encode() + text)


def check_content(content: Any, most: int = 1_000_000) -> None:
    """ValueError for plain data that stands for more than it is: lists in lists, each of them many times."""
    waiting, looked_at = [content], 0
    while waiting:
        value = waiting.pop()
        looked_at += 1
        if looked_at > most:
            raise ValueError(f"it stands for more than {most:,} values")
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value


def seal(checkpoint: dict[str, Any]) -> None:
    """Put the digest of a checkpoint into it."""
    checkpoint.pop(DIGEST_KEY, None)
    checkpoint[DIGEST_KEY] = digest_of(checkpoint)


def check_seal(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Compare a checkpoint with the digest in it; one of anybody's Trainer, or an old one, has none.

    Raises:
        ModelFileError: If they differ, or `fit` wrote it and the digest has gone.
    """
    told = checkpoint.pop(DIGEST_KEY, None)
    if not VERIFY.get() or (told is None and RUN_KEY not in checkpoint):
        return
    try:
        check_content(checkpoint)
        found = digest_of(checkpoint)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged or made up: {error or 'nested without end'}.") from error
    if told != found:
        raise ModelFileError(
            f"{path} is damaged: what it holds is not what was written (SHA-256). Copy it again, or take "
            "another checkpoint of the run."
        )


def tensor_digests(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """The digests of a model file, as its own metadata has them.

    Args:
        metadata: The rest of its metadata.
    """
    digests = {"metadata": digest_of(metadata), "tensors": {k: digest_of(v) for k, v in tensors.items()}}
    return json.dumps(digests, sort_keys=True)


def check_metadata_of(metadata: str, told: str | None, path: Path) -> dict[str, str]:
    """Compare the metadata of a model file with their digest, and give those of the tensors.

    Args:
        told: See `check_tensors_of`.

    Raises:
        ModelFileError: If they differ, or there is no digest.
    """
    if not VERIFY.get():
        return {}
    try:
        known = {} if told is None else json.loads(told)
        digests: Any = known.get("tensors")
        if not isinstance(digests, dict) or known.get("metadata") != digest_of(metadata):
            raise ValueError
    except (ValueError, RecursionError, AttributeError):
        raise _damaged(path, "its metadata") from None
    return digests


def check_tensors_of(tensors: Mapping[str, Tensor], metadata: str, told: str | None, path: Path) -> None:
    """Compare a model file with the digests in it.

    Args:
        told: What `tensor_digests` gave when it was written; None where the file has none.

    Raises:
        ModelFileError: Names the tensors that are damaged.
    """
    digests = check_metadata_of(metadata, told, path)
    if not VERIFY.get():
        return
    names = [name for name in {**digests, **tensors} if name not in digests or name not in tensors]
    names += [name for name in tensors if name in digests and digest_of(tensors[name]) != digests[name]]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise _damaged(path, f"{', '.join(sorted(names)[:3])}{more}")


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged: {what} is not what was written (SHA-256). Copy or export it again."
    )
