"""From a classifier and images to predictions, and from those to metrics and comparisons."""
