"""Settings of the terms: which terms are on, what they need, and which settings are refused."""

from __future__ import annotations

import pytest

from lightning_mlc.consistency import (
    DCO,
    MLC,
    MPO,
    Consistency,
    Contrast,
    Needs,
    PairwiseCosine,
    Retain,
    SelfDistillation,
    SourceCosine,
)
from lightning_mlc.errors import UserError

OFF = MLC(weight=0)


def test_steps_with_the_terms() -> None:
    settings = Consistency(every_n_steps=3)
    assert [settings.terms_at(step) for step in range(4)] == [(MLC(),), (), (), (MLC(),)]
    assert Consistency(mlc=OFF).terms_at(0) == ()
    both = Consistency(dco=DCO(weight=2.0))
    assert both.terms == (MLC(), DCO(weight=2.0))


def test_nothing_is_needed_that_is_off() -> None:
    assert Consistency(mlc=OFF).needs == Needs()
    assert Consistency().needs == Needs(representations=True)
    assert Consistency(mlc=OFF, mpo=MPO(weight=1)).needs == Needs(responses=True, reference=True, pooled_states=True)
    unconstrained = Consistency(mlc=OFF, mpo=MPO(weight=1, constraint=0))
    assert unconstrained.needs == Needs(responses=True, reference=True)
    kept = Consistency(mlc=OFF, retain=Retain(weight=1))
    assert kept.needs == Needs(representations=True, reference=True, reference_states=True)
    assert Retain().rows == "ordinary"
    taught = Consistency(mlc=OFF, self_distillation=SelfDistillation(weight=1, positions=3))
    assert taught.needs == Needs(positions=3)
    several = Consistency(pairwise_cosine=PairwiseCosine(weight=1), dco=DCO(weight=1))
    assert several.needs == Needs(representations=True, responses=True, reference=True, reference_translations=True)


def test_a_term_needs_its_rows() -> None:
    harmful, ordinary = Consistency(mlc=MLC(rows="harmful")), Consistency(mlc=MLC(rows="ordinary"))
    for settings, prompts, some in ((harmful, 5, 4), (ordinary, 5, 1), (Consistency(), 5, 5), (harmful, 0, 0)):
        settings.require_rows(prompts, some)
    for settings, some, kind in ((harmful, 5, "harmful"), (ordinary, 0, "ordinary")):
        with pytest.raises(UserError, match=rf"^model\.consistency\.mlc\.rows: is {kind}, but the training"):
            settings.require_rows(5, some)


def test_a_term_that_compares_prompts_needs_more_than_one() -> None:
    both = Consistency(contrast=Contrast(weight=1))
    assert both.terms == (MLC(), Contrast(weight=1))
    assert both.needs == Needs(representations=True)
    both.require_several_prompts(2)
    both.require_several_prompts(None)
    Consistency().require_several_prompts(1)
    with pytest.raises(UserError, match=r"^data\.batch_size: is 1, but model\.consistency\.contrast compares"):
        both.require_several_prompts(1)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: MLC(weight=-1), "mlc.weight"),
        (lambda: MLC(weight=float("nan")), "mlc.weight"),
        (lambda: MLC(weight=float("inf")), "mlc.weight"),
        (lambda: MLC(temperature=0.0), "mlc.temperature"),
        (lambda: MLC(temperature=1e6), "mlc.temperature"),
        (lambda: Contrast(weight=-1), "contrast.weight"),
        (lambda: Contrast(temperature=0.001), "contrast.temperature"),
        (lambda: Retain(weight=-1), "retain.weight"),
        (lambda: PairwiseCosine(weight=-1), "pairwise_cosine.weight"),
        (lambda: SourceCosine(weight=-1), "source_cosine.weight"),
        (lambda: MPO(weight=-1), "mpo.weight"),
        (lambda: MPO(beta=0), "mpo.beta"),
        (lambda: MPO(constraint=-1), "mpo.constraint"),
        (lambda: DCO(weight=-1), "dco.weight"),
        (lambda: DCO(beta=0), "dco.beta"),
        (lambda: SelfDistillation(weight=-1), "self_distillation.weight"),
        (lambda: SelfDistillation(positions=0), "self_distillation.positions"),
        (lambda: Consistency(extractor_dim=1), "extractor_dim"),
        (lambda: Consistency(every_n_steps=0), "every_n_steps"),
        (lambda: Consistency(extractor="none", extractor_lr=1e-4), "extractor_lr"),
        (lambda: Consistency(extractor_lr=-1.0), "extractor_lr"),
    ],
)
def test_settings_out_of_range(make: object, option: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=rf"^model\.consistency\.{option}: "):
        make()
