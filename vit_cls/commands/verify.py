"""``vit-cls verify``: mathematical identities, checked on the user's own model."""

from __future__ import annotations

from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import MODEL_HELP, make_parser, parse
from vit_cls.files import output_folder


def run(words: list[str]) -> Outcome:
    """Check a model: every identity with its residual, and exit code 1 if one does not hold."""
    parser = make_parser(
        "verify", "Check mathematical identities on this very model. Exit 1: one does not hold."
    )
    parser.add_argument("--model", type=str, required=True, help=MODEL_HELP)
    parser.add_argument("--precision", type=str, default="auto", help="auto (64 for small models), 64 or 32")
    parser.add_argument("--images", type=int, default=2, help="random images, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the images and all else that is drawn")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--output", type=str | None, default=None, help="folder for files; made if needed")
    args = parse(parser, words)
    # Here: these load for seconds, and --help needs none of them.
    from vit_cls.inference import choose_device
    from vit_cls.lab.verify import verify
    from vit_cls.reports.folder import write_folder
    from vit_cls.weights.factory import load

    output = output_folder(args.output)
    device = choose_device(args.device)
    found = verify(
        load(args.model), precision=args.precision, images=args.images, seed=args.seed, device=device
    )
    if output is not None:
        write_folder(output, found, model=args.model)
    return Outcome.of(found, {"model": args.model}, output, code=0 if found.ok else 1)
