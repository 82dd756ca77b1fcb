"""Several processes of one run: they begin alike, one reports a failure, and none outlives the others."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.distributed import _init_dist_connection, _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.constants import default_pg_timeout

from vit_cls.data.datamodule import FROM_ANY_PROCESS
from vit_cls.errors import ConfigError, RunError, VitClsError
from vit_cls.signals import SIGNALS, Stopped, watched
from vit_cls.training.launch import is_first_process

log = logging.getLogger("vit_cls")

TICK_SECONDS = 0.25
ARRIVE_SECONDS = 1800.0
"""How long the processes of a run wait for each other at its start."""
GRACE_SECONDS = 10.0
"""How long process 0 may take to end by itself once another has failed; it has a record to write."""
HURRY_SECONDS = 2.0
"""How long the others may take, and any process after a second signal."""
END_SECONDS = 120.0
"""How long the processes that another one started may take to end after a run that did not fail."""
PARENT = "VIT_CLS_PARENT"
"""Variable that says to a process of a run which one started it."""
WORDS_OF_A_LOST_PEER = ("gloo", "connection", "nccl", "socket", "broken pipe", "store", "peer")
"""In what torch raises where another process is gone."""


_SERVER: dict[tuple[str, int], TCPStore] = {}
"""The store of a run that this process has; it stays for the next run of the same processes."""
_RUNS = itertools.count()


class Company(_SubprocessScriptLauncher):
    """Starts the processes of a run like Lightning's launcher, and stays in touch with them through a store.

    Lightning's own kills its process without a word when another ends, and waits for half an hour for one
    that never began. gloo and NCCL tell of a lost process by a traceback, or never.

    Args:
        strategy: Of the Trainer; this becomes its launcher.
        facts: What must be alike in all processes, by name; it is compared before the first step.
    """

    def __init__(self, strategy: DDPStrategy, facts: Mapping[str, Any]) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self.strategy = strategy
        self.facts = {name: _digest(value) for name, value in facts.items()}
        self.speaks: bool | None = None
        """Whether this process reports how the run failed; None where it did not."""
        self.exit_code = 2
        """Of the run, by who reports."""
        self.children: dict[int, subprocess.Popen[Any]] = {}
        self._parent = os.environ.pop(PARENT, None)
        self._store: Any = None
        self._is_alone = False
        self.rank, self.size = 0, 1
        self._signals = socket.socketpair()
        self._over = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes, if nobody else does; wait for all; then call the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
            first = 1 + self.strategy.node_rank * self.num_processes
            self.children = {first + i: process for i, process in enumerate(self.procs)}
        _set_num_threads_if_needed(num_processes=self.num_processes)
        self.strategy.set_world_ranks()
        self.rank, self.size = self.strategy.global_rank, self.strategy.world_size
        try:
            self._meet()
            return function(*args, **kwargs)
        except Exception as error:
            told = self._account(error)
            if told is error:
                raise
            raise told from error

    def _meet(self) -> None:
        """Wait until all have come, compare what they come with, and make torch's process group."""
        store = self._connect(is_first=self.rank == 0 and not _has_agent())
        self._store = PrefixStore(f"run/{next(_RUNS)}", store)  # a script may train more than once
        self._watch()
        self._wait_for_all("came", json.dumps(self.facts))
        first = json.loads(self._store.get("came/0"))
        others = [name for name, digest in self.facts.items() if first.get(name) != digest]
        if others:
            raise ConfigError(
                f"process {self.rank} of the run has other settings or data than process 0: "
                f"{', '.join(others)}. All processes must read the same files with the same options."
            )
        self._wait_for_all("agrees")
        settings: dict[str, Any] = {"timeout": self.strategy._timeout}
        # A connection of its own: one that waits for an answer keeps all others of its process waiting.
        settings["store"] = PrefixStore("group", self._connect())
        if self.strategy.root_device.type != "cpu":
            settings["device_id"] = self.strategy.root_device
        backend = self.strategy._get_process_group_backend()
        _init_dist_connection(self.cluster_environment, backend, self.rank, self.size, **settings)

    def _connect(self, *, is_first: bool = False) -> TCPStore:
        """A connection to the store at the run's address, which process 0 has, or torchrun's agent."""
        address = self.cluster_environment.main_address, self.cluster_environment.main_port
        made = [_SERVER[address]] if is_first and address in _SERVER else []

        def connect() -> bool:
            with contextlib.suppress(RuntimeError, OSError):
                if not is_first:  # torch tells at length of a connection that is refused
                    socket.create_connection(address, timeout=5).close()
                limit = timedelta(seconds=5)
                made.append(TCPStore(*address, None, is_first, timeout=limit, wait_for_workers=False))
            return bool(made)

        self._wait(connect, f"process 0 answers at {address[0]}:{address[1]}")
        made[0].set_timeout(self.strategy._timeout or default_pg_timeout)
        if is_first:
            _SERVER[address] = made[0]
        return made[0]

    def _wait_for_all(self, word: str, told: str = "") -> None:
        self._store.set(f"{word}/{self.rank}", told)
        everyone = [f"{word}/{rank}" for rank in range(self.size)]
        self._wait(lambda: self._store.check(everyone), "all processes have come")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        """Ask again and again: a signal, or a process that has failed, ends it."""
        end = time.monotonic() + ARRIVE_SECONDS
        while not done():
            if self._failure() is not None or self._is_left():
                raise _Lost
            if time.monotonic() > end:
                raise RunError(
                    f"process {self.rank} of {self.size} has waited for {ARRIVE_SECONDS / 60:.0f} minutes "
                    f"until {what}. See what the other processes say, and that they can reach each other."
                )
            time.sleep(TICK_SECONDS / 5)

    def _is_left(self) -> bool:
        """Whether the process that started this one, or one that this one started, is gone."""
        return self._parent not in (None, str(os.getppid())) or bool(self._ended())

    def _failure(self) -> dict[str, Any] | None:
        """What is known of the failure of the run: ``by`` whom it is reported, and its exit ``code``."""
        if self._ask(lambda store: store.check(["failed"])):
            return json.loads(self._ask(lambda store: store.get("failed")) or "null")
        return None

    def _claim(self, code: int) -> None:
        """Report the failure of the run, unless another process does."""
        mine = json.dumps({"by": self.rank, "code": code})
        answer = self._ask(lambda store: store.compare_set("failed", "", mine))
        told = {"by": min(self.rank, 1), "code": code} if answer is None else json.loads(answer)
        self.speaks, self.exit_code = told["by"] == self.rank, told["code"]

    def _account(self, error: Exception) -> BaseException:
        """What is to be raised here: the error, or that of another process in its place."""
        is_lost = isinstance(error, _Lost) or (
            isinstance(error, RuntimeError)
            and not isinstance(error, VitClsError)
            and any(word in str(error).lower() for word in WORDS_OF_A_LOST_PEER)
        )
        if not is_lost:
            self._claim(getattr(error, "exit_code", 2))
            return error if self.speaks else SystemExit(self.exit_code)
        end = time.monotonic() + 2.0  # it may be about to say why
        while self._failure() is None and not self._ended() and time.monotonic() < end:
            time.sleep(TICK_SECONDS / 5)
        spoke = next((code for code in self._ended().values() if code > 0), None)
        if spoke is not None and self._failure() is None:  # before it could say so here
            self.speaks, self.exit_code = False, spoke
            return SystemExit(spoke)
        self._claim(2)
        if not self.speaks:
            return SystemExit(self.exit_code)
        killed = [
            f"process {rank} of the run was killed by {signal.Signals(-code).name}"
            for rank, code in self._ended().items()
        ]
        who = " and ".join(killed) or f"a process of the run is gone, as process {self.rank} found"
        return RunError(f"{who}. The others have ended: a run cannot go on without one.")

    def account_for_stop(self, signum: int) -> None:
        """Process 0 reports a signal by which all stop; of one that ends a single one, that one."""
        if self.is_stopping():
            self.speaks, self.exit_code = self.rank == 0, 128 + signum
        else:
            self._claim(128 + signum)

    def _ended(self) -> dict[int, int]:
        """Exit codes of the processes that this one started and that failed."""
        codes = {rank: process.poll() for rank, process in self.children.items()}
        return {rank: code for rank, code in codes.items() if code}

    @property
    def has_met(self) -> bool:
        """Whether this process is in touch with the others."""
        return self._store is not None

    def is_stopping(self) -> bool:
        """Whether the processes have agreed to stop by a signal."""
        return bool(self._ask(lambda store: store.check(["stop"])))

    def stop_at(self, signum: int | None, step: int) -> int | None:
        """The signal to stop by at the end of this optimiser step, at the same one in all processes.

        A process that has got one names the step after this: nobody has made that without it.

        Args:
            signum: That this process has got, if any.
            step: Optimiser steps made until now.
        """
        if signum is not None:
            self._store.compare_set("stop", "", json.dumps([step + 1, signum]))
        if not self._store.check(["stop"]):
            return None
        last, number = json.loads(self._store.get("stop"))
        return number if step >= last else None

    def _watch(self) -> None:
        """In a thread, since a process that waits for another one in torch's code hears nothing."""
        for end in self._signals:
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._signals[0].fileno(), warn_on_full_buffer=False)
            watched(True)
        threading.Thread(target=self._look, daemon=True, name="company").start()

    def _look(self) -> None:
        came: list[int] = []
        end, code = float("inf"), 2
        while not self._over.is_set() and time.monotonic() < end:
            if select.select([self._signals[1]], [], [], TICK_SECONDS)[0]:
                came += [number for number in self._signals[1].recv(64) if number in SIGNALS]
            failure = self._failure()
            if len(came) > 1:
                end, code = min(end, time.monotonic() + HURRY_SECONDS), 128 + came[-1]
            elif end == float("inf") and self.speaks is None and (failure or self._is_left()):
                patience = GRACE_SECONDS if self.rank == 0 else HURRY_SECONDS
                end, code = time.monotonic() + patience, 2 if failure is None else failure["code"]
        if not self._over.is_set():
            self._leave()
            self.end_children(0.0)
            if len(came) > 1:
                self._claim(code)
            if len(came) > 1 and self.speaks:
                name = signal.Signals(came[-1]).name
                print(f"vit-cls: stopped by {name}, the second signal, within a step.", file=sys.stderr)
            sys.stderr.flush()
            os._exit(code)

    def close(self, *, failed: bool) -> None:
        """At the end of the run: where it failed let the others end, and see that they do."""
        end = time.monotonic() + GRACE_SECONDS
        try:
            self._leave()
            while failed and self.rank == 0 and not self._have_left() and time.monotonic() < end:
                time.sleep(TICK_SECONDS / 5)  # the store ends with this process
            if failed:
                self.end_children(end - time.monotonic())
            else:  # they have the same program to go on with
                atexit.register(self.end_children, END_SECONDS)
        except BaseException:  # a second signal does not wait
            self.end_children(0.0)
            raise
        finally:
            self._over.set()
            if self._store is not None and threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(-1)
                watched(False)

    def end_children(self, patience: float) -> None:
        """Wait so many seconds for the processes that this one started, then kill them."""
        end = time.monotonic() + patience
        for process in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            process.kill()

    def _leave(self) -> None:
        self._ask(lambda store: store.set(f"left/{self.rank}", ""))

    def _have_left(self) -> bool:
        others = [f"left/{rank}" for rank in range(1, self.size) if rank not in self._ended()]
        return not others or self._ask(lambda store: store.check(others)) is not False

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The store's answer; None where it is not there yet, or no longer, with the process that had it."""
        if self._store is None or self._is_alone:
            return None
        try:
            return question(self._store)
        except RuntimeError:
            self._is_alone = True
            return None


