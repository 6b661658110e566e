"""Texts in training: targets, what classes have in common, negatives of the store, tokens."""
