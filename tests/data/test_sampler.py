"""The order of samples is a function of seed and epoch, and is dealt out to processes without loss."""

import itertools

import numpy as np
import pytest

from vit_cls.data.sampler import EpochSampler, EvenBatches, sample_seed, scored_images, spread_order
from vit_cls.errors import ConfigError


def _indices(sampler: EpochSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert all(key[0] == epoch for key in keys)
    assert len(keys) == len(sampler)
    return [index for _, index in keys]


def _rank_indices(num_samples: int, world_size: int, *, shuffle: bool, epoch: int = 0) -> list[list[int]]:
    return [
        _indices(EpochSampler(num_samples, seed=7, shuffle=shuffle, rank=rank, world_size=world_size), epoch)
        for rank in range(world_size)
    ]


def test_samples_are_in_order_when_not_shuffled_in_any_epoch():
    sampler = EpochSampler(50, seed=0, shuffle=False)
    assert _indices(sampler, 0) == _indices(sampler, 9) == list(range(50))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = {
        tuple(_indices(EpochSampler(50, seed=seed, shuffle=True), epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_order_depends_on_seed_and_epoch_not_on_what_was_drawn_before():
    used = EpochSampler(50, seed=3, shuffle=True)
    _indices(used, 0)
    _indices(used, 1)
    assert _indices(used, 5) == _indices(used, 5) == _indices(EpochSampler(50, seed=3, shuffle=True), 5)


def test_any_sample_may_come_at_any_place():
    """Each of 5 samples is first in about a fifth of 500 epochs; a weak shuffle would favour some."""
    sampler = EpochSampler(5, seed=0, shuffle=True)
    first = [_indices(sampler, epoch)[0] for epoch in range(500)]
    assert all(60 <= first.count(index) <= 140 for index in range(5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_samples", [0, 1, 3, 84, 101])
def test_processes_train_on_different_samples_for_the_same_number_of_steps(num_samples, world_size):
    for epoch in range(3):
        parts = _rank_indices(num_samples, world_size, shuffle=True, epoch=epoch)
        assert {len(part) for part in parts} == {num_samples // world_size}
        dealt = list(itertools.chain(*parts))
        assert len(set(dealt)) == len(dealt)
        if num_samples % world_size == 0:
            assert sorted(dealt) == list(range(num_samples))


def test_what_does_not_go_round_evenly_is_another_sample_in_another_epoch():
    left_out = set()
    for epoch in range(20):
        dealt = set(itertools.chain(*_rank_indices(7, 3, shuffle=True, epoch=epoch)))
        left_out |= set(range(7)) - dealt
    assert len(left_out) >= 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [0, 2, 101])
def test_processes_evaluate_every_sample_exactly_once(num_samples, world_size):
    parts = _rank_indices(num_samples, world_size, shuffle=False)
    assert sorted(itertools.chain(*parts)) == list(range(num_samples))


def test_sample_seeds_of_ten_thousand_samples_are_distinct_and_valid_torch_seeds():
    grid = list(itertools.product(range(10), range(-1, 9), range(-1, 99)))
    seeds = {sample_seed(*key) for key in grid}
    assert len(grid) == len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # well mixed: each bit is set in about half of them
    for bit in range(63):
        assert 4_700 < sum(seed >> bit & 1 for seed in seeds) < 5_300


def test_sample_seed_is_the_same_on_every_machine():
    """Golden: other numbers would change every augmented image of a run that is resumed."""
    assert sample_seed(0, 0, 0) == 1_445_694_884_619_442_965
    assert sample_seed(1, 2, 3) == 6_520_558_355_739_401_531


def _keys(num_samples: int, epoch: int = 0, **settings) -> list[tuple[int, ...]]:
    sampler = EpochSampler(num_samples, seed=7, shuffle=True, **settings)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_weights_draw_in_their_proportion_and_copies_are_numbered():
    weights = np.array([1.0] * 90 + [9.0] * 10)
    counts = np.zeros(100)
    for epoch in range(200):
        keys = _keys(100, epoch, weights=weights)
        assert len(keys) == 100
        for _, index, copy in keys:
            counts[index] += 1
            assert copy >= 0
        for index in {key[1] for key in keys}:
            assert [copy for _, i, copy in keys if i == index] == list(
                range(sum(k[1] == index for k in keys))
            )
    assert counts[90:].sum() / counts.sum() == pytest.approx(0.5, abs=0.01)
    assert _keys(100, 3, weights=weights) == _keys(100, 3, weights=weights) != _keys(100, 4, weights=weights)


def test_a_weight_of_zero_is_never_drawn():
    weights = np.array([0.0, 1.0, 0.0, 2.0, 0.0])
    assert {key[1] for epoch in range(100) for key in _keys(5, epoch, weights=weights)} == {1, 3}


@pytest.mark.parametrize("settings", [{"repeats": 3}, {"weights": np.arange(1.0, 13.0)}, {}])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch_without_loss(settings, world_size):
    alone = _keys(12, 2, **settings)
    shares = [_keys(12, 2, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    dealt = [key for turn in zip(*shares, strict=True) for key in turn]
    assert dealt == alone  # in the same order, nothing twice, nothing lost


def test_repeated_images_come_together_and_are_augmented_each_on_its_own():
    keys = _keys(12, repeats=3)
    images = [index for _, index, _ in keys]
    assert len(keys) == 12
    assert images == [index for index in images[::3] for _ in range(3)]
    assert [copy for *_, copy in keys] == [0, 1, 2] * 4
    assert len({sample_seed(7, epoch, index, copy) for epoch, index, copy in keys}) == 12
    assert sample_seed(7, 0, 5, 0) == sample_seed(7, 0, 5)
    two = [_keys(12, repeats=2, rank=rank, world_size=2) for rank in range(2)]
    assert [key[1] for key in two[0]] == [key[1] for key in two[1]]  # each process has a copy of its own
    assert {key[2] for key in two[0]} == {0}


@pytest.mark.parametrize("num_samples", [0, 1, 3, 4, 5, 8, 9, 65, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 64, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_as_few_as_may_be_and_differ_by_one_image_at_most(num_samples, batch_size, shuffle):
    sampler = EpochSampler(num_samples, seed=7, shuffle=shuffle)
    batches = EvenBatches(sampler, batch_size)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        made = list(batches)
        assert [key for batch in made for key in batch] == list(sampler)  # the same keys in the same order
        sizes = [len(batch) for batch in made]
        assert len(made) == len(batches) == -(-num_samples // batch_size)
        assert sizes == batches.sizes() == sorted(sizes, reverse=True)
        assert not sizes or (max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize(
    "counts", [[12] * 10, [1] * 50, [500, 3, 1, 1, 40], [0, 7, 0, 2], list(range(1, 60)), [5]], ids=str
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_first_part_of_a_spread_order_holds_each_class_in_proportion(counts, shuffled):
    labels = np.repeat(np.arange(len(counts)), counts)
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    order = spread_order(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    held = np.cumsum(np.eye(len(counts))[labels[order]], axis=0)  # of each class, in each first part
    wanted = np.outer(np.arange(1, len(labels) + 1) / len(labels), counts)
    assert np.abs(held - wanted).max() < 2
    if len(set(counts)) == 1:  # as in turn
        assert (held.max(axis=1) - held.min(axis=1)).max() <= 1


def test_few_images_of_many_classes_are_not_those_of_the_first_classes_nor_the_first_of_a_class():
    labels = np.repeat(np.arange(100), 50)
    first = spread_order(labels)[:20]
    assert len(set(labels[first])) == 20
    assert np.diff(sorted(labels[first]), prepend=0, append=100).max() <= 10
    of_one = [i for i in spread_order(labels).tolist() if labels[i] == 0][:5]
    assert np.diff(sorted(of_one), prepend=0, append=50).max() <= 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_limit_scores_the_same_first_images_for_any_number_of_processes(world_size):
    order = spread_order(np.repeat(np.arange(4), 25))
    seen = []
    for rank in range(world_size):
        sampler = EpochSampler(100, seed=0, shuffle=False, rank=rank, world_size=world_size, order=order)
        batches = list(EvenBatches(sampler, 5))
        seen += [index for batch in batches[: int(len(batches) * 0.3)] for _, index in batch]
    assert len(seen) == scored_images(100, 5, 0.3, world_size)
    assert abs(len(seen) - 30) <= 5 * world_size
    assert set(seen) == set(order[: len(seen)].tolist())


@pytest.mark.parametrize(
    ("limit", "scored"),
    [(None, 21), (1.0, 21), (1, 4), (2, 8), (5, 18), (6, 21), (99, 21), (0.5, 12), (0.99, 18), (0, 0)],
)
def test_images_that_a_limit_scores_are_counted_as_lightning_takes_them(limit, scored):
    assert scored_images(21, 4, limit, 1) == scored  # in batches of 4, 4, 4, 3, 3 and 3


def test_a_limit_below_one_batch_is_refused():
    with pytest.raises(ConfigError, match=r"limit_val_batches 0.1 is less than one of the 6 batches.*0\.17"):
        scored_images(21, 4, 0.1, 1)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"data.repeats must be at least 1; got 0"):
        _keys(3, repeats=0)
    with pytest.raises(ConfigError, match=r"cannot be combined with data.weights"):
        _keys(3, repeats=2, weights=np.ones(3))
