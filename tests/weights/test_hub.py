"""Published weights: fetched once by the real client from a hub on this machine, then from the cache."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file
from timm.models import PretrainedCfg

from tests.models import perturbed
from vit_cls import create_model
from vit_cls.errors import ModelFileError
from vit_cls.weights.hub import weights_file

TAG = "test_vit.r160_in1k"
DEFAULT = "test_vit"  # stands for its default tag, the one above
BIN_ONLY = "test_vit2.r160_in1k"
MALICIOUS = "test_vit3.r160_in1k"
EMPTY = "vit_tiny_patch16_224.augreg_in21k"
GATED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
LOCKED = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
UNKNOWN = "vit_small_patch16_224.augreg_in21k"
BROKEN = "vit_small_patch16_224.augreg_in21k_ft_in1k"
PAGE = "vit_small_patch16_224.augreg_in1k"
EXPIRED = "vit_small_patch32_224.augreg_in21k"
CUT = "vit_small_patch32_224.augreg_in21k_ft_in1k"
NEVER_ASKED = "vit_base_patch16_224.augreg_in21k"

# what the server answers for a repository that holds no files: status, X-Error-Code
REFUSALS = {
    GATED: (403, "GatedRepo"),
    LOCKED: (401, "GatedRepo"),
    EXPIRED: (401, None),  # a token that is none
    UNKNOWN: (404, "RepoNotFound"),
    BROKEN: (500, None),
}


class _Handler(BaseHTTPRequestHandler):
    """The part of the hub that downloads use: HEAD and GET of ``/timm/NAME/resolve/main/FILE``."""

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Any = self.server
        found = re.fullmatch(r"/timm/([^/]+)/resolve/main/(.+)", self.path)
        name, file = found.groups() if found else ("", self.path.rpartition("/")[2])
        hub.requests[self.command, name, file] += 1
        content = hub.files.get((name, file))
        if content is None or (name == BROKEN and file.endswith("safetensors")):
            status, code = REFUSALS.get(name, (404, "EntryNotFound"))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code}: access to {name} is restricted")
            content = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{name}-{file}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if name != CUT else content[:1000])
        self.close_connection = True


class _Hub(ThreadingHTTPServer):
    """A hub on this machine: its files by repository and name, and how often each was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: Counter[tuple[str, str, str]] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch canary",)


def _images() -> torch.Tensor:
    return torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))


# Settings of huggingface_hub are read when it is imported, so each state of the network is a process.
CHILD = """
import contextlib, io, json, logging, sys, time
time.sleep = lambda seconds: None  # the client waits before it tries again; here there is nothing to wait for
import torch, vit_cls
from vit_cls.cli import main

names, commands = json.loads(sys.argv[1])
images = torch.load("images.pt")
out = {}
for name in names:
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logging.getLogger("vit_cls").addHandler(handler)
    logging.getLogger("vit_cls").setLevel(logging.INFO)
    try:
        found = vit_cls.load(name)
        with torch.inference_mode():
            logits = found.model(images)[0].tolist()
        out[name] = {
            "logits": logits, "licence": found.weights_licence, "source": found.weights_source,
            "size": found.preprocess.img_size, "crop": found.preprocess.crop_pct,
            "mean": found.preprocess.mean, "first": found.class_names[0], "log": records,
        }
    except Exception as error:
        out[name] = {"kind": type(error).__name__, "error": str(error)}
    logging.getLogger("vit_cls").removeHandler(handler)
for words in commands:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(words)
    out[" ".join(words[:3])] = {"exit": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
json.dump(out, open(sys.argv[2], "w"))
"""


