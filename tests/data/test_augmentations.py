"""Own augmentations by name: what may be registered, what comes out, and what is refused before a run."""

from __future__ import annotations

import multiprocessing
import sys
from functools import partial

import pytest
import torch
from torchvision.transforms import v2

from vit_cls.data.augmentations import register_augmentation
from vit_cls.data.transforms import AUGMENTS, train_reader
from vit_cls.errors import ConfigError
from vit_cls.own_code import import_modules


@pytest.fixture(autouse=True)
def own_rows():
    rows = dict(AUGMENTS)
    yield
    AUGMENTS.clear()
    AUGMENTS.update(rows)


def _image(generator, height=40, width=60):
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def _crop(size, interpolation, *, scale=(0.5, 1.0)):
    return v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation)


@pytest.mark.parametrize(
    "transform",
    [v2.RandomVerticalFlip(1.0), lambda image: image.flip(-2), partial(torch.flip, dims=(-2,))],
    ids=["transform", "function", "builtin"],
)
def test_a_transform_is_applied_to_the_decoded_image(transform, generator):
    register_augmentation("own", transform)
    image = _image(generator)
    assert torch.equal(train_reader((40, 60), augment="own")(image, key=1), image.flip(-2))
    assert train_reader(16, augment="own")(image).shape == (3, 16, 16)  # cut at the centre, not squashed
    wide = torch.zeros(3, 20, 60, dtype=torch.uint8)
    wide[..., 20:40] = 255
    assert train_reader(20, augment="own")(wide).min() == 255


@pytest.mark.parametrize("make", [_crop, partial(_crop, scale=(0.2, 0.6))], ids=["function", "partial"])
def test_a_function_of_size_and_interpolation_makes_one(make, generator):
    register_augmentation("own", make)
    reader, image = train_reader((24, 32), augment="own"), _image(generator)
    assert reader(image, key=3).shape == (3, 24, 32)
    assert torch.equal(reader(image, key=3), reader(image, key=3))
    assert not torch.equal(reader(image, key=3), reader(image, key=4))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            v2.RandomVerticalFlip,
            "the augmentation own must be a transform of an image, or a function of size",
        ),
        (lambda: None, "the augmentation own must be a transform of an image"),
        ("crop_flip", "the augmentation own must be a transform of an image"),
        (
            v2.ToDtype(torch.float32),
            r"must give a uint8 tensor of shape \(3, height, width\); got torch.float32",
        ),
        (lambda image: image[:1], r"got torch.uint8 \(1, 1024, 1024\)"),
        (v2.ToPILImage(), "got Image"),
        (lambda image: image.nothing, "data.augment own fails on an image of .3, 1024, 1024.: "),
    ],
    ids=["class", "no argument", "word", "float", "grey", "picture", "raises"],
)
def test_what_makes_no_pixels_is_refused_before_the_first_epoch(transform, message):
    with pytest.raises(ConfigError, match=message):
        register_augmentation("own", transform)
        train_reader(16, augment="own")


def test_a_name_is_registered_once_and_the_same_may_come_again():
    for _ in range(2):
        register_augmentation("own", v2.Compose([v2.RandomVerticalFlip(0.25)]))
        register_augmentation("crop", _crop)
    register_augmentation("affine", AUGMENTS["affine"])
    for name, transform in (("own", v2.RandomVerticalFlip()), ("crop", v2.Identity()), ("affine", _crop)):
        with pytest.raises(ConfigError, match=f"the augmentation {name} is there already"):
            register_augmentation(name, transform)
    with pytest.raises(ConfigError, match="the name of an augmentation must be small letters"):
        register_augmentation("Own", _crop)


def test_a_started_process_has_what_cannot_be_sent(tmp_path, monkeypatch, generator):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = "from vit_cls.data.augmentations import register_augmentation\n"
    (tmp_path / "own_flip.py").write_text(
        f"{text}register_augmentation('own', lambda image: image.flip(-1))\n"
    )
    image = _image(generator)
    import_modules(["own_flip.py"])
    try:
        reader = train_reader((40, 60), augment="own")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert torch.equal(pool.apply(reader, (image, 1)), image.flip(-1))
    finally:
        import_modules([])
        del sys.modules["own_flip"]
