"""The options: invalid values, the module, and the floor of the loss."""

from __future__ import annotations

import math

import pytest
import torch

from mlc_kernels import MLCLoss, loss_floor, mlc_loss, singular_values
from mlc_kernels.functional import Scale

SHARED = ("representations", "mask", "backend")  # as an argument of singular_values


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"representations": torch.ones(2, 3)}, ValueError, "representations must be"),
        ({"representations": torch.ones(2, 3, 0)}, ValueError, "representations must have"),
        ({"representations": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "representations must be"),
        ({"representations": torch.ones(2, 3, 4).to(torch.complex64)}, TypeError, "representations must be"),
        ({"representations": [[[1.0]]]}, TypeError, "representations must be a tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.ones(2, 3, 1, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"mask": [[True] * 3] * 2}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"temperature": -1}, ValueError, "temperature must be"),
        ({"temperature": float("nan")}, ValueError, "temperature must be"),
        ({"temperature": float("inf")}, ValueError, "temperature must be"),
        ({"temperature": "0.2"}, ValueError, "temperature must be"),
        ({"scale": "bottom"}, ValueError, "scale must be"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"representations": torch.ones(2, 3, 4), **change}
    with pytest.raises(error, match=f"^{message}"):
        mlc_loss(**arguments)  # type: ignore[arg-type]
    shared = {name: value for name, value in arguments.items() if name in SHARED}
    if change.keys() & shared.keys():
        with pytest.raises(error, match=f"^{message}"):
            singular_values(**shared)  # type: ignore[arg-type]
    else:
        with pytest.raises(error, match=f"^{message}"):
            MLCLoss(**change)  # type: ignore[arg-type]


def test_module_is_the_function_with_options() -> None:
    rows = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    module = MLCLoss(temperature=0.5, scale="none", reduction="sum", backend="reference")
    expected = mlc_loss(rows, mask, temperature=0.5, scale="none", reduction="sum", backend="reference")
    assert torch.equal(module(rows, mask), expected)
    assert repr(module) == "MLCLoss(temperature=0.5, scale='none', reduction='sum', backend='reference')"
    assert not list(module.parameters())


def test_floor() -> None:
    assert float(loss_floor(10)) == pytest.approx(0.0589, abs=5e-5)  # the published setting, to four digits
    assert float(loss_floor(4, 0.5, "none")) == pytest.approx(math.log(1 + 3 * math.exp(-2 / 0.5)))
    assert loss_floor(torch.tensor([0, 1, 2])).tolist() == pytest.approx([0, 0, math.log(1 + math.exp(-5))])
    assert loss_floor(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("scale", ["top", "none"])
def test_floor_is_what_equal_rows_get(scale: Scale) -> None:
    rows = torch.arange(1.0, 9.0, dtype=torch.float64).expand(1, 5, 8)
    # A singular value of 0 comes from a float64 eigenvalue of up to 1e-16, so it may be as large as 1e-8.
    assert float(mlc_loss(rows, scale=scale)) == pytest.approx(float(loss_floor(5, 0.2, scale)), abs=1e-8)


def test_floor_refuses_what_the_loss_refuses() -> None:
    with pytest.raises(ValueError, match=r"^temperature must be"):
        loss_floor(3, 0.0)
    with pytest.raises(ValueError, match=r"^scale must be"):
        loss_floor(3, 0.2, "bottom")  # type: ignore[arg-type]
