"""``vit-cls fit``: train a classifier."""

from __future__ import annotations

import warnings
from pathlib import Path

from vit_cls.commands.config_files import check_config, read_config
from vit_cls.commands.fit_parser import FitCLI
from vit_cls.commands.outcome import Outcome
from vit_cls.own_code import import_options
from vit_cls.reports.folder import write_folder
from vit_cls.signals import held
from vit_cls.training.fit import fit
from vit_cls.training.launch import is_first_process
from vit_cls.training.runs import RunFolder, check_imports
from vit_cls.training.trust import check_trust


def run(words: list[str]) -> Outcome:
    """Train: where the run folder is, and the validation accuracy of its best epoch."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    cli = FitCLI(_with_config_of_resumed_run(words))
    command = ["vit-cls", "fit", *words]
    needs = import_options()
    config_yaml = (f"# own code:{needs}\n" if needs else "") + cli.config_yaml()
    result = fit(cli.options, cli.datamodule, cli.trainer_options, config_yaml=config_yaml, command=command)
    if not is_first_process():
        return Outcome({}, (), silent=True)
    if not result.kept:
        return Outcome.of(result, {})
    with held(f"the run is complete in {result.folder.path}"):
        record = result.folder.read_record()
        write_folder(result.folder.path, result, record=record, option="--run_dir")
    return Outcome.of(result, {})


def _with_config_of_resumed_run(words: list[str]) -> list[str]:
    """``--resume RUN`` alone is enough: the run's own configuration comes first."""
    pairs = [
        word.partition("=")[::2] if "=" in word else (word, after)
        for word, after in zip(words, [*words[1:], ""], strict=False)
    ]
    configs = [Path(value) for word, value in pairs if word in ("--config", "-c")]
    for path in configs:
        if path.is_file():
            check_config(path)
    resume = next((value for word, value in pairs if word == "--resume"), None)
    if resume in (None, "", "auto") or configs:
        return words
    folder = RunFolder(Path(resume))
    config = folder.config_file
    if folder.record_file.is_file():
        check_imports(folder)  # before its names are parsed
    if not config.is_file():
        return words
    values = read_config(config)
    if not any(word == "--trust_config" and value.lower() != "false" for word, value in pairs):
        check_trust(values, config)
    return ["--config", str(config), "--run_dir", "null", *words]
