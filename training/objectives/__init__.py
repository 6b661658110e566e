"""One file a training method behind `protocol.py`; the rest of training knows a method by those names
only."""
