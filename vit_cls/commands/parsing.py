"""Words and YAML to checked options."""

from __future__ import annotations

import argparse
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser, Namespace

from vit_cls.checks import check_finite
from vit_cls.commands.complaints import explain
from vit_cls.errors import ConfigError

if TYPE_CHECKING:
    from vit_cls.inference import InferenceConfig

MODEL_HELP = (
    "a run folder, model.safetensors, .ckpt, a name of timm's with or without tag, or name=weights file"
)
DATA_HELP = "a folder of classes, of train/, val/ and test/, a manifest (.csv, .tsv, .parquet), or digits"
SPLIT_HELP = "the part to score: train, val or test (default: test if there is one, else val, else all)"
EPILOG = (
    "Also: --json prints one JSON object on stdout and nothing else; --debug shows tracebacks; --no_verify "
    "compares no file with the digest in it; --import "
    "MODULE (a module or a .py file, may come several times) imports own code first, docs/extending.md."
)


def make_parser(verb: str, description: str) -> ArgumentParser:
    """A parser that raises instead of exiting.

    Args:
        verb: The verb, for the usage line.
        description: What the verb does.
    """
    return ArgumentParser(
        prog=f"vit-cls {verb}",
        description=description,
        epilog=EPILOG,
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_flag(parser: ArgumentParser, name: str, text: str) -> None:
    """An option that is true where it stands alone, and false where it does not stand.

    Args:
        name: The option, dashes included.
        text: What it does.
    """
    parser.add_argument(name, type=bool, nargs="?", const=True, default=False, help=text)


def add_data_arguments(parser: ArgumentParser, *, required: bool = True, split: str = SPLIT_HELP) -> None:
    """The images of a verb, and the part of them that it takes.

    Args:
        parser: Gets the options.
        required: Whether the verb cannot do without.
        split: What the part is for.
    """
    parser.add_argument("--data", type=str if required else str | None, required=required, help=DATA_HELP)
    parser.add_argument("--split", type=str | None, default=None, help=split)


def add_runtime_arguments(parser: ArgumentParser) -> None:
    """The options that every verb shares which runs a model over images.

    Args:
        parser: Gets the options.
    """
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--precision", default="auto", help="auto (on a GPU bf16, or fp16 where it has none), 32 or bf16"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward pass")
    parser.add_argument("--num_workers", type=int | None, default=None, help="loading processes")
    parser.add_argument(
        "--timeout_seconds",
        type=float,
        default=300.0,
        help="without a batch, until it ends; 0: none",
    )
    parser.add_argument("--output", type=str | None, default=None, help="folder for files; made if needed")
    add_flag(parser, "--compile", "compile the encoder")


def inference_config(args: Namespace, *, show_progress: bool) -> InferenceConfig:
    """How a model is to be run, from the options that are there.

    Args:
        args: The parsed options.
        show_progress: Whether a bar is drawn on stderr.

    Raises:
        ConfigError: If a number is out of range, or the device or the precision is not available.
    """
    from vit_cls.inference import InferenceConfig  # imports torch, which --help does not need

    names = ("device", "precision", "batch_size", "num_workers", "timeout_seconds", "compile", "exact")
    settings: dict[str, Any] = {name: args[name] for name in names if name in args}
    return InferenceConfig(**settings, show_progress=show_progress)


def parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Parse, or say in one paragraph what is wrong.

    Args:
        parser: Knows the options.
        words: The words after the verb.

    Raises:
        ConfigError: If a word, a key or a value is not accepted; the nearest known key is named.
    """
    try:
        args = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(explain(str(error), known_keys(parser))) from error
    for group in dict.fromkeys(key.partition(".")[0] for key in known_keys(parser) if "." in key):
        given = args[group] if group in args else Namespace()
        if given is None:
            raise ConfigError(f"{group} has no settings. Give it some, or leave the line out.")
        if not isinstance(given, Namespace):
            raise ConfigError(f"{group} must be settings by name; got {str(given)[:100]!r}.")
    _refuse_null(parser, args)
    check_finite("", args.as_flat().__dict__)
    return args


def _refuse_null(parser: ArgumentParser, args: Namespace) -> None:
    """A null in a file passes jsonargparse whatever the option takes."""
    defaults = parser.get_defaults(skip_validation=True)
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        takes = kind in (None, Any) or NoneType in get_args(kind)
        if not takes and args.get(action.dest, 0) is None and defaults.get(action.dest) is not None:
            raise ConfigError(
                f"{action.dest} must have a value; got null. Give it one, or leave the line out: the default "
                f"is {defaults[action.dest]}."
            )


def known_keys(parser: ArgumentParser) -> list[str]:
    """Every option of a parser, dotted.

    Args:
        parser: Knows the options.
    """
    return sorted(str(key) for key in parser.get_defaults(skip_validation=True).keys())  # noqa: SIM118, no dict
