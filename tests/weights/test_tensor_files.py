"""Any weights file becomes tensors or one clear paragraph; nothing that it holds ever runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vit_cls.errors import ModelFileError
from vit_cls.weights.tensor_files import PICKLE_SUFFIXES, SUFFIXES, WRAPPERS, read_tensors

STATE = {"norm.weight": torch.arange(3.0), "norm.bias": torch.full((3,), -1.0)}
OTHER = {"norm.weight": torch.zeros(3), "norm.bias": torch.zeros(3)}


def _assert_read(path, expected=STATE) -> tuple[str, ...]:
    tensors, remarks = read_tensors(path)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)
    return remarks


def _assert_refused(path, message) -> str:
    with pytest.raises(ModelFileError, match=message) as refused:
        read_tensors(path)
    text = str(refused.value)
    assert path.name in text
    assert "\n" not in text  # one paragraph
    assert "weights_only" not in text  # torch's advice to open the file by running it
    return text


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
@pytest.mark.parametrize("zipped", [True, False])
def test_torchs_files_are_read_under_each_of_their_endings(suffix, zipped, here):
    path = here / f"weights{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    assert _assert_read(path) == ()
    save_file(STATE, here / "weights.safetensors")
    assert _assert_read(here / "weights.safetensors") == ()


NAMESPACE = argparse.Namespace(lr=0.1, model="vit", nested=argparse.Namespace(a=[1, 2]))
CONTENTS = {
    "an average that was never made": {"state_dict": STATE, "state_dict_ema": None},
    "options as a namespace": {"state_dict": STATE, "args": NAMESPACE, "arch": "vit", "metric": 0.5},
    "values beside the tensors": {**STATE, "version": 2},
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_stands_beside_the_tensors_is_left_out(case, here):
    torch.save(CONTENTS[case], here / "weights.pth")
    assert _assert_read(here / "weights.pth") == ()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_tensors_are_found_inside_what_training_scripts_wrap_around_them(wrapper, here):
    path = here / "weights.pth"
    torch.save({"epoch": 3, wrapper: STATE, "optimizer": {"state": {}}}, path)
    assert _assert_read(path) == ()
    torch.save({"model": {wrapper: STATE, "step": 1}}, path)
    assert _assert_read(path) == ()


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "teacher"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_are_taken_before_the_last_ones_and_the_choice_is_said(average, plain, here):
    path = here / "weights.pth"
    torch.save({plain: OTHER, average: STATE}, path)
    assert _assert_read(path) == (f"the file holds {average}, {plain}; {average} was taken",)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_that_every_key_has_are_taken_off(prefix, suffix, here):
    path = here / f"weights{suffix}"
    wrapped = {prefix + name: tensor for name, tensor in STATE.items()}
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save({"model": wrapped}, path)
    _assert_read(path)


def test_a_prefix_that_only_some_keys_have_stays(here):
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, here / "weights.pth")
    _assert_read(here / "weights.pth", mixed)


def test_half_precision_stays_half_precision(here):
    half = {name: tensor.to(torch.bfloat16) for name, tensor in STATE.items()}
    torch.save(half, here / "weights.pth")
    assert {tensor.dtype for tensor in read_tensors(here / "weights.pth")[0].values()} == {torch.bfloat16}


def test_a_missing_file_is_named(here):
    _assert_refused(here / "nowhere.pth", r"there is no file '.*nowhere\.pth'\.")
    (here / "folder.pth").mkdir()
    _assert_refused(here / "folder.pth", r"there is no file")


def test_an_unknown_ending_is_refused_with_the_known_ones(here):
    (here / "weights.h5").write_bytes(b"\x89HDF")
    text = _assert_refused(here / "weights.h5", r"does not look like a weights file: known endings are ")
    assert all(suffix in text for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty\. Copy or download it again\."),
        (b"\n <!DOCTYPE html><html>Sign in</html>", r"is a web page, not weights: .*download the file again"),
        (b"<html><body>404</body></html>", r"is a web page, not weights"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", r"is a web page, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 346\n",
            r"is a pointer of Git LFS, .*Run `git lfs pull`",
        ),
        (b'{"error": "not found"}', r"is damaged .*or no .*file.*\. Copy or download it again\."),
        (np.random.default_rng(0).bytes(999), r"is damaged .*or no .*file.*\. Copy or download it again\."),
    ],
    ids=["empty", "html", "html without doctype", "xml", "git lfs", "json", "random bytes"],
)
def test_what_a_failed_download_leaves_is_called_by_its_name(suffix, content, message, here):
    (here / f"weights{suffix}").write_bytes(content)
    text = _assert_refused(here / f"weights{suffix}", message)
    assert "program" not in text  # it is no attack


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_damaged(kept, here):
    save_file(STATE, here / "weights.safetensors")
    torch.save(STATE, here / "weights.pth")
    torch.save(STATE, here / "old.pth", _use_new_zipfile_serialization=False)
    for name, message in (
        ("weights.safetensors", r"is damaged or no safetensors file: \w+.*Copy or download it again\."),
        ("weights.pth", r"is damaged \(truncated\?\) or no file of torch's.*Copy or download it again\."),
        ("old.pth", r"is damaged \(truncated\?\) or no file of torch's.*Copy or download it again\."),
    ):
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(len(content) * kept)])
        _assert_refused(here / name, message)


def test_an_archive_of_something_else_is_no_file_of_torchs(here):
    with zipfile.ZipFile(here / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    _assert_refused(here / "weights.pth", r"is not a file of torch's: .*Copy or download it again\.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"holds no state dict of tensors \(it has epoch, lr\)\."),
        ({"model": {"a": 1, "b": "text"}}, r"holds no state dict of tensors \(it has a, b\)\."),
        ({}, r"holds no state dict of tensors\."),
        ([1, 2], r"holds no state dict of tensors\."),
        (torch.ones(2), r"holds no state dict of tensors\."),
        ({"a": torch.ones(1), "b": 1, "c": 2}, r"holds no state dict of tensors \(it has a, b, c\)\."),
    ],
    ids=["settings", "wrapped settings", "empty", "list", "lone tensor", "mostly settings"],
)
def test_a_file_without_a_state_dict_is_refused_with_what_it_has(content, message, here):
    torch.save(content, here / "weights.pth")
    _assert_refused(here / "weights.pth", message)


class _Call:
    """Unpickles by calling a function: what an attacker's file does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _inner_bomb() -> bytes:
    return pickle.dumps(_Call(os.system, "touch canary"))


