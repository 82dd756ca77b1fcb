"""Files of weights that would take memory without end are refused before they are opened."""

from __future__ import annotations

import pickle
import pickletools
import zipfile

import numpy as np
import pytest
import torch

from vit_cls import create_model
from vit_cls.errors import ModelFileError
from vit_cls.weights import archives
from vit_cls.weights.archives import check_archive, check_pickle, check_tensors
from vit_cls.weights.tensor_files import read_tensors
from vit_cls.weights.timm_files import count_classes

NAME = "vit_tiny_patch16_224"


def _repacked(path, target, compression) -> None:
    """The same entries, compressed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize("ending", ["pth", "ckpt"])
def test_an_archive_that_unpacks_to_far_more_is_not_opened(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 100_000)
    plain, bomb = tmp_path / "plain.pth", tmp_path / f"bomb.{ending}"
    torch.save({"head.weight": torch.zeros(1000, 1000)}, plain)
    _repacked(plain, bomb, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10_000
    check_archive(plain)
    with pytest.raises(ModelFileError, match=r"unpacks to 40\d{5}: no file of weights does that"):
        create_model(NAME, pretrained=bomb)


def test_an_npz_that_unpacks_to_far_more_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 100_000)
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, **{"embedding/kernel": np.zeros((1000, 1000), np.float32)})
    with pytest.raises(ModelFileError, match="no file of weights does that"):
        create_model(NAME, pretrained=bomb)
    assert count_classes(bomb) is None


def test_a_small_archive_may_be_compressed(tmp_path):
    torch.save({"head.weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pth")
    _repacked(tmp_path / "plain.pth", tmp_path / "small.pth", zipfile.ZIP_DEFLATED)
    assert read_tensors(tmp_path / "small.pth")[0]["head.weight"].shape == (1000, 1000)


class _Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _encoded(times: int):
    import _codecs

    value = _Calls(_codecs.encode, "x", "latin1")
    for _ in range(times):
        value = _Calls(_codecs.encode, value, "hex_codec")
    return value


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "message"),
    [(_Calls(bytearray, 10**12), "asks for bytearray"), (_encoded(60), "of another kind than latin1")],
)
def test_a_pickle_that_makes_memory_of_nothing_is_not_read(value, message, zipped, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"a": value}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelFileError, match=message):
        create_model(NAME, pretrained=path)
    names = [op.name for op, _, _ in pickletools.genops(pickle.dumps(value, protocol=2))]
    assert "REDUCE" in names


def test_bytes_and_texts_of_ordinary_checkpoints_pass(tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save({"bytes": b"abc", "name": "hexagon"}, path, _use_new_zipfile_serialization=zipped)
        check_pickle(path)


def test_tensors_have_a_value_for_each_of_their_places(tmp_path):
    torch.save({"head.weight": torch.zeros(1).half().expand(10**6, 10**6)}, tmp_path / "wide.pth")
    with pytest.raises(
        ModelFileError, match=r"'head.weight' of shape \(1000000, 1000000\), but not the values"
    ):
        create_model(NAME, pretrained=tmp_path / "wide.pth")
    for tensor in (torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()):
        with pytest.raises(ModelFileError, match="not the values"):
            check_tensors({"state": [tensor]}, tmp_path)
    base = torch.zeros(4, 4)
    check_tensors({"whole": base, "view": base[1:, 2], "turned": base.T, "none": torch.zeros(0)}, tmp_path)


def test_a_web_of_lists_is_looked_at_once(tmp_path):
    web: list = [torch.zeros(1)]
    for _ in range(100):
        web = [web, web]
    check_tensors({"web": web}, tmp_path)
