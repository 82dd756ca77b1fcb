"""Metrics of reconstructed images by hand: signal to noise, structure, frequencies, identification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit_cls.stats.image_metrics import band_energy, identified, psnr, ssim


def test_psnr_is_the_hand_worked_one_and_has_a_ceiling():
    original = np.zeros((2, 3, 4, 4))
    image = original.copy()
    image[0, :, :2] = 0.5  # half of the pixels: mean squared error 0.125
    np.testing.assert_allclose(psnr(image, original), [9.0309, 100.0], atol=1e-4)


@pytest.mark.parametrize("side", [3, 5, 8, 12, 28])
def test_structural_similarity_is_one_for_equal_images_only(side, generator):
    images = torch.rand(3, 3, side, side, generator=generator).double().numpy()
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-6)
    assert (ssim(1 - images, images) < 0.7).all()


def test_structural_similarity_of_constant_images_is_the_hand_worked_one():
    one, other = np.full((1, 3, 12, 12), 0.2), np.full((1, 3, 12, 12), 0.8)
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.8 + c1) / (0.2**2 + 0.8**2 + c1)
    np.testing.assert_allclose(ssim(one, other), expected, atol=1e-4)


def test_images_are_identified_by_exact_reconstructions_and_by_others_as_often_as_by_chance():
    rng = np.random.default_rng(0)
    originals = rng.random((400, 3, 4, 4))
    assert identified(originals, originals).tolist() == [1.0] * 400
    assert identified(originals + 1e-3 * rng.normal(size=originals.shape), originals).mean() == 1.0
    hits = np.mean([identified(rng.random(originals.shape), originals).mean() for _ in range(25)])
    assert hits == pytest.approx(1 / 400, abs=4 * np.sqrt(1 / 400 / 10_000))
    assert identified(np.broadcast_to(originals.mean(0), originals.shape), originals).sum() == 1.0


def test_energies_of_the_rings_add_up_and_a_wave_is_in_its_ring():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 3, 12, 10))
    np.testing.assert_allclose(band_energy(images, 4).sum(axis=1), np.square(images).sum(axis=(1, 2, 3)))
    wave = np.cos(2 * np.pi * 0.3125 * np.arange(16))[None, None, None].repeat(16, axis=2)
    shares = band_energy(wave, 4)[0] / np.square(wave).sum()
    np.testing.assert_allclose(shares, [0, 0, 1, 0], atol=1e-12)  # 0.25 to 0.375 cycles a pixel
