"""The command ``vit-cls``: a table of verbs, and what becomes of their results and errors."""

from __future__ import annotations

import contextlib
import importlib
import sys

from vit_cls import __version__
from vit_cls.boundary import ReaderGone, fault, paragraph, printing, sturdy_streams
from vit_cls.commands.outcome import CALLER, Caller, Outcome
from vit_cls.errors import VitClsError, did_you_mean
from vit_cls.own_code import import_modules, take_imports
from vit_cls.signals import Stopped, StopSignals, held
from vit_cls.streams import begin
from vit_cls.texts import printable
from vit_cls.verification import VERIFY

# verb: (what it does, module). A module is imported when its verb is chosen, and not before. Its `run` takes
# the words after the verb, gives an `Outcome`, and raises `VitClsError` where a request cannot be done.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("train a classifier; a run folder comes out", "vit_cls.commands.fit"),
    "evaluate": ("top-1, calibration and other metrics on an image folder", "vit_cls.commands.evaluate"),
    "compare": ("is one model better than another on the same images?", "vit_cls.commands.compare"),
    "predict": ("label files or folders: CSV, JSONL, Parquet or a table", "vit_cls.commands.predict"),
    "probe": ("what the frozen tokens of a model know", "vit_cls.commands.probe"),
    "study": ("a question about the class token, answered with statistics", "vit_cls.commands.study"),
    "verify": ("mathematical identities checked on this very model", "vit_cls.commands.verify"),
    "doctor": ("what is wrong with an image folder, before hours are spent on it", "vit_cls.commands.doctor"),
    "export": ("a file that others can run, checked for equality", "vit_cls.commands.export"),
    "models": ("the architectures and the published weights that can be used", "vit_cls.commands.models"),
}

EVERYWHERE = (
    "every verb takes --json (one JSON object on stdout, nothing else), --debug (show tracebacks),\n"
    "--no_verify (do not compare files with the digests in them) and\n"
    "--import MODULE (own code, a module or a .py file: its poolings, augmentations, losses, metrics by name)"
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb, of the words after ``vit-cls``; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 the answer is bad, 2 the request is wrong, 128 + n after signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    with sturdy_streams(is_program=argv is None):
        try:
            return _run([word for word in words if word != "--debug"], is_program=argv is None)
        except ReaderGone as error:
            return error.exit_code
        except VitClsError as error:
            if debug:
                raise
            _complain(str(error))
            return 128 + error.signum if isinstance(error, Stopped) else error.exit_code
        except Exception as error:  # the one place where what is not ours ends
            if debug:
                raise
            _complain(paragraph(error) or fault(error))
            return VitClsError.exit_code


def _complain(text: str) -> None:
    print(printable(f"vit-cls: {' '.join(text.split())}"), file=sys.stderr)


def _run(words: list[str], *, is_program: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help", "--version"):
        with printing(sys.stdout):
            print(f"vit-cls {__version__}" if words[:1] == ["--version"] else _help())
        return 0 if words else 2
    begin(is_program=is_program)
    verb, *rest = words
    as_json = "--json" in rest
    VERIFY.set("--no_verify" not in rest)
    rest = [word for word in rest if word not in ("--json", "--no_verify")]
    CALLER.set(Caller(sys.stdout, as_json))
    if verb not in COMMANDS:
        raise VitClsError(
            f"there is no verb {verb!r}.{did_you_mean(verb, COMMANDS)} Known: {', '.join(COMMANDS)}."
        )
    # Whatever a library prints on the way is not the result, unless it is what was asked for.
    asked = any(word in ("-h", "--help") or word.startswith("--print_config") for word in rest)
    stdout = printing(sys.stdout) if asked else contextlib.redirect_stdout(sys.stderr)
    with StopSignals(is_program=is_program):
        with stdout:
            rest, modules = take_imports(rest)
            import_modules(modules)  # before the verb has its parser: their names are known to it
            with held():  # an import that is cut off may end the process
                module = importlib.import_module(COMMANDS[verb][1])
            outcome: Outcome = module.run(rest)
        with held("all was done by then"), printing(sys.stdout):
            outcome.print(sys.stdout, as_json=as_json)
    return outcome.code


def _help() -> str:
    rows = "\n".join(f"  {verb:<10} {what}" for verb, (what, _) in COMMANDS.items())
    return (
        "usage: vit-cls VERB [options]\n\n"
        "Train, evaluate and understand Vision Transformer image classifiers.\n\n"
        f"{rows}\n\n"
        "  vit-cls VERB --help   the options of a verb\n"
        "  vit-cls --version\n\n"
        f"{EVERYWHERE}.\n"
        "exit: 0 done; 1 the answer is bad; 2 the request is wrong; 128 + n after signal n, such as 143"
    )
