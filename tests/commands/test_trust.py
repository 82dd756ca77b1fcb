"""A run folder that is resumed may be anybody's: its configuration calls nothing, and takes no memory."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml

from vit_cls.cli import main
from vit_cls.commands.config_files import check_config
from vit_cls.errors import ConfigError
from vit_cls.training.trust import check_trust, lightning_classes

SETTINGS = {"seed": 0, "data": {"name": "digits"}, "trainer": {"max_epochs": 1}}

STEP = "lightning.pytorch.callbacks.lambda_function"
HOSTILE = {
    "a class path": {"trainer": {"callbacks": [{"class_path": "canary.Callback"}]}},
    "one callback": {"trainer": {"callbacks": {"class_path": "canary.Callback"}}},
    "a class path without a mapping": {"trainer": {"callbacks": ["canary.Callback"]}},
    "a logger": {"trainer": {"logger": {"class_path": "canary.Logger", "init_args": {}}}},
    "a strategy": {"trainer": {"strategy": "canary.Strategy"}},
    "a plugin": {"trainer": {"plugins": [{"class_path": "canary.Plugin"}]}},
    "an augmentation": {"data": {"augment": {"class_path": "canary.run"}}},
    "an augmentation by its name": {"data": {"augment": "canary.run"}},
    "a class inside a class": {
        "trainer": {
            "strategy": {
                "class_path": "lightning.pytorch.strategies.DDPStrategy",
                "init_args": {"cluster_environment": {"class_path": "canary.Environment"}},
            }
        }
    },
    "a function as a value": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "canary.run"},
                }
            ]
        }
    },
    "a function that Lightning imports": {
        "trainer": {
            "callbacks": [
                {"class_path": f"{STEP}.LambdaCallback", "init_args": {"setup": f"{STEP}.canary.run"}}
            ]
        }
    },
    "a module of Lightning's": {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.trainer.os"}]}},
    "our own function": {"trainer": {"callbacks": [{"class_path": "vit_cls.files.write_text"}]}},
    "YAML in a text": {"trainer": {"callbacks": "[{class_path: canary.Callback}]"}},
    "escapes in a text": {"trainer": {"callbacks": '[{"class_path": "\\u0063anary.Callback"}]'}},
    "a text for the whole": {"trainer": "{callbacks: [{class_path: canary.Callback}]}"},
    "another file": {"trainer": "other.yaml"},
    "another file for a part": {"trainer": {"callbacks": "other.yaml"}},
    "another file for the model": {"model": "other.yaml"},
    "a configuration": {"config": "other.yaml"},
    "a dotted key": {"trainer.callbacks": [{"class_path": "canary.Callback"}]},
    "wide letters": {"trainer": {"profiler": "\uff43anary.run"}},
    "brackets": {"trainer": {"profiler": "list[(canary).\n run]"}},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A foreign folder of a run, and a module beside it that must not be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "canary.py").write_text(
        "from pathlib import Path\nSANG = Path(__file__).with_name('sang')\nSANG.touch()\n"
        "from lightning.pytorch import Callback as Base\n\n\nclass Callback(Base):\n    pass\n\n\n"
        "def run(*args, **kwargs):\n    SANG.touch()\n"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"identity": {}, "imports": {}}))
    (tmp_path / "other.yaml").write_text("callbacks: [{class_path: canary.Callback}]\n")
    yield tmp_path
    sys.modules.pop("canary", None)


def _resume(capsys, *words: str) -> str:
    """Resume, which must fail; what was said."""
    assert main(["fit", "--resume", "run", *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    return told[-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_run_imports_and_calls_nothing(name, place, capsys):
    (place / "run/config.yaml").write_text(yaml.safe_dump(HOSTILE[name]))
    told = _resume(capsys)
    assert "--trust_config" in told
    assert not (place / "sang").exists()
    assert "canary" not in sys.modules


def test_yaml_tags_make_no_objects(place, capsys):
    (place / "run/config.yaml").write_text("seed: !!python/object/apply:os.system ['touch sang']\n")
    assert "cannot be read as YAML" in _resume(capsys)
    assert not (place / "sang").exists()


def test_own_code_is_named_again_or_the_configuration_is_trusted(place, capsys):
    text = yaml.safe_dump({**SETTINGS, **HOSTILE["a class path"]})
    (place / "run/config.yaml").write_text(text)
    assert "(--import canary)" in _resume(capsys)
    for words in (["--trust_config"], ["--import", "canary"]):
        assert "there is no run/checkpoints/last.ckpt" in _resume(capsys, *words)  # so it was parsed
        assert (place / "sang").exists()
    trusted_itself = yaml.safe_dump({**yaml.safe_load(text), "trust_config": True})
    (place / "run/config.yaml").write_text(trusted_itself)
    sys.modules.pop("canary")
    (place / "sang").unlink()
    assert "--trust_config" in _resume(capsys)
    assert not (place / "sang").exists()


def test_what_imported_code_has_imported_itself_is_not_its_own(place):
    sys.modules.pop("canary", None)
    from vit_cls.own_code import import_modules

    import_modules(["canary"])
    known = {"trainer": {"callbacks": [{"class_path": "canary.Callback"}]}}
    check_trust(known, place / "config.yaml")
    for name in ("canary.Path", "canary.Base", "canary.Path.os"):
        with pytest.raises(ConfigError, match=f"names {name}"):
            check_trust({"trainer": {"callbacks": [name]}}, place / "config.yaml")
    import_modules([])


def test_what_lightning_has_needs_no_trust(place):
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/acc1"}},
        {"class_path": "lightning.pytorch.callbacks.early_stopping.EarlyStopping"},
        "LearningRateMonitor",
    ]
    trainer = {"callbacks": callbacks, "strategy": "ddp_find_unused_parameters_true", "precision": "16-mixed"}
    settings = {**SETTINGS, "trainer": trainer, "data": {"root": "photos.v2"}, "model": {"name": "os.path"}}
    check_trust(settings, place / "config.yaml")
    assert len(lightning_classes()) > 80
    assert not any("torch.nn" in name or name.endswith(".os") for name in lightning_classes())


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": LAUGHS,
    "an alias of itself": "a: &a [*a]\n",
    "depth": "a: " + "[" * 100_000 + "]" * 100_000,
    "depth of lines": "- " * 10_000 + "x",
    "depth in a text": 'trainer: {callbacks: "' + "[" * 10_000 + '"}',
    "digits": f"seed: {'9' * 5000}",
    "hexadecimal digits": f"seed: 0x{'f' * 5000}",
    "size": "a: " + "x" * 1_000_001,
    "values": f"a: [{'1, ' * 100_001}]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_that_stands_for_more_than_it_is_is_refused(name, place, capsys):
    (place / "run/config.yaml").write_text(BOMBS[name])
    assert "run/config.yaml is not read as a configuration" in _resume(capsys)
    shutil.move("run/config.yaml", "mine.yaml")
    assert main(["fit", "--config", "mine.yaml"]) == 2
    assert "mine.yaml is not read as a configuration" in capsys.readouterr().err


def test_the_recipes_are_within_the_limits(request):
    configs = list((request.config.rootpath / "configs").rglob("*.yaml"))
    assert len(configs) > 3
    for path in configs:
        check_config(path)
