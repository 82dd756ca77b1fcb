"""Kept pixels are those of the images and need no file again, whatever becomes of the cache's own file."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from vit_cls.data import cache as cache_module
from vit_cls.data import dataset as dataset_module
from vit_cls.data.cache import PixelCache
from vit_cls.data.dataset import Batch, FolderSource, ImageDataset
from vit_cls.data.index import index_folder
from vit_cls.data.loader import make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.transforms import eval_reader
from vit_cls.errors import ConfigError

SIZE = (12, 10)
COUNT = 9
IMAGE_BYTES = 3 * SIZE[0] * SIZE[1]


@pytest.fixture
def folder(tmp_path, write_folder) -> Path:
    return write_folder(tmp_path / "images", {"a": 5, "b": 4})


def _cache(root: Path, size: tuple[int, int] = SIZE, **settings) -> PixelCache:
    return PixelCache(root.parent / "cache", index_folder(root), eval_reader(size, **settings))


def _dataset(root: Path, cache: PixelCache | None) -> ImageDataset:
    return ImageDataset(FolderSource(index_folder(root)), eval_reader(SIZE), cache=cache)


def _loader(dataset: ImageDataset, num_workers: int = 0):
    sampler = EpochSampler(len(dataset), seed=0, shuffle=False)
    return make_loader(dataset, sampler, batch_size=2, num_workers=num_workers)


def _images(batches: list[Batch]) -> torch.Tensor:
    assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(COUNT))
    assert not any(batch.failures for batch in batches)
    return torch.cat([batch.images for batch in batches])


def _fresh(root: Path) -> torch.Tensor:
    """The pixels without a cache."""
    return _images(list(_loader(_dataset(root, None))))


def _pixels(root: Path) -> torch.Tensor:
    """The pixels through a cache that is opened anew."""
    return _images(list(_loader(_dataset(root, _cache(root)))))


def _kept(cache: PixelCache) -> int:
    """Images whose pixels are there."""
    return sum(cache.get(i) is not None for i in range(cache.shape[0]))


@pytest.fixture
def no_reading(monkeypatch):
    """Call it, and whoever reads a file from then on fails the test."""
    return lambda: monkeypatch.setattr(
        dataset_module, "read_file", lambda path, *_: pytest.fail(f"{path} was read")
    )


def _replace_unnoticed(path: Path) -> None:
    """Other bytes of the same length, at the same time."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_second_pass_has_the_same_pixels_and_reads_no_file(folder, no_reading, num_workers):
    expected = _fresh(folder)
    cache = _cache(folder)
    loader = _loader(_dataset(folder, cache), num_workers)
    assert _kept(cache) == 0
    assert torch.equal(_images(list(loader)), expected)
    assert _kept(cache) == COUNT
    for path in folder.rglob("*.png"):
        _replace_unnoticed(path)
    assert torch.equal(_images(list(loader)), expected)
    no_reading()
    # a later run finds the file by its name
    again = _cache(folder)
    assert again.path == cache.path
    assert torch.equal(_images(list(_loader(_dataset(folder, again)))), expected)


def test_main_process_and_workers_fill_one_cache_at_once(folder, no_reading):
    expected, cache = _fresh(folder), _cache(folder)
    loaders = [_loader(_dataset(folder, cache), num_workers=2), _loader(_dataset(folder, cache))]
    interleaved = list(zip(*loaders, strict=True))
    for side in zip(*interleaved, strict=True):
        assert torch.equal(_images(list(side)), expected)
    assert _kept(cache) == COUNT
    no_reading()
    assert torch.equal(_pixels(folder), expected)


def test_what_a_caller_does_to_its_pixels_stays_out_of_the_cache(folder):
    cache = _cache(folder)
    cache.put(0, torch.full((3, *SIZE), 7, dtype=torch.uint8))
    cache.get(0).zero_()
    assert (cache.get(0) == 7).all()