# what would run: the name that the message must give
BOMBS = {
    "os.system": (_Call(os.system, "touch canary"), r"(posix|nt)\.system"),
    "os.mkdir": (_Call(os.mkdir, "canary"), r"(posix|nt)\.mkdir"),
    "exec": (_Call(exec, "import os; os.mkdir('canary')"), r"exec"),
    "eval": (_Call(eval, "__import__('os').mkdir('canary')"), r"eval"),
    "open": (_Call(open, "canary", "w"), r"io\.open"),
    "subprocess": (_Call(subprocess.Popen, ["touch", "canary"]), r"\.Popen"),
    # torch's own function that unpickles bytes without any check
    "torch storage": (_Call(torch.storage._load_from_bytes, _inner_bomb()), r"storage\._load_from_bytes"),
}
WRITERS = {
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle, protocol 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "torch, zip": torch.save,
    "torch, legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "torch, zip, protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_pickle_with_a_program_in_it_is_refused_by_name_and_nothing_runs(writer, bomb, suffix, here):
    program, name = BOMBS[bomb]
    path = here / f"weights{suffix}"
    WRITERS[writer]({"state_dict": {"extra": program, **STATE}}, path)
    text = _assert_refused(path, r"holds more than tensors and plain data.* nothing of it was run\.")
    assert re.search(rf"It asks for (\S+, )*\S*{name}[.,] ", text), text
    assert text.endswith("Ask for a .safetensors file, or save the state dict alone.")
    assert not (here / "canary").exists()


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_bombs_of_these_tests_are_live(bomb, here):
    program, _ = BOMBS[bomb]
    with contextlib.suppress(RuntimeError):  # torch's storage is no storage once the program has run
        left = pickle.loads(pickle.dumps(program))
        for close in ("wait", "close"):
            getattr(left, close, lambda: None)()
    assert (here / "canary").exists()


def test_a_program_behind_a_namespace_or_a_tensor_is_refused_too(here):
    hidden = argparse.Namespace(lr=_Call(os.system, "touch canary"))
    torch.save({"state_dict": STATE, "args": hidden}, here / "weights.pth")
    _assert_refused(here / "weights.pth", r"It asks for (posix|nt)\.system\.")
    assert not (here / "canary").exists()


def test_a_whole_module_is_a_program_as_well(here):
    torch.save(torch.nn.Linear(2, 2), here / "weights.pth")
    _assert_refused(here / "weights.pth", r"It asks for torch\.nn\.modules\.linear\.Linear\.")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_program_is_not_run(here):
    torch.jit.script(torch.nn.Linear(2, 2)).save(here / "weights.pt")
    _assert_refused(here / "weights.pt", r"is a TorchScript program, not weights: nothing of it was run")


def test_a_pickle_named_safetensors_is_damaged_and_does_not_run(here):
    (here / "weights.safetensors").write_bytes(_inner_bomb())
    _assert_refused(here / "weights.safetensors", r"is damaged or no safetensors file")
    assert not (here / "canary").exists()
