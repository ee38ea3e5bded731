"""The former name of :mod:`lightning_mlc.training.schedules`, which stands in configurations of users."""

from lightning_mlc.training.schedules import Warmup

__all__ = ["Warmup"]
