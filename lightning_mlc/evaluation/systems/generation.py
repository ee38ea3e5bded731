"""Greedy responses, whatever runs the model.

A generator takes all conversations and says which of them are answered already; how it batches the rest is its
own business. Batches of a local model are planned over all conversations, answered or not, so that a run that was
interrupted gives the same responses as one that was not: padding changes the last bits of what a model computes.
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
    """What a model answered."""

    text: str
    """Without special tokens and surrounding space."""
    finished: bool
    """Whether the model ended it, rather than the limit of new tokens."""
    error: str | None = None
    """Why there is none: the endpoint declined this very request, for good."""
    decoding: Decoding = "greedy"


class Generator(Protocol):
    """Anything that answers conversations."""

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        """The response to each of ``conversations`` whose index is not in ``done``, as they come."""

    def close(self) -> None:
        """Give back what it holds and nobody else does, a loaded model say. It is not asked again."""


@dataclass
class LocalModel:
    """A causal LM that runs in this process, with how its texts are turned into tokens."""

    model: Any
    chat: ChatTokenizer
    device: torch.device

    def to_device(self) -> LocalModel:
        """Move the model to where it runs.

        Raises:
            UserError: It does not fit there.
        """
        with out_of_memory():
            self.model.to(self.device)
        return self


class TransformersGenerator:
    """``generate`` of transformers, in batches of conversations of similar length.

    Args:
        local: The model, on its device.
        max_new_tokens: Longest response.
        batch_tokens: Most tokens of a batch, prompts, padding and responses together.
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
        for batch in plan([len(prompt) for prompt in prompts], self._batch_tokens, self._max_new_tokens):
            if all(index in done for index in batch):
                continue
            responses = self._respond([prompts[index] for index in batch])
            for index, response in zip(batch, responses, strict=True):
                if index not in done:
                    yield index, response

    def close(self) -> None:
        del self._local  # which others may hold

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
    """vLLM in this process: it batches by itself, and answers in chunks so that little is lost.

    Args:
        llm: A ``vllm.LLM``.
        chat: Tokenises as for transformers, so that both are given the same tokens.
        max_new_tokens: Longest response.
        header: Whether to ask the chat template for its generation header.
        chunk: Conversations per call.
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
        """End the engine: else it keeps the share of the accelerator's memory that it took, most of it, until Python
        collects it."""
        llm, self._llm = self._llm, None
        for end in ("shutdown", "llm_engine.engine_core.shutdown"):  # later and earlier versions
            with suppress(AttributeError):
                attrgetter(end)(llm)()
                break
        del llm
        free_memory()


def free_memory() -> None:
    """Give unused memory of the accelerator back, so that others can have it: another process, or another library."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def encode(chat: ChatTokenizer, conversations: Sequence[Conversation], header: bool = True) -> list[list[int]]:
    """Token ids of each conversation, ending with the generation header."""
    return [chat.prompt(messages, f"text {i}", header)[0] for i, messages in enumerate(conversations, start=1)]


def plan(lengths: Sequence[int], batch_tokens: int, new_tokens: int) -> list[list[int]]:
    """Indices in batches of at most ``batch_tokens`` (but one at least), longest first.

    A row takes the longest prompt of its batch and ``new_tokens``. Longest first, so that what does not fit into
    memory shows at once.
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
    """Turns an accelerator's lack of memory into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "batch_tokens",
            "a batch does not fit into the accelerator's memory; give less, and run again: what is done is kept",
        ) from error
