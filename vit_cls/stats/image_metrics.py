"""How near a reconstruction is to its image: signal to noise, structure, frequencies, identification."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_PSNR = 100.0
"""In dB; an exact reconstruction has no finite one."""
_SIGMA = 1.5
"""Of the Gaussian window of SSIM, in pixels, as in its paper."""
_CHUNK = 512


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, for a peak of 1, at most `MAX_PSNR`.

    Args:
        images: Reconstructions, shape ``(images, ...)``, as the originals.
    """
    error = np.square(images - originals).reshape(len(images), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(error, 10 ** (-MAX_PSNR / 10)))


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, in [-1, 1]; NaN below 3 pixels.

    Args:
        images: Clipped to [0, 1] here, shape ``(images, channels, height, width)``.

    Source:
        Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, as torchmetrics computes it; the Gaussian
        window is smaller where an image has no room.
    """
    half = (min(images.shape[2:]) - 1) // 2
    if half < 1:
        return np.full(len(images), np.nan)
    sigma = min(_SIGMA, (half - 0.4) / 3.5)  # its window is 2 * int(3.5 * sigma + 0.5) + 1 wide
    values = []
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        image, original = (
            torch.from_numpy(np.clip(part[rows], 0, 1)).double() for part in (images, originals)
        )
        value = structural_similarity_index_measure(
            image, original, sigma=sigma, data_range=1.0, reduction="none"
        )
        assert isinstance(value, torch.Tensor)
        values.append(value.reshape(-1).numpy())
    return np.concatenate(values)


def frequency_bands(height: int, width: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Rings of the Fourier plane, equally wide up to half a cycle a pixel; the corners are in the last.

    Args:
        bands: How many rings.

    Returns:
        The ring of each coefficient of a 2-D FFT, shape ``(height, width)``, and each ring's upper end in
        cycles a pixel.

    Example:
        >>> frequency_bands(2, 4, 2)[0]
        array([[0, 1, 1, 1],
               [1, 1, 1, 1]])
    """
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ends = 0.5 * np.arange(1, bands + 1) / bands
    return np.minimum(np.searchsorted(ends, radius + 1e-9), bands - 1), ends


def band_energy(images: np.ndarray, bands: int) -> np.ndarray:
    """Energy of each image in each ring of `frequency_bands`; together, the image's sum of squares.

    Args:
        images: Shape ``(images, channels, height, width)``.
    """
    ring, _ = frequency_bands(images.shape[2], images.shape[3], bands)
    pick = (ring.reshape(-1, 1) == np.arange(bands)).astype(np.float64)
    energies = []
    for start in range(0, len(images), _CHUNK):
        spectrum = np.square(np.abs(np.fft.fft2(images[start : start + _CHUNK]))).sum(axis=1)
        energies.append(spectrum.reshape(len(spectrum), -1) @ pick / ring.size)
    return np.concatenate(energies)


def identified(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Whether each reconstruction is nearer to its own image than to any other of the originals.

    Args:
        images: Reconstructions, shape ``(images, ...)``; row ``i`` is of original ``i``.

    Returns:
        1 where it is, 0 where it is not, ``1 / ties`` where it is as near to others.

    Example:
        >>> originals = np.eye(4)
        >>> identified(originals, originals), identified(np.zeros((4, 4)), originals)
        (array([1., 1., 1., 1.]), array([0.25, 0.25, 0.25, 0.25]))
    """
    flat, others = images.reshape(len(images), -1), originals.reshape(len(originals), -1)
    squares = np.square(others).sum(axis=1)
    shares = []
    for start in range(0, len(flat), _CHUNK):
        rows = flat[start : start + _CHUNK]
        distance = squares - 2 * rows @ others.T  # less the square of the reconstruction, the same in a row
        own = distance[np.arange(len(rows)), np.arange(start, start + len(rows))][:, None]
        slack = 1e-9 * (squares.max(initial=0.0) + 1e-300)
        nearer = (distance < own - slack).sum(axis=1)
        ties = (np.abs(distance - own) <= slack).sum(axis=1)
        shares.append(np.where(nearer == 0, 1 / ties, 0.0))
    return np.concatenate(shares)
