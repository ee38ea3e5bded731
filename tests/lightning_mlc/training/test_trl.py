"""Losses and rewards against those of TRL, if it is installed.

The loss functions of TRL's trainers get given log-probabilities, without a model or a trainer. These functions are
private, so this works with one version of TRL only.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from lightning_mlc.objectives import CPO, DPO, KTO, ORPO, Objective, Responses, Scores, SimPO

trl = pytest.importorskip("trl")
if Version(trl.__version__).release[:2] != (1, 16):
    pytest.skip("written for the internals of TRL 1.16", allow_module_level=True)

BETA = 0.3
LENGTHS = {"chosen": [5, 9, 3, 12], "rejected": [8, 2, 3, 7], "mismatched": [4, 6, 10, 2]}


class Given:
    """Log-probabilities of tokens, padded on the right, as TRL's model would give them."""

    def __init__(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = max(map(max, LENGTHS.values()))
        self.mask = {name: torch.arange(width) < torch.tensor(sizes)[:, None] for name, sizes in LENGTHS.items()}
        self.logps = {
            name: -scale * torch.rand(mask.shape, generator=generator) * mask for name, mask in self.mask.items()
        }


POLICY, REFERENCE = Given(1, 4.0), Given(2, 9.0)


def scores(name: str) -> Scores:
    logps, reference = (given.logps[name].sum(1) for given in (POLICY, REFERENCE))
    return Scores(logps, POLICY.mask[name].sum(1).float(), reference)


RESPONSES = Responses(*(scores(name) for name in LENGTHS))


class Alone:
    """The accelerator of a single process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


def trainer(**options: Any) -> Any:
    return SimpleNamespace(
        accelerator=Alone(),
        model=torch.nn.Identity().train(),
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        **options,
    )


def outputs(logps: Tensor) -> Any:
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def inputs(mask: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """As TRL's collator gives them, after a prompt of one token."""
    tokens = torch.cat([torch.zeros(len(mask), 1), mask], dim=1).long()
    return {"input_ids": tokens, "attention_mask": tokens, "completion_mask": tokens, **more}


@pytest.mark.parametrize(
    ("loss", "ours"),
    [
        ("sigmoid", DPO(beta=BETA)),
        ("hinge", DPO(beta=BETA, loss="hinge")),
        ("robust", DPO(beta=BETA, loss="robust", label_smoothing=0.2)),
        ("apo_zero", DPO(beta=BETA, loss="apo_zero")),
        ("apo_down", DPO(beta=BETA, loss="apo_down")),
        ("ipo", DPO(beta=BETA, loss="ipo")),
    ],
)
def test_dpo(loss: str, ours: DPO) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    logps, mask = (torch.cat([part["chosen"], part["rejected"]]) for part in (POLICY.logps, POLICY.mask))
    theirs = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        label_smoothing=ours.label_smoothing,
        use_weighting=False,
    )
    batch = inputs(
        mask,
        ref_chosen_logps=REFERENCE.logps["chosen"].sum(1),
        ref_rejected_logps=REFERENCE.logps["rejected"].sum(1),
    )
    found = DPOTrainer._compute_loss(theirs, lambda **_: outputs(logps), batch, False)
    torch.testing.assert_close(ours.losses(RESPONSES).mean(), found)
    if loss != "ipo":  # TRL logs sums over tokens of these
        assert theirs._metrics["train"]["rewards/margins"] == pytest.approx(
            [float((ours.rewards(RESPONSES.chosen) - ours.rewards(scores("rejected"))).mean())]
        )


@pytest.mark.parametrize(
    "ours",
    [KTO(beta=BETA, desirable_weight=3.0, undesirable_weight=0.5), KTO(beta=BETA, loss="apo_zero_unpaired")],
    ids=lambda objective: objective.loss,
)
@pytest.mark.parametrize("labels", [[True, False, False, True], [True, True, True, True]])
def test_kto(ours: KTO, labels: list[bool]) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    label = torch.tensor(labels)

    def chosen_or_rejected(given: Given, part: str) -> Tensor:
        values = getattr(given, part)
        return torch.where(label[:, None], values["chosen"], values["rejected"])

    logps, mask = (chosen_or_rejected(POLICY, part) for part in ("logps", "mask"))
    theirs = trainer(
        calculate_KL=ours.needs_mismatched,
        loss_type=ours.loss,
        desirable_weight=ours.desirable_weight,
        undesirable_weight=ours.undesirable_weight,
        _compute_kl_logps=lambda _model, _batch: POLICY.logps["mismatched"].sum(1) if ours.needs_mismatched else None,
    )
    batch = inputs(
        mask,
        label=label,
        ref_logps=chosen_or_rejected(REFERENCE, "logps").sum(1),
        ref_KL_logps=REFERENCE.logps["mismatched"].sum(1),
    )
    found = KTOTrainer._compute_loss(theirs, lambda **_: outputs(logps), batch, False)

    def only(scores: Scores, there: Tensor) -> Scores:
        return Scores(*(values * there for values in scores))  # type: ignore[operator]

    responses = Responses(
        only(RESPONSES.chosen, label),
        only(scores("rejected"), ~label),
        RESPONSES.mismatched if ours.needs_mismatched else None,
    )
    torch.testing.assert_close(ours.losses(responses).sum() / responses.counts.sum(), found)
    if ours.needs_mismatched:
        kl = float(ours.metrics(responses)["kl"].mean())
        assert kl > 0
        assert theirs._metrics["train"]["kl"] == pytest.approx([kl])


@pytest.mark.parametrize(
    ("loss", "ours"), [("sigmoid", CPO(beta=BETA, alpha=0.0)), ("simpo", SimPO(beta=BETA, gamma=0.6))]
)
def test_cpo_and_simpo(loss: str, ours: Objective) -> None:
    """TRL adds the likelihood of the chosen response to CPO elsewhere, over all tokens of a batch."""
    from trl.experimental.cpo import CPOTrainer

    theirs = trainer(loss_type=loss, alpha=0.0, label_smoothing=0.0, simpo_gamma=0.6)
    logps = [side.mean_logps if loss == "simpo" else side.logps for side in RESPONSES.pairs]
    losses, chosen, rejected = CPOTrainer.cpo_loss(theirs, *logps)
    torch.testing.assert_close(ours.losses(RESPONSES), losses)
    torch.testing.assert_close(ours.rewards(RESPONSES.chosen), chosen)
    torch.testing.assert_close(ours.rewards(scores("rejected")), rejected)


def test_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    ours = ORPO(beta=BETA)
    logps = [side.mean_logps for side in RESPONSES.pairs]
    losses, chosen, rejected, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer(), *logps)
    torch.testing.assert_close(ours.losses(RESPONSES), -RESPONSES.chosen.mean_logps - losses)
    torch.testing.assert_close(ours.rewards(RESPONSES.chosen), chosen)
    torch.testing.assert_close(ours.rewards(scores("rejected")), rejected)
    torch.testing.assert_close(ours.metrics(RESPONSES)["log_odds_ratio"].mean(), ratio)
    torch.testing.assert_close(ours.metrics(RESPONSES)["log_odds_chosen"].mean(), odds)
