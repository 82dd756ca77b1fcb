"""The order of samples is a function of seed and epoch, and is dealt out to processes without loss."""

import itertools

import pytest

from vit_cls.data.sampler import EpochSampler, sample_seed


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


@pytest.mark.parametrize("num_samples", [0, 1, 2, 101])
def test_each_epoch_holds_every_sample_once(num_samples):
    sampler = EpochSampler(num_samples, seed=0, shuffle=True)
    for epoch in range(3):
        assert sorted(_indices(sampler, epoch)) == list(range(num_samples))


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
@pytest.mark.parametrize("num_samples", [0, 3, 84, 101])
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


def test_two_processes_together_follow_the_order_of_one():
    whole = _indices(EpochSampler(100, seed=7, shuffle=True), 4)
    even, odd = _rank_indices(100, 2, shuffle=True, epoch=4)
    assert [index for pair in zip(even, odd, strict=True) for index in pair] == whole


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