def _run(folder: Path, hub: str, names: list[str], commands: list[list[str]], *, offline: bool) -> Any:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    words = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps([names, commands]), "out.json"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def session(tmp_path_factory, image_root) -> dict[str, Any]:
    """A process online; then the hub is gone: one process knows it (offline), one does not (unplugged)."""
    folder = tmp_path_factory.mktemp("hub")
    theirs = {name: perturbed(timm.create_model(name.partition(".")[0])) for name in (TAG, BIN_ONLY)}
    torch.save(_images(), folder / "images.pt")
    torch.save(theirs[BIN_ONLY].state_dict(), folder / "weights.bin")
    torch.save({"state_dict": {"x": _Bomb()}}, folder / "bomb.bin")
    hub = _Hub()
    hub.files = {
        (TAG, "model.safetensors"): save(theirs[TAG].state_dict()),
        (TAG, "pytorch_model.bin"): (folder / "bomb.bin").read_bytes(),  # is not to be asked for
        (BIN_ONLY, "pytorch_model.bin"): (folder / "weights.bin").read_bytes(),
        (MALICIOUS, "pytorch_model.bin"): (folder / "bomb.bin").read_bytes(),
        (CUT, "model.safetensors"): save(theirs[TAG].state_dict()),
        (CUT, "pytorch_model.bin"): (folder / "bomb.bin").read_bytes(),
        (BROKEN, "pytorch_model.bin"): (folder / "bomb.bin").read_bytes(),
        (PAGE, "model.safetensors"): b"<!DOCTYPE html><html>Log in to this network</html>",
    }
    evaluate = ["evaluate", "--model", NEVER_ASKED, "--data", str(image_root / "val")]
    refused = [MALICIOUS, EMPTY, GATED, LOCKED, EXPIRED, UNKNOWN, BROKEN, PAGE, CUT]
    try:
        online = _run(folder, hub.address, [TAG, DEFAULT, BIN_ONLY, *refused], [], offline=False)
    finally:
        hub.close()
    offline = _run(folder, hub.address, [TAG, BIN_ONLY, NEVER_ASKED], [evaluate], offline=True)
    unplugged = _run(folder, hub.address, [TAG, NEVER_ASKED], [], offline=False)
    states = {"online": online, "offline": offline, "unplugged": unplugged}
    return {"folder": folder, "theirs": theirs, "address": hub.address, "requests": hub.requests, **states}


STATES = {"online": [TAG, DEFAULT, BIN_ONLY], "offline": [TAG, BIN_ONLY], "unplugged": [TAG]}


