"""The settings of a run as plain data: for its config.yaml and for loggers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.training.options import FitOptions
from vit_cls.training.trainer import TRAINER_DEFAULTS

NOT_REPEATED = ("run_dir", "resume", "resume_changes")
"""Another run of the same settings has its own."""


def run_settings(
    options: FitOptions, data: ImageDataModule, trainer_options: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of ``vit-cls fit``, by section, with every default.

    Args:
        trainer_options: Lightning's arguments that were given.
    """
    run = dataclasses.asdict(options)
    arguments = inspect.signature(Trainer.__init__).parameters.values()
    trainer = {one.name: one.default for one in arguments if one.name != "self"}
    values = {name: getattr(data, name) for name in inspect.signature(type(data)).parameters}
    return {
        **{key: value for key, value in run.items() if key not in (*NOT_REPEATED, "model", "optim")},
        "model": run["model"],
        "data": {
            key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for key, value in values.items()
        },
        "optim": run["optim"],
        "trainer": {**trainer, **TRAINER_DEFAULTS, **trainer_options},
    }


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """YAML that ``fit --config`` takes; objects are null, and named in a comment."""
    objects: list[str] = []
    plain = _plain(settings, "", objects)
    note = "".join(f"# {key} was given as an object, which is not in here\n" for key in objects)
    return note + yaml.safe_dump(plain, sort_keys=False)


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """One level, with dotted keys; objects by the names of their classes, lists as text.

    Example:
        >>> flat({"seed": 0, "data": {"mix": {"erase_prob": 0.1}, "allow": []}})
        {'seed': 0, 'data.mix.erase_prob': 0.1, 'data.allow': '[]'}
    """
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{above}{key}.")
        elif value is None or isinstance(value, bool | int | float | str):
            values[above + key] = value
        elif isinstance(value, list | tuple):
            values[above + key] = f"[{', '.join(map(_name, value))}]"
        else:
            values[above + key] = _name(value)
    return values


def _name(value: Any) -> str:
    plain = isinstance(value, bool | int | float | str | Path)
    return str(value) if plain else type(value).__name__


def _plain(value: Any, key: str, objects: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one, f"{key}.{name}".lstrip("."), objects) for name, one in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(one, bool | int | float | str) for one in value):
        return list(value)
    objects.append(key)
    return None
