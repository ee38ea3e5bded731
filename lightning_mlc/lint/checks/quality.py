"""A translation that a model of quality estimation scores low."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from lightning_mlc.errors import renamed
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.likeness import LikenessCheck
from lightning_mlc.lint.texts import Text

if TYPE_CHECKING:
    from lightning_mlc.lint.quality_model import QualityModel


class Quality(LikenessCheck):
    """The score of quality estimation is nearer to that of unrelated texts than to that of its column.

    It needs ``--quality``, a regression model that reads source and translation together, such as one that learned
    people's judgements of translations.

    Threshold: half way between the column's median and the median of texts with another row's source, in columns of at
    least 20 texts. No limit is the same for all columns, because no source supports one: TransQuest scales the
    judgements of each pair of languages by themselves before training
    (examples/sentence_level/wmt_2020/multilingual/monotransquest.py in https://github.com/TharinduDR/TransQuest), and
    its author, asked for a threshold, named none and said that a model does not work in another domain than the one it
    was trained for (issue 2 there). False alarms: not measured yet with a real model.
    """

    name = "quality"
    severity = "warning"
    title = "a low score of quality estimation"
    option = "--quality"
    limit = 0.5
    unit = "quality"
    doubt = "does the model know the language, and are its larger scores the better ones?"

    def __init__(self, model: QualityModel) -> None:
        super().__init__()
        self._model = model

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        # Imported here, because torch takes seconds.
        from lightning_mlc.lint.quality_model import QualityModel

        assert settings.quality is not None
        with renamed(("device",), "--device"), renamed(("model.name_or_path",), "--quality"):
            return cls(QualityModel.load(settings.quality, settings.device))

    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
        texts = list(dict.fromkeys((source.content, text.content) for source, text in pairs))
        found = dict(zip(texts, self._model.scores(texts), strict=True))
        return [found[source.content, text.content] for source, text in pairs]
