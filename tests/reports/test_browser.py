"""In a real browser no page scrolls sideways, at the width of a phone and of a screen."""

from __future__ import annotations


def test_page_does_not_scroll_sideways_and_logs_nothing(any_page, in_browser):
    assert all(size["height"] > 800 for size in in_browser(any_page))
