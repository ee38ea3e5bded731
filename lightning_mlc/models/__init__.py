"""Pretrained models: where they come from, and the forward passes that a training step needs."""
