"""What the project claims to be fast at, measured. Each module is a command: ``python -m benchmarks.NAME``."""
