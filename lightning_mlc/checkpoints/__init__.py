"""Checkpoints: their format on disk, when they are saved, the description of their model, and how it is restored."""
