"""``python -m benchmarks.study``: measure the effect of training options, over a grid of cells and seeds."""
