"""Pixels to patch tokens: (B, C, H, W) -> (B, P, D)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to a token.

    Source:
        ViT, https://arxiv.org/abs/2010.11929, equation 1. A convolution with stride == kernel is that
        linear projection; it keeps timm's weight layout.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, (B, C, H, W), to patch tokens in raster order, (B, P, D); or ValueError."""
        expected = (self.proj.in_channels, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, expected))}); got "
                f"{tuple(images.shape)}. Resize them, or build the model with another img_size."
            )
        return rearrange(self.proj(images), "b d r c -> b (r c) d")
