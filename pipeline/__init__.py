"""Images to captions to text embeddings: everything before training. `python -m pipeline --help`."""
