"""A translation model in this process: an encoder and a decoder, such as NLLB-200, M2M-100 or MADLAD-400."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mlc.evaluation.systems.generation import out_of_memory, plan_batches
from lightning_mlc.translation.backends.codes import LanguageCodes
from lightning_mlc.translation.failures import CUT, TOO_LONG
from lightning_mlc.translation.texts import Reply, Text

BEAMS = {1: 1, 2: 4}
"""Beams of each attempt. A second greedy attempt would give the first translation again."""


@dataclass(frozen=True)
class Limits:
    """How much a model translates at a time, in tokens.

    Args:
        context: Longest line that the model takes.
        new_tokens: Longest translation of a line.
        batch: Most tokens of a batch, with padding and translations.
    """

    context: int
    new_tokens: int
    batch: int


class Seq2SeqBackend:
    """Translates line by line, because such models were trained on sentences and drop line breaks.

    Args:
        settings: What distinguishes the model from others: plain JSON values.
        tokenizer: Its tokenizer.
        codes: The tokens of its languages.
        limits: How much it translates at a time.
        load: Loads the weights onto their device, when they are first needed.
    """

    name = "transformers"

    def __init__(
        self,
        settings: Mapping[str, Any],
        tokenizer: Any,
        codes: LanguageCodes,
        limits: Limits,
        load: Callable[[], Any],
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._codes = codes
        self._limits = limits
        self._load = load
        self._model: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        return {**self._settings, "beams": list(BEAMS.values())}

    def translate(self, texts: Sequence[Text], attempt: int, done: Collection[int]) -> Iterator[tuple[int, Reply]]:
        directions = dict.fromkeys((text.source, text.target) for text in texts)
        for direction in directions:  # a model is told one target language per batch
            indices = [index for index, text in enumerate(texts) if (text.source, text.target) == direction]
            encoded = {index: self._encode(texts[index]) for index in indices}
            fitting = []
            for index, lines in encoded.items():
                if max(map(len, lines.values()), default=0) <= self._limits.context:
                    fitting.append(index)
                elif index not in done:
                    yield index, Reply(None, TOO_LONG)
            for batch in self._batches({index: encoded[index] for index in fitting}):
                if not all(index in done for index in batch):
                    replies = self._translate({index: (texts[index], encoded[index]) for index in batch}, attempt)
                    yield from ((index, reply) for index, reply in replies if index not in done)

    def close(self) -> None:
        self._model = None

    def _encode(self, text: Text) -> dict[int, list[int]]:
        """Token ids of each line of ``text`` that is not blank, by the number of the line."""
        token = self._codes.token(text.source, "source_language")
        content = text.content.split("\n")
        if self._codes.family == "MADLAD-400":
            mark = self._codes.token(text.target, "languages")
            content = [f"{mark} {line.strip()}" if line.strip() else "" for line in content]
        else:
            self._tokenizer.src_lang = token.strip("_") if self._codes.family == "M2M-100" else token
        return {n: self._tokenizer(line.strip())["input_ids"] for n, line in enumerate(content) if line.strip()}

    def _batches(self, encoded: Mapping[int, Mapping[int, list[int]]]) -> list[list[int]]:
        """Indices of texts in batches, those with the longest lines first. A text is never divided."""
        batches: list[list[int]] = []
        width = lines = 0
        longest = {index: max(map(len, found.values()), default=0) for index, found in encoded.items()}
        for index in sorted(encoded, key=lambda index: (-longest[index], index)):
            more = len(encoded[index])
            if not batches or (lines + more) * width > self._limits.batch:
                batches.append([])
                width, lines = longest[index] + self._limits.new_tokens, 0
            batches[-1].append(index)
            lines += more
        return batches

    def _translate(
        self, batch: Mapping[int, tuple[Text, Mapping[int, list[int]]]], attempt: int
    ) -> Iterator[tuple[int, Reply]]:
        places = [(index, number) for index, (_, lines) in batch.items() for number in lines]
        inputs = [batch[index][1][number] for index, number in places]
        target = next(iter(batch.values()))[0].target
        found: dict[tuple[int, int], str | None] = {}
        # A text of many lines can exceed the limit alone; its lines are then run in several parts.
        for part in plan_batches([len(line) for line in inputs], self._limits.batch, self._limits.new_tokens):
            outputs = self._generate([inputs[i] for i in part], self._codes.token(target, "languages"), BEAMS[attempt])
            found.update(zip((places[i] for i in part), outputs, strict=True))
        for index, (text, lines) in batch.items():
            translated = {number: found[index, number] for number in lines}
            if None in translated.values():
                yield index, Reply(None, CUT)
                continue
            whole = [translated.get(number) or "" for number in range(text.content.count("\n") + 1)]
            yield index, Reply("\n".join(whole).strip())

    @torch.inference_mode()
    def _generate(self, lines: Sequence[list[int]], target: str, beams: int) -> list[str | None]:
        """The translation of each of ``lines``; None if it did not end in time."""
        if self._model is None:
            self._model = self._load()
        tokenizer, device = self._tokenizer, self._model.device
        width = max(map(len, lines))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[*line, *[pad] * (width - len(line))] for line in lines])
        mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines])
        forced = None if self._codes.family == "MADLAD-400" else tokenizer.convert_tokens_to_ids(target)
        with out_of_memory():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self._limits.new_tokens,
                num_beams=beams,
                do_sample=False,
                forced_bos_token_id=forced,
            ).cpu()
        # The first token starts the decoder, and is the end token in some models. The token of the language follows,
        # which some tokenizers do not count as special.
        new = output[:, 1 if forced is None else 2 :]
        finished = (new == tokenizer.eos_token_id).any(1).tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() if ended else None for text, ended in zip(texts, finished, strict=True)]
