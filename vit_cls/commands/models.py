"""``vit-cls models``: the architectures that can be built, and the published weights of each."""

from __future__ import annotations

from typing import Any

from vit_cls import formatting as fmt
from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import make_parser, parse
from vit_cls.weights.catalogue import describe, find

COLUMNS = {
    "name": "name",
    "kind": "kind",
    "parameters": "params",
    "img_size": "input",
    "patch_size": "patch",
    "tokens": "tokens",
    "pool": "pool",
    "normalisation": "mean/std",
    "tags": "tags",
    "licence": "licence",
}
TAG_COLUMNS = {
    "tag": "tag",
    "img_size": "input",
    "head": "head",
    "normalisation": "mean/std",
    "crop_pct": "crop",
    "crop_mode": "mode",
    "family": "family",
    "licence": "licence",
}
NO_LICENCE = "not stated"


def run(words: list[str]) -> Outcome:
    """List architectures, or tell all about one.

    Args:
        words: The words after ``models``.

    Returns:
        One row an architecture, with a row a tag.

    Raises:
        ConfigError: If nothing matches.
    """
    parser = make_parser("models", "List the architectures that can be trained, and their published weights.")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or a pattern: '*clip*', '*.openai'")
    rows = [describe(name) for name in find(parse(parser, words).pattern)]
    text = _details(rows[0]) if len(rows) == 1 else _list(rows)
    return Outcome({"models": rows}, text)


def _list(rows: list[dict[str, Any]]) -> str:
    shown = []
    for row in rows:
        licences = dict.fromkeys(tag["licence"] or NO_LICENCE for tag in row["tags"])
        cells = {"parameters": f"{fmt.decimals(row['parameters'] / 1e6, 1)} M", "tags": len(row["tags"])}
        shown.append({**row, **cells, "licence": ", ".join(licences)})
    weights = sum(len(row["tags"]) for row in rows)
    return (
        f"{_table(shown, COLUMNS)}\n{len(rows)} architectures, {weights} tags with weights. native: our "
        "blocks; adapter: timm's, with the same poolings and tokens. `vit-cls models NAME` tells more."
    )


def _details(row: dict[str, Any]) -> str:
    prefix = "class token" if row["class_token"] else "no class token"
    registers = f", {row['reg_tokens']} registers" if row["reg_tokens"] else ""
    lines = [
        f"{row['name']} ({row['kind']}): {fmt.count(row['parameters'])} parameters, {row['img_size']} pixels "
        f"in patches of {row['patch_size']}",
        f"{row['tokens']} tokens ({prefix}{registers}), width {row['embed_dim']}, {row['depth']} blocks of "
        f"{row['num_heads']} heads, pool {row['pool']}",
    ]
    if not row["tags"]:
        return "\n".join([*lines, "no published weights"])
    shown = []
    for tag in row["tags"]:
        head = f"{tag['num_classes']} {tag['head']}" if tag["num_classes"] else "headless"
        licence = f"{tag['licence'] or NO_LICENCE}{' (non-commercial)' if tag['non_commercial'] else ''}"
        shown.append({**tag, "head": head, "licence": licence})
    lines.append(_table(shown, TAG_COLUMNS))
    if any(tag["quick_gelu"] for tag in row["tags"]):
        quick = [tag["tag"] for tag in row["tags"] if tag["quick_gelu"]]
        lines.append(f"loaded with QuickGELU, as they were trained: {', '.join(quick)}")
    lines.append(f"Use: --model.name {row['name']}.{row['tags'][0]['tag']} --model.pretrained true")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    cells = [list(columns.values())] + [[str(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )
