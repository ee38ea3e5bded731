"""The former name of :mod:`lightning_mlc.distributed.sharding`, which stands in configurations of users."""

from lightning_mlc.distributed.sharding import FSDP2

__all__ = ["FSDP2"]
