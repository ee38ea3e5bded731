"""A language that a model's tokenizer covers badly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from lightning_mlc.errors import renamed
from lightning_mlc.lint.check import Check, LintSettings
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(Check):
    """The prompts of a language take three and more times as many tokens as their sources.

    Every step pays for them, and a model has often learnt little of such a language. It needs ``--model``, whose
    tokenizer counts. Threshold: that of training's warning, 3. SmolLM2's tokenizer, made for English, takes 1.3 to 3.0
    times as many for the nine languages of the sample.
    """

    name = "tokens"
    severity = "warning"
    title = "many tokens per token of the source"
    option = "--model"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._own: Counter[str] = Counter()
        self._of_source: Counter[str] = Counter()

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        # Imported here, because transformers takes seconds.
        from lightning_mlc.sources import load_tokenizer

        assert settings.model is not None
        with renamed(("model.name_or_path",), "--model"), renamed(("model.gguf_file",), "--gguf_file"):
            return cls(load_tokenizer(settings.model))

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        pairs = list(row.prompts)
        texts = [row.source.content, *(pair.text.content for pair in pairs)]
        # An unpaired surrogate has no tokens; another check reports it.
        usable = [text.encode(errors="replace").decode() for text in texts]
        ids = self._tokenizer(usable, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for pair, own in zip(pairs, ids[1:], strict=True):
            self._own[pair.text.language] += len(own)
            self._of_source[pair.text.language] += len(ids[0])
        return iter(())

    def columns(self) -> Iterator[Finding]:
        from lightning_mlc.data.costs import EXPENSIVE  # here, because it imports pyarrow and datasets

        for language, tokens in self._own.items():
            factor = tokens / max(1, self._of_source[language])
            if factor >= EXPENSIVE:
                yield self.found_in_column(language, f"{factor:.1f} times as many tokens as the source")
