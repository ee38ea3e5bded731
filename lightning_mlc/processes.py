"""Among whom examples are divided, and what processes settle so that none waits for another that has ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import distributed

from lightning_mlc.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class DataParallel:
    """Among whom examples are divided.

    Processes that split a layer (:mod:`lightning_mlc.distributed.tensor_parallel`) run the same examples, and count as
    one. What they compute of an example is the same on each, so a mean over all processes is the mean over the shares.
    """

    size: int = 1
    """Shares that the examples are divided into."""
    rank: int = 0
    """Which of them is this process's."""
    processes: int = 1
    """How many have the same share."""
    is_first: bool = True
    """Whether this process is the first of them, which writes for all."""

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """As the strategy of ``trainer`` has it, whose processes have met."""
        from lightning_mlc.lightning_internals import examples_share  # here, because importing Lightning takes seconds

        found = examples_share(trainer)
        if found is None:
            return cls()
        size, rank = found
        together = trainer.world_size // size
        return cls(size, rank, together, trainer.global_rank % together == 0)


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
    """Refuse to go on if ``value``, of an ``option`` that each process settles by itself, differs. To be called by all.

    Raises:
        UserError: Some process has another value.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    found: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    if len(different := sorted(set(found))) > 1:
        error = UserError(option, f"is {' on some and '.join(different)} on other processes; give it explicitly")
        error.is_shared = True
        raise error


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone, rather than that something is wrong in this one."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
