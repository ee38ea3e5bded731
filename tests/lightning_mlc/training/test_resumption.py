"""The meaning of a checkpoint's progress on a different number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from lightning_mlc.data.sampling import Sizes, plan_epoch
from lightning_mlc.data.windows import ByExamples, ByTokens, Cut, Division
from lightning_mlc.errors import UserError
from lightning_mlc.training.resumption import Epoch, _convert_progress

EXAMPLES = 24


def epoch(batch_size: int, accumulate: int, processes: int, tokens: int | None = None, seed: int = 3) -> Epoch:
    length = len(plans(batch_size, accumulate, processes, tokens)[0])
    return Epoch(seed, EXAMPLES, batch_size, tokens, accumulate, processes, "DDP", length)


def plans(batch_size: int, accumulate: int, processes: int, tokens: int | None) -> list[list[tuple[int, ...]]]:
    """The micro-batches of each process."""
    division = Division(accumulate, processes)
    one = np.ones(EXAMPLES, int)
    costs = np.random.default_rng(0).integers(1, 5, EXAMPLES).tolist()
    cut: Cut = ByTokens(costs, tokens, division, 3) if tokens else ByExamples(EXAMPLES, batch_size, division, 3)
    return [
        [part.indices for part in plan_epoch(cut(0), Sizes(*5 * [one]), Division(accumulate, processes, rank))]
        for rank in range(processes)
    ]


LAYOUTS = list(product((1, 2, 3), (1, 2, 4), (1, 2, 3)))


@pytest.mark.parametrize("tokens", [None, 8])
def test_no_example_is_left_out_or_trained_on_twice(tokens: int | None) -> None:
    """For any two layouts, interrupted after any step, a run trains on all remaining examples once, or is refused."""
    accepted = refused = 0
    for before, now in product(LAYOUTS, LAYOUTS):
        if tokens and (before[0] > 1 or now[0] > 1):  # then the examples of a micro-batch are not given
            continue
        first, second = epoch(*before, tokens), epoch(*now, tokens)
        for processed in range(before[1], first.micro_batches + 1, before[1]):
            done = [part for plan in plans(*before, tokens) for part in plan[:processed]]
            try:
                start = second.done(first, processed)
            except UserError:
                refused += 1
                assert first.step != second.step
                continue
            accepted += 1
            left = [part for plan in plans(*now, tokens) for part in plan[start:]]
            seen = Counter(example for part in done + left for example in part)
            # In an epoch's last step, fewer examples than processes are dropped in any case.
            assert max(seen.values()) == 1
            assert len(seen) > EXAMPLES - max(before[2], now[2])
    assert accepted > 20
    assert refused > 20


def test_counts_are_those_of_the_new_processes() -> None:
    """In the second epoch, after its first step of 6, before the hooks of the last micro-batch have ended."""
    before, now = epoch(1, 3, 2), epoch(2, 3, 1)
    counts = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    total = {name: 12 + count for name, count in counts.items()}
    progress = {"current": dict(counts), "total": dict(total), "is_last_batch": False}
    _convert_progress(progress, before, now)
    assert progress == {"current": counts, "total": total, "is_last_batch": False}
    one = epoch(1, 6, 1)
    _convert_progress(progress, before, one)
    assert progress["current"] == {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    assert progress["total"] == {"ready": 30, "started": 30, "processed": 30, "completed": 29}


def test_an_epoch_that_is_over_is_over_for_any_processes() -> None:
    """There a run may resume with other steps, other data, or another order."""
    before = epoch(1, 3, 2)
    now = Epoch(9, 100, 7, None, 2, 3, "FSDP2", 4)
    assert now.done(before, before.micro_batches) == 4


def test_another_order_in_the_middle_of_an_epoch_is_refused() -> None:
    before, now = epoch(1, 3, 2), epoch(1, 3, 2, seed=4)
    with pytest.raises(UserError, match=r"ckpt_path: .* \(seed was 3 and is now 4\)"):
        now.done(before, 3)
