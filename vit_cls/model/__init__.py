"""The Vision Transformer, from pixels to logits: torch and einops only.

Axes, here and everywhere: B batch, C channels, H W pixels, P patches, N tokens (prefix tokens, then
patches in raster order), D width of a token, h heads, K classes.
"""
