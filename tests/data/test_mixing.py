"""Mixup, CutMix and erasing: what is mixed with what, how much, and that the draws follow their key."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vit_cls.data import mixing
from vit_cls.data.mixing import MixedTargets, MixOptions, mix_batch
from vit_cls.errors import ConfigError
from vit_cls.training.losses import mixed_cross_entropy

MIXUP = MixOptions(mixup_alpha=0.8)
CUTMIX = MixOptions(cutmix_alpha=1.0)
BOTH = MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.7, erase_prob=0.3)


def _batch(size: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image is one number, its class plus 1: what a pixel came from can be read off."""
    targets = torch.arange(size)
    return (targets + 1.0)[:, None, None, None].expand(-1, 3, side, side).clone(), targets


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("options", [MIXUP, CUTMIX, BOTH, MixOptions(erase_prob=1.0)])
def test_any_batch_size_will_do_and_shapes_stay(size, options):
    images, targets = _batch(size)
    mixed, classes = mix_batch(images, targets, options, key=3)
    assert mixed.shape == images.shape
    assert mixed.dtype == images.dtype
    assert torch.equal(classes.first, targets)
    assert sorted(classes.second.tolist()) == targets.tolist()  # everyone is somebody's partner once
    assert ((classes.share >= 0) & (classes.share <= 1)).all()


def test_mixup_is_the_shares_average_of_the_two_images():
    images, targets = _batch(64)
    mixed, classes = mix_batch(images, targets, MIXUP, key=1)
    expected = classes.share * (classes.first + 1) + (1 - classes.share) * (classes.second + 1)
    torch.testing.assert_close(mixed, expected[:, None, None, None].expand_as(mixed))
    assert len(classes.share.unique()) > 60  # each image has its own


def test_cutmix_shares_are_counted_in_pixels():
    images, targets = _batch(64)
    mixed, classes = mix_batch(images, targets, CUTMIX, key=1)
    own = (mixed == (targets + 1.0)[:, None, None, None]).float().mean(dim=(1, 2, 3))
    other = (mixed == (classes.second + 1.0)[:, None, None, None]).float().mean(dim=(1, 2, 3))
    alone = classes.second == targets
    torch.testing.assert_close(own[~alone], classes.share[~alone])
    torch.testing.assert_close((own + other)[~alone], torch.ones(int((~alone).sum())))
    assert 0.2 < classes.share.mean() < 0.8


def test_mix_prob_leaves_the_others_as_they_are():
    images, targets = _batch(2000, side=4)
    options = MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.25)
    mixed, classes = mix_batch(images, targets, options, key=5)
    untouched = (mixed == images).all(dim=(1, 2, 3))
    assert (classes.share[untouched] == 1).all()
    assert 0.70 < untouched.float().mean() < 0.85  # 75 % are not mixed; of CutMix's boxes a few are empty


@pytest.mark.parametrize("alpha", [0.2, 1.0, 7.0, 50.0])
def test_shares_are_beta_distributed(alpha):
    images, targets = _batch(20_000, side=1)
    drawn = mix_batch(images, targets, MixOptions(mixup_alpha=alpha), key=7)[1].share.double().numpy()
    for share in (0.95, 0.75, 0.5, 0.25, 0.05):
        four_standard_errors = 4 * (share * (1 - share) / len(drawn)) ** 0.5
        below = np.mean(drawn <= beta.ppf(share, alpha, alpha))
        assert below == pytest.approx(share, abs=four_standard_errors)


def test_the_draws_of_a_large_alpha_take_no_time():
    images, targets = _batch(256, side=1)
    began = time.perf_counter()
    for key in range(20):
        mix_batch(images, targets, MixOptions(mixup_alpha=200.0, cutmix_alpha=200.0), key=key)
    assert time.perf_counter() - began < 2.0  # 0.05 s; by rejection it never ended


