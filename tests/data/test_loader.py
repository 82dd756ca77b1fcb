"""Batches are a function of files, seed and epoch; a file that fails costs no other row its pixels."""

import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_cls.data import loader as loader_module
from vit_cls.data.dataset import Batch, FolderSource, ImageDataset, Sample, collate
from vit_cls.data.decode import decode_image
from vit_cls.data.index import index_folder
from vit_cls.data.loader import default_num_workers, loading_advice, make_loader
from vit_cls.data.sampler import EpochSampler, sample_seed
from vit_cls.data.transforms import Reader, eval_reader, keyed, train_reader
from vit_cls.errors import ConfigError

SEED = 11
EPOCHS = (0, 1)
# torch advises against more workers than cores; the point here is that any number gives the same batches
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_folder) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), {"a": 9, "b": 7, "c": 5})


@pytest.fixture
def own_folder(tmp_path, write_folder) -> Path:
    """A folder to damage: 10 images."""
    return write_folder(tmp_path, {"a": 6, "b": 4})


def _train_set(root: Path, augment: str = "crop_flip") -> ImageDataset:
    return ImageDataset(FolderSource(index_folder(root)), train_reader(12, augment=augment), seed=SEED)


def _loader(dataset: ImageDataset, num_workers: int = 0, batch_size: int = 4, *, shuffle: bool = True):
    sampler = EpochSampler(len(dataset), seed=SEED, shuffle=shuffle)
    return make_loader(dataset, sampler, batch_size=batch_size, num_workers=num_workers)


def _epochs(loader) -> list[list[Batch]]:
    """All batches of the epochs, from one loader whose workers live on between them."""
    epochs = []
    for epoch in EPOCHS:
        loader.batch_sampler.sampler.set_epoch(epoch)
        epochs.append(list(loader))
    return epochs


def _assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.indices, b.indices)
    assert a.failures == b.failures


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers_and_in_every_epoch(folder, num_workers):
    dataset = _train_set(folder)
    loader = _loader(dataset, num_workers)
    assert loader.persistent_workers == (num_workers > 0)
    for epoch, batches in zip(EPOCHS, _epochs(loader), strict=True):
        # the reference: each key's sample, made here one by one, in the sampler's order
        sampler = EpochSampler(len(dataset), seed=SEED, shuffle=True)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert [len(batch.images) for batch in batches] == [4, 4, 4, 3, 3, 3]
        for batch in batches:
            mine, keys = keys[: len(batch.images)], keys[len(batch.images) :]
            _assert_same(batch, collate([dataset[key] for key in mine]))
        assert not keys


def test_two_epochs_differ_in_order_and_in_the_pixels_of_each_image(folder):
    first, second = _epochs(_loader(_train_set(folder), batch_size=100))
    orders = [epoch[0].indices for epoch in (first, second)]
    assert not torch.equal(*orders)
    assert all(order.sort().values.tolist() == list(range(21)) for order in orders)
    a, b = (epoch[0].images[order.argsort()] for epoch, order in zip((first, second), orders, strict=True))
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batch_holds_each_image_with_its_class_and_its_place_in_the_index(folder):
    index = index_folder(folder)
    dataset = ImageDataset(FolderSource(index), eval_reader(12))
    seen = []
    for batch in _loader(dataset, shuffle=False):
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        for image, target, i in zip(
            batch.images, batch.targets.tolist(), batch.indices.tolist(), strict=True
        ):
            assert torch.equal(image, eval_reader(12)(decode_image(index.path(i).read_bytes())))
            assert index.class_names[target] == index.path(i).parent.name
            seen.append(i)
    assert seen == list(range(21))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", [{"repeats": 3}, {"weights": np.r_[np.full(5, 20.0), np.ones(16)]}])