@pytest.mark.parametrize(
    ("state", "name"), [(state, name) for state, names in STATES.items() for name in names]
)
def test_a_tag_gives_timms_logits_with_and_without_a_network(state, name, session):
    theirs = session["theirs"][BIN_ONLY if name == BIN_ONLY else TAG]
    with torch.inference_mode():
        expected = theirs(_images())[0]
    found = torch.tensor(session[state][name]["logits"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


def test_a_file_is_downloaded_once_and_then_comes_from_the_cache(session):
    requests = session["requests"]
    assert requests["GET", TAG, "model.safetensors"] == 1
    assert requests["GET", BIN_ONLY, "pytorch_model.bin"] == 1


def test_a_pickle_is_asked_for_only_where_there_is_no_safetensors_file(session):
    asked = {name for (_, name, file) in session["requests"] if file == "pytorch_model.bin"}
    assert asked == {BIN_ONLY, MALICIOUS, EMPTY}  # the others have safetensors, or gave no answer


def test_preprocessing_classes_and_licence_are_those_of_the_tag(session):
    found = session["online"][TAG]
    assert found["size"] == [160, 160]
    assert found["crop"] == 0.95
    assert found["mean"] == [0.5, 0.5, 0.5]
    assert found["first"] == "n01440764"
    assert found["licence"] == "apache-2.0"
    assert found["source"] == TAG
    assert found["log"] == [["INFO", f"licence of the weights of {TAG}: apache-2.0"]]
    assert session["online"][DEFAULT]["source"] == TAG


def _refusal(session, state: str, name: str) -> str:
    found = session[state][name]
    assert found["kind"] == "ModelFileError", found
    assert "\n" not in found["error"]
    return found["error"]


def test_a_malicious_pickle_from_the_hub_is_refused_and_does_not_run(session):
    text = _refusal(session, "online", MALICIOUS)
    assert re.search(r"pytorch_model\.bin holds more than tensors.*It asks for (posix|nt)\.system\.", text)
    assert not (session["folder"] / "canary").exists()


@pytest.mark.parametrize(("name", "status"), [(GATED, 403), (LOCKED, 401), (EXPIRED, 401), (UNKNOWN, 404)])
def test_a_repository_behind_a_licence_says_how_to_get_in(name, status, session):
    text = _refusal(session, "online", name)
    assert text.startswith(f"{name}: the hub refuses timm/{name}/model.safetensors: ")
    assert str(status) in text
    assert "account that accepted their licence (`hf auth login`)" in text
    assert text.endswith(f"use {name}=path/to/file, or model.pretrained path/to/file.")


@pytest.mark.parametrize(
    ("state", "name", "reason"),
    [
        ("online", EMPTY, "404 Client Error"),
        ("online", BROKEN, "500 Internal Server Error"),
        ("online", CUT, "received 1000 bytes|incomplete|ended prematurely"),
        ("offline", NEVER_ASKED, r"offline mode is on \(HF_HUB_OFFLINE\)"),
        ("unplugged", NEVER_ASKED, "Connection refused|refused"),
    ],
)
def test_weights_that_cannot_be_had_are_named_with_the_cache_the_reason_and_a_way_out(
    state, name, reason, session
):
    text = _refusal(session, state, name)
    cache, address = session["folder"] / "home" / "hub", session["address"]
    start = (
        f"{name}: model.safetensors of timm/{name} is not in the cache {cache} and cannot be fetched from "
    )
    assert text.startswith(f"{start}{address}: ")
    assert re.search(reason, text)
    assert text.endswith(f"With the file at hand use {name}=path/to/file, or model.pretrained path/to/file.")


def test_a_page_in_place_of_weights_is_named_with_its_place_in_the_cache(session):
    text = _refusal(session, "online", PAGE)
    assert re.search(rf"hub/models--timm--{PAGE}/.*/model\.safetensors is a web page, not weights", text)


def test_the_command_line_refuses_in_one_paragraph_and_exits_with_2(session):
    found = session["offline"][f"evaluate --model {NEVER_ASKED}"]
    assert found["exit"] == 2
    assert found["stdout"] == ""
    assert found["stderr"].startswith(
        f"vit-cls: {NEVER_ASKED}: model.safetensors of timm/{NEVER_ASKED} is not"
    )
    assert found["stderr"].count("\n") == 1


# ---- tags without a repository ----------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch's cache of downloads, in this test's folder; online."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub" / "checkpoints"


def test_a_tag_at_an_address_alone_is_downloaded_once(torch_home, monkeypatch):
    hub = _Hub()
    hub.files["", "encoder.pth.tar"] = b"weights"
    config = PretrainedCfg(url=f"{hub.address}/ijepa/encoder.pth.tar")
    try:
        assert weights_file("vit.tag", config) == torch_home / "encoder.pth.tar"
        assert weights_file("vit.tag", config).read_bytes() == b"weights"
        assert hub.requests["GET", "", "encoder.pth.tar"] == 1
        with pytest.raises(ModelFileError, match=r"^vit\.tag: absent\.pth is not in the cache .*404"):
            weights_file("vit.tag", PretrainedCfg(url=f"{hub.address}/absent.pth"))
    finally:
        hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights_file("vit.tag", config).read_bytes() == b"weights"
    with pytest.raises(ModelFileError, match=r"offline mode is on.*use vit\.tag=path/to/file"):
        weights_file("vit.tag", PretrainedCfg(url=f"{hub.address}/absent.pth"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelFileError, match=r"absent\.pth is not in .* cannot be fetched from .*refused"):
        weights_file("vit.tag", PretrainedCfg(url=f"{hub.address}/absent.pth"))
    assert [path.name for path in torch_home.iterdir()] == ["encoder.pth.tar"]


def test_a_tag_without_published_weights_says_so():
    with pytest.raises(ModelFileError, match=r"^no weights were published for test_vit4\.r160_in1k\. Use it"):
        create_model("test_vit4.r160_in1k", pretrained=True)


# ---- licences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "licence"),
    [
        ("vit_base_patch16_224.mae", "WARNING", "cc-by-nc-4.0, which does not allow commercial use"),
        (
            "vit_base_patch32_clip_224.metaclip_400m",
            "WARNING",
            "cc-by-nc-4.0, which does not allow commercial use",
        ),
        ("vit_tiny_patch16_224.augreg_in21k", "INFO", "apache-2.0"),
        ("vit_tiny_patch16_224", "INFO", "not stated by the source of the weights"),
    ],
)
def test_a_licence_is_told_and_warned_of_where_it_forbids_commercial_use(
    name, level, licence, tmp_path, caplog
):
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 10}
    model = timm.create_model(name.partition(".")[0], **small)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with caplog.at_level(logging.INFO, logger="vit_cls"):
        ours = create_model(name, pretrained=tmp_path / "weights.safetensors", **small)
    told = [r for r in caplog.records if r.getMessage().startswith("licence of the weights of ")]
    assert [(r.levelname, r.getMessage().partition(": ")[2]) for r in told] == [(level, licence)]
    assert ours.load_report.licence == (None if "not stated" in licence else licence.partition(",")[0])
