"""Evaluation sees what timm's evaluation sees; training draws what its key says and nothing else."""

import contextlib
import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import v2

from tests.data.files import image_file, noise
from vit_cls.data.decode import decode_image, read_file
from vit_cls.data.index import index_folder
from vit_cls.data.transforms import (
    AUGMENTS,
    eval_reader,
    keyed,
    model_reader,
    train_reader,
)
from vit_cls.errors import ConfigError
from vit_cls.model.classifier import Preprocess

MAX_DIFFERENCE = 2
"""Grey levels. torchvision resizes uint8 tensors in fixed point, and Pillow images in another."""


def _picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Edges, slopes and noise, uint8 ``(3, height, width)``.

    Within 50 and 205: beyond, bicubic overshoots what uint8 holds, and the libraries clip it between their
    two passes over rows and columns in different order.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None]
    picture = torch.stack([x + 0 * y, y + 0 * x, ((x * 7 + y * 5) % 1 > 0.5).float()])
    noise = torch.rand((3, height, width), generator=generator)
    return (50 + (0.7 * picture + 0.3 * noise) * 155).round().to(torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process; the images are too small to share
    yield
    torch.set_num_threads(threads)


def _ramp(height: int = 40, width: int = 60) -> torch.Tensor:
    """Brighter to the right, from 60 to 250, so that a flip and a crop can be read off."""
    return torch.linspace(60, 250, width).round().to(torch.uint8).expand(3, height, width).contiguous()


def _reference_timm_eval(image: torch.Tensor, size, crop_pct: float, crop_mode: str, interpolation: str):
    transform = transforms_imagenet_eval(
        size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, normalize=False
    )
    return transform(Image.fromarray(image.permute(1, 2, 0).numpy()))


def _difference(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize(
    "shape",
    [
        (50, 50),
        (61, 83),
        (90, 41),
        (300, 200),
        (33, 32),
        (7, 5),
        (20, 140),
        (20, 300),
        (1, 1),
        (1, 9),
        (2, 3),
    ],
)
@pytest.mark.parametrize("size", [32, 33, (24, 40), (40, 24)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_exact_evaluation_is_timms_pixel_for_pixel_and_the_fast_one_nearly(
    shape, size, crop_mode, interpolation
):
    # full contrast, unlike `_picture`: here no rounding is excused
    image, gentle = torch.from_numpy(noise(0, *shape)).permute(2, 0, 1), _picture(*shape)
    for crop_pct in (0.875, 0.9, 1.0):
        settings = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        exact, fast = (eval_reader(size, **settings, exact=each) for each in (True, False))
        assert torch.equal(exact(image), _reference_timm_eval(image, size, *settings.values())), crop_pct
        reference = _reference_timm_eval(gentle, size, *settings.values())
        assert _difference(fast(gentle), reference) <= MAX_DIFFERENCE, crop_pct


@pytest.mark.filterwarnings("ignore:.*unclosed file:pytest.PytestUnraisableExceptionWarning")  # timm's
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_exact_evaluation_of_a_folder_of_jpegs_is_that_of_timms_loader(tmp_path):
    sizes = [(60, 80), (80, 60), (64, 64), (33, 120)]
    for i, (height, width) in enumerate(sizes):
        path = tmp_path / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(_picture(height, width, seed=i).permute(1, 2, 0).numpy()).save(path, quality=90)
    loader = create_loader(
        ImageDataset(str(tmp_path)),
        (3, 48, 48),
        batch_size=4,
        interpolation="bicubic",
        crop_pct=0.875,
        num_workers=0,
        device=torch.device("cpu"),
    )
    theirs, targets = next(iter(loader.loader))  # inside the prefetcher, which goes on to normalise
    index = index_folder(tmp_path)
    assert targets.tolist() == index.labels.tolist()
    for exact in (True, False):
        transform = eval_reader(48, crop_pct=0.875, exact=exact)
        ours = torch.stack([transform(decode_image(read_file(index.path(i)))) for i in range(len(index))])
        assert _difference(ours, theirs) <= (0 if exact else MAX_DIFFERENCE)


def test_nearest_makes_no_new_values_and_the_smooth_filters_do():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, 21:] = 200
    values = {
        name: set(eval_reader(15, crop_pct=1.0, interpolation=name)(image).unique().tolist())
        for name in ("nearest", "bilinear", "bicubic")
    }
    assert values["nearest"] == {0, 200}
    assert len(values["bilinear"]) > 2
    assert max(values["bicubic"]) > 200  # it overshoots at an edge; bilinear cannot
    assert max(values["bilinear"]) == 200


@pytest.mark.parametrize("size", [224, (160, 224)])
def test_line_of_millions_of_pixels_costs_no_more_than_its_middle(size):
    """Resized whole, it would be hundreds of gigabytes; a file of a few kilobytes may hold it."""
    length = 3_000_000
    image = (torch.arange(length) // 10 % 2 * 200).to(torch.uint8).expand(3, 1, length)
    middle = image[..., length // 2 - 50 : length // 2 + 50]
    for turn, exact in itertools.product((lambda x: x, lambda x: x.transpose(1, 2)), (False, True)):
        transform = eval_reader(size, crop_pct=1.0, exact=exact)
        assert _difference(transform(turn(image)), transform(turn(middle))) <= 1


def test_evaluation_draws_no_random_numbers():
    image, transform = _picture(50, 70), eval_reader(24)
    state = torch.get_rng_state()
    assert torch.equal(transform(image), transform(image))
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_survive_the_way_to_a_worker_process():
    image = _picture(50, 70)
    transforms = [eval_reader(24), eval_reader((24, 16)), eval_reader(24, crop_mode="squash")]
    transforms += [eval_reader((24, 16), exact=True)]
    transforms += [train_reader(24, augment=augment) for augment in AUGMENTS]
    for transform in transforms:
        there = pickle.loads(pickle.dumps(transform))
        assert torch.equal(keyed(there, image, 5), keyed(transform, image, 5))


def test_table_of_augmentations_has_the_rows_these_tests_are_about():
    assert list(AUGMENTS) == ["crop_flip", "affine", "randaugment", "trivialaugment", "none"]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 200), (200, 9), (64, 48)])
@pytest.mark.parametrize("size", [20, (12, 30)])
def test_every_augmentation_makes_uint8_images_of_the_model_size_and_leaves_its_input_alone(
    augment, shape, size
):
    image = _picture(*shape)
    before = image.clone()
    out = train_reader(size, augment=augment)(image, 1)
    assert out.shape == (3, *((size, size) if isinstance(size, int) else size))
    assert out.dtype == torch.uint8
    assert torch.equal(image, before)


def _flipped(image: torch.Tensor) -> bool:
    """Whether a ramp, cropped or turned a little, is brighter on its left."""
    columns = image[0, image.shape[1] // 2].float()
    third = len(columns) // 3
    return bool(columns[third] > columns[-third - 1])


@pytest.mark.parametrize("size", [24, (16, 30)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_crop_flip_is_torchvisions_to_the_bit(size, interpolation):
    image, transform = _picture(61, 83), train_reader(size, interpolation=interpolation)
    pair = (size, size) if isinstance(size, int) else size
    crop = v2.RandomResizedCrop(pair, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    reference = v2.Compose([crop, v2.RandomHorizontalFlip()])
    for key in range(50):
        assert torch.equal(transform(image, key), keyed(reference, image, key))


def test_affine_moves_every_image_a_little_and_flips_none():
    transform = train_reader(24, augment="affine")
    still = train_reader(24, augment="none")(_ramp())
    outs = [transform(_ramp(), key) for key in range(200)]
    assert not any(map(_flipped, outs))
    assert len({out.numpy().tobytes() for out in outs}) == 200
    centres = torch.stack([out[0, 10:14, 10:14].float().mean() for out in outs])
    assert (
        centres - still[0, 10:14, 10:14].float().mean()
    ).abs().max() < 60  # a shift by a tenth, a turn by 12 degrees
    assert centres.std() > 3


@pytest.mark.parametrize(("augment", "share"), [("randaugment", 0.8), ("trivialaugment", 0.6)])
def test_automatic_augmentations_change_the_pixels_of_most_crops(augment, share):
    """They draw the crop first, so that equal keys give the crop that ``crop_flip`` gives."""
    image = _picture(48, 64)
    plain, transform = train_reader(24), train_reader(24, augment=augment)
    changed = [not torch.equal(transform(image, key), keyed(plain, image, key)) for key in range(100)]
    assert sum(changed) >= 100 * share  # "identity" and a strength of nought change nothing


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment"])
def test_automatic_augmentations_fill_with_grey_what_a_turn_leaves_empty(augment):
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    outs = [train_reader(24, augment=augment)(white, key) for key in range(100)]
    shares = [(out == 128).all(dim=0).float().mean().item() for out in outs]
    assert sum(0 < share < 1 for share in shares) > 10  # by turns, shears and shifts


def test_trivialaugment_reaches_every_strength_that_randaugment_keeps_to_one():
    """Brightness of a grey image tells the strength: always the same step up or down, or any."""
    grey = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    levels = {}
    for augment in ("randaugment", "trivialaugment"):
        outs = [train_reader(24, augment=augment)(grey, key) for key in range(300)]
        flat = [out for out in outs if len(out.unique()) == 1]
        levels[augment] = {int(out[0, 0, 0]) for out in flat}
    assert len(levels["trivialaugment"]) > 2 * len(levels["randaugment"]) > 2


def test_none_only_resizes_both_sides_and_draws_nothing():
    image, transform = _picture(31, 57), train_reader((20, 26), augment="none")
    state = torch.get_rng_state()
    out = transform(image)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, keyed(transform, image, 3))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((26, 20), Image.Resampling.BICUBIC)
    assert _difference(out, torch.from_numpy(np.array(pillow)).permute(2, 0, 1)) <= MAX_DIFFERENCE


@pytest.mark.parametrize("augment", AUGMENTS)
def test_interpolation_reaches_every_augmentation(augment):
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, 21:] = 200
    outs = {
        name: train_reader(15, augment=augment, interpolation=name)(image, 2).numpy().tobytes()
        for name in ("nearest", "bilinear", "bicubic")
    }
    assert len(set(outs.values())) == 3


@pytest.mark.parametrize("augment", [name for name in AUGMENTS if name != "none"])
def test_equal_keys_give_equal_pixels_and_other_keys_others(augment):
    image, transform = _picture(40, 60), train_reader(24, augment=augment)
    first = [transform(image, key) for key in range(20)]
    torch.rand(3)  # what was drawn in between does not matter
    again = [transform(image, key) for key in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({out.numpy().tobytes() for out in first}) == 20
    assert not torch.equal(keyed(transform, image, 2**63 - 1), first[0])


def _broken(image):
    torch.rand(1)
    raise ZeroDivisionError


@pytest.mark.parametrize("transform", [train_reader(24), _broken])
def test_keyed_transform_leaves_every_global_generator_as_it_was(transform):
    state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_state = copy.deepcopy(np.random.get_state())  # noqa: NPY002
    for key in range(5):
        with contextlib.suppress(ZeroDivisionError):
            keyed(transform, _ramp(), key)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    for before, after in zip(numpy_state, np.random.get_state(), strict=True):  # noqa: NPY002
        assert np.array_equal(before, after)


def test_keyed_draws_are_those_of_a_generator_with_that_seed():
    draws = keyed(lambda image: torch.rand(4), _ramp(), 123)
    assert torch.equal(draws, torch.rand(4, generator=torch.Generator().manual_seed(123)))


def test_unknown_words_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="crop_mode must be one of center, squash; got 'border'"):
        eval_reader(16, crop_mode="border")
    with pytest.raises(
        ConfigError, match=r"data\.augment must be one of crop_flip, affine, .*; got 'mixup'\."
    ):
        train_reader(24, augment="mixup")


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_training_reader_decodes_and_then_transforms_with_the_same_key(augment):
    data = _file(_picture(61, 83))
    reader = train_reader(24, augment=augment)
    for key in range(5):
        assert torch.equal(reader(data, key), keyed(reader.transform, decode_image(data), key))


@pytest.mark.parametrize("exact", [False, True])
def test_an_evaluation_reader_decodes_and_then_transforms_and_takes_pixels_too(exact):
    settings = {"crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear", "exact": exact}
    image = _picture(61, 83)
    reader = eval_reader((20, 24), **settings)
    expected = reader.transform(image)
    assert torch.equal(reader(_file(image)), expected)
    assert torch.equal(reader(image), expected)


def test_the_reader_of_a_model_takes_every_setting_of_its_preprocessing():
    changes = {
        "img_size": (20, 28),
        "crop_pct": 0.5,
        "crop_mode": "squash",
        "interpolation": "nearest",
        "background": (1, 2, 3),
    }
    half_clear = image_file(noise(0, 50, 70, channels=4))
    readers = [model_reader(Preprocess((24, 24))), model_reader(Preprocess((24, 24)), exact=True)]
    readers += [model_reader(Preprocess(**{"img_size": (24, 24), key: changes[key]})) for key in changes]
    readers += [model_reader(Preprocess((24, 24)), augment="crop_flip")]
    results = {reader(half_clear, 1).numpy().tobytes() for reader in readers}
    assert len(results) == len({reader.description for reader in readers}) == len(readers) == 8


def _file(image: torch.Tensor) -> bytes:
    return image_file(image.permute(1, 2, 0).numpy())


def test_grey_pixels_are_pillows_luma_before_the_resize_and_have_a_description_of_their_own(generator):
    pixels = torch.randint(0, 256, (3, 40, 30), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    same_size = eval_reader((40, 30), crop_pct=1.0, in_chans=1)
    assert torch.equal(same_size(pixels)[0], torch.from_numpy(np.array(picture)))
    exact = eval_reader(16, crop_pct=1.0, exact=True, in_chans=1)
    resized = picture.resize((16, 21), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
    assert torch.equal(exact(pixels)[0], torch.from_numpy(np.array(resized)))
    grey = same_size(pixels)
    assert torch.equal(same_size(grey), grey)  # grey already
    for make in (eval_reader, train_reader):
        assert make(16).description != make(16, in_chans=1).description


@pytest.mark.parametrize("augment", list(AUGMENTS))
def test_every_augmentation_makes_grey_pixels_of_a_grey_model(augment, generator):
    pixels = torch.randint(0, 256, (3, 40, 30), generator=generator, dtype=torch.uint8)
    reader = train_reader(16, augment=augment, in_chans=1)
    for key in range(12):
        image = reader(pixels, key=key)
        assert (image.shape, image.dtype) == ((1, 16, 16), torch.uint8)


@pytest.mark.parametrize("in_chans", [0, 2, 4])
def test_images_are_read_as_rgb_or_grey_alone(in_chans):
    with pytest.raises(ConfigError, match=rf"model.in_chans must be 3 .* or 1 .*; got {in_chans}"):
        eval_reader(16, in_chans=in_chans)
