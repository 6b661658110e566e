"""`evaluate`: what a trained model can do, measured, listed and drawn."""
