"""One file an engine behind the `Captioner` protocol of `protocol.py`; none of them knows of Ray."""
