"""One pre-norm encoder block: attention and MLP, each with LayerScale and drop path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_cls.model.attention import Attention
from vit_cls.model.linear import Linear


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)`` of CLIP. Source: https://github.com/openai/CLIP/blob/main/clip/model.py"""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element of ``x``; the shape stays."""
        return x * torch.sigmoid(1.702 * x)


def make_activation(name: str) -> nn.Module:
    """The activation module of that name, one of `vit_cls.model.config.ACTIVATIONS`."""
    rows = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": QuickGELU(),
        "silu": nn.SiLU(),
    }
    return rows[name]


class DropPath(nn.Module):
    """Stochastic depth: drop the branch of some samples with probability ``rate``, and scale the rest up.

    Source:
        https://arxiv.org/abs/1603.09382; one draw a sample, as in timm.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # A number would be compiled in: a graph for every block, since each has a rate of its own.
        self._keep = torch.tensor(1.0 - rate, device="cpu") if rate else None

    def forward(self, x: Tensor) -> Tensor:
        """Drop or scale each sample of ``x``, shape ``(batch, ...)``; the identity when not training."""
        if not self.training or self._keep is None:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        if torch.compiler.is_compiling():
            kept = torch.rand(shape, device=x.device) < self._keep
            return x * (kept / self._keep).to(x.dtype)
        keep = 1.0 - self.rate
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The rate, for ``print(model)``."""
        return f"rate={self.rate:g}"


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch. Source: CaiT, https://arxiv.org/abs/2103.17239."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``, shape ``(..., dim)``."""
        return x * self.gamma

    def reset_parameters(self) -> None:
        """Every factor back to its first value."""
        nn.init.constant_(self.gamma, self.init_values)


class Mlp(nn.Module):
    """Two linear layers with an activation between, for each token on its own; dropout after each."""

    def __init__(self, dim: int, hidden_dim: int, *, act: str = "gelu", drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = make_activation(act)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``, shape ``(batch, tokens, dim)``; the shape stays."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SwiGLUPacked(nn.Module):
    """Gated MLP whose gate and value share one matrix of ``hidden_dim`` rows: ``fc2(act(gate) * value)``.

    Source:
        GLU variants, https://arxiv.org/abs/2002.05202; packed as in DINOv2's ``w12`` and timm's ``GluMlp``
        with ``gate_last=False``.
    """

    def __init__(self, dim: int, hidden_dim: int, *, act: str = "silu", drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = make_activation(act)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim // 2, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``, shape ``(batch, tokens, dim)``; the shape stays."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.drop1(self.act(gate) * value)))


class Block(nn.Module):
    """Pre-norm encoder block, which computes only the tokens that are read after it.

    Source:
        ViT, https://arxiv.org/abs/2010.11929, equations 2 and 3; parameter names as in timm's ``Block``.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: Mlp | SwiGLUPacked,
        *,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, tokens: Tensor, read: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """What the whole block gives for the read tokens, (B, read, D), from tokens (B, N, D).

        Keys and values are of all tokens, everything else of the read ones alone; None reads all. The mask is
        that of `Attention.forward`.
        """
        # No name for what attention returns: it would live, and cost memory, until the MLP is done.
        kept = tokens if read is None else tokens[:, read]
        tokens = kept + self.drop_path1(self.ls1(self.attn(self.norm1(tokens), read, mask)))
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
