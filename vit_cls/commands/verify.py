"""``vit-cls verify``: mathematical identities, checked on the user's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_cls import formatting as fmt
from vit_cls.commands.outcome import Outcome, with_files
from vit_cls.commands.parsing import MODEL_HELP, make_parser, parse
from vit_cls.files import output_folder, write_text, writing


def run(words: list[str]) -> Outcome:
    """Verify.

    Args:
        words: The words after ``verify``.

    Returns:
        Every identity with its residual, and exit code 1 if one does not hold; ``verify.json`` in
        ``--output`` where one is given.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
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
    from vit_cls.weights.factory import load

    output = output_folder(args.output)
    device = choose_device(args.device)
    found = verify(
        load(args.model), precision=args.precision, images=args.images, seed=args.seed, device=device
    )
    data = {**found.to_dict(), "model": args.model}
    text = _text(data)
    if output is not None:
        _write(output, data)
    return Outcome(data, with_files(text, output), code=0 if found.ok else 1)


def _write(output: Path, data: dict[str, Any]) -> None:
    with writing(output):
        write_text(output / "verify.json", json.dumps(data, indent=2) + "\n")


def _text(data: dict[str, Any]) -> str:
    rows = data["identities"]
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'identity':<{width}}  {'residual':>9}  {'tolerance':>9}",
        *(_line(row, width) for row in rows),
    ]
    failed = [row for row in rows if not row["ok"]]
    lines += [f"does not hold: {row['name']}. {row['what']}" for row in failed]
    lines.append(
        f"{data['checked']} identities checked, {data['failed']} do not hold; "
        f"{data['not_applicable']} do not apply; float{data['precision']} on {data['device']}, "
        f"{data['images']} random images, seed {data['seed']}, {fmt.duration(data['seconds'])}"
    )
    return "\n".join(lines)


def _line(row: dict[str, Any], width: int) -> str:
    if not row["applies"]:
        return f"{row['name']:<{width}}  {'-':>9}  {'-':>9}  does not apply: {row['reason']}"
    residual = "not finite" if row["residual"] is None else f"{row['residual']:.2g}"
    bound = {"exact": "= 0", "relative": f"<= {row['tolerance']:.0e}", "greater": f"> {row['tolerance']:g}"}
    return (
        f"{row['name']:<{width}}  {residual:>9}  {bound[row['kind']]:>9}  {'ok' if row['ok'] else 'FAILED'}"
    )
