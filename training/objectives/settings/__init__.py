"""Settings of the training methods, whose fields are their flags; torch is not loaded for them."""
