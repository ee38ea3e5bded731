"""The training step of several variants, measured: ``python -m benchmarks.train_step``."""