class _Lost(Exception):
    """Another process is gone, or has failed."""


def company_of(trainer: Trainer) -> Company | None:
    """What a process knows of the others; None where it is alone."""
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, Company) else None


@contextlib.contextmanager
def one_voice(trainer: Trainer, facts: Mapping[str, Any]) -> Iterator[None]:
    """Let one process report what ends the block, and the others end with its exit code, without a word.

    Args:
        trainer: Has not started yet.
        facts: See `Company`.
    """
    if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
        yield
        return
    company = Company(trainer.strategy, facts)
    trainer.strategy._launcher = company
    failed = True
    try:
        yield
        failed = False
    except VitClsError as error:
        if isinstance(error, Stopped) and company.has_met:
            company.account_for_stop(error.signum)
        if company.speaks is False:
            raise SystemExit(company.exit_code) from error
        raise
    finally:
        company.close(failed=failed)


@contextlib.contextmanager
def first_process_speaks() -> Iterator[None]:
    """Keep what all processes of a run would say to the first of them; see `FROM_ANY_PROCESS`."""

    def is_said(record: logging.LogRecord) -> bool:
        return is_first_process() or all(hasattr(record, mark) for mark in FROM_ANY_PROCESS)

    log.addFilter(is_said)
    try:
        with warnings.catch_warnings():
            if not is_first_process():
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(is_said)


def _has_agent() -> bool:
    """Whether torchrun has a store at the run's address; it says so in the environment alone."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