def test_copies_of_an_image_are_augmented_each_on_its_own_by_any_number_of_workers(folder, num_workers, how):
    dataset = _train_set(folder)
    sampler = EpochSampler(len(dataset), seed=SEED, shuffle=True, **how)
    keys = list(sampler)
    assert any(copy > 0 for _, _, copy in keys)
    batches = list(make_loader(dataset, sampler, batch_size=4, num_workers=num_workers))
    images = torch.cat([batch.images for batch in batches])
    assert torch.cat([batch.indices for batch in batches]).tolist() == [index for _, index, _ in keys]
    for image, (epoch, index, copy) in zip(images, keys, strict=True):
        whole = decode_image(dataset.source.index.path(index).read_bytes())
        assert torch.equal(
            image, keyed(dataset.reader.transform, whole, sample_seed(SEED, epoch, index, copy))
        )
    assert len({image.numpy().tobytes() for image in images}) == len(keys)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_neither_moves_torchs_global_generator_nor_depends_on_it(folder, num_workers):
    batches = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            batches.append(
                [batch for epoch in _epochs(_loader(_train_set(folder), num_workers)) for batch in epoch]
            )
            assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(*batches, strict=True):
        _assert_same(a, b)


def _make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # the path is too long for a socket to be bound to


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_bytes(b"no image"), "it is not an image of a known format"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-60]), "truncated"),
    "deleted": (Path.unlink, "No such file or directory"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is not a regular file"),
    "socket": (lambda path: (path.unlink(), _make_socket(path)), "it is not a regular file"),
    "device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "it is not a regular file"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_file_that_fails_is_a_row_with_its_reason_and_the_others_keep_their_pixels(
    own_folder, damage, num_workers
):
    damaged = 7
    dataset = _train_set(own_folder)
    whole = {i: (dataset[0, i].image, dataset[0, i].target) for i in range(10)}
    change, reason = DAMAGE[damage]
    change(dataset.source.index.path(damaged))
    batches = list(_loader(dataset, num_workers))
    failures = [failure for batch in batches for failure in batch.failures]
    assert [index for index, _ in failures] == [damaged]
    assert reason in failures[0][1]
    rows = {
        int(i): (image, int(target))
        for batch in batches
        for image, target, i in zip(batch.images, batch.targets, batch.indices, strict=True)
    }
    assert sorted(rows) == [i for i in range(10) if i != damaged]
    assert all(torch.equal(rows[i][0], whole[i][0]) and rows[i][1] == whole[i][1] for i in rows)


def test_batch_without_any_readable_image_still_lists_its_failures(own_folder):
    dataset = _train_set(own_folder)
    for i in range(10):
        dataset.source.index.path(i).write_bytes(b"")
    batches = list(_loader(dataset, num_workers=1, batch_size=5))
    assert len(batches) == 2
    for batch in batches:
        assert len(batch.images) == len(batch.targets) == len(batch.indices) == 0
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64
        assert {reason for _, reason in batch.failures} == {"the file is empty"}
    assert sorted(i for batch in batches for i, _ in batch.failures) == list(range(10))


def test_collate_keeps_the_order_of_images_and_of_failures():
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(4)]
    batch = collate(
        [
            Sample(9, images[0], 2, None),
            Sample(5, None, 1, "gone"),
            Sample(7, images[2], 0, None),
            Sample(1, None, 1, "torn"),
        ]
    )
    assert batch.images[:, 0, 0, 0].tolist() == [0, 2]
    assert batch.targets.tolist() == [2, 0]
    assert batch.indices.tolist() == [9, 7]
    assert batch.failures == [(5, "gone"), (1, "torn")]


def test_mistake_in_a_transform_is_an_error_not_a_failed_file(folder):
    def broken(image):
        raise ZeroDivisionError("our own fault")

    dataset = ImageDataset(FolderSource(index_folder(folder)), Reader(broken, (12, 12), (0, 0, 0), ""))
    with pytest.raises(ZeroDivisionError):
        next(iter(_loader(dataset)))


