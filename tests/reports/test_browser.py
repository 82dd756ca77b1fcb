"""In a real browser no page scrolls sideways, at the width of a phone and of a screen."""

from __future__ import annotations

import html
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=2000",
    "--enable-logging=stderr",
    "--window-size=1400,900",
    "--dump-dom",
]
WIDTHS = (360, 1280)
# A window cannot be narrower than 500 px; a frame can. The page in it is untouched, its own policy included.
MEASURE = """
<!doctype html><title></title>{frames}
<script>onload = () => document.title = [...document.querySelectorAll("iframe")].map(frame => {{
  const root = frame.contentDocument.documentElement;
  return [frame.contentWindow.innerWidth, root.scrollWidth, root.scrollHeight].join(" ");
}}).join(", ")</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
def test_page_does_not_scroll_sideways_and_logs_nothing(any_page, tmp_path):
    frame = '<iframe srcdoc="{}" style="border:0;width:{}px;height:800px"></iframe>'
    frames = "".join(frame.format(html.escape(any_page), width) for width in WIDTHS)
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "measure.html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    sizes = [[int(n) for n in frame.split()] for frame in title[1].split(", ")]
    assert [inner for inner, _, _ in sizes] == list(WIDTHS)
    assert all(scroll <= inner for inner, scroll, _ in sizes), sizes
    assert all(height > 800 for _, _, height in sizes)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
