"""Align a language model once, in one language, and make it hold in every language its users speak."""

__version__ = "0.1.0"
