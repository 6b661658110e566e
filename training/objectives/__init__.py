"""One file a training method; each is a module whose forward returns {"loss": ..., part: ...}."""
