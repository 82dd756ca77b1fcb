"""Pages for people: one self-contained HTML file each, to read, print and send."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined

from vit_cls import formatting as fmt
from vit_cls.reports.svg import svg_file
from vit_cls.texts import csv_row

DASH = "–"  # noqa: RUF001, a dash stands where there is no value

Files = Iterator[tuple[str, str | bytes]]
"""Name in the folder and content of each file of a result."""
Thumbnails = Callable[[Sequence[str]], Mapping[str, bytes]]
"""Gives a small JPEG by path, for those of the paths that can be read."""

# A control character would vanish or be an error in HTML; it is shown as Python would write it.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), 127) if chr(i) not in "\n\t"}


def render(template: str, context: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Fill a template; the page is valid UTF-8 whatever the names in it are."""
    page = PAGES.get_template(template).render(context, versions=versions)
    # A path that is not valid UTF-8 holds lone surrogates; the page must be valid all the same.
    return page.translate(CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")


def figure_files(charts: Iterable[tuple[str, str]]) -> Files:
    """Each chart of a page, an ``<svg>`` element with its title, as an SVG file named by the title."""
    for title, svg in charts:
        yield f"figures/{file_stem(title)}.svg", svg_file(svg)


def file_stem(title: str) -> str:
    """A title as a file's name.

    Example:
        >>> file_stem("Loss & more")
        'loss_more'
    """
    return re.sub(r"[^a-z0-9]+", "_", title.lower())[:60].strip("_")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as the text of a CSV file."""
    return "".join(map(csv_row, [header, *rows]))


def no_pictures(paths: Sequence[str]) -> dict[str, bytes]:
    """Where there are none to show."""
    return {}


def embedded(thumbnails: Mapping[str, bytes]) -> dict[str, str]:
    """JPEG files by path as the text of a ``data:`` address."""
    return {path: base64.b64encode(jpeg).decode() for path, jpeg in thumbnails.items()}


def _absent(value: Any) -> bool:
    return value is None or isinstance(value, Undefined)


def _or_dash(write: Callable[[float], str]) -> Callable[[Any], str]:
    """A number, or the page's dash where there is none."""
    return lambda x: DASH if _absent(x) or not math.isfinite(x) else write(x)


def _minute(moment: str | None) -> str:
    text = moment or DASH
    return f"{text[:16].replace('T', ' ')} UTC" if text.endswith("+00:00") else text


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items()) or DASH


FORMS: dict[str, Callable[[Any], str]] = {
    "percent": _or_dash(lambda share: fmt.percent(share, 2, unit="\u00a0%")),
    "decimals": _or_dash(fmt.decimals),
    "significant": _or_dash(fmt.significant),
    "count": _or_dash(fmt.count),
    "p_value": _or_dash(fmt.p_value),
    "duration": _or_dash(fmt.duration),
    "minute": _minute,
    "versions": _versions,
}
"""How values are written, by the name that templates and tables use."""

PAGES = Environment(
    loader=PackageLoader("vit_cls.reports"),
    autoescape=True,
    undefined=ChainableUndefined,
    finalize=lambda value: DASH if _absent(value) else value,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= FORMS
