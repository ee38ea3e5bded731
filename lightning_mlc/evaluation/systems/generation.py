"""Greedy responses from any engine.

A generator takes all conversations, and the indices of those that already have a response. It makes its own batches.
Batches of a local model are planned over all conversations, with or without a response. So a run that was interrupted
gives the same responses as one that was not, although padding changes the last bits of what a model computes.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch

from lightning_mlc.data.records import Message
from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.decoding import Decoding
from lightning_mlc.models.greedy import generate_greedily

Conversation = list[Message]


class Response(NamedTuple):
    """A model's response to a conversation."""

    text: str
    """Without special tokens, and without spaces around it."""
    finished: bool
    """Whether the model ended it; otherwise the limit of new tokens did."""
    error: str | None = None
    """Why the response is missing: the endpoint rejects this request, and would reject it again."""
    decoding: Decoding = "greedy"


class Generator(Protocol):
    """Generates responses to conversations."""

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        """Yield index and response of each of ``conversations`` whose index is not in ``done``, as they arrive."""

    def close(self) -> None:
        """Release resources that are not shared, such as a loaded model. The generator cannot be used afterwards."""


@dataclass
class LocalModel:
    """A causal LM in this process, with its chat template and tokenizer."""

    model: Any
    chat: ChatTokenizer
    device: torch.device

    def to_device(self) -> LocalModel:
        """Move the model to its device.

        Raises:
            UserError: It does not fit into the device's memory.
        """
        with out_of_memory():
            self.model.to(self.device)
        return self


class TransformersGenerator:
    """``generate`` of transformers, in batches of conversations of similar length.

    Args:
        local: The model, on its device.
        max_new_tokens: Longest response, in tokens.
        batch_tokens: Maximum number of tokens in a batch: prompts, padding and responses.
        header: Whether to ask the chat template for its generation header.
    """

    def __init__(self, local: LocalModel, max_new_tokens: int, batch_tokens: int, header: bool = True) -> None:
        self._local = local
        self._max_new_tokens = max_new_tokens
        self._batch_tokens = batch_tokens
        self._header = header
        self._ends = end_tokens(local.model, local.chat.tokenizer)

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        prompts = encode(self._local.chat, conversations, self._header)
        for batch in plan_batches([len(prompt) for prompt in prompts], self._batch_tokens, self._max_new_tokens):
            if all(index in done for index in batch):
                continue
            responses = self._respond([prompts[index] for index in batch])
            for index, response in zip(batch, responses, strict=True):
                if index not in done:
                    yield index, response

    def close(self) -> None:
        del self._local  # others may still use the model

    @torch.inference_mode()
    def _respond(self, prompts: Sequence[Sequence[int]]) -> list[Response]:
        tokenizer, model = self._local.chat.tokenizer, self._local.model
        rows = TokenRows.pad(
            [TokenSequence(prompt, (), 0, 0, NO_RESPONSE) for prompt in prompts], tokenizer.pad_token_id, "left"
        )
        with out_of_memory():
            generated = generate_greedily(
                model, rows.to(self._local.device), self._max_new_tokens, self._ends, tokenizer.pad_token_id
            )
        new = generated[:, rows.input_ids.shape[1] :].cpu()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        finished = torch.isin(new, torch.tensor(self._ends)).any(1).tolist()
        return [Response(text.strip(), ended) for text, ended in zip(texts, finished, strict=True)]


class VLLMGenerator:
    """vLLM in this process. It makes its own batches. It is asked in chunks, so that a stopped run loses little.

    Args:
        llm: A ``vllm.LLM``.
        chat: Tokenises the prompts, so that vLLM gets the same tokens as transformers.
        max_new_tokens: Longest response, in tokens.
        header: Whether to ask the chat template for its generation header.
        chunk: Number of conversations per call.
    """

    def __init__(
        self, llm: Any, chat: ChatTokenizer, max_new_tokens: int, header: bool = True, chunk: int = 256
    ) -> None:
        self._llm = llm
        self._chat = chat
        self._max_new_tokens = max_new_tokens
        self._header = header
        self._chunk = chunk

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        from vllm import SamplingParams

        prompts = encode(self._chat, conversations, self._header)
        end = self._chat.tokenizer.convert_tokens_to_ids(self._chat.end)
        sampling = SamplingParams(temperature=0.0, max_tokens=self._max_new_tokens, stop_token_ids=[end])
        left = [index for index in range(len(prompts)) if index not in done]
        for start in range(0, len(left), self._chunk):
            part = left[start : start + self._chunk]
            inputs = [{"prompt_token_ids": prompts[index]} for index in part]
            outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
            for index, output in zip(part, outputs, strict=True):
                first = output.outputs[0]
                yield index, Response(first.text.strip(), first.finish_reason == "stop")

    def close(self) -> None:
        """Stop the engine, because it otherwise keeps most of the accelerator's memory until garbage collection."""
        llm, self._llm = self._llm, None
        for end in ("shutdown", "llm_engine.engine_core.shutdown"):  # later and earlier versions
            with suppress(AttributeError):
                attrgetter(end)(llm)()
                break
        del llm
        free_memory()


def free_memory() -> None:
    """Release unused memory of the accelerator, so that another process or library can have it."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def encode(chat: ChatTokenizer, conversations: Sequence[Conversation], header: bool = True) -> list[list[int]]:
    """Token ids of each conversation, ending with the generation header."""
    return [chat.prompt(messages, f"text {i}", header)[0] for i, messages in enumerate(conversations, start=1)]


def plan_batches(lengths: Sequence[int], batch_tokens: int, new_tokens: int) -> list[list[int]]:
    """Divide sequences into batches. The longest sequences come first, so that lack of memory shows at once.

    Args:
        lengths: Length of each sequence, in tokens.
        batch_tokens: Maximum number of tokens in a batch, padding included. A single sequence may be longer.
        new_tokens: Number of tokens that each sequence may grow by.

    Returns:
        The indices of the sequences in each batch.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = lengths[index] + new_tokens
        batches[-1].append(index)
    return batches


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns an out-of-memory error of an accelerator into an error of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "batch_tokens",
            "a batch does not fit into the accelerator's memory; give a smaller number and run the same command again "
            "(finished work is kept)",
        ) from error
