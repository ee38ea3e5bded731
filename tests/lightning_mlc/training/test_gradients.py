"""The gradient of an optimizer step does not depend on how the step is divided."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, labelled_rows, translated_rows, write_jsonl
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mlc.consistency import DCO, MLC, MPO, Consistency, PairwiseCosine, Retain, SelfDistillation, SourceCosine
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.rows import BEGINNING, CHOSEN, NO_RESPONSE, REJECTED, TokenRows
from lightning_mlc.errors import UserError
from lightning_mlc.objectives import CPO, DPO, KTO, ORPO, SFT, Objective, SimPO, Sum
from lightning_mlc.training.module import AlignmentModule
from lightning_mlc.training.preflight import require_gradients_everywhere


class Recorder(AlignmentModule):
    """Records the gradient of every optimizer step, the sizes of batches, and the rows that were run.

    ``rows`` counts the rows of the policy, ``reference_rows`` those of the reference, by language and kind.
    """

    gradients: list[dict[str, Tensor]]
    counts: list[int]
    rows: Counter[tuple[int, int]]
    reference_rows: Counter[tuple[int, int]]

    def on_fit_start(self) -> None:
        self.gradients = []
        self.counts = []
        self.rows, self.reference_rows = Counter(), Counter()
        assert self.policy is not None
        self.policy.register_forward_hook(lambda _module, inputs, _output: self._count(inputs[0], self.rows))
        if self._reference is not None:
            self._reference._policy.register_forward_hook(
                lambda _module, inputs, _output: self._count(inputs[0], self.reference_rows)
            )

    def _count(self, rows: TokenRows, counter: Counter[tuple[int, int]]) -> None:
        counter.update(zip(rows.language.tolist(), rows.kind.tolist(), strict=True))

    @property
    def prompt_rows(self) -> int:
        return sum(count for (_, kind), count in self.rows.items() if kind == NO_RESPONSE)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.counts.append(len(batch))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def ragged_rows(translated: bool = False, labelled: bool = False) -> list[dict[str, Any]]:
    """Rows that differ in everything that a wrong mean would weight wrongly: length, languages, desirability."""
    rows = labelled_rows(9) if labelled else translated_rows(9) if translated else example_rows(9)
    key = "response" if labelled else "chosen"
    for number, row in enumerate(rows):
        missing = [("sw", "zh"), ("zh",), ()][number % 3]
        for language in missing:
            row["prompt"][language] = None
            for translated_key in ("chosen", "rejected"):
                if isinstance(row.get(translated_key), dict):
                    row[translated_key][language] = None
        longer = " Really." * number
        row[key] = row[key] | {"en": row[key]["en"] + longer} if isinstance(row[key], dict) else row[key] + longer
    return rows


def weighing(mlc: float) -> Consistency:
    return Consistency(mlc=MLC(weight=mlc))


def train(
    model: Path,
    data_file: Path,
    objective: Objective | None,
    consistency: Consistency,
    cut: tuple[int, int] = (2, 2),
    steps: int = 2,
    tokens_per_batch: int | None = None,
) -> Recorder:
    """``cut`` gives the examples per micro-batch, or ``tokens_per_batch`` the tokens, and the micro-batches per
    step."""
    torch.manual_seed(0)
    module = Recorder(str(model), objective, consistency, optimizer=sgd)
    size: dict[str, Any] = {"tokens_per_batch": tokens_per_batch} if tokens_per_batch else {"batch_size": cut[0]}
    data = MultilingualData(str(data_file), val_share=0.0, name_or_path=str(model), **size)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=cut[1],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return module


OBJECTIVES: dict[str, Objective] = {
    "sft": SFT(),
    "dpo": DPO(),
    # At a smaller beta, its gradient would be so large that the steps magnify earlier rounding errors.
    "ipo": DPO(beta=1.0, loss="ipo", rpo_alpha=0.5),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
    "apo": KTO(loss="apo_zero_unpaired", desirable_weight=2.0),
    "sum": Sum([SFT(), DPO(), ORPO()], [0.5, 1.0, 2.0]),
}
UNPAIRED: dict[str, Objective] = {
    "unpaired apo": KTO(loss="apo_zero_unpaired", desirable_weight=2.0),
    "unpaired sft": SFT(),
    "unpaired sum": Sum([KTO(loss="apo_zero_unpaired"), SFT()], [3.0, 1.0]),
}


@pytest.mark.parametrize(
    ("objective", "center", "labelled"),
    [
        *(
            pytest.param(objective, False, False, marks=[] if name in ("sft", "dpo") else pytest.mark.slow)
            for name, objective in OBJECTIVES.items()
        ),
        *((objective, False, True) for objective in UNPAIRED.values()),
        (SFT(), True, False),
        (DPO(), True, False),
    ],
    ids=[*OBJECTIVES, *UNPAIRED, "sft centred", "dpo centred"],
)
def test_cutting_a_batch_changes_no_gradient(
    tiny_model: Path, tmp_path: Path, objective: Objective, center: bool, labelled: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows(labelled=labelled))
    # Three steps. The last one, with one of nine examples, is an incomplete window.
    consistency = Consistency(mlc=MLC(weight=2.0), center=center)
    runs = [train(tiny_model, path, objective, consistency, cut, steps=3) for cut in ((1, 4), (2, 2), (4, 1))]
    assert len(runs[0].gradients) == 3
    for other in runs[1:]:
        for expected, found in zip(runs[0].gradients, other.gradients, strict=True):
            assert expected.keys() == found.keys()
            for name, gradient in expected.items():
                # The order of float32 sums differs; later steps also carry the rounding of earlier ones.
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", [SFT(), DPO()])
def test_micro_batches_of_unlike_counts_change_no_gradient(
    tiny_model: Path, tmp_path: Path, objective: Objective
) -> None:
    """All nine examples in one step: as one micro-batch, and as four by a budget of tokens."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    mlc = weighing(mlc=2.0)
    whole = train(tiny_model, path, objective, mlc, (9, 1), steps=1)
    parts = train(tiny_model, path, objective, mlc, (0, 4), steps=1, tokens_per_batch=1000)
    assert whole.counts == [9]
    assert sum(parts.counts) == 9
    assert len(parts.counts) == 4
    assert len(set(parts.counts)) > 1
    for name, gradient in whole.gradients[0].items():
        # the order of float32 sums differs
        torch.testing.assert_close(parts.gradients[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_loss_is_the_objective_plus_weighted_mlc(tiny_model: Path, tmp_path: Path) -> None:
    """Gradients are linear in the terms: weight 2 gives the gradient of weight 0 plus twice the difference to
    weight 1."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    none, one, two = (train(tiny_model, path, DPO(), weighing(w), steps=1).gradients[0] for w in (0.0, 1.0, 2.0))
    name = "policy.model.model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(two[name] - none[name], 2 * (one[name] - none[name]), rtol=1e-3, atol=1e-6)
    assert (one[name] - none[name]).norm() > 1e-3 * none[name].norm()
    assert "representation.extractor.weight" in one
    assert not any(key.startswith("representation") for key in none)


def test_a_sum_s_gradient_is_the_sum_of_the_parts_own(tiny_model: Path, tmp_path: Path) -> None:
    """Over rows of different lengths, where a mean over examples differs from a mean over tokens."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    off = weighing(0.0)
    parts: list[Objective] = [DPO(), SFT()]
    name = "policy.model.model.layers.1.mlp.up_proj.weight"
    dpo, sft, both = (
        train(tiny_model, path, objective, off, steps=1).gradients[0][name]
        for objective in (*parts, Sum(parts, [1.0, 0.25]))
    )
    # the order of float32 sums differs
    torch.testing.assert_close(both, dpo + 0.25 * sft, rtol=1e-3, atol=1e-6)


def test_to_kto_a_pair_is_two_responses(tiny_model: Path, tmp_path: Path) -> None:
    pairs = ragged_rows()
    labelled = [
        {"id": f"{row['id']} {name}", "prompt": row["prompt"], "response": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    name = "policy.model.model.layers.1.mlp.up_proj.weight"
    one, other = (
        train(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), KTO(), weighing(mlc=0.0), (len(rows), 1), 1)
        for rows in (pairs, labelled)
    )
    # the order of float32 sums differs
    torch.testing.assert_close(one.gradients[0][name], other.gradients[0][name], rtol=1e-3, atol=1e-6)


def test_kto_is_its_own_formula_over_the_responses_of_a_step(tiny_model: Path, tmp_path: Path) -> None:
    """Recompute the second step's gradient from the log-ratios of all nine responses and of as many mismatched ones."""
    rows = ragged_rows(labelled=True)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    objective = KTO(beta=0.05, desirable_weight=2.0)
    trained = train(tiny_model, path, objective, weighing(mlc=0.0), cut=(9, 1))
    moved = train(tiny_model, path, objective, weighing(mlc=0.0), cut=(9, 1), steps=1)
    assert moved.policy is not None
    assert moved._reference is not None
    data = MultilingualData(str(path), val_share=0.0, batch_size=9, name_or_path=str(tiny_model))
    data.prepare_data()
    data.setup("fit")
    chat = data._chat_tokenizer()

    def log_ratio(prompt: dict[str, str], response: str) -> Tensor:
        ids = chat.prompt([{"role": "user", "content": prompt["en"]}], "")[0]
        (answer,) = chat.encoder.ids([response + "<|end|>"])
        assert moved.policy is not None
        assert moved._reference is not None
        logps = []
        for model in (moved.policy.model, moved._reference._policy.model):
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
        return logps[0] - logps[1]

    others = [rows[(number + 1) % 9]["response"] for number in range(9)]
    mismatched = [log_ratio(row["prompt"], other).detach() for row, other in zip(rows, others, strict=True)]
    divergence = torch.stack(mismatched).mean().clamp(min=0)
    assert 5 < divergence < 50  # at least a tenth of the gains, which are not all saturated
    losses = []
    for row in rows:
        gain = 0.05 * (log_ratio(row["prompt"], row["response"]) - divergence)
        losses.append(2 * (1 - gain.sigmoid()) if row["label"] else 1 - (-gain).sigmoid())
    name = "model.layers.1.mlp.up_proj.weight"
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), moved.policy.model.get_parameter(name))
    # the order of float32 sums differs, after a step of their own
    torch.testing.assert_close(trained.gradients[1][f"policy.model.{name}"], expected, rtol=1e-3, atol=1e-5)


def test_logits_in_many_chunks_change_no_gradient(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    whole = train(tiny_model, path, DPO(), Consistency(), steps=1).gradients[0]
    monkeypatch.setattr("lightning_mlc.models.policy.CHUNK_ELEMENTS", 4096)  # 15 tokens
    chunked = train(tiny_model, path, DPO(), Consistency(), steps=1).gradients[0]
    for name, gradient in whole.items():
        # the order of float32 sums differs
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_weight_zero_runs_no_translation(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    assert train(tiny_model, path, DPO(), weighing(0)).prompt_rows == 0
    assert train(tiny_model, path, DPO(), weighing(1)).prompt_rows > 0


def test_every_second_step(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(8))
    every = train(tiny_model, path, DPO(), Consistency(), cut=(1, 2), steps=4)
    second = train(tiny_model, path, DPO(), Consistency(every_n_steps=2), cut=(1, 2), steps=4)
    assert every.prompt_rows == 2 * second.prompt_rows == 16
    moved = ["representation.extractor.weight" in gradients for gradients in second.gradients]
    assert moved == [True, False, True, False]  # no gradient, so that momentum cannot move it either


@pytest.mark.parametrize("objective", [SFT(), ORPO(), SimPO(), CPO(), Sum([SFT(), ORPO()])])
def test_what_needs_no_reference_loads_none(tiny_model: Path, tmp_path: Path, objective: Objective) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(4))
    assert train(tiny_model, path, objective, Consistency(), steps=1)._reference is None


def test_reference_is_frozen_hidden_and_in_eval_mode(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(4))
    module = train(tiny_model, path, DPO(), Consistency())
    reference = module._reference
    assert reference is not None
    assert module.policy is not None
    assert module.policy.training
    assert not reference._policy.training
    assert not any(key.startswith(("_reference", "reference")) for key in module.state_dict())
    initial = Recorder(str(module.source), DPO())
    initial.trainer = module.trainer
    fresh = initial._load_policy().state_dict()
    for key, value in reference._policy.state_dict().items():
        assert torch.equal(value, fresh[key]), key
    assert not torch.equal(module.policy.state_dict()["model.lm_head.weight"], fresh["model.lm_head.weight"])


# ---- terms beside MLC -----------------------------------------------------------------------------------

OFF = MLC(weight=0)
PEERS = {
    "pairwise_cosine": Consistency(mlc=OFF, pairwise_cosine=PairwiseCosine(weight=1.0)),
    "source_cosine": Consistency(mlc=OFF, source_cosine=SourceCosine(weight=1.0)),
    "mpo": Consistency(mlc=OFF, mpo=MPO(weight=1.0)),
    # Its gradient does not become smaller as languages agree, so the steps must be small.
    "dco": Consistency(mlc=OFF, dco=DCO(weight=1e-3)),
    # The tiny model's distributions differ little at first.
    "self_distillation": Consistency(mlc=OFF, self_distillation=SelfDistillation(weight=100.0, positions=4)),
    "self_distillation, fixed teacher": Consistency(
        mlc=OFF, self_distillation=SelfDistillation(weight=1.0, positions=4, teacher="reference")
    ),
}


@pytest.mark.parametrize("objective", [None, DPO()], ids=["alone", "dpo"])
@pytest.mark.parametrize("consistency", PEERS.values(), ids=PEERS)
def test_cutting_a_batch_changes_no_gradient_of_any_term(
    tiny_model: Path, tmp_path: Path, consistency: Consistency, objective: Objective | None
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows(translated=True))
    runs = [train(tiny_model, path, objective, consistency, cut, steps=3) for cut in ((1, 4), (4, 1))]
    assert len(runs[0].gradients) == 3
    for expected, found in zip(runs[0].gradients, runs[1].gradients, strict=True):
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            # The order of float32 sums differs; later steps also carry the rounding of earlier ones.
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_several_terms_are_their_weighted_sum(tiny_model: Path, tmp_path: Path) -> None:
    """With the objective, over rows of different lengths and languages. Some rows are run for two terms at once."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows(translated=True))
    weights = {"mlc": 4.0, "pairwise_cosine": 2.0, "source_cosine": 1.0, "mpo": 50.0, "dco": 0.125}
    weights |= {"self_distillation": 2000.0}
    terms = {"mlc": MLC, "pairwise_cosine": PairwiseCosine, "source_cosine": SourceCosine, "mpo": MPO, "dco": DCO}
    terms |= {"self_distillation": SelfDistillation}
    name = "policy.model.model.layers.1.mlp.up_proj.weight"

    def gradient(objective: Objective | None, **on: float) -> Tensor:
        settings: Any = {"mlc": OFF} | {term: terms[term](weight=weight) for term, weight in on.items()}
        return train(tiny_model, path, objective, Consistency(**settings, center=True), steps=1).gradients[0][name]

    together = gradient(DPO(), **weights)
    parts = [gradient(DPO()), *(weight * gradient(None, **{term: 1.0}) for term, weight in weights.items())]
    assert all(part.norm() > 1e-2 * together.norm() for part in parts)  # otherwise a missing term would not show
    # the order of float32 sums differs
    torch.testing.assert_close(together, torch.stack(parts).sum(0), rtol=1e-3, atol=1e-5)


SOURCE = {(0, kind): 4 for kind in (CHOSEN, REJECTED)}
EVERYWHERE = {(language, kind): 4 for language in range(3) for kind in (CHOSEN, REJECTED)}
BARE = {(language, NO_RESPONSE): 4 for language in (1, 2)}
BEGUN = {(language, BEGINNING): 4 for language in (1, 2)}


@pytest.mark.parametrize(
    ("objective", "on", "policy", "reference"),
    [
        (DPO(), {}, SOURCE, SOURCE),
        (DPO(), {"pairwise_cosine": PairwiseCosine(weight=1)}, SOURCE | BARE, SOURCE),
        (SFT(), {"mlc": MLC()}, {(0, CHOSEN): 4} | BARE, {}),
        (SFT(), {"mpo": MPO(weight=1)}, EVERYWHERE, SOURCE),
        (DPO(), {"mpo": MPO(weight=1), "mlc": MLC()}, EVERYWHERE, SOURCE),
        (None, {"mlc": MLC()}, {(0, NO_RESPONSE): 4} | BARE, {}),
        (None, {"mpo": MPO(weight=1)}, EVERYWHERE, SOURCE),
        (None, {"dco": DCO(weight=1)}, EVERYWHERE, EVERYWHERE),
        (DPO(), {"self_distillation": SelfDistillation(weight=1)}, SOURCE | BEGUN, SOURCE),
        (SFT(), {"self_distillation": SelfDistillation(weight=1, positions=1)}, {(0, CHOSEN): 4} | BARE, {}),
        (None, {"self_distillation": SelfDistillation(weight=1)}, {(0, BEGINNING): 4} | BEGUN, {}),
        (DPO(), {"self_distillation": SelfDistillation(weight=1, teacher="reference")}, SOURCE | BEGUN, SOURCE),
        (
            SFT(),
            {"self_distillation": SelfDistillation(weight=1, teacher="reference")},
            {(0, CHOSEN): 4} | BEGUN,
            {(0, CHOSEN): 4},
        ),
        # The source's beginnings are packed together with those of the translations.
        (
            None,
            {"self_distillation": SelfDistillation(weight=1, teacher="reference")},
            {(0, BEGINNING): 4} | BEGUN,
            {(0, BEGINNING): 4} | BEGUN,
        ),
        (
            SFT(),
            {"retain": Retain(weight=1, distance="kl", rows="all")},
            {(0, CHOSEN): 4} | BARE,
            {(0, CHOSEN): 4} | BARE,
        ),
        # Rows with responses of their own cannot serve: of four examples, two have one in Swahili and two in Chinese.
        (
            None,
            {"self_distillation": SelfDistillation(weight=1), "dco": DCO(weight=1)},
            EVERYWHERE | dict.fromkeys(BEGUN, 2),
            EVERYWHERE,
        ),
    ],
)
def test_what_no_term_needs_is_not_run(
    tiny_model: Path,
    tmp_path: Path,
    objective: Objective | None,
    on: dict[str, Any],
    policy: dict[tuple[int, int], int],
    reference: dict[tuple[int, int], int],
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", translated_rows(4))
    run = train(tiny_model, path, objective, Consistency(**{"mlc": OFF} | on), steps=1)
    assert run.rows == policy
    assert (run.reference_rows if run._reference is not None else {}) == reference


def test_between_the_steps_of_a_term_only_the_objective_runs(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", translated_rows(8))
    consistency = Consistency(mlc=OFF, dco=DCO(weight=1), every_n_steps=2)
    run = train(tiny_model, path, SFT(), consistency, cut=(1, 2), steps=4)
    assert run.rows[0, CHOSEN] == 8
    assert {run.rows[language, kind] for language, kind in run.rows if language} == {4}
    assert set(run.reference_rows.values()) == {4}


def test_the_state_of_a_translation_does_not_depend_on_what_follows_it(tiny_model: Path, tmp_path: Path) -> None:
    """With MPO the state is read from the row of the chosen response, otherwise from the prompt alone."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows(translated=True))
    name = "representation.extractor.weight"
    alone, beside = (
        train(tiny_model, path, SFT(), Consistency(mpo=MPO(weight=w)), steps=1).gradients[0][name] for w in (0.0, 1.0)
    )
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-7)


def test_ddp_is_told_of_parameters_without_a_gradient(tiny_model: Path) -> None:
    """Hidden states alone give ``lm_head`` no gradient, unless it is the embeddings."""
    for objective, consistency, strategy, works in (
        (None, Consistency(), "ddp", False),
        (None, Consistency(), "ddp_find_unused_parameters_true", True),
        (None, PEERS["mpo"], "ddp", True),
        (None, PEERS["self_distillation"], "ddp", True),
        (DPO(), Consistency(), "ddp", True),
        (None, Consistency(), "auto", True),
    ):
        module = AlignmentModule(str(tiny_model), objective, consistency)
        module.trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
        with nullcontext() if works else pytest.raises(UserError, match=r"^trainer\.strategy: "):
            require_gradients_everywhere(module.losses, module.trainer.strategy)
