"""``python -m benchmarks.study``: what an option of training changes, over a grid of cells and seeds."""
