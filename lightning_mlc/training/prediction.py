"""Greedy responses of the policy to the prompts of a batch."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.models.policy import Policy
from lightning_mlc.sources import ModelSource, load_tokenizer


class Response(NamedTuple):
    """A response to one prompt of a batch."""

    example: int
    """Index of the example in the batch."""
    language: int
    """Index of the language in ``Batch.languages``."""
    text: str
    """The response, without special tokens."""


class Prediction(TypedDict):
    """A line of ``predictions.jsonl``."""

    id: str
    language: str
    response: str


class Predictor:
    """Generates responses.

    Args:
        policy: The model.
        source: Where its tokenizer is.
        together: Whether all processes must generate the same number of tokens, because they share a model.
    """

    def __init__(self, policy: Policy, source: ModelSource, together: bool) -> None:
        self._policy = policy
        self._tokenizer = load_tokenizer(source)
        self._ends = end_tokens(policy.causal_lm, self._tokenizer)
        self._together = together

    def respond(self, batch: Batch, max_new_tokens: int) -> list[Response]:
        """Respond to all prompts of ``batch``, in every language.

        Args:
            batch: Its prompts are padded on the left.
            max_new_tokens: Longest response, in tokens.
        """
        tokenizer = self._tokenizer
        found: list[Response] = []
        for rows in batch.prompts:
            generated = self._policy.generate(rows, max_new_tokens, self._ends, tokenizer.pad_token_id, self._together)
            texts = tokenizer.batch_decode(generated[:, rows.input_ids.shape[1] :], skip_special_tokens=True)
            responses = zip(rows.example.tolist(), rows.language.tolist(), texts, strict=True)
            found += [Response(*one) for one, leads in zip(responses, rows.leads.tolist(), strict=True) if leads]
        return found


def as_predictions(batch: Batch, responses: list[Response]) -> list[Prediction]:
    """Lines of ``predictions.jsonl`` for the ``responses`` to prompts of ``batch``."""
    return [
        {"id": batch.ids[one.example], "language": batch.languages[one.language], "response": one.text}
        for one in responses
    ]
