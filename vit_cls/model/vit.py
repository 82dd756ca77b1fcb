"""The Vision Transformer: patch embedding, tokens, encoder, norm, pooling, head, in that order."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from vit_cls.errors import ConfigError
from vit_cls.model.block import LayerScale
from vit_cls.model.config import ViTConfig
from vit_cls.model.encoder import Encoder
from vit_cls.model.patch_embed import PatchEmbed
from vit_cls.model.pooling import make_pooling
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import add_prefix_and_positions, sincos_2d_positions

INIT_SEEDS = 2**62


class VisionTransformer(TokenModel):
    """A plain ViT whose weights and numbers are timm's, key for key.

    Args:
        config: The architecture; ConfigError if its pooling does not fit its tokens.

    Example:
        >>> import torch
        >>> config = ViTConfig(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=10)
        >>> VisionTransformer(config).embed_tokens(torch.zeros(1, 3, 28, 28)).shape
        torch.Size([1, 17, 32])

    Source:
        ViT, https://arxiv.org/abs/2010.11929; norm placement and initialisation: timm's
        ``VisionTransformer`` (``weight_init=''``).
    """

    config: ViTConfig
    blocks: Encoder

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout
        with _drawing_from(0, torch.get_default_device()):  # what layers draw by themselves is drawn over
            self._build(config)
        if not self.patch_embed.proj.weight.is_meta:
            self.init_weights()

    def _build(self, config: ViTConfig) -> None:
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(
            config.image_hw, config.patch_size, config.in_chans, dim, bias=not config.pre_norm
        )
        classes = self.layout.num_class_tokens
        self.cls_token = nn.Parameter(torch.empty(1, classes, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        self.pos_embed = self._make_positions()
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = Encoder(config)

        self.pooling_context = PoolingContext(
            self.layout,
            embed_dim=dim,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            norm_eps=config.norm_eps,
            act=config.act,
            include_prefix=config.pool_include_prefix,
            depth=config.depth,
            num_classes=config.num_classes,
        )
        pooling = make_pooling(config.pool, self.pooling_context)
        norm_after = pooling.norm_after if config.fc_norm is None else config.fc_norm
        if norm_after and pooling.out_dim != dim:
            raise ConfigError(
                f"model.fc_norm must not be true with model.pool {config.pool}: the norm belongs to each "
                "token before they are joined. Leave model.fc_norm out."
            )
        norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        # In timm's order, which is the order of the keys.
        self.norm = nn.Identity() if norm_after else norm
        self.attn_pool = pooling
        self.fc_norm = norm if norm_after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = _make_head(pooling, config.num_classes)

    def _make_positions(self) -> nn.Parameter | None:
        config = self.config
        if config.pos_embed == "none":
            return None
        length = self.layout.num_patches if config.no_embed_class else self.layout.num_tokens
        learned = config.pos_embed == "learn"
        return nn.Parameter(torch.empty(1, length, config.embed_dim), requires_grad=learned)

    @torch.no_grad()
    def init_weights(self, keys: Collection[str] | None = None) -> None:
        """Draw fresh weights, linear ones N(0, .02), biases 0, of the modules that have one of these keys.

        One seed comes from torch's global generator of the CPU, which moves on by that one draw; what a layer
        draws then depends on that seed and on the layer's name. So two models under one seed start from the
        same encoder, whatever reads its tokens.
        """
        seed = int(torch.randint(INIT_SEEDS, (), device="cpu"))
        for name, module in self.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            if not own or (keys is not None and not any(key in keys for key in own)):
                continue
            with _drawing_from(_key(seed, name), next(module.parameters(recurse=False)).device):
                self._init_module(module)
        # timm's spread; several class tokens would never part if they were as good as equal
        spread = 1e-6 if self.layout.num_class_tokens == 1 else 0.02
        for name, token, std in (("cls_token", self.cls_token, spread), ("reg_token", self.reg_token, 1e-6)):
            if token is not None and (keys is None or name in keys):
                with _drawing_from(_key(seed, name), token.device):
                    nn.init.normal_(token, std=std)
        if self.pos_embed is not None and (keys is None or "pos_embed" in keys):
            with _drawing_from(_key(seed, "pos_embed"), self.pos_embed.device):
                self._init_positions(self.pos_embed)

    @staticmethod
    def _init_module(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.LayerNorm, LayerScale, Pooling)):
            module.reset_parameters()

    def _init_positions(self, pos_embed: nn.Parameter) -> None:
        patches = pos_embed[:, -self.layout.num_patches :]
        if self.config.pos_embed == "learn":
            # Patches first: they start from the same values with class token and without.
            for part in (patches, pos_embed[:, : -self.layout.num_patches]):
                nn.init.trunc_normal_(part, std=0.02)
            return
        # Fixed positions belong to patches; prefix tokens get zeros, as in MAE.
        pos_embed.zero_()
        patches[0] = sincos_2d_positions(self.layout.grid_size, self.config.embed_dim).to(pos_embed)

    def embed_tokens(self, images: Tensor) -> Tensor:
        """See `TokenModel.embed_tokens`."""
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = add_prefix_and_positions(
            self.patch_embed(images), prefix, self.pos_embed, no_embed_class=self.config.no_embed_class
        )
        return self.norm_pre(self.pos_drop(tokens))

    def run_blocks(self, tokens: Tensor, read: slice | None = None, num_layers: int = 1) -> Tensor:
        """See `TokenModel.run_blocks`; of the last block only the read tokens are computed."""
        return self.blocks(tokens, read, num_layers, self.call_block)


class ClassTokensHead(nn.Linear):
    """The same weights for the token of each class."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Score ``features``, shape ``(batch, classes, dim)``: logits, shape ``(batch, classes)``."""
        return super().forward(features)[..., 0]


def _make_head(pooling: Pooling, num_classes: int) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    if pooling.per_class:
        return ClassTokensHead(pooling.out_dim)
    return nn.Linear(pooling.out_dim, num_classes)


@contextlib.contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generators of the CPU and of the device begin anew, and put them back."""
    devices: list[int] = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _key(seed: int, name: str) -> int:
    """A seed of its own for each name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
