"""From frozen tokens back to pixels: ridge regression, or a small convolutional decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vit_cls.data.dataset import ImageSource
from vit_cls.data.transforms import model_reader
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import Preprocess
from vit_cls.model.tokens import TokenLayout
from vit_cls.stats.least_squares import (
    PENALTIES,
    Linear,
    best_fit,
    fits_of_moments,
    moments_of,
    r2,
    ridge_fits,
    scale_of,
)

MAX_SIDE = 32
"""Images are decoded at up to this many pixels a side."""
MAX_FLAT = 4096
"""Up to so many numbers, all tokens of an image are one vector to a ridge regression."""
CONV_WIDTH = 64
CONV_STEPS = 600
CONV_BATCH = 64
CONV_LR = 1e-3
_CHECK_EVERY = 50
_PENALTIES = (0.0, *PENALTIES)

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What is fitted on, chosen on and tested on."""


@dataclass(frozen=True)
class Decoded:
    """Test images as a decoder sees them.

    Args:
        images: Predicted pixels, float64, shape ``(images, channels, height, width)``; not clipped.
        in_sample: Share of the training pixels' variance that the decoder explains where nothing restrains it
            (least squares), or as it was trained.
        settings: What validation chose.
    """

    images: np.ndarray
    in_sample: float
    settings: dict[str, float]


