"""``vit-cls models``: the architectures that can be built, and the published weights of each."""

from __future__ import annotations

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import make_parser, parse
from vit_cls.reports.terminal import model_details, models_table
from vit_cls.weights.catalogue import describe, find


def run(words: list[str]) -> Outcome:
    """List architectures, or tell all about one: a row an architecture, with a row a tag."""
    parser = make_parser("models", "List the architectures that can be trained, and their published weights.")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or a pattern: '*clip*', '*.openai'")
    rows = [describe(name) for name in find(parse(parser, words).pattern)]
    return Outcome({"models": rows}, model_details(rows[0]) if len(rows) == 1 else models_table(rows))
