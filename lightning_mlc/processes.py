"""The division of examples among processes, and errors that stop all processes together.

Importing this module does not import torch, so that commands without a model start at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lightning_mlc.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor


@dataclass(frozen=True)
class DataParallel:
    """The share of the examples that this process runs.

    Processes that split a layer (:mod:`lightning_mlc.distributed.tensor_parallel`) run the same examples, so they have
    one share. They compute the same values for an example, so a mean over all processes is the mean over the shares.
    """

    size: int = 1
    """How many shares there are."""
    rank: int = 0
    """The number of this process's share, from 0."""
    processes: int = 1
    """How many processes have the same share."""
    is_first: bool = True
    """Whether this process is the first of those with its share. It writes for the others."""

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """The share according to the strategy of ``trainer``, whose process group must exist if it has one."""
        from lightning_mlc.lightning_internals import examples_share  # here, because importing Lightning takes seconds

        found = examples_share(trainer)
        if found is None:
            return cls()
        size, rank = found
        together = trainer.world_size // size
        return cls(size, rank, together, trainer.global_rank % together == 0)


def is_first() -> bool:
    """Whether this is the first process of its run, by the variables that launchers set. Needs no process group."""
    for variables in (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)):
        if variables[0] in os.environ:
            return all(os.environ.get(variable, "0") == "0" for variable in variables)
    return True


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes, which must all call it. It may be written to ``values``.

    On GPUs the host does not wait. Lightning's ``reduce`` begins with a barrier, at which the host waits for the GPU.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    distributed.all_reduce(values)
    return values.div_(distributed.get_world_size())


def raise_together(error: UserError | None) -> None:
    """Raise the error of the first process that has one, on all processes. All processes must call it.

    Raises:
        UserError: Some process has an error.
    """
    from torch import distributed

    found: list[UserError | None] = [error]
    if distributed.is_available() and distributed.is_initialized():
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, error)
    for first in found:
        if first is not None:
            shared = first.of(first.option)
            shared.is_shared = True
            raise shared from error


def require_same(option: str, value: str) -> None:
    """Require the same ``value`` on all processes, for an ``option`` that each of them chooses. All must call it.

    Raises:
        UserError: Some processes have another value.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    found: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    if len(different := sorted(set(found))) > 1:
        error = UserError(option, f"is {' on some and '.join(different)} on other processes; give it explicitly")
        error.is_shared = True
        raise error


def lost_another(error: BaseException) -> bool:
    """Whether the reason for ``error`` is that another process has ended, rather than a fault in this one."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