def test_every_kind_of_pixels_is_kept_exactly(folder):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 2 * SIZE[0], SIZE[1]), dtype=torch.uint8, generator=generator)
    images = [
        torch.zeros(3, *SIZE, dtype=torch.uint8),  # black is not "not there"
        torch.full((3, *SIZE), 255, dtype=torch.uint8),
        noise[:, ::2],  # not contiguous
        noise[:, : SIZE[0]].flip(2),
    ]
    cache = _cache(folder)
    for i, image in enumerate(images):
        cache.put(i + 2, image)
    for i, image in enumerate(images):
        kept = cache.get(i + 2)
        assert kept.dtype == torch.uint8
        assert torch.equal(kept, image)
    assert cache.get(0) is None
    assert cache.get(COUNT - 1) is None
    assert _kept(cache) == len(images)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_cannot_be_read_stays_a_failure_and_is_tried_again(folder, num_workers):
    index = index_folder(folder)
    expected = _fresh(folder)
    whole = index.path(3).read_bytes()
    _replace_unnoticed(index.path(3))
    cache = _cache(folder)
    loader = _loader(_dataset(folder, cache), num_workers)
    for _ in range(2):
        failures = [failure for batch in loader for failure in batch.failures]
        assert failures == [(3, "it is not an image of a known format")]
    assert _kept(cache) == COUNT - 1
    status = index.path(3).stat()
    index.path(3).write_bytes(whole)  # the disk is back; as far as the cache can see, nothing has changed
    os.utime(index.path(3), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(_images(list(loader)), expected)
    assert _kept(cache) == COUNT


def test_file_that_is_missing_when_the_cache_is_opened_is_a_failure(folder):
    cache_before = _cache(folder)
    index = index_folder(folder)
    index.path(2).unlink()
    cache = PixelCache(folder.parent / "cache", index, eval_reader(SIZE))
    assert cache.path != cache_before.path
    dataset = ImageDataset(FolderSource(index), eval_reader(SIZE), cache=cache)
    failures = [failure for batch in _loader(dataset) for failure in batch.failures]
    assert failures == [(2, "No such file or directory")]
    assert _kept(cache) == COUNT - 1


def _touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def _longer(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    {
        "time": lambda root: _touched(root / "a" / "001.png"),
        "size": lambda root: _longer(root / "b" / "000.png"),
        "added": lambda root: shutil.copy(root / "a" / "000.png", root / "a" / "new.png"),
        "removed": lambda root: (root / "b" / "003.png").unlink(),
        "renamed": lambda root: (root / "a" / "001.png").rename(root / "a" / "0011.png"),
        "other class": lambda root: (root / "a" / "004.png").rename(root / "b" / "004.png"),
    }.items(),
    ids=lambda item: item[0],
)
def test_change_of_any_file_is_another_cache(folder, change):
    before = _cache(folder)
    change[1](folder)
    assert _cache(folder).path != before.path


def test_other_settings_format_root_size_or_libraries_are_another_cache(folder, monkeypatch):
    paths = [_cache(folder, **own).path for own in ({}, {"crop_mode": "squash"}, {"size": SIZE[::-1]})]
    shutil.copytree(folder, folder.parent / "copy")  # keeps the times
    paths.append(_cache(folder.parent / "copy").path)
    libraries = (cache_module.PIL, torch, cache_module.torchvision)
    own = [(cache_module, name) for name in ("FORMAT_VERSION", "FAST_JPEG")]
    for owner, name in [*own, *((each, "__version__") for each in libraries)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, "99.0")
            paths.append(_cache(folder).path)
    assert len(set(paths)) == len(paths) == 9
    assert len({path.parent for path in paths}) == 1


def test_relative_and_absolute_root_share_a_cache(folder, monkeypatch):
    absolute = _cache(folder).path
    monkeypatch.chdir(folder.parent)
    relative = PixelCache(Path("cache"), index_folder("images"), eval_reader(SIZE)).path
    assert relative.resolve() == absolute.resolve()


@pytest.mark.parametrize("depth", ["file", "below a file"])
def test_folder_that_cannot_be_made_is_a_config_error(folder, depth):
    target = folder.parent / "occupied"
    target.write_text("a file")
    target = target if depth == "file" else target / "deeper"
    with pytest.raises(ConfigError, match=r"^data\.cache .*occupied.* cannot be written: [A-Z][a-z ]+\.$"):
        PixelCache(target, index_folder(folder), eval_reader(SIZE))


def test_folder_without_permission_is_a_config_error(folder, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache_module.os, "open", refuse)  # the superuser of a container may write anywhere
    with pytest.raises(ConfigError, match=r"cannot be written: Permission denied\.$"):
        _cache(folder)


def test_full_disk_is_one_warning_and_the_images_are_decoded_anew(folder, monkeypatch):
    expected, cache = _fresh(folder), _cache(folder)
    pwrite, room = os.pwrite, 3 * (IMAGE_BYTES + 4) + 100

    def write(descriptor, data, place):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[:room]  # a full disk takes what still fits
        room -= len(part)
        return pwrite(descriptor, part, place)

    monkeypatch.setattr(cache_module.os, "pwrite", write)
    with pytest.warns(UserWarning, match=r"takes no more images: No space left on device\.") as record:
        images = _images(list(_loader(_dataset(folder, cache))))
    assert len(record) == 1
    assert torch.equal(images, expected)
    assert _kept(cache) == 3
    monkeypatch.undo()
    assert torch.equal(_pixels(folder), expected)
    assert _kept(_cache(folder)) == COUNT


def _cut(share: float):
    return lambda data: data[: round(len(data) * share)]


DAMAGE = {
    "empty": _cut(0),
    "table cut off": lambda data: data[: 4 * COUNT - 6],
    "pixels cut off": _cut(0.6),
    "last byte missing": lambda data: data[:-1],
    "cut off and filled up with zeros": lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
    "pixels lost, table kept": lambda data: data[: 4 * COUNT] + bytes(len(data) - 4 * COUNT),
    "too long": lambda data: data + b"foreign" * 1000,
    "shifted": lambda data: b"\1" + data[:-1],
    "all ones": lambda data: b"\1" * len(data),
    "one bit": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_never_gives_wrong_pixels_and_is_whole_again_after_a_pass(folder, no_reading, damage):
    expected = _fresh(folder)
    assert torch.equal(_pixels(folder), expected)
    path = _cache(folder).path
    data = path.read_bytes()
    assert len(data) == COUNT * (4 + IMAGE_BYTES)
    path.write_bytes(DAMAGE[damage](data))
    assert torch.equal(_pixels(folder), expected)
    assert path.read_bytes()[: len(data)] == data
    no_reading()
    assert torch.equal(_pixels(folder), expected)


def test_damage_under_an_open_cache_is_noticed_too(folder):
    expected, cache = _fresh(folder), _cache(folder)
    loader = _loader(_dataset(folder, cache))
    assert torch.equal(_images(list(loader)), expected)
    os.truncate(cache.path, 4 * COUNT + IMAGE_BYTES)
    assert torch.equal(_images(list(loader)), expected)
    cache.path.unlink()  # whoever has it open keeps it
    assert torch.equal(_images(list(loader)), expected)


def test_pickle_holds_the_name_of_the_file_not_its_pixels(folder):
    index = index_folder(folder)
    size = (2000, 2000)
    cache = PixelCache(folder.parent / "cache", index, eval_reader(size))
    image = torch.arange(3 * 2000 * 2000, dtype=torch.int64).to(torch.uint8).reshape(3, *size)
    cache.put(4, image)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    there = pickle.loads(data)
    assert torch.equal(there.get(4), image)
    there.put(5, image.flip(1))
    assert torch.equal(cache.get(5), image.flip(1))
    assert cache.path.stat().st_blocks * 512 < 4 * image.numel()  # the others take no room yet


def test_random_pixels_are_not_to_be_kept(folder):
    with pytest.raises(AssertionError, match="random pixels"):
        ImageDataset(FolderSource(index_folder(folder)), eval_reader(SIZE), seed=0, cache=_cache(folder))
