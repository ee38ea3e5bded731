"""The loss from token states: comparison with pooling by hand, options, and the choice of a backend."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc_kernels import backends, mlc_loss, mlc_loss_from_hidden, singular_values
from mlc_kernels.functional import Backend
from mlc_kernels.hidden import Pooling

BACKENDS: list[Backend] = ["closed_form", "reference"]
PROMPTS, LANGUAGES, WIDTH = 3, 4, 6


def random_states(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64)


def pooled_by_hand(rows: list[Tensor], ids: list[tuple[int, int]], pooling: Pooling) -> tuple[Tensor, Tensor]:
    """(B, L, H) representations and their mask, from one (tokens, H) tensor per row, with loops only."""
    found, mask = torch.zeros(PROMPTS, LANGUAGES, WIDTH, dtype=torch.float64), torch.zeros(PROMPTS, LANGUAGES).bool()
    for tokens, (group, language) in zip(rows, ids, strict=True):
        if not (0 <= group < PROMPTS and 0 <= language < LANGUAGES):
            continue
        mask[group, language] = len(tokens) > 0  # the last row of several counts, with or without tokens
        if len(tokens):
            found[group, language] = tokens[-1] if pooling == "last" else sum(tokens) / len(tokens)
    return found, mask


# In no order and of different lengths; (2, 0) occurs twice, row 3 has no tokens, two ids are out of range.
IDS = [(2, 0), (0, 1), (1, 3), (1, 1), (0, 0), (2, 0), (3, 0), (0, -1), (1, 0), (2, 2), (0, 3)]
LENGTHS = [4, 2, 5, 0, 1, 3, 5, 2, 4, 1, 5]


def layouts() -> dict[str, tuple[Tensor, dict[str, Tensor], list[Tensor]]]:
    """The arguments of each layout, and the tokens of each row."""
    states = random_states(len(IDS), 5)
    position, length = torch.arange(5), torch.tensor(LENGTHS)[:, None]
    made = {}
    for side, real in (("right", position < length), ("left", position >= 5 - length)):
        padded = states.masked_fill(~real[:, :, None], float("nan"))
        rows = [row[kept] for row, kept in zip(states, real, strict=True)]
        made[f"padded {side}"] = (padded, {"attention_mask": real.long()}, rows)
    rows = [row[:size] for row, size in zip(states, LENGTHS, strict=True)]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    made["packed"] = (torch.cat(rows), {"offsets": offsets.int()}, rows)
    made["all tokens"] = (states, {}, list(states))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("extractor", [False, True])
def test_agrees_with_pooling_by_hand(backend: Backend, pooling: Pooling, layout: str, extractor: bool) -> None:
    hidden, spans, rows = layouts()[layout]
    hidden.requires_grad_()
    group, language = torch.tensor(IDS).unbind(1)
    weight = random_states(1, 7)[0] if extractor else None
    bias = random_states(1, 2)[0, 0].repeat(2)[:7] if extractor else None
    loss = mlc_loss_from_hidden(
        hidden,
        group,
        language,
        PROMPTS,
        LANGUAGES,
        pooling=pooling,
        weight=weight,
        bias=bias,
        backend=backend,
        **spans,  # type: ignore[arg-type]
    )
    found, mask = pooled_by_hand(rows, IDS, pooling)
    if weight is not None and bias is not None:
        found = found @ weight.T + bias
    torch.testing.assert_close(loss, mlc_loss(found, mask, backend=backend), rtol=1e-11, atol=0)
    (grad,) = torch.autograd.grad(loss, hidden)
    # By finite differences along a random direction, in the tokens that are used.
    direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = []
    for step in (1e-6, -1e-6):
        moved = hidden.detach() + step * direction
        slopes.append(
            mlc_loss_from_hidden(
                moved,
                group,
                language,
                PROMPTS,
                LANGUAGES,
                pooling=pooling,
                weight=weight,
                bias=bias,
                scale="none",
                backend=backend,
                **spans,  # type: ignore[arg-type]
            )
        )
    under_none = mlc_loss_from_hidden(
        hidden,
        group,
        language,
        PROMPTS,
        LANGUAGES,
        pooling=pooling,
        weight=weight,
        bias=bias,
        scale="none",
        backend=backend,
        **spans,  # type: ignore[arg-type]
    )
    (slope,) = torch.autograd.grad(under_none, hidden)
    numeric = float(slopes[0] - slopes[1]) / 2e-6
    # Second-order differences: an error of 1e-12 from the third derivative, and rounding of 1e-16 divided by the step.
    assert float((slope * direction.nan_to_num()).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    assert (grad[hidden.detach().isnan()] == 0).all()


def test_mean_is_summed_wide_and_kept_in_float32() -> None:
    """In bfloat16 a sum of ones would stop growing at 256."""
    hidden = torch.ones(2, 1000, 2, dtype=torch.bfloat16)
    hidden[0, :, 1] = 2.0
    ids = torch.tensor([0, 1])
    found = mlc_loss_from_hidden(hidden, ids * 0, ids, 1, 2, pooling="mean")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mlc_loss(torch.tensor([[[1.0, 2.0], [1.0, 1.0]]])))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(4, 3)}, ValueError, "hidden must be"),
        ({"hidden": torch.ones(4, 3, 0)}, ValueError, "hidden must have"),
        ({"hidden": torch.ones(4, 3, 2).long()}, TypeError, "hidden must be one of"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"group": torch.zeros(3).long()}, ValueError, "group must be"),
        ({"group": torch.zeros(4)}, TypeError, "group must be one of int64"),
        ({"language": torch.zeros(4, 1).long()}, ValueError, "language must be"),
        ({"prompts": -1}, ValueError, "prompts must be"),
        ({"languages": -1}, ValueError, "languages must be"),
        ({"attention_mask": torch.ones(4, 2)}, TypeError, "attention_mask must be one of bool"),
        ({"attention_mask": torch.ones(4, 2).long()}, ValueError, "attention_mask must be"),
        ({"offsets": torch.zeros(5).long()}, ValueError, "hidden must be"),
        ({"offsets": torch.zeros(5)}, TypeError, "offsets must be one of int32"),
        ({"offsets": torch.zeros(5, 1).long()}, ValueError, "offsets must be"),
        (
            {
                "hidden": torch.ones(6, 2),
                "offsets": torch.zeros(5).long(),
                "attention_mask": torch.ones(4, 3).long(),
            },
            ValueError,
            "attention_mask is for",
        ),
        ({"pooling": "first"}, ValueError, "pooling must be"),
        ({"weight": torch.ones(5, 3)}, ValueError, "weight must be"),
        ({"weight": torch.ones(5, 2).long()}, TypeError, "weight must be one of"),
        ({"weight": torch.ones(5, 2), "bias": torch.ones(4)}, ValueError, "bias must be"),
        ({"weight": torch.ones(5, 2), "bias": torch.ones(5).double()}, TypeError, "bias must be one of"),
        ({"bias": torch.ones(5)}, ValueError, "bias needs"),
        ({"group": torch.zeros(4, device="meta").long()}, ValueError, "group is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    arguments = {"hidden": torch.ones(4, 3, 2), "group": ids, "language": ids, "prompts": 1, "languages": 1}
    with pytest.raises(error, match=f"^{message}"):
        mlc_loss_from_hidden(**(arguments | change))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_waits_for_the_device(pooling: Pooling, backend: Backend) -> None:
    """The meta device has no values, so anything that reads a value on the host fails."""
    hidden = torch.empty(4, 3, 5, device="meta", requires_grad=True)
    ids = torch.empty(4, device="meta", dtype=torch.int64)
    mlc_loss_from_hidden(hidden, ids, ids, 2, 2, attention_mask=hidden[:, :, 0] > 0, pooling=pooling, backend=backend)
    flat, offsets = hidden.reshape(12, 5), torch.empty(5, device="meta", dtype=torch.int64)
    loss = mlc_loss_from_hidden(flat, ids, ids, 2, 2, offsets=offsets, pooling=pooling, backend=backend)
    assert torch.autograd.grad(loss, hidden)[0].shape == hidden.shape


def test_compiles_into_one_graph() -> None:
    hidden, ids = random_states(4, 3).requires_grad_(), torch.arange(4)

    def loss(hidden: Tensor) -> Tensor:
        return mlc_loss_from_hidden(hidden, ids // 2, ids % 2, 2, 2, pooling="mean")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(found, torch.autograd.grad(loss(hidden), hidden)[0], rtol=1e-10, atol=1e-14)


class TestChoice:
    GPU = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_reasons", {})
        monkeypatch.setattr(backends, "_said", set())
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def test_on_the_cpu_without_a_word(self, caplog: pytest.LogCaptureFixture) -> None:
        assert backends.choose("auto", torch.device("cpu"), 3) == "closed_form"
        assert backends.choose("auto", torch.device("cpu"), 300) == "closed_form"
        assert caplog.records == []

    def test_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(backends, "_find_reason", lambda *_: None)
        assert [backends.choose("auto", self.GPU, languages) for languages in (0, 64)] == ["triton", "triton"]
        assert caplog.records == []
        assert backends.choose("closed_form", self.GPU, 3) == "closed_form"
        assert backends.choose("reference", self.GPU, 3) == "reference"

    def test_the_reason_is_told_once(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(backends, "_find_reason", lambda *_: None)
        with caplog.at_level(logging.INFO, "mlc_kernels"):
            assert [backends.choose("auto", self.GPU, 65) for _ in range(3)] == ["closed_form"] * 3
        assert [record.message for record in caplog.records] == [
            "The MLC loss runs without its Triton kernel, in plain PyTorch: it takes up to 64 languages."
        ]

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("find_spec", None, "Triton is not installed"),
            ("capability", (7, 5), "compute capability 8.0"),
        ],
    )
    def test_reasons(self, monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: "found")
        assert backends.choose("auto", self.GPU, 3) == "triton"
        backends._reasons.clear()
        where = torch.cuda if name == "capability" else backends.importlib.util
        monkeypatch.setattr(where, "get_device_capability" if name == "capability" else name, lambda _: value)
        assert backends.choose("auto", self.GPU, 3) == "closed_form"
        with pytest.raises(ValueError, match=f"^backend cannot be 'triton' here: .*{reason}"):
            backends.choose("triton", self.GPU, 3)

    @pytest.mark.parametrize("operator", [mlc_loss, singular_values])
    def test_asked_for_where_it_cannot_run(self, operator: Any) -> None:
        with pytest.raises(ValueError, match=r"^backend cannot be 'triton' here: it needs a CUDA or ROCm device"):
            operator(torch.ones(1, 2, 3), backend="triton")

    def test_the_fall_back_compiles_into_one_graph(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(backends, "_find_reason", lambda *_: "no reason")

        def chosen(rows: Tensor) -> Tensor:
            return rows * (2 if backends.choose("auto", TestChoice.GPU, 3) == "closed_form" else 3)

        compiled = torch.compile(chosen, fullgraph=True, backend="eager")
        assert compiled(torch.ones(1)).item() == 2
        told = [record.message for record in caplog.records if record.name == "mlc_kernels"]
        assert [message.split(": ")[1] for message in told] == ["no reason."]


def test_a_distributed_tensor_is_refused() -> None:
    class Sharded(Tensor):
        def to_local(self) -> Tensor:
            return torch.ones(1, 2, 3)

    rows = torch.ones(1, 2, 3).as_subclass(Sharded)
    for operator in (mlc_loss, singular_values):
        with pytest.raises(TypeError, match=r"^representations must not be a DTensor: pass its \.to_local\(\)"):
            operator(rows)
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^hidden must not be a DTensor"):
        mlc_loss_from_hidden(rows, ids, ids, 1, 1)
