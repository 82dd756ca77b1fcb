"""Statistics for comparisons, the laboratory and training: arrays in, numbers and dataclasses out."""
