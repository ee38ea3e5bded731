"""Parts of ``python -m benchmarks.train_step``: run and measure several variants of a training step."""
