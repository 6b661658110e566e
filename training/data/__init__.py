"""From the store to batches: order, decoding, augmentation, mixing, text targets."""
