"""Choose the backend, and log once why ``auto`` did not choose the Triton kernel."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

MAX_LANGUAGES = 64  # the kernel keeps an L x L matrix in registers

_LOG = logging.getLogger("mlc_kernels")
_reasons: dict[tuple[str, int | None], str | None] = {}
_said: set[str] = set()


def choose(backend: str, device: torch.device, languages: int) -> str:
    """Return ``triton``, ``closed_form`` or ``reference``; ``backend`` is one of them or ``auto``.

    Raises:
        ValueError: ``backend`` is ``triton``, which cannot run here.
    """
    if backend in ("closed_form", "reference") or (backend == "auto" and device.type != "cuda"):
        return "closed_form" if backend == "auto" else backend
    reason = _why_not_on(device.type, device.index)
    if reason is None and languages > MAX_LANGUAGES:
        reason = f"it takes up to {MAX_LANGUAGES} languages"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend cannot be 'triton' here: {reason}")
    _say_once(reason)
    return "closed_form"


def _why_not_on(device_type: str, index: int | None) -> str | None:
    key = device_type, index
    if key not in _reasons:
        _reasons[key] = _find_reason(device_type, index)
    return _reasons[key]


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _LOG.warning("The MLC loss runs without its Triton kernel, in plain PyTorch: %s.", reason)


# torch.compile can trace neither a query of the device nor a logger, so their results are constants for it. This is
# what torch.compiler.assume_constant_result does, but without importing torch._dynamo, and Triton with it.
_why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_reason(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return f"it needs a CUDA or ROCm device, and this is {device_type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a CUDA device of compute capability 8.0 or more"
    return None
