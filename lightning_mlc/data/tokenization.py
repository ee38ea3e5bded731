"""From texts to token ids, through the tokenizer's chat template."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.records import Example, Message
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.turns import end_of_turn


class PromptTooLong(UserError):
    """A prompt that is not to be cut has more tokens than it may have."""


class ChatTokenizer:
    """Tokenises prompts so that they end with the generation header, and responses so that they end their turn."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        max_response_length: int,
        on_long_prompt: Literal["cut", "error"],
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; use a chat "
                "(instruct) model, or put a chat_template.jinja into its folder",
            )
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.on_long_prompt = on_long_prompt

    def encode(self, example: Example, languages: tuple[str, ...]) -> dict[str, Any]:
        """Token ids of an example: ``prompts`` with their ``languages`` (indices), ``chosen``, ``rejected``.

        ``translated`` are the other languages (indices) that have responses of their own, which are in
        ``translated_chosen`` and ``translated_rejected``.
        ``cut_prompts`` lists the languages whose prompt was cut, ``cut_response`` says whether a response was.
        """
        present = [index for index, language in enumerate(languages) if language in example.prompts]
        prompts, cut = [], []
        for index in present:
            ids, was_cut = self.prompt(example.prompts[languages[index]], f"{example.where} ({languages[index]})")
            prompts.append(ids)
            if was_cut:
                cut.append(languages[index])
        source = example.prompts[languages[0]]
        chosen = [] if example.chosen is None else self.response(source, example.chosen)
        rejected = [] if example.rejected is None else self.response(source, example.rejected)
        translated = [index for index in present if languages[index] in example.translated]
        pairs = [
            [self.response(example.prompts[languages[index]], text) for text in example.translated[languages[index]]]
            for index in translated
        ]
        limit = self.max_response_length
        return {
            "id": example.id,
            "where": example.where,
            "languages": present,
            "prompts": prompts,
            "chosen": chosen[:limit],
            "rejected": rejected[:limit],
            "translated": translated,
            "translated_chosen": [pair[0][:limit] for pair in pairs],
            "translated_rejected": [pair[1][:limit] for pair in pairs],
            "cut_prompts": cut,
            "cut_response": any(len(ids) > limit for ids in (chosen, rejected, *itertools.chain(*pairs))),
        }

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, messages: list[Message], header: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=header, tokenize=False)
        assert isinstance(text, str)
        return text

    def prompt(self, messages: list[Message], where: str, header: bool = True) -> tuple[list[int], bool]:
        """Ids of a prompt of at most ``max_prompt_length`` tokens, and whether it had to be cut.

        ``header`` asks the template for its generation header. The templates of some guard models have it anyway.
        """
        try:
            ids = self._ids(self._render(messages, header))
        except TemplateError as error:  # no messages of a system, say
            raise UserError(
                where,
                f"the chat template of the model refuses this prompt ({first_line(error)}); change the row, "
                "or the template",
            ) from error
        limit = self.max_prompt_length
        if len(ids) <= limit:
            return ids, False
        if self.on_long_prompt == "error":
            raise PromptTooLong(
                where,
                f"the prompt has {len(ids)} tokens, data.max_prompt_length is {limit}; "
                "raise it, shorten the prompt, or set data.on_long_prompt to cut",
            )
        # What is cut is the end of the user's last message, in whole characters: the template around it,
        # and with it the generation header, stays as it is.
        text = messages[-1]["content"]

        def cut_to(characters: int) -> list[int]:
            shorter = [*messages[:-1], {**messages[-1], "content": text[:characters].rstrip() or " "}]
            return self._ids(self._render(shorter, header))

        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(cut_to(middle)) <= limit:
                fits = middle
            else:
                too_long = middle
        if fits == 0:
            raise UserError(where, f"data.max_prompt_length {limit} leaves no room beside the chat template; raise it")
        return cut_to(fits), True

    @cached_property
    def end(self) -> str:
        """The token that ends a response."""
        return end_of_turn(self.tokenizer)

    def response(self, prompt: list[Message], response: str) -> list[int]:
        """Ids of what the model has to generate after the generation header: the response, then the end of its turn."""
        header = self._render(prompt, header=True)
        whole = self._render([*prompt, {"role": "assistant", "content": response}], header=False)
        text = response
        if whole.startswith(header):
            # Templates put more after the end (a line break, say), which nothing generates.
            body, has_end, _ = whole[len(header) :].rpartition(self.end)
            if has_end:
                text = body
        return self._ids(text + self.end)
