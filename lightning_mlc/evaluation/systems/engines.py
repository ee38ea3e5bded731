"""The library that runs a local model."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.system import System

Engine = Literal["transformers", "vllm"]


def engine_of(system: System, engine: Literal["auto", "transformers", "vllm"]) -> Engine:
    """The library that generates with a local model.

    Args:
        system: The local model.
        engine: The option ``engine``. ``auto`` is vLLM if it is installed, a GPU exists and vLLM can run the model.

    Raises:
        UserError: ``vllm`` is given, but vLLM is not installed or cannot run this model.
    """
    is_folder = not system.is_checkpoint and not system.source.resolve()[1].get("gguf_file")
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm":
        if not installed:
            raise UserError("engine", "vllm is not installed; run `pip install vllm`, or set engine to transformers")
        if not is_folder:
            raise UserError(
                "engine", f"vllm runs folders and hub ids, not {system.spec}; export it, or use transformers"
            )
        return "vllm"
    if engine == "auto" and installed and is_folder and torch.cuda.is_available():
        return "vllm"
    return "transformers"
