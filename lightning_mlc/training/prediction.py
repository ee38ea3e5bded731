"""Greedy responses of the policy to the prompts of a batch."""

from __future__ import annotations

from typing import TypedDict

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.models.policy import Policy
from lightning_mlc.sources import ModelSource, load_tokenizer


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
        max_new_tokens: Longest response, in tokens.
        together: Whether all processes must generate the same number of tokens, because they share a model.
    """

    def __init__(self, policy: Policy, source: ModelSource, max_new_tokens: int, together: bool) -> None:
        self._policy = policy
        self._tokenizer = load_tokenizer(source)
        self._ends = end_tokens(policy.causal_lm, self._tokenizer)
        self._max_new_tokens = max_new_tokens
        self._together = together

    def predict(self, batch: Batch) -> list[Prediction]:
        """The responses to all prompts of ``batch``, in every language."""
        tokenizer = self._tokenizer
        found: list[Prediction] = []
        for rows in batch.prompts:
            generated = self._policy.generate(
                rows, self._max_new_tokens, self._ends, tokenizer.pad_token_id, self._together
            )
            responses = tokenizer.batch_decode(generated[:, rows.input_ids.shape[1] :], skip_special_tokens=True)
            for example, language, leads, response in zip(
                rows.example.tolist(), rows.language.tolist(), rows.leads.tolist(), responses, strict=True
            ):
                if leads:
                    found.append(
                        {"id": batch.ids[example], "language": batch.languages[language], "response": response}
                    )
        return found
