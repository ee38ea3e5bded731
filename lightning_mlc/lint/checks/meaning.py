"""A text that means something else, as a model of sentence embeddings sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from lightning_mlc.errors import renamed
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.likeness import LikenessCheck
from lightning_mlc.lint.texts import Text

if TYPE_CHECKING:
    from lightning_mlc.lint.sentence_encoder import SentenceEncoder


class Meaning(LikenessCheck):
    """The cosine between the embeddings of translation and source is nearer to that of unrelated texts.

    It needs ``--embeddings``, a multilingual model of sentence embeddings, and finds what rules cannot: a fluent text
    in the right language that says something else, such as the translation of another row.

    Threshold: half way between the column's median and the median of texts with another row's source, in columns of at
    least 20 texts, because models differ in the range of their cosines. False alarms: not measured yet with a
    multilingual model. With hidden states of SmolLM2, an English model, no column of the sample can be told from
    unrelated texts, and the check says that instead of naming rows.
    """

    name = "meaning"
    severity = "warning"
    title = "another meaning than the source"
    option = "--embeddings"
    limit = 0.5
    unit = "cosine"

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self._encoder = encoder

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        # Imported here, because torch takes seconds.
        from lightning_mlc.lint.sentence_encoder import SentenceEncoder

        assert settings.embeddings is not None
        with renamed(("device",), "--device"), renamed(("model.name_or_path",), "--embeddings"):
            return cls(SentenceEncoder.load(settings.embeddings, settings.device))

    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
        texts = list(dict.fromkeys(text.content for pair in pairs for text in pair))
        vectors = self._encoder.encode(texts)
        places = {text: place for place, text in enumerate(texts)}
        sources, translations = (vectors[[places[text.content] for text in side]] for side in zip(*pairs, strict=True))
        found: list[float | None] = (sources * translations).sum(1).tolist()
        return found
