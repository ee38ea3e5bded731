"""Objectives against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_mlc.errors import UserError
from lightning_mlc.objectives import CPO, DPO, KTO, ORPO, SFT, Objective, Responses, Scores, SimPO, Sum


def scores(logps: list[float], tokens: list[float], reference: list[float] | None = None) -> Scores:
    return Scores(torch.tensor(logps), torch.tensor(tokens), None if reference is None else torch.tensor(reference))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Log-ratios +2 against -4 (the right order), and -2 against +1 (the wrong order).
CHOSEN = scores([-10.0, -20.0], [5, 10], [-12.0, -18.0])
REJECTED = scores([-15.0, -9.0], [3, 2], [-11.0, -10.0])
PAIRS = Responses(CHOSEN, REJECTED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # At beta 0.5: rewards 1 against -2 (margin 3), and -1 against 0.5 (margin -1.5).
        ({}, [math.log(1 + math.exp(-3)), math.log(1 + math.exp(1.5))]),
        (
            {"label_smoothing": 0.1},
            [
                0.9 * math.log(1 + math.exp(-3)) + 0.1 * math.log(1 + math.exp(3)),
                0.9 * math.log(1 + math.exp(1.5)) + 0.1 * math.log(1 + math.exp(-1.5)),
            ],
        ),
        (
            {"loss": "robust", "label_smoothing": 0.1},
            [
                (0.9 * math.log(1 + math.exp(-3)) - 0.1 * math.log(1 + math.exp(3))) / 0.8,
                (0.9 * math.log(1 + math.exp(1.5)) - 0.1 * math.log(1 + math.exp(-1.5))) / 0.8,
            ],
        ),
        ({"loss": "hinge"}, [0.0, 2.5]),
        # Per token: 2/5 + 4/3 and -2/10 - 1/2, against 1 / (2 * 0.5) = 1.
        ({"loss": "ipo"}, [(2 / 5 + 4 / 3 - 1) ** 2, (-0.2 - 0.5 - 1) ** 2]),
        ({"loss": "apo_zero"}, [1 - sigmoid(1) + sigmoid(-2), 1 - sigmoid(-1) + sigmoid(0.5)]),
        ({"loss": "apo_down"}, [sigmoid(1) + 1 - sigmoid(3), sigmoid(-1) + 1 - sigmoid(-1.5)]),
        # 10 / 5 and 20 / 10: two nats per token in both.
        ({"rpo_alpha": 0.25}, [math.log(1 + math.exp(-3)) + 0.5, math.log(1 + math.exp(1.5)) + 0.5]),
        ({"loss": "hinge", "rpo_alpha": 0.25}, [0.5, 3.0]),
    ],
    ids=str,
)
def test_dpo(options: dict[str, Any], expected: list[float]) -> None:
    assert DPO(beta=0.5, **options).losses(PAIRS).tolist() == pytest.approx(expected, rel=1e-6)


def test_rewards_of_dpo() -> None:
    assert DPO(beta=0.5).rewards(CHOSEN).tolist() == pytest.approx([1.0, -1.0])
    # The loss of ipo compares per-token values, and so do its rewards.
    assert DPO(beta=0.5, loss="ipo").rewards(CHOSEN).tolist() == pytest.approx([0.2, -0.1])
    assert DPO().metrics(PAIRS) == {}
    assert DPO(rpo_alpha=1).metrics(PAIRS)["nll_loss"].tolist() == [2.0, 2.0]


def test_label_smoothing_is_unbiased_where_robust_and_has_an_optimum_where_conservative() -> None:
    """If a share e of the pairs is swapped, the expected loss of robust DPO is that of the true order (the paper's
    claim)."""
    robust = DPO(beta=0.5, loss="robust", label_smoothing=0.2)
    expected = 0.8 * robust.losses(PAIRS) + 0.2 * robust.losses(Responses(REJECTED, CHOSEN))
    torch.testing.assert_close(expected, DPO(beta=0.5).losses(PAIRS))
    # Conservative DPO is flat where the model's confidence in the label equals the label's reliability.
    margin = math.log(0.8 / 0.2)
    chosen, rejected = scores([margin], [1], [0.0]), scores([0.0], [1], [0.0])
    chosen.logps.requires_grad_()
    DPO(beta=1.0, label_smoothing=0.2).losses(Responses(chosen, rejected)).sum().backward()
    assert chosen.logps.grad is not None
    assert chosen.logps.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_sft_sums_and_leaves_the_mean_to_the_step() -> None:
    objective = SFT()
    assert objective.losses(Responses(scores([-10.0, -3.0], [5, 1]))).tolist() == [10.0, 3.0]
    assert objective.mean_over == "tokens"
    assert objective.each_alone(Responses(scores([-10.0, -3.0], [5, 1]))).tolist() == [2.0, 3.0]


def test_orpo() -> None:
    # Mean probabilities 0.8 against 0.5: odds 4 against 1; and 0.2 against 0.6: odds 1/4 against 3/2.
    chosen = scores([5 * math.log(0.8), 2 * math.log(0.2)], [5, 2])
    rejected = scores([4 * math.log(0.5), 3 * math.log(0.6)], [4, 3])
    objective = ORPO(beta=0.5)
    # -log sigmoid(log x) = log(1 + 1 / x)
    expected = [-math.log(0.8) + 0.5 * math.log(1 + 1 / 4), -math.log(0.2) + 0.5 * math.log(1 + 6)]
    assert objective.losses(Responses(chosen, rejected)).tolist() == pytest.approx(expected, rel=1e-6)
    assert objective.rewards(chosen).tolist() == pytest.approx([0.5 * math.log(0.8), 0.5 * math.log(0.2)])
    metrics = {name: values.tolist() for name, values in objective.metrics(Responses(chosen, rejected)).items()}
    assert metrics["nll_loss"] == pytest.approx([-math.log(0.8), -math.log(0.2)])
    assert metrics["log_odds_chosen"] == pytest.approx([math.log(4), math.log(1 / 6)])
    assert metrics["log_odds_ratio"] == pytest.approx([-math.log(1 + 1 / 4), -math.log(1 + 6)])


def test_odds_of_a_nearly_certain_response() -> None:
    """1 - P is 1e-6. A float32 P keeps one digit of it, but the odds must have five correct digits."""
    chosen, rejected = scores([-1e-6], [1]), scores([math.log(0.5)], [1])
    log_odds = ORPO().metrics(Responses(chosen, rejected))["log_odds_chosen"].item()
    assert log_odds == pytest.approx(math.log(1e6 - 0.5), rel=1e-6)


def test_simpo() -> None:
    chosen, rejected = scores([-10.0, -20.0], [5, 10]), scores([-15.0, -9.0], [3, 9])
    objective = SimPO(beta=2.0, gamma=0.5)
    # Per token -2 against -5, and -2 against -1: margins 2 * 3 - 0.5 and 2 * -1 - 0.5.
    expected = [math.log(1 + math.exp(-5.5)), math.log(1 + math.exp(2.5))]
    assert objective.losses(Responses(chosen, rejected)).tolist() == pytest.approx(expected, rel=1e-6)
    assert objective.rewards(chosen).tolist() == [-4.0, -4.0]
    assert objective.rewards(rejected).tolist() == [-10.0, -2.0]


def test_cpo() -> None:
    chosen, rejected = scores([-10.0, -20.0], [5, 10]), scores([-15.0, -9.0], [3, 9])
    objective = CPO(beta=0.2, alpha=0.5)
    # Sums: 0.2 * 5 and 0.2 * -11; two nats per chosen token.
    expected = [math.log(1 + math.exp(-1)) + 1, math.log(1 + math.exp(2.2)) + 1]
    assert objective.losses(Responses(chosen, rejected)).tolist() == pytest.approx(expected, rel=1e-6)
    assert objective.rewards(rejected).tolist() == pytest.approx([-3.0, -1.8])
    assert objective.metrics(Responses(chosen, rejected))["nll_loss"].tolist() == [2.0, 2.0]


# Log-ratios 2, none, -2 of the desirable responses; -4, 6, none of the others; 3, -1, 1 of mismatched ones: mean 1.
SOME = Responses(
    chosen=scores([-10.0, 0.0, -20.0], [5, 0, 10], [-12.0, 0.0, -18.0]),
    rejected=scores([-15.0, -9.0, 0.0], [3, 2, 0], [-11.0, -15.0, 0.0]),
    mismatched=scores([-7.0, -8.0, -9.0], [4, 4, 4], [-10.0, -7.0, -10.0]),
)


def test_kto() -> None:
    objective = KTO(beta=0.5, desirable_weight=3.0, undesirable_weight=2.0)
    assert objective.mean_over == "responses"
    # Rewards 1, -1 and -2, 3 around the point 0.5 * 1: gains are 1 - sigmoid(r - z), losses 1 - sigmoid(z - r).
    first = 3 * (1 - sigmoid(1 - 0.5)) + 2 * (1 - sigmoid(0.5 + 2))
    expected = [first, 2 * (1 - sigmoid(0.5 - 3)), 3 * (1 - sigmoid(-1 - 0.5))]
    assert objective.losses(SOME).tolist() == pytest.approx(expected, rel=1e-6)
    assert objective.rewards(SOME.chosen).tolist() == pytest.approx([1.0, 0.0, -1.0])
    assert objective.metrics(SOME)["kl"].tolist() == [3.0, -1.0, 1.0]
    # In evaluation each is compared with its own mismatched response, of which the second is clamped; the first has two
    # responses.
    alone = [
        (3 * (1 - sigmoid(1 - 1.5)) + 2 * (1 - sigmoid(1.5 + 2))) / 2,
        2 * (1 - sigmoid(0 - 3)),
        3 * (1 - sigmoid(-1 - 0.5)),
    ]
    assert objective.each_alone(SOME).tolist() == pytest.approx(alone, rel=1e-6)


def test_kto_s_divergence_is_not_negative_and_has_no_gradient() -> None:
    logps = torch.tensor([-30.0, 1.0, 2.0], requires_grad=True)
    below = SOME._replace(mismatched=SOME.mismatched._replace(logps=logps))  # type: ignore[union-attr]
    objective = KTO(beta=0.5)
    # The same rewards, around 0.
    expected = [1 - sigmoid(1) + 1 - sigmoid(2), 1 - sigmoid(-3), 1 - sigmoid(-1)]
    assert objective.losses(below).tolist() == pytest.approx(expected, rel=1e-6)
    assert not objective.losses(below).requires_grad
    assert not objective.each_alone(below).requires_grad


def test_apo_zero_of_pairs_is_kto_s_unpaired_form_of_them() -> None:
    objective = KTO(beta=0.5, loss="apo_zero_unpaired")
    assert not objective.needs_mismatched
    assert KTO().needs_mismatched
    torch.testing.assert_close(objective.losses(PAIRS), DPO(beta=0.5, loss="apo_zero").losses(PAIRS))
    assert objective.metrics(PAIRS) == {}
    torch.testing.assert_close(objective.each_alone(PAIRS), objective.losses(PAIRS) / 2)


def test_a_sum_of_kto_and_sft_of_unpaired_responses() -> None:
    objective = Sum([KTO(beta=0.5), SFT()], [1.0, 0.5])
    assert objective.accepts_unpaired
    assert objective.needs_mismatched
    assert [term.mean_over for term in objective.terms(SOME)] == ["responses", "tokens"]
    assert objective.terms(SOME)[1].losses.tolist() == [5.0, 0.0, 10.0]
    expected = KTO(beta=0.5).each_alone(SOME) + torch.tensor([1.0, 0.0, 1.0])  # half of two nats per token
    torch.testing.assert_close(objective.each_alone(SOME), expected)
    assert not Sum([KTO(), DPO()]).accepts_unpaired
    assert not Sum([KTO(loss="apo_zero_unpaired"), SFT()]).needs_mismatched


@pytest.mark.parametrize(
    ("objective", "kind", "message"),
    [
        (DPO(), "pairs", None),
        (SFT(), "single", None),
        (SFT(), "unpaired", None),
        (KTO(), "unpaired", None),
        (KTO(), "pairs", None),
        (
            KTO(),
            "single",
            r"^model\.objective: KTO needs chosen and rejected responses, or responses with a label, but",
        ),
        (ORPO(), "single", r"^model\.objective: ORPO needs chosen and rejected responses, but the data has single"),
        (SimPO(), "unpaired", r"^model\.objective: SimPO needs a chosen and a rejected response to every prompt, but"),
        (Sum([KTO(), SFT()]), "unpaired", None),
        (
            Sum([KTO(), Sum([SFT(), CPO()])]),
            "unpaired",
            r"^model\.objective\.objectives\[1\]\.objectives\[1\]: CPO needs",
        ),
    ],
)
def test_what_data_an_objective_learns_from(objective: Objective, kind: Any, message: str | None) -> None:
    if message is None:
        objective.check_data(kind)
    else:
        with pytest.raises(UserError, match=message):
            objective.check_data(kind)


def test_a_sum_averages_each_part_in_its_own_way() -> None:
    objective = Sum([SFT(), DPO(beta=0.5, loss="hinge"), SimPO()], [0.1, 2.0, 1.0])
    assert objective.needs_rejected
    assert objective.needs_reference
    terms = objective.terms(PAIRS)
    assert [term.mean_over for term in terms] == ["tokens", "examples", "examples"]
    assert terms[0].losses.tolist() == pytest.approx([1.0, 2.0])
    assert terms[1].losses.tolist() == pytest.approx([0.0, 5.0])
    # In a step of one example: 0.1 * 2 nats per token, twice the hinge, and SimPO's at -2 against -5 and -4.5.
    simpo = [math.log(1 + math.exp(-(2 * 3 - 1))), math.log(1 + math.exp(-(2 * 2.5 - 1)))]
    assert objective.each_alone(PAIRS).tolist() == pytest.approx([0.2 + simpo[0], 5.2 + simpo[1]])
    # SFT has no rewards; DPO's come first.
    assert objective.rewards(CHOSEN).tolist() == pytest.approx([1.0, -1.0])


def test_sums_of_sums_and_of_what_needs_nothing() -> None:
    inner = Sum([SFT(), ORPO()])
    outer = Sum([inner, SFT()], [0.5, 1.0])
    assert [term.mean_over for term in outer.terms(PAIRS)] == ["tokens", "examples", "tokens"]
    assert outer.terms(PAIRS)[0].losses.tolist() == [5.0, 10.0]
    assert not outer.needs_reference
    assert set(outer.metrics(PAIRS)) == {"nll_loss", "log_odds_ratio", "log_odds_chosen"}
    alone = Sum([SFT()], [3.0])
    assert not alone.needs_rejected
    assert alone.rewards(CHOSEN) is None
    assert alone.each_alone(Responses(CHOSEN)).tolist() == [6.0, 6.0]


EVERY_ONE: list[Objective] = [
    SFT(),
    *(DPO(loss=loss, rpo_alpha=1.0) for loss in ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down")),
    DPO(label_smoothing=0.1),
    DPO(loss="robust", label_smoothing=0.1),
    ORPO(),
    SimPO(),
    CPO(),
    KTO(loss="apo_zero_unpaired"),
    KTO(),
    Sum([DPO(), ORPO(), SFT(), KTO()]),
]


def named(objective: Objective) -> str:
    """The same in every process, which parallel tests need."""
    return "-".join([type(objective).__name__, *(word for word in vars(objective).values() if isinstance(word, str))])


@pytest.mark.parametrize("objective", EVERY_ONE, ids=named)
def test_no_score_however_extreme_gives_an_infinite_gradient(objective: Objective) -> None:
    extremes = [0.0, -1e-12, -1e-6, -1.0, -1e4, -1e8]
    pairs = [(chosen, rejected) for chosen in extremes for rejected in extremes]
    sides = [
        Scores(torch.tensor(logps, requires_grad=True), torch.full((len(logps),), 7.0), torch.tensor(reference))
        for logps, reference in (
            ([chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]),
            ([rejected for _, rejected in pairs], [chosen for chosen, _ in pairs]),
        )
    ]
    responses = Responses(*sides, mismatched=sides[0])
    losses = torch.stack([objective.each_alone(responses), *(term.losses for term in objective.terms(responses))])
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    gradients = [side.logps.grad for side in sides if side.logps.grad is not None]
    assert len(gradients) == (2 if objective.needs_rejected else 1)
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
    assert not any(values.isinf().any() for values in objective.metrics(responses).values())


def test_dpo_is_stable_far_from_the_reference() -> None:
    far = scores([0.0], [1], [1e6]), scores([0.0], [1], [-1e6])
    assert DPO().losses(Responses(*far)).item() == pytest.approx(2e5)


@pytest.mark.parametrize("objective", [DPO, ORPO, SimPO, CPO, KTO])
@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_must_be_positive(objective: type[Any], beta: float) -> None:
    with pytest.raises(UserError, match=r"^model\.objective\.beta: must be above 0"):
        objective(beta=beta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(loss="ppo"), r"loss: unknown loss 'ppo'; choose one of sigmoid, ipo"),  # type: ignore[arg-type]
        (lambda: DPO(label_smoothing=0.5), r"label_smoothing: must be from 0 to below 0\.5"),
        (lambda: DPO(label_smoothing=-0.1), r"label_smoothing: must be from 0"),
        (lambda: DPO(loss="hinge", label_smoothing=0.1), r"label_smoothing: has no effect on the loss hinge"),
        (lambda: DPO(loss="robust"), r"label_smoothing: the loss robust needs the share"),
        (lambda: DPO(rpo_alpha=-1), r"rpo_alpha: must be 0 or above"),
        (lambda: SimPO(gamma=-1), r"gamma: must be 0 or above"),
        (lambda: CPO(alpha=-1), r"alpha: must be 0 or above"),
        (lambda: KTO(loss="apo_zero"), r"loss: unknown loss 'apo_zero'; choose one of kto, apo_zero_unpaired"),  # type: ignore[arg-type]
        (lambda: KTO(desirable_weight=0), r"desirable_weight: must be above 0"),
        (lambda: KTO(undesirable_weight=-1), r"undesirable_weight: must be above 0"),
        (lambda: Sum([]), r"objectives: is empty"),
        (lambda: Sum([SFT()], [1.0, 2.0]), r"weights: 2 given for 1 objectives"),
        (lambda: Sum([SFT()], [0.0]), r"weights: must be above 0"),
    ],
)
def test_options_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"^model\.objective\." + message):
        make()