def test_erasing_fills_one_rectangle_with_the_mean_colour():
    images, targets = _batch(400, side=32)
    erased, classes = mix_batch(images, targets, MixOptions(erase_prob=0.5), key=2)
    gone = erased[:, 0] == 0
    hit = gone.flatten(1).any(1)
    assert 0.4 < hit.float().mean() < 0.6
    rows, cols = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.flatten(1).sum(1), rows * cols)  # a rectangle
    share = gone[hit].float().mean(dim=(1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.4
    assert torch.equal(classes.share, torch.ones(400))


def test_draws_are_a_function_of_the_key_alone():
    images, targets = _batch(8)
    torch.manual_seed(0)
    first = mix_batch(images, targets, BOTH, key=11)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = mix_batch(images, targets, BOTH, key=11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    assert not torch.equal(first[0], mix_batch(images, targets, BOTH, key=12)[0])


def _reference_masks_of_the_host(images, targets, options, key):
    """Each image on its own, by slices."""
    draws = mixing._draw(len(images), tuple(images.shape[-2:]), options, key)
    mixed = images.clone()
    for i, (partner, _, blend, *edges) in enumerate(draws.tolist()):
        top, bottom, left, right, *erased = map(int, edges)
        if options.mixup_alpha > 0:
            mixed[i] = torch.lerp(images[int(partner)], images[i], torch.tensor(blend).to(images.dtype))
        mixed[i, :, top:bottom, left:right] = images[int(partner), :, top:bottom, left:right]
        mixed[i, :, erased[0] : erased[1], erased[2] : erased[3]] = 0
    partners = draws[:, 0].long()
    return mixed, MixedTargets(targets, targets[partners], draws[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [MIXUP, CUTMIX, BOTH, MixOptions(erase_prob=0.6)], ids=str)
def test_boxes_on_the_device_cut_and_erase_what_slices_do(options, dtype, generator):
    images = torch.randn(33, 3, 20, 28, generator=generator).to(dtype)
    targets = torch.arange(33)
    expected = _reference_masks_of_the_host(images, targets, options, key=2**62 + 5)
    mixed = mix_batch(images, targets, options, key=2**62 + 5)
    assert torch.equal(mixed[0], expected[0])
    for ours, theirs in zip(mixed[1], expected[1], strict=True):
        assert torch.equal(ours, theirs)


class _Transfers(TorchDispatchMode):
    """What is read back from the device, and what is sent to it."""

    def __init__(self):
        super().__init__()
        self.reads, self.sent = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and inputs:
            there, here = result.device.type, inputs[0].device.type
            if there == "cpu" != here or func is torch.ops.aten._local_scalar_dense.default:
                self.reads.append(func)
            if here == "cpu" != there:
                waits = not (kwargs or {}).get("non_blocking", False)
                self.sent.append((result.nbytes, waits))
        return result


def test_on_a_gpu_one_small_pinned_tensor_is_sent_and_nothing_is_read_back(monkeypatch):
    pinned = []
    monkeypatch.setattr(mixing, "_pinned", lambda draws: (pinned.append(draws.shape), draws)[1])
    with FakeTensorMode(allow_non_fake_inputs=True), _Transfers() as transfers:
        images = torch.empty(64, 3, 224, 224, device="cuda")
        targets = torch.empty(64, dtype=torch.int64, device="cuda")
        mixed, classes = mix_batch(images, targets, BOTH, key=3)
    assert mixed.device.type == "cuda"
    assert {tensor.device.type for tensor in classes} == {"cuda"}
    assert transfers.reads == []
    assert transfers.sent == [(64 * 11 * 4, False)]
    assert pinned == [(64, 11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_on_a_device_without_values_gives_its_shapes_and_types(dtype):
    images = torch.empty(5, 3, 12, 16, device="meta", dtype=dtype)
    targets = torch.empty(5, device="meta", dtype=torch.int64)
    mixed, classes = mix_batch(images, targets, BOTH, key=3)
    assert (mixed.shape, mixed.dtype, mixed.device.type) == (images.shape, dtype, "meta")
    assert [tensor.dtype for tensor in classes] == [torch.int64, torch.int64, torch.float32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": -1.0}, r"data\.mix\.mixup_alpha must be at least 0; got -1.0"),
        ({"cutmix_alpha": -0.5}, r"data\.mix\.cutmix_alpha must be at least 0; got -0.5"),
        ({"mix_prob": 1.5}, r"data\.mix\.mix_prob must be at least 0 and at most 1; got 1.5"),
        ({"erase_prob": -0.1}, r"data\.mix\.erase_prob must be at least 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MixOptions(**settings)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_unmixed_images_is_torchs(generator, smoothing, weighted):
    logits = torch.randn(6, 4, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 1, 1])
    weights = torch.tensor([1.0, 0.5, 2.0, 4.0]) if weighted else None
    mixed = MixedTargets(targets, targets.flip(0), torch.ones(6))
    ours = mixed_cross_entropy(logits, mixed, label_smoothing=smoothing, class_weights=weights)
    if smoothing and weighted:  # torch divides the smoothed part by the weights of the classes too
        each = F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing, reduction="none")
        expected = each.sum() / weights[targets].sum()
    else:
        expected = F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(ours, expected)


def test_the_loss_of_mixed_images_is_that_of_their_soft_targets(generator):
    logits = torch.randn(5, 4, generator=generator)
    share = torch.rand(5, generator=generator)
    first, second = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 3, 0, 2])
    soft = share[:, None] * F.one_hot(first, 4) + (1 - share)[:, None] * F.one_hot(second, 4)
    for smoothing in (0.0, 0.2):
        ours = mixed_cross_entropy(logits, MixedTargets(first, second, share), label_smoothing=smoothing)
        torch.testing.assert_close(ours, F.cross_entropy(logits, soft, label_smoothing=smoothing))
