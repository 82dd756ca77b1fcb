"""The Vision Transformer: patch embedding, tokens, encoder, norm, pooling, head, in that order."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vit_cls.errors import ConfigError
from vit_cls.model.config import ViTConfig
from vit_cls.model.encoder import Encoder
from vit_cls.model.patch_embed import PatchEmbed
from vit_cls.model.pooling import PoolingContext, make_pooling
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import TokenLayout, add_prefix_and_positions, sincos_2d_positions


class VisionTransformer(TokenModel):
    """A plain ViT whose weights and numbers are timm's, key for key.

    Args:
        config: The architecture.

    Raises:
        ConfigError: If the pooling does not fit the tokens.

    Example:
        >>> import torch
        >>> config = ViTConfig(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=10)
        >>> model = VisionTransformer(config)
        >>> model.embed_tokens(torch.zeros(1, 3, 28, 28)).shape
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
        self.layout = TokenLayout(config.class_token, config.reg_tokens, config.grid_size)
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(
            config.image_hw, config.patch_size, config.in_chans, dim, bias=not config.pre_norm
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        self.pos_embed = self._make_positions()
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = Encoder(config)

        pooling = make_pooling(config.pool, self._pooling_context())
        norm_after = pooling.norm_after if config.fc_norm is None else config.fc_norm
        if norm_after and pooling.parts:
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
        self.head = nn.Linear(pooling.out_dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def _pooling_context(self) -> PoolingContext:
        config = self.config
        return PoolingContext(
            self.layout,
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            norm_eps=config.norm_eps,
            act=config.act,
            include_prefix=config.pool_include_prefix,
        )

    def _make_positions(self) -> nn.Parameter | None:
        config = self.config
        if config.pos_embed == "none":
            return None
        length = self.layout.num_patches if config.no_embed_class else self.layout.num_tokens
        learned = config.pos_embed == "learn"
        return nn.Parameter(torch.empty(1, length, config.embed_dim), requires_grad=learned)

    @torch.no_grad()
    def init_weights(self, keys: Collection[str] | None = None) -> None:
        """Draw fresh weights from torch's global generator: linear weights N(0, .02), biases 0.

        Args:
            keys: Names of weights; the modules that have none of them are left alone. None means all, in a
                model whose other layers have initialised themselves.
        """
        for name, module in self.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            if keys is not None and not any(key in keys for key in own):
                continue
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif keys is not None and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, token in (("cls_token", self.cls_token), ("reg_token", self.reg_token)):
            if token is not None and (keys is None or name in keys):
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None and (keys is None or "pos_embed" in keys):
            self._init_positions(self.pos_embed)

    def _init_positions(self, pos_embed: nn.Parameter) -> None:
        if self.config.pos_embed == "learn":
            nn.init.trunc_normal_(pos_embed, std=0.02)
            return
        # Fixed positions belong to patches; prefix tokens get zeros, as in MAE.
        pos_embed.zero_()
        patches = sincos_2d_positions(self.layout.grid_size, self.config.embed_dim)
        pos_embed[0, -self.layout.num_patches :] = patches.to(pos_embed)

    def embed_tokens(self, images: Tensor) -> Tensor:
        """See `TokenModel.embed_tokens`."""
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = add_prefix_and_positions(
            self.patch_embed(images), prefix, self.pos_embed, no_embed_class=self.config.no_embed_class
        )
        return self.norm_pre(self.pos_drop(tokens))

    def run_blocks(self, tokens: Tensor, read: slice | None = None) -> Tensor:
        """See `TokenModel.run_blocks`; of the last block only the read tokens are computed."""
        return self.blocks(tokens, read)
