"""Frozen text encoders, and which model exactly a name stands for."""
