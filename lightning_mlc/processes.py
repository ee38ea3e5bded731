"""What the processes of a run settle among themselves, so that none waits for another that has ended."""

from __future__ import annotations

import os

from torch import distributed

from lightning_mlc.errors import UserError


def is_first() -> bool:
    """Whether this is the first process of its run, by what launchers tell a process: also before they have met."""
    for variables in (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)):
        if variables[0] in os.environ:
            return all(os.environ.get(variable, "0") == "0" for variable in variables)
    return True


def raise_together(error: UserError | None) -> None:
    """Raise the error of the first process that has one on all of them, for that one to tell. To be called by all.

    Raises:
        UserError: Some process has an error.
    """
    found: list[str | None] = [None if error is None else str(error)]
    if distributed.is_available() and distributed.is_initialized():
        own = found[0]
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, own)
    for message in found:
        if message is not None:
            shared = UserError(message)
            shared.is_shared = True
            raise shared from error


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone, rather than that something is wrong in this one."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
