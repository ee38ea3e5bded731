"""From texts to token ids, through the tokenizer's chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.encoding import ChatEncoder
from lightning_mlc.data.hashing import digest
from lightning_mlc.data.records import Example, Message
from lightning_mlc.data.templates import ChatTemplate, TemplateProblem, contains
from lightning_mlc.data.tokenised import TokenisedExample
from lightning_mlc.data.turns import end_of_turn
from lightning_mlc.errors import UserError


class PromptTooLong(UserError):
    """A prompt that is not to be cut has more tokens than it may have."""


class _Prompt(NamedTuple):
    """A rendered prompt, before anything is cut."""

    messages: list[Message]
    where: str
    text: str
    """With the generation header."""


class _Answer(NamedTuple):
    """The text that the model has to generate after a prompt."""

    prompt: _Prompt
    text: str
    """The response, to the end of its turn."""
    continues: bool
    """Whether it continues the prompt's text as that stands."""

    @property
    def whole(self) -> str:
        """The prompt and the answer as one text; empty if they do not form one."""
        return self.prompt.text + self.text if self.continues else ""


class ChatTokenizer:
    """Tokenises prompts so that they end with the generation header, and responses so that they end their turn.

    Args:
        tokenizer: The tokenizer, with its chat template.
        max_prompt_length: Longest prompt in tokens, its chat template included.
        max_response_length: Longest response in tokens; what is longer is cut.
        on_long_prompt: ``cut`` shortens the user's last message until the prompt fits, ``error`` refuses it.

    Raises:
        UserError: There is no chat template, or no token that could end a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        max_response_length: int,
        on_long_prompt: Literal["cut", "error"],
    ) -> None:
        self.template = ChatTemplate(tokenizer)
        end = end_of_turn(tokenizer)
        if end is None:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no EOS token, and its chat template ends no turn with "
                "a special token; set eos_token in its tokenizer_config.json",
            )
        self.end = end
        """The token that ends a response."""
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer, "".join(self.template.sample))
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.on_long_prompt = on_long_prompt

    # ---- examples -----------------------------------------------------------------------------------

    def encode(self, example: Example, languages: tuple[str, ...]) -> TokenisedExample:
        """One example; see :meth:`encode_all`."""
        return self.encode_all([example], languages)[0]

    def encode_all(self, examples: Sequence[Example], languages: tuple[str, ...]) -> list[TokenisedExample]:
        """Tokenise ``examples``.

        Args:
            examples: Texts. They are rendered and encoded together, because that is faster than one by one.
            languages: Those to use, the source language first.

        Raises:
            UserError: A prompt or a response cannot be rendered, or is too long; the message names its row.
        """
        present = [[i for i, language in enumerate(languages) if language in e.prompts] for e in examples]
        prompts = self._prompts(
            [
                (example.prompts[languages[i]], f"{example.where} ({languages[i]})")
                for example, indices in zip(examples, present, strict=True)
                for i in indices
            ],
            header=True,
        )
        in_order = iter(prompts)
        rendered = [{i: next(in_order) for i in indices} for indices in present]
        answers = self._answers(
            [
                (found[i], text)
                for example, found in zip(examples, rendered, strict=True)
                for i, text in _responses_of(example, languages, found)
            ]
        )
        ids = self._ids([*(prompt.text for prompt in prompts), *(answer.whole for answer in answers)])
        left = iter(answers)
        return [
            self._row(example, languages, found, left, ids) for example, found in zip(examples, rendered, strict=True)
        ]

    def _row(
        self,
        example: Example,
        languages: tuple[str, ...],
        prompts: dict[int, _Prompt],
        answers: Iterator[_Answer],
        ids: Mapping[str, list[int]],
    ) -> TokenisedExample:
        fitted = {i: self._fit(prompt, ids[prompt.text], header=True) for i, prompt in prompts.items()}
        whole = [self._after_prompt(next(answers), ids) for _ in _responses_of(example, languages, prompts)]
        own = iter(whole)
        chosen = [] if example.chosen is None else next(own)
        rejected = [] if example.rejected is None else next(own)
        translated = [i for i in prompts if languages[i] in example.translated]
        pairs = [(next(own), next(own)) for _ in translated]
        limit = self.max_response_length
        texts = (*example.responses, *itertools.chain(*example.translated.values()))
        return {
            "id": example.id,
            "where": str(example.where),
            "languages": list(prompts),
            "prompts": [ids for ids, _ in fitted.values()],
            "chosen": chosen[:limit],
            "rejected": rejected[:limit],
            "translated": translated,
            "translated_chosen": [pair[0][:limit] for pair in pairs],
            "translated_rejected": [pair[1][:limit] for pair in pairs],
            "ordinary": example.ordinary,
            "cut_prompts": [languages[i] for i, (_, was_cut) in fitted.items() if was_cut],
            "cut_response": any(len(ids) > limit for ids in whole),
            "empty_response": not all(text.strip() for text in texts),
            "same_prompt": digest(repr(fitted[0][0])),
            "prompt_text": digest(repr(example.prompts[languages[0]])),
            "chosen_text": 0 if example.chosen is None else digest(example.chosen),
            "rejected_text": 0 if example.rejected is None else digest(example.rejected),
        }

    # ---- prompts ------------------------------------------------------------------------------------

    def prompt(self, messages: list[Message], where: str, header: bool = True) -> tuple[list[int], bool]:
        """Ids of a prompt of at most ``max_prompt_length`` tokens, and whether it had to be cut.

        ``header`` asks the template for its generation header. The templates of some guard models have it anyway.
        """
        return self.prompts([(messages, where)], header)[0]

    def prompts(self, asked: Sequence[tuple[list[Message], str]], header: bool = True) -> list[tuple[list[int], bool]]:
        """The same for several prompts, each with its place: rendered and encoded together, because that is faster."""
        prompts = self._prompts(asked, header)
        ids = self._ids([prompt.text for prompt in prompts])
        return [self._fit(prompt, ids[prompt.text], header) for prompt in prompts]

    def _prompts(self, asked: Sequence[tuple[list[Message], str]], header: bool) -> list[_Prompt]:
        try:
            texts = self.template.render([messages for messages, _ in asked], header)
        except TemplateProblem:
            for messages, where in asked:  # one by one, to name the row
                try:
                    self.template.render([messages], header)
                except TemplateProblem as error:
                    raise UserError(
                        where,
                        f"the chat template of the model {error.told('this prompt')}; change the row, or the template",
                    ) from error
            raise
        return [_Prompt(*given, text) for given, text in zip(asked, texts, strict=True)]

    def _fit(self, prompt: _Prompt, ids: list[int], header: bool) -> tuple[list[int], bool]:
        """The ``ids`` of ``prompt``, cut if they are too many, and whether they were cut."""
        limit, messages, where = self.max_prompt_length, prompt.messages, prompt.where
        if len(ids) <= limit:
            return ids, False
        if self.on_long_prompt == "error":
            raise PromptTooLong(
                where,
                f"the prompt has {len(ids)} tokens, data.max_prompt_length is {limit}; "
                "raise it, shorten the prompt, or set data.on_long_prompt to cut",
            )
        # The end of the user's last message is cut, in whole characters, so that the template around it and the
        # generation header stay as they are.
        text = messages[-1]["content"]

        def cut_to(characters: int) -> list[int]:
            shorter = [*messages[:-1], {**messages[-1], "content": text[:characters].rstrip() or " "}]
            return self._encoded(self._prompts([(shorter, where)], header)[0].text)

        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(cut_to(middle)) <= limit:
                fits = middle
            else:
                too_long = middle
        if fits == 0:
            raise UserError(
                where,
                f"max_prompt_length {limit} leaves no room in addition to the chat template; raise it",
            )
        return cut_to(fits), True

    # ---- responses ----------------------------------------------------------------------------------

    def response(self, prompt: list[Message], response: str, where: str | None = None) -> list[int]:
        """Token ids that the model has to generate after the generation header: the response and the end of its turn.

        If the tokens of the whole conversation begin with those of the prompt, the rest are the response's. Otherwise
        a token crosses the border (a header's last space and the first word, for example), or the template renders an
        answered prompt differently. The response is then encoded alone, as the middle of a text, so that no token and
        no mark of a text's beginning crosses the border. In both cases the prompt has the same tokens as in
        generation.

        Args:
            prompt: The conversation before the response.
            response: The response; may be empty.
            where: File and row, for errors.

        Raises:
            UserError: The template refuses the response, or leaves some of it out.
        """
        (asked,) = self._prompts([(prompt, where or "")], header=True)
        (answer,) = self._answers([(asked, response)])
        return self._after_prompt(answer, self._ids([asked.text, answer.whole]))

    def _answers(self, asked: Sequence[tuple[_Prompt, str]]) -> list[_Answer]:
        wholes = self._finished(asked)
        return [self._answer(*given, whole) for given, whole in zip(asked, wholes, strict=True)]

    def _finished(self, asked: Sequence[tuple[_Prompt, str]]) -> list[str]:
        """The text of each conversation with its response."""
        finished = [[*prompt.messages, {"role": "assistant", "content": response}] for prompt, response in asked]
        try:
            return self.template.render_unchecked(finished, header=False)
        except TemplateProblem:
            for messages, (prompt, response) in zip(finished, asked, strict=True):  # one by one, to name the row
                try:
                    self.template.render_unchecked([messages], header=False)
                except TemplateProblem as error:
                    what = "this response" if response.strip() else "an empty response"
                    raise UserError(
                        prompt.where,
                        f"the chat template of the model {error.told(what)}; change the row, or the template",
                    ) from error
            raise

    def _answer(self, prompt: _Prompt, response: str, whole: str) -> _Answer:
        """The answer to ``prompt``, where ``whole`` is the text of both."""
        block = self.template.opened_block
        opened, continues = block.strip(), True
        if whole.startswith(prompt.text):
            body = whole[len(prompt.text) :]
            # Templates put more text after the end, such as a line break, which the model does not generate.
            text, has_end, _ = body.rpartition(self.end)
            if not has_end:
                last = body.rfind(response.strip())
                text = body[: last + len(response.strip())] if last >= 0 else response
            is_whole = contains(block + text, response)
        elif opened:  # a finished turn lacks the block that the header opens, and some of the text inside
            text, is_whole = response, True
        else:
            text, is_whole, continues = response, contains(whole, response), False
        if not is_whole:
            raise UserError(
                prompt.where,
                "the chat template of the model changes or leaves out some of the response; change the row, or the "
                "template",
            )
        if opened:
            if text.lstrip().startswith(opened):  # the prompt already has it
                text = text.removeprefix(block) if text.startswith(block) else text.lstrip().removeprefix(opened)
            closed = self.template.closed_block
            if closed not in text:
                raise UserError(
                    prompt.where,
                    f"the chat template opens {opened} before each response, and this response has no {closed}; "
                    "give responses with both, or change the template",
                )
        return _Answer(prompt, text + self.end, continues)

    def _after_prompt(self, answer: _Answer, ids: Mapping[str, list[int]]) -> list[int]:
        """The token ids of ``answer``; ``ids`` has those of its prompt and of both."""
        prompt, whole = ids[answer.prompt.text], ids[answer.whole]
        border = len(prompt)
        shared = len(whole) > border and whole[:border] == prompt
        return whole[border:] if shared else self._apart(answer.text)

    def _apart(self, text: str) -> list[int]:
        """Token ids of ``text`` in the middle of a longer text."""
        for before in self._anchors:
            start, ids = self.encoder.ids([before, before + text])
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self._encoded(text)

    @cached_property
    def _anchors(self) -> list[str]:
        """Texts after which another text is encoded as in the middle of one. SentencePiece marks a beginning."""
        found = []
        for before in (self.end, "\n", "."):
            start, ids = self.encoder.ids([before, f"{before}x"])
            if ids[: len(start)] == start and self.tokenizer.convert_ids_to_tokens(ids[len(start) :]) == ["x"]:
                found.append(before)
        return found

    def _ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        return dict(zip(texts, self.encoder.ids(texts), strict=True))

    def _encoded(self, text: str) -> list[int]:
        return self.encoder.ids([text])[0]


def _responses_of(example: Example, languages: tuple[str, ...], prompts: Iterable[int]) -> Iterable[tuple[int, str]]:
    """The responses of ``example`` after the index of their language: the source's, then the translated pairs."""
    for text in example.responses:
        yield 0, text
    for i in prompts:
        for text in example.translated.get(languages[i], ()):
            yield i, text
