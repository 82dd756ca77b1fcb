"""Own code for the command line: what `--import` takes, what it refuses, and which names are whose."""

from __future__ import annotations

import sys

import pytest

from vit_cls.cli import COMMANDS, main
from vit_cls.errors import ConfigError
from vit_cls.model.pooling import POOLINGS, register_pooling
from vit_cls.model.pooling_base import Pooling
from vit_cls.model.pooling_mean import MeanPool
from vit_cls.own_code import import_modules, imported, not_imported, origin, take_imports
from vit_cls.workers import WorkerPool

OWN = """
from vit_cls.model.pooling import register_pooling
from vit_cls.model.pooling_base import Pooling

class Ends(Pooling):
    def forward(self, tokens, mask=None):
        return 0.5 * (tokens[:, 0] + tokens[:, -1])

register_pooling("ends", Ends)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder; what is imported or registered from it goes again."""
    rows, modules = dict(POOLINGS), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    POOLINGS.clear()
    POOLINGS.update(rows)
    import_modules([])
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def _complaint(capsys, *words):
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("vit-cls: ").strip()


def test_the_option_may_come_several_times_and_in_both_spellings():
    words, modules = take_imports(
        ["photos", "--import", "a", "--seed", "1", "--import=b/c.py", "--import", "d"]
    )
    assert (words, modules) == (["photos", "--seed", "1"], ["a", "b/c.py", "d"])


@pytest.mark.parametrize("word", ["own_a", "./own_a.py", "pack.own_b", "{}/pack/own_b.py", "spread.own_c"])
def test_a_module_is_found_from_the_current_folder_and_a_file_anywhere(word, place):
    for path in ("own_a.py", "pack/__init__.py", "pack/own_b.py", "spread/own_c.py"):
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_text(OWN if "own" in path else "")
    word = word.format(place)
    import_modules([word])
    assert "ends" in POOLINGS
    assert imported() == {word: word.removesuffix(".py").rpartition("/")[2]}
    assert origin("pooling", "ends") == word
    assert not_imported(imported()) == []
    assert not_imported({"gone.py": "gone"}) == ["gone.py"]


def test_two_names_of_one_file_register_the_same(place):
    (place / "pack").mkdir()
    (place / "pack/__init__.py").touch()
    (place / "pack/own_d.py").write_text(OWN)
    import_modules(["pack.own_d", "pack/own_d.py"])
    assert list(imported().values()) == ["pack.own_d", "own_d"]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_imports_before_it_parses_and_names_what_is_missing(verb, place, capsys):
    complaint = _complaint(capsys, verb, "--import", "own_pool")
    assert complaint == (
        f"--import own_pool cannot be imported: there is no module own_pool in {place} or on Python's path."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n\nraise KeyError('colour')\n", "{}:3: KeyError: 'colour'."),
        ("def broken(:\n", "{}:1: SyntaxError: invalid syntax."),
        ("import not_there_at_all\n", "{}:1: ModuleNotFoundError: No module named 'not_there_at_all'."),
        ("import sys\nsys.exit('bye')\n", "{}:2: SystemExit: bye."),
        ("import json\n\njson.loads('{{')\n", "{}:3: JSONDecodeError: Expecting property name"),
        (
            OWN.replace('"ends"', '"cls"'),
            "{}:9: ConfigError: the pooling cls is there already. Choose another",
        ),
        (
            OWN.replace('"ends"', '"Ends 2"'),
            "{}:9: ConfigError: the name of a pooling must be small letters, digits",
        ),
    ],
    ids=["raises", "syntax", "lacks", "leaves", "below", "taken", "name"],
)
def test_a_module_that_cannot_be_imported_is_one_paragraph_with_file_and_line(text, reason, place, capsys):
    file = place / "own_bad.py"
    file.write_text(text.replace("{{", "{"))
    complaint = _complaint(capsys, "models", "--import", "own_bad.py")
    assert complaint.startswith(f"--import own_bad.py cannot be imported: {reason.format(file)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--import"], "--import needs a module or a .py file behind it; got nothing."),
        (["--import", "--json"], "--import needs a module or a .py file behind it; got nothing."),
        (["--import", "--model", "x"], "--import needs a module or a .py file behind it; got --model."),
        (["--import", "nowhere.py"], "--import nowhere.py: there is no such file."),
        (
            ["--import", "some/folder"],
            "--import takes a module, such as own_code or package.own_code, or a file",
        ),
        (["--import", "own_pol"], "or on Python's path. Did you mean `own_pool`?"),
        (["--import", "random.py"], "is named like the module random that Python knows already ("),
        (
            ["--import", "sys"],
            "is named like the module sys that Python knows already (built in). Rename it.",
        ),
        (["--import", "json"], "is named like the module json that Python knows already ("),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_is_no_module_is_refused(words, message, place, capsys):
    for name in ("own_pool", "random", "sys", "json"):
        (place / f"{name}.py").touch()
    assert message in _complaint(capsys, "doctor", *words)


def test_processes_have_the_modules_too(place):
    (place / "own_e.py").write_text(OWN)
    import_modules(["own_e"])
    with WorkerPool(1) as pool:
        assert pool.submit(origin, "pooling", "ends").result() == "own_e"


def test_names_are_registered_once_and_the_same_may_come_again(place):
    class Last(Pooling):
        def forward(self, tokens, mask=None):
            return tokens[:, -1]

    first = Last
    register_pooling("ours", Last)
    assert origin("pooling", "ours") == __name__

    class Last(Pooling):  # a cell that is run again
        def forward(self, tokens, mask=None):
            return tokens[:, -2]

    register_pooling("ours", Last)
    assert POOLINGS["ours"] is Last is not first
    register_pooling("gap", MeanPool)  # what it is
    assert origin("pooling", "gap") is None
    with pytest.raises(ConfigError, match="the pooling ours is there already"):
        register_pooling("ours", MeanPool)
    with pytest.raises(ConfigError, match="the pooling gap is there already"):
        register_pooling("gap", Last)


def test_without_the_option_nothing_changes(place):
    before = list(sys.path)
    import_modules([])
    assert (sys.path, imported()) == (before, {})
