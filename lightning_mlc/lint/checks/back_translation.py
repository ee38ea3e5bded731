"""A text that, translated back, is not its source any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from lightning_mlc.lint.check import BackTranslator, LintSettings
from lightning_mlc.lint.likeness import LikenessCheck
from lightning_mlc.lint.texts import Text


class BackTranslation(LikenessCheck):
    """chrF of the text, translated back, and its source (Popović 2015) is near to that of unrelated texts.

    It needs ``--translator``, and sacrebleu. It finds texts that say something else, and harmful prompts that were
    softened. A text that its own translator translates back well can still be wrong, so name another one.

    Threshold: a third of the way from the median of unrelated texts to that of the column, in columns of at least 20
    texts. chrF depends on the choice of words, so that good translations vary much, and half way would be too strict.
    Pairs of different English prompts of the sample have 16 in the middle, and 98 % of them 11 to 29. False
    alarms: not measured yet with a translation model.
    """

    name = "back_translation"
    severity = "warning"
    title = "not the source any more when translated back"
    packages = ("sacrebleu",)
    option = "--translator"
    limit = 1 / 3
    unit = "chrF"

    def __init__(self, translator: BackTranslator) -> None:
        super().__init__()
        self._translator = translator

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        assert settings.translator is not None
        return cls(settings.translator)

    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
        from sacrebleu import sentence_chrf

        texts = {(text.content, text.language): text for _, text in pairs}
        back = dict(zip(texts, self._translator.back(list(texts.values()), pairs[0][0].language), strict=True))
        translated = [back[text.content, text.language] for _, text in pairs]
        return [
            None if text is None else float(sentence_chrf(text, [source.content]).score)
            for text, (source, _) in zip(translated, pairs, strict=True)
        ]
