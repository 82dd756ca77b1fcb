"""Model files in and out; the only room that may import timm."""
