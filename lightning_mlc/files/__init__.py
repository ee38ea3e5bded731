"""Paths as users write them, and files that are written whole or not at all."""
