"""Settings that a reference cannot be combined with are refused in one line, before a model is loaded."""

from __future__ import annotations

import pytest

from lightning_mlc.consistency import Needs
from lightning_mlc.errors import UserError
from lightning_mlc.objectives import DPO, SFT, Objective, SimPO, Sum
from lightning_mlc.reference import ReferenceSettings

PRECOMPUTED = ReferenceSettings("precomputed")
UPDATED = ReferenceSettings(update_every_n_steps=2)


@pytest.mark.parametrize(
    ("settings", "objective", "adapters", "message"),
    [
        (PRECOMPUTED, SFT(), False, "model.reference.mode: SFT needs no reference"),
        (PRECOMPUTED, Sum([SFT(), SimPO()]), False, "model.reference.mode: Sum needs no reference"),
        (UPDATED, SimPO(), False, "model.reference.update_every_n_steps: SimPO needs no reference"),
        (UPDATED, DPO(), True, "model.reference.update_every_n_steps: with model.lora"),
        (ReferenceSettings("precomputed", 2), DPO(), False, "model.reference.update_every_n_steps: precomputed scores"),
    ],
)
def test_what_cannot_work(settings: ReferenceSettings, objective: Objective, adapters: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.check(objective, Needs(), adapters)


@pytest.mark.parametrize(
    ("settings", "objective", "adapters"),
    [
        (ReferenceSettings(), SFT(), True),
        (ReferenceSettings(), DPO(), True),
        (PRECOMPUTED, DPO(), True),
        (PRECOMPUTED, Sum([SFT(), DPO()]), False),
        (UPDATED, DPO(), False),
    ],
)
def test_what_can(settings: ReferenceSettings, objective: Objective, adapters: bool) -> None:
    settings.check(objective, Needs(), adapters)


def test_precomputed_scores_are_not_all_that_some_terms_need() -> None:
    message = r"model\.reference\.mode: precomputed keeps log-probabilities of responses only, .* set it to online"
    for more in (
        Needs(reference=True, pooled_states=True),
        Needs(reference=True, reference_states=True),
        Needs(reference=True, positions=1, reference_positions=1),
        Needs(reference=True, positions=8, reference_source_positions=8),
    ):
        with pytest.raises(UserError, match=message):
            PRECOMPUTED.check(DPO(), more, adapters=False)
        ReferenceSettings().check(None, more, adapters=False)
    for enough in (Needs(reference=True), Needs(reference=True, reference_translations=True)):
        PRECOMPUTED.check(None, enough, adapters=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "none"}, "mode: unknown mode 'none'"),
        ({"update_every_n_steps": 0}, "update_every_n_steps: must be at least 1"),
        ({"update_share": 0.0}, "update_share: must be above 0"),
        ({"update_share": 1.5}, "update_share: must be above 0 and at most 1"),
        ({"update_share": float("nan")}, "update_share: must be above 0"),
    ],
)
def test_values_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"model.reference.{message}"):
        ReferenceSettings(**values)  # type: ignore[arg-type]


def test_which_steps_end_with_an_update() -> None:
    assert [step for step in range(1, 10) if ReferenceSettings(update_every_n_steps=3).updates_after(step)] == [3, 6, 9]
    assert not any(ReferenceSettings().updates_after(step) for step in range(1, 10))