def working_size(image_hw: tuple[int, int], grid_size: tuple[int, int]) -> tuple[int, int]:
    """The resolution that pixels are predicted at, ``(height, width)``.

    The input's where it is at most `MAX_SIDE` and patches tile it, else the largest multiple of the grid that
    is not above that (one pixel a patch for a larger grid).

    Example:
        >>> working_size((28, 28), (4, 4)), working_size((224, 224), (14, 14))
        ((28, 28), (28, 28))
    """

    def side(pixels: int, patches: int) -> int:
        return patches * max(1, min(MAX_SIDE, pixels) // patches)

    return side(image_hw[0], grid_size[0]), side(image_hw[1], grid_size[1])


def pixels_of(
    source: ImageSource, positions: np.ndarray, preprocess: Preprocess, size: tuple[int, int]
) -> np.ndarray:
    """The pixels that the model saw, averaged over areas: float64 in [0, 1], ``(n, 3, height, width)``."""
    reader = model_reader(preprocess)
    images = (reader(source.read(position)) for position in positions.tolist())
    reduced = [F.adaptive_avg_pool2d(image.float() / 255, size) for image in images]
    return torch.stack(reduced).double().numpy()


def ridge_decoded(x: Triple, y: Triple) -> Decoded:
    """All pixels, ``(images, channels, height, width)``, from one vector an image, ``(images, features)``."""
    flat = [part.reshape(len(part), -1) for part in y]
    fits = ridge_fits(x[0], flat[0], _PENALTIES)
    plain = next(fits)
    best = best_fit(itertools.chain([plain], fits), x[1], flat[1])
    return Decoded(
        best(x[2]).reshape(y[2].shape), _explained(plain(x[0]), flat[0]), {"penalty": best.penalty}
    )


def ridge_decoded_by_patch(
    token: Callable[[int, int], np.ndarray], layout: TokenLayout, y: Triple
) -> Decoded:
    """The pixels of each patch from its own token and the class token; weights shared, an intercept a place.

    Where all tokens are too many numbers for one vector. It is a special case of that regression.

    Args:
        token: Of a part (0, 1, 2: as in ``y``) and a place in the sequence, shape ``(images, dim)``.
        y: Pixels, each of shape ``(images, channels, height, width)``, the grid dividing both sides.
    """
    rows, cols = layout.grid_size
    cut = "n c (r p) (k q) -> (r k) n (c p q)"
    patches = [rearrange(part, cut, r=rows, k=cols) for part in y]
    first = layout.num_prefix_tokens

    def features(part: int, patch: int) -> np.ndarray:
        own = np.asarray(token(part, first + patch), dtype=np.float64)
        return np.concatenate([own, token(part, 0)], axis=1) if layout.class_token else own

    means = [features(0, patch).mean(axis=0) for patch in range(len(patches[0]))]

    def centred(part: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for patch, mean in enumerate(means):
            yield features(part, patch) - mean, patches[part][patch] - patches[0][patch].mean(axis=0)

    fits = list(fits_of_moments(moments_of(centred(0)), _PENALTIES))

    def losses(part: int, some: list[Linear]) -> np.ndarray:
        return sum((_losses(some, x, t) for x, t in centred(part)), np.zeros(len(some)))

    validation = losses(1, fits)
    best = min(range(len(fits)), key=lambda i: (validation[i], -fits[i].penalty))
    total = sum(float(np.square(t).sum()) for _, t in centred(0))
    in_sample = 1 - float(losses(0, fits[:1])[0]) / max(total, 1e-300)
    found = np.stack([fits[best](x) + patches[0][i].mean(axis=0) for i, (x, _) in enumerate(centred(2))])
    height, width = y[2].shape[2] // rows, y[2].shape[3] // cols
    back = "(r k) n (c p q) -> n c (r p) (k q)"
    images = rearrange(found, back, r=rows, k=cols, p=height, q=width)
    return Decoded(images, in_sample, {"penalty": fits[best].penalty})


def _losses(fits: list[Linear], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([float(np.square(fit(x) - y).sum()) for fit in fits])


def _explained(images: np.ndarray, originals: np.ndarray) -> float:
    totals = np.square(originals - originals.mean(axis=0)).sum(axis=1)
    return r2(np.square(images - originals).sum(axis=1), totals)


class ConvDecoder(nn.Module):
    """A vector, or one a patch, to pixels: a hidden map on the patch grid, two convolutions, the mean image.

    The last layer starts at zero, so that training starts from the mean image.

    Args:
        mean: The mean image, shape ``(channels, height, width)``; the grid divides both sides.
        by_patch: Whether there is a vector for every patch, or one for the image.
    """

    mean: Tensor

    def __init__(self, dim: int, grid_size: tuple[int, int], mean: Tensor, *, by_patch: bool) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.by_patch = by_patch
        self.register_buffer("mean", mean)
        self.patch = (mean.shape[1] // grid_size[0], mean.shape[2] // grid_size[1])
        places = 1 if by_patch else grid_size[0] * grid_size[1]
        self.first = nn.Linear(dim, places * CONV_WIDTH)
        self.mix = nn.Conv2d(CONV_WIDTH, CONV_WIDTH, 3, padding=1)
        self.last = nn.Conv2d(CONV_WIDTH, mean.shape[0] * self.patch[0] * self.patch[1], 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, dim)``, by patch ``(batch, patches, dim)``, to ``(batch, channels, height, width)``."""
        rows, cols = self.grid_size
        cut = "b (r k) d -> b d r k" if self.by_patch else "b (r k d) -> b d r k"
        hidden = rearrange(self.first(x), cut, r=rows, k=cols)
        hidden = self.mix(F.gelu(hidden))
        out = self.last(F.gelu(hidden))
        height, width = self.patch
        return self.mean + rearrange(out, "b (c p q) r k -> b c (r p) (k q)", p=height, q=width)


def conv_decoded(x: Triple, y: Triple, grid_size: tuple[int, int], *, seed: int) -> Decoded:
    """Pixels by a `ConvDecoder`, trained by Adam; the step with the least validation error is kept."""
    axes = tuple(range(x[0].ndim - 1))
    mean, scale = x[0].mean(axis=axes), scale_of(x[0].var(axis=axes, dtype=np.float64))
    inputs = [torch.from_numpy((part - mean) / scale).float() for part in x]
    targets = [torch.from_numpy(part).float() for part in y]
    with seeded(seed):
        model = ConvDecoder(x[0].shape[-1], grid_size, targets[0].mean(dim=0), by_patch=x[0].ndim == 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=CONV_LR)
    draws = np.random.default_rng(seed)
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step in range(CONV_STEPS + 1):
        if step % _CHECK_EVERY == 0:
            loss = float(np.square(_run(model, inputs[1]) - y[1]).sum())
            if best is None or loss < best[0]:
                best = (loss, step, {name: value.clone() for name, value in model.state_dict().items()})
        rows = draws.choice(len(inputs[0]), size=min(CONV_BATCH, len(inputs[0])), replace=False)
        error = F.mse_loss(model(inputs[0][rows]), targets[0][rows])
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
    assert best is not None
    model.load_state_dict(best[2])
    fitted = _run(model, inputs[0]).reshape(len(y[0]), -1)
    in_sample = _explained(fitted, y[0].reshape(len(y[0]), -1))
    return Decoded(_run(model, inputs[2]), in_sample, {"steps": float(best[1])})


@torch.inference_mode()
def _run(model: nn.Module, x: Tensor) -> np.ndarray:
    return torch.cat([model(chunk) for chunk in x.split(256)]).double().numpy()
