"""Measurements behind the project's claims of speed. Run one with ``python -m benchmarks.NAME``."""
