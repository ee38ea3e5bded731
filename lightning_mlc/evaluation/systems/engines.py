"""Which library runs a local model."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.settings import Settings
from lightning_mlc.evaluation.systems.generation import Generator, TransformersGenerator, VLLMGenerator, free_memory
from lightning_mlc.evaluation.systems.local import chat_of, choose_device, choose_dtype, load
from lightning_mlc.evaluation.systems.system import System


def engine_of(system: System, settings: Settings) -> Literal["transformers", "vllm"]:
    """What generates with the local model ``system``.

    Raises:
        UserError: vLLM is asked for and cannot be had, or cannot run this model.
    """
    is_folder = not system.is_checkpoint and not system.source.resolve()[1].get("gguf_file")
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm":
        if not installed:
            raise UserError("engine", "vllm is not installed; run `pip install vllm`, or set engine to transformers")
        if not is_folder:
            raise UserError(
                "engine", f"vllm runs folders and hub ids, not {system.spec}; export it, or use transformers"
            )
        return "vllm"
    if settings.engine == "auto" and installed and is_folder and torch.cuda.is_available():
        return "vllm"
    return "transformers"


def local_generator(
    system: System,
    max_new_tokens: int,
    settings: Settings,
    header: bool = True,
    on_long_prompt: Literal["cut", "error"] = "error",
) -> Generator:
    """Load ``system`` into what runs it."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    chat = chat_of(system, max_new_tokens, on_long_prompt)
    if engine_of(system, settings) == "vllm":
        from vllm import LLM

        location, keywords = system.source.resolve()
        revision = keywords["revision"]
        free_memory()  # of a model that ran before: vLLM takes a share of all memory, and fails if that is not free
        llm = LLM(model=location, dtype=dtype, revision=revision, tokenizer_revision=revision)
        return VLLMGenerator(llm, chat, max_new_tokens, header)
    return TransformersGenerator(load(system, chat, device, dtype), max_new_tokens, settings.batch_tokens, header)
