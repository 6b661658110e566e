"""The loop and its step, checkpoints, and what is logged."""
