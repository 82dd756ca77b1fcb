"""Copies are found by bytes and by looks, and the check before training reads no more than it must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.files import copy, image_file, put
from vit_cls.data.decode import decode_image
from vit_cls.data.doctor import copies
from vit_cls.data.doctor.image_check import sign
from vit_cls.data.doctor.report import quick_check
from vit_cls.data.doctor.scan import FoundImage
from vit_cls.data.folders import find_parts
from vit_cls.data.partition import split_for_training


def _signature(pixels: np.ndarray) -> np.ndarray:
    signature = sign(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    assert signature is not None
    return signature


def _picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, quality: int) -> np.ndarray:
    return decode_image(image_file(image, "JPEG", quality=quality)).permute(1, 2, 0).numpy()


CHANGES = {
    "recompressed": lambda image: _jpeg(image, 40),
    "half the size": lambda image: np.asarray(image.resize((160, 120))),
    "brighter": lambda image: np.clip(np.asarray(image) * 1.15 + 5, 0, 255).astype(np.uint8),
    "grey": lambda image: np.asarray(image.convert("L").convert("RGB")),
    "one pixel cut off": lambda image: np.asarray(image)[1:, 1:],
}


@pytest.mark.parametrize("change", CHANGES)
def test_signature_stays_with_the_picture(change):
    for seed in range(20):
        image = _picture(seed)
        similarity = _signature(np.asarray(image)) @ _signature(CHANGES[change](image))
        assert copies.SIMILAR <= similarity <= 1.0001


def test_signatures_of_different_pictures_are_far_apart():
    signatures = np.stack([_signature(np.asarray(_picture(seed))) for seed in range(100)])
    similar = signatures @ signatures.T - np.eye(100)
    assert similar.max() < 0.75
    assert np.allclose(np.linalg.norm(signatures, axis=1), 1, atol=1e-5)


def test_flat_picture_has_no_signature():
    flat = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    flat[:, ::7, ::5] += 2
    assert sign(flat) is None


def test_near_copies_do_not_depend_on_the_block_size(monkeypatch):
    rng = np.random.default_rng(0)
    images = [FoundImage(f"{i}", "ab"[i % 2], "xyz"[i % 3], 1) for i in range(40)]
    base = rng.normal(size=(10, 480))
    signatures = base[np.arange(40) % 10] + 0.05 * rng.normal(size=(40, 480))
    signatures = (signatures / np.linalg.norm(signatures, axis=1, keepdims=True)).astype(np.float32)
    contents = [None] * 38 + [b"same"] * 2
    whole = copies.near_copies(images, signatures, contents)
    monkeypatch.setattr(copies, "CELLS", 100)
    assert sorted(whole, key=str) == sorted(copies.near_copies(images, signatures, contents), key=str)
    assert {kind for kind, _ in whole} == {"near_leakage", "near_label_conflict", "near_duplicate"} - {
        "near_leakage"  # i and i + 10 are in one split
    }
    for kind, offender in whole:  # by hand: the best earlier one of its kind
        row = int(offender.path)
        same_class = [j for j in range(row % 10, row, 10) if (images[j].label == images[row].label)]
        other_class = [j for j in range(row % 10, row, 10) if (images[j].label != images[row].label)]
        candidates = same_class if kind == "near_duplicate" else other_class
        best = max(candidates, key=lambda j: signatures[row] @ signatures[j])
        assert offender.other == str(best)


def _fill(root: Path, classes: dict[str, int], seed: int) -> None:
    """Files of one size: nothing here is decoded."""
    rng = np.random.default_rng(seed)
    for label, count in classes.items():
        for i in range(count):
            put(root, f"{label}/{i:02d}.png", rng.bytes(900))


@pytest.fixture
def clean(tmp_path):
    """train/ with 10 files a class, val/ with 2, all different."""
    _fill(tmp_path / "train", {"cat": 10, "dog": 10}, seed=0)
    _fill(tmp_path / "val", {"cat": 2, "dog": 2}, seed=1)
    return tmp_path


def _quick(root, **options):
    split = split_for_training(find_parts(root), val_fraction=0.2, seed=0)
    return {p.kind: p.offenders for p in quick_check(split.train.index, split.val.index, **options)}


def test_quick_check_finds_nothing_in_a_clean_folder(clean):
    assert _quick(clean) == {}


def test_quick_check_finds_images_of_validation_in_training(clean):
    found_in_val = copy(clean, "train/dog/03.png", "val/cat/a.png")
    copy(clean, "train/dog/03.png", "train/dog/b.png")
    found = _quick(clean)
    assert found.keys() == {"leakage"}
    (offender,) = found["leakage"]
    assert (offender.path, offender.other) == (found_in_val, "train/dog/03.png")
    assert offender.detail == "same file as train/dog/03.png"


def test_quick_check_finds_copies_that_the_split_made_here_parts(tmp_path):
    _fill(tmp_path, {"cat": 10, "dog": 10}, seed=0)
    for i in range(10):
        copy(tmp_path, f"cat/{i:02d}.png", f"cat/copy{i}.png")
    split = split_for_training(find_parts(tmp_path), val_fraction=0.2, seed=0)
    val, train = set(split.val.index.paths), set(split.train.index.paths)
    twin = {f"cat/{i:02d}.png": f"cat/copy{i}.png" for i in range(10)}
    twin |= {value: key for key, value in twin.items()}
    expected = sorted(path for path in val if twin.get(path) in train)
    assert expected
    assert [o.path for o in _quick(tmp_path)["leakage"]] == expected


def test_quick_check_is_not_fooled_by_equal_sizes_beginnings_and_middles(clean):
    data = np.random.default_rng(1000).bytes(200_000)
    put(clean, "train/cat/a.bmp", data)
    put(clean, "val/cat/a.bmp", data[:-1] + bytes([data[-1] ^ 1]))
    put(clean, "train/dog/a.bmp", b"x" + data[1:])
    assert len(data) > 2 * copies.BLOCK_BYTES
    assert _quick(clean) == {}


def test_quick_check_finds_class_names_that_collide(clean):
    _fill(clean / "train", {"Dog": 3}, seed=1000)
    assert [o.path for o in _quick(clean)["similar_class_names"]] == ["Dog", "dog"]


def _make_sizes_unique(root):
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        path.write_bytes(path.read_bytes() + bytes(8000 + 64 * i))


def test_quick_check_opens_no_file_whose_size_is_alone(clean, monkeypatch):
    _make_sizes_unique(clean)
    monkeypatch.setattr("builtins.open", lambda path, *_: pytest.fail(f"{path} was opened"))
    assert _quick(clean) == {}


def test_quick_check_says_when_it_compared_a_part(clean):
    _make_sizes_unique(clean)
    for i in range(6):
        for split in ("train", "val"):
            put(clean, f"{split}/cat/x{i}.png", bytes([i]) * (50_000 + i))
    assert len(_quick(clean)["leakage"]) == 6
    found = _quick(clean, most_reads=4)
    assert len(found["leakage"]) == 2
    assert found["partly_checked"][0].detail == "2 of 6 validation images were compared with training images"


def test_quick_check_passes_over_what_it_cannot_read(clean):
    (clean / "train/cat/a.jpg").symlink_to("nowhere")
    (clean / "val/cat/a.jpg").symlink_to("nowhere")
    put(clean, "train/cat/b.jpg", b"")
    put(clean, "val/cat/b.jpg", b"")
    assert _quick(clean) == {}
