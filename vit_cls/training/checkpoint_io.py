"""How checkpoints are written and read: whole or not at all, with a digest, and the one before is kept."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from vit_cls.errors import ModelFileError, RunError
from vit_cls.files import replacing, sync_file
from vit_cls.weights.archives import check_archive, check_pickle
from vit_cls.weights.digest import check_seal, seal

log = logging.getLogger("vit_cls")

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
CANDIDATES = (LAST, PREVIOUS, BEST)
"""From which a run goes on, in this order, where one is damaged."""
RECORD_KEY = "vit_cls_record"
"""What ``run.json`` says, as JSON, in every checkpoint."""


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything in a folder of checkpoints to go on from."""
    return any((folder / name).exists() for name in CANDIDATES)


class RunCheckpointIO(TorchCheckpointIO):
    """Write beside the place, to the disk, with a digest; keep the last checkpoint but one; trust no file.

    Lightning's own writes into the folder for temporary files, which is often another file system: what it
    then moves is a copy, over the old file, and nothing waits for the disk.
    """

    def __init__(self) -> None:
        self.damaged: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace a file; there is a complete one, this or the one before, at any moment.

        Raises:
            OSError: If the disk is full, say; the file stays as it was.
        """
        if "://" in str(path):  # a user's callback that saves elsewhere
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        seal(checkpoint)
        with replacing(path) as temporary:
            _write(checkpoint, temporary)
            if path.name == LAST and path not in self.damaged:
                _keep(path, path.with_name(PREVIOUS))
        self.damaged.discard(path)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What a file holds; where ``last.ckpt`` is damaged or gone, the one before, or the best one.

        Raises:
            ModelFileError: If it is damaged, or holds more than tensors and plain data.
            RunError: If no checkpoint of the run is whole.
        """
        path, wrong = Path(path), []
        names = CANDIDATES if path.name == LAST else (path.name,)
        for place in (path.with_name(name) for name in names):
            if not os.path.lexists(place):
                continue
            try:
                checkpoint = read_checkpoint(place)
            except ModelFileError as error:
                wrong.append(error)
                self.damaged.add(place)
                continue
            if place != path:
                said = f" ({wrong[0]})" if wrong else ""
                log.warning(
                    f"{path.name} cannot be used{said}: the run goes on from {place.name}, after step "
                    f"{checkpoint.get('global_step')}"
                )
            return checkpoint
        if len(names) == 1 and wrong:
            raise wrong[0]
        reasons = " ".join(map(str, wrong)) or "there is none."
        raise RunError(
            f"{path.parent} holds no checkpoint that is whole: {reasons} Begin it again in another folder."
        )

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain data of a checkpoint on the CPU, compared with its digest.

    Raises:
        ModelFileError: If it is damaged, no checkpoint, or holds anything else.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    check_archive(path)
    check_pickle(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        raise ModelFileError(f"{path} is damaged, or no checkpoint that torch can read.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "loops" not in checkpoint:
        raise ModelFileError(f"{path} is no checkpoint of a run.")
    check_seal(checkpoint, path)
    return checkpoint


def record_in(folder: Path) -> dict[str, Any] | None:
    """The record of the run whose checkpoints are in a folder, if one of them is whole."""
    for name in CANDIDATES:
        with contextlib.suppress(ModelFileError, KeyError, ValueError):
            return dict(json.loads(read_checkpoint(folder / name)[RECORD_KEY]))
    return None


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
        sync_file(path)  # before the one before it gives up its place
    except RuntimeError as error:  # torch's writer says that it failed, and not why
        with path.open("ab") as file:
            file.write(bytes(2**20))
            sync_file(path)
        raise OSError(errno.EIO, f"the checkpoint cannot be written: {str(error).splitlines()[0]}") from error


def _keep(path: Path, previous: Path) -> None:
    """Let a file that is about to be replaced have a second name."""
    if not path.is_file():
        return
    link = previous.with_name(f".{previous.name}.link.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:  # a file system without links
        os.replace(path, previous)
        return
    try:
        os.replace(link, previous)
    finally:
        with contextlib.suppress(OSError):  # two names of one file are not replaced by each other
            link.unlink()