def test_pickled_dataset_makes_the_same_samples(folder):
    dataset = _train_set(folder)
    there = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(there[1, i].image, dataset[1, i].image) for i in range(len(dataset)))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"batch_size": 0, "num_workers": 0}, r"data\.batch_size must be at least 1; got 0\."),
        ({"batch_size": -3, "num_workers": 0}, r"data\.batch_size must be at least 1; got -3\."),
        ({"batch_size": 1, "num_workers": -1}, r"data\.num_workers must be at least 0; got -1\."),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(folder, numbers, message):
    with pytest.raises(ConfigError, match=message):
        make_loader(_train_set(folder), EpochSampler(21, seed=0, shuffle=True), **numbers)


@pytest.fixture
def machine(monkeypatch):
    """A function that says how many cores there are, how many are usable, and what the launcher says."""

    def set_up(usable: int, cores: int | None = None, **environment: str) -> None:
        monkeypatch.setattr(loader_module, "cpu_count", lambda: usable)
        monkeypatch.setattr(loader_module.os, "cpu_count", lambda: cores or usable)
        for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 3), (64, 1, 63), (64, 8, 7), (64, 32, 2), (4, 8, 1)],
)
def test_default_is_a_share_of_the_cores_with_one_for_training_itself_where_there_are_four(
    machine, cores, processes, workers
):
    machine(cores)
    assert default_num_workers(processes) == workers
    machine(cores, LOCAL_WORLD_SIZE=str(processes))
    assert default_num_workers() == workers
    machine(cores, SLURM_CPUS_PER_TASK=str(cores))  # these are this process's own
    assert default_num_workers(processes) == default_num_workers(1)


@pytest.mark.parametrize(
    ("usable", "given", "advice"),
    [
        ((12,), (4, 100), "raise data.num_workers (now 4; this process may use 12 cores)"),
        ((12,), (4, 100, 2), "raise data.num_workers (now 4; 2 processes share 12 cores)"),
        (
            (12,),
            (11, 100),
            "data.num_workers is 11 and this process may use 12 cores, so more will hardly help: make the "
            "images smaller once (their shorter side near the model's input)",
        ),
        (
            (1, 64),
            (1, 100),
            "data.num_workers is 1 and this process may use 1 core, so more will hardly help: make the "
            "images smaller once (their shorter side near the model's input), or let it use more of the "
            "machine's 64 cores",
        ),
        (
            (12,),
            (4, 4),  # batches: a fifth process would have none
            "data.num_workers is 4 and this process may use 12 cores, so more will hardly help: make the "
            "images smaller once (their shorter side near the model's input)",
        ),
    ],
)
def test_advice_names_the_machine_and_only_what_is_possible(machine, usable, given, advice):
    machine(*usable)
    assert loading_advice(*given) == advice


def test_no_more_processes_are_started_than_there_are_batches(machine, folder, monkeypatch):
    machine(64)
    started = []
    make = loader_module.WatchedLoader

    def count(*given, num_workers, prefetch_factor, timeout, **settings):
        started.append(num_workers)
        return make(*given, num_workers=0, **settings)

    monkeypatch.setattr(loader_module, "WatchedLoader", count)
    source = FolderSource(index_folder(folder))  # 21 images
    for batch_size in (4, 20, 21):
        batches = list(loader_module.load_once(source, eval_reader(12), batch_size=batch_size))
        assert [place for items, _ in batches for place in items] == list(range(21))
    assert started == [6, 2, 0]


def test_a_batch_of_decoded_photos_keeps_their_layout_and_their_pixels(generator):
    planes = torch.randint(0, 256, (4, 3, 6, 5), generator=generator, dtype=torch.uint8)
    rows = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in planes]
    samples = [Sample(i, image, 0, None) for i, image in enumerate(rows)]
    batch = collate(samples).images
    assert torch.equal(batch, planes)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    mixed = collate([samples[0], Sample(1, planes[1], 0, None)]).images
    assert torch.equal(mixed, planes[:2])
