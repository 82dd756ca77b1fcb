"""Results in, pages out: the only room that knows jinja2 and matplotlib."""
