"""Checkpoints: their format on disk, when they are saved, what they say of their model, and how it is restored."""
