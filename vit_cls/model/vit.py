"""The Vision Transformer: patch embedding, tokens, encoder, norm, pooling, head, in that order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_cls.model.config import ViTConfig
from vit_cls.model.encoder import Encoder
from vit_cls.model.patch_embed import PatchEmbed
from vit_cls.model.pooling import make_pooling
from vit_cls.model.tokens import TokenLayout, add_prefix_and_positions, sincos_2d_positions


class VisionTransformer(nn.Module):
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

        self.pool = make_pooling(config.pool, self.layout)
        norm_after = self.pool.norm_after if config.fc_norm is None else config.fc_norm
        norms = [
            nn.LayerNorm(dim, eps=config.norm_eps) if config.final_norm else nn.Identity(),
            nn.Identity(),
        ]
        self.norm, self.fc_norm = reversed(norms) if norm_after else norms
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def _make_positions(self) -> nn.Parameter | None:
        config = self.config
        if config.pos_embed == "none":
            return None
        length = self.layout.num_patches if config.no_embed_class else self.layout.num_tokens
        learned = config.pos_embed == "learn"
        return nn.Parameter(torch.empty(1, length, config.embed_dim), requires_grad=learned)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from torch's global generator: linear weights N(0, .02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None and self.config.pos_embed == "learn":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif self.pos_embed is not None:
            # Fixed positions belong to patches; prefix tokens get zeros, as in MAE.
            self.pos_embed.zero_()
            patches = sincos_2d_positions(self.layout.grid_size, self.config.embed_dim)
            self.pos_embed[0, -self.layout.num_patches :] = patches.to(self.pos_embed)

    def embed_tokens(self, images: Tensor) -> Tensor:
        """Images to the encoder's input.

        Args:
            images: Normalised floats, shape ``(batch, channels, height, width)``.

        Returns:
            Class token, registers and patches with positions, shape ``(batch, tokens, dim)``.

        Raises:
            ValueError: If the image shape is not the model's.
        """
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = add_prefix_and_positions(
            self.patch_embed(images), prefix, self.pos_embed, no_embed_class=self.config.no_embed_class
        )
        return self.norm_pre(self.pos_drop(tokens))

    def encode(self, images: Tensor) -> Tensor:
        """Every token after the last block, whatever the pooling reads.

        Args:
            images: As for `embed_tokens`.

        Returns:
            Shape ``(batch, tokens, dim)``, after the final norm where that stands before the pooling.

        Raises:
            ValueError: If the image shape is not the model's.
        """
        return self.norm(self.blocks(self.embed_tokens(images)))

    def forward_features(self, images: Tensor) -> Tensor:
        """The vector that the head reads.

        Args:
            images: As for `embed_tokens`.

        Returns:
            Features, shape ``(batch, dim)``.

        Raises:
            ValueError: If the image shape is not the model's.
        """
        tokens = self.blocks(self.embed_tokens(images), self.pool.read)
        return self.fc_norm(self.pool(self.norm(tokens)))

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: As for `embed_tokens`.

        Returns:
            Logits, shape ``(batch, classes)``; features where the model is headless.

        Raises:
            ValueError: If the image shape is not the model's.
        """
        return self.head(self.head_drop(self.forward_features(images)))
