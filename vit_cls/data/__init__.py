"""Files to batches of uint8 images: index, splits, decoding, transforms, order, loading."""
