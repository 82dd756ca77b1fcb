"""Which process of a run this one is: by what the Trainer is given, not by what the environment holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.utilities import rank_zero_only

from vit_cls.errors import ConfigError

log = logging.getLogger("vit_cls")

PLACE = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables from which Lightning takes the number of a process that nothing else has told it."""


class Alone(LightningEnvironment):
    """Of a run of one process, whatever something else that is launched has left in the environment."""

    @property
    def creates_processes_externally(self) -> bool:
        """Nobody else is to come."""
        return False

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """One of its own."""
        if self._main_port == -1:
            self._main_port = find_free_network_port()
        return self._main_port

    def local_rank(self) -> int:
        """The first process."""
        return 0

    def node_rank(self) -> int:
        """The first machine."""
        return 0


def is_first_process() -> bool:
    """Whether this process speaks and writes for the run; right once `take_place` was called."""
    return getattr(rank_zero_only, "rank", 0) == 0


def take_place(arguments: Mapping[str, Any]) -> None:
    """Let `is_first_process`, and Lightning's loggers, know before there is a Trainer which process this is.

    Args:
        arguments: The Trainer's. Those that it will refuse are left for it to complain of.

    Raises:
        ConfigError: If what the environment says of the processes is not what the arguments say.
    """
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    environment = environment_of(arguments)
    if isinstance(environment, Alone):
        _check_alone()
        return
    try:
        strategy = _connector(arguments, environment).strategy
    except Exception:
        return
    rank, size = strategy.global_rank, getattr(strategy, "world_size", 1)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    variables = " ".join(f"{name}={os.environ[name]}" for name in PLACE if name in os.environ)
    if rank >= size:
        raise ConfigError(
            f"the environment ({variables}) says that this is process {rank}, counted from 0, of a run of "
            f"{size} (trainer.devices times trainer.num_nodes). Give the numbers that its processes were "
            f"started with, or take away what another program has left: {_without(PLACE)}."
        )
    lightnings = type(getattr(strategy, "cluster_environment", None)) is LightningEnvironment
    if lightnings and "LOCAL_RANK" in os.environ and "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"the environment ({variables}) says that somebody else starts the {size} processes of this run, "
            "but no MASTER_PORT says where they meet. Start them by torchrun; or, where another program has "
            f"left that, take it away, and they are started from here: {_without(['LOCAL_RANK'])}."
        )


def environment_of(arguments: Mapping[str, Any]) -> ClusterEnvironment | None:
    """What the Trainer of a run of one process is to ask which one it is; None lets Lightning find out."""
    if _given_environment(arguments) is not None:
        return None
    try:
        connector = _connector(arguments, Alone())
        alone = len(connector._parallel_devices) == 1 == connector._num_nodes_flag
    except Exception:  # the Trainer will say what it is
        return None
    return Alone() if alone else None


def _check_alone() -> None:
    """Refuse several processes of torchrun, each of which would be a run of its own."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if torch.distributed.is_torchelastic_launched() and processes not in ("0", "1"):
        raise ConfigError(
            f"torchrun has started {processes} processes, but trainer.devices times trainer.num_nodes is 1. "
            "For one run of all of them give --trainer.devices "
            f"{os.environ.get('LOCAL_WORLD_SIZE', processes)}; for a run of its own, in a process that "
            f"torchrun has started for something else: {_without(['TORCHELASTIC_RUN_ID'])}."
        )
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks not in ("0", "1"):
        log.info(
            f"this is one of {tasks} tasks of a Slurm step, and trains by itself: trainer.devices times "
            f"trainer.num_nodes is 1. For one run of all of them give --trainer.devices {tasks}"
        )


def _connector(arguments: Mapping[str, Any], environment: ClusterEnvironment | None) -> _AcceleratorConnector:
    """What a Trainer makes of its arguments, before there is one; objects are for the Trainer alone."""
    given = {key: arguments[key] for key in ("accelerator", "devices", "num_nodes") if arguments.get(key)}
    strategy = arguments.get("strategy") or "auto"
    if isinstance(strategy, Strategy):
        if devices := getattr(strategy, "parallel_devices", None):
            given["devices"] = len(devices)
        strategy = "ddp" if isinstance(strategy, DDPStrategy) else "auto"
    environment = environment or _given_environment(arguments)
    plugins = None if environment is None else [environment]
    return _AcceleratorConnector(**given, strategy=strategy, plugins=plugins)


def _given_environment(arguments: Mapping[str, Any]) -> ClusterEnvironment | None:
    """The user's own, of the plugins or the strategy."""
    plugins = arguments.get("plugins") or ()
    given = [*(plugins if isinstance(plugins, Iterable) else [plugins])]
    given.append(getattr(arguments.get("strategy"), "cluster_environment", None))
    return next((one for one in given if isinstance(one, ClusterEnvironment)), None)


def _without(variables: Iterable[str]) -> str:
    return f"env {' '.join(f'-u {name}' for name in variables)} vit-cls fit ..."
