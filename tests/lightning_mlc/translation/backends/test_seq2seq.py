"""Translation models: compared with what their model cards do, one line at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from translators import save_m2m, save_madlad, save_nllb

from lightning_mlc.errors import UserError
from lightning_mlc.translation.backends.roster import make_backend
from lightning_mlc.translation.backends.seq2seq import Seq2SeqBackend
from lightning_mlc.translation.failures import CUT, TOO_LONG
from lightning_mlc.translation.languages import language_of
from lightning_mlc.translation.settings import TranslationSettings
from lightning_mlc.translation.texts import Reply, Text

NEW_TOKENS = 12
LINES = ("How are you?", "Hi", "What is it that you want of me now, my dear?", "Yes or no", "1, 2, 3")
Call = Callable[[Any, Any, str, int], str | None]


def nllb(tokenizer: Any, model: Any, line: str, beams: int) -> str | None:
    tokenizer.src_lang = "eng_Latn"
    return finished(tokenizer, model, line, beams, forced_bos_token_id=tokenizer.convert_tokens_to_ids("swh_Latn"))


def m2m(tokenizer: Any, model: Any, line: str, beams: int) -> str | None:
    tokenizer.src_lang = "en"
    return finished(tokenizer, model, line, beams, forced_bos_token_id=tokenizer.get_lang_id("sw"))


def madlad(tokenizer: Any, model: Any, line: str, beams: int) -> str | None:
    return finished(tokenizer, model, f"<2sw> {line}", beams)


def finished(tokenizer: Any, model: Any, line: str, beams: int, **options: Any) -> str | None:
    inputs = tokenizer(line, return_tensors="pt", return_token_type_ids=False)
    (output,) = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=beams, do_sample=False, **options)
    text: str = tokenizer.decode(output, skip_special_tokens=True)
    return text.removeprefix("__sw__").strip() if tokenizer.eos_token_id in output[1:] else None


FAMILIES: dict[str, tuple[Callable[[Path], Path], Call]] = {
    "nllb": (save_nllb, nllb),
    "m2m": (save_m2m, m2m),
    "madlad": (save_madlad, madlad),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Call]:
    if request.param == "m2m":
        pytest.importorskip("sentencepiece")
    save, call = FAMILIES[request.param]
    return save(tmp_path_factory.mktemp("models") / request.param), call


def backend(folder: Path, batch_tokens: int = 200) -> Seq2SeqBackend:
    settings = TranslationSettings(
        "f", ["sw"], "o.jsonl", str(folder), max_new_tokens=NEW_TOKENS, batch_tokens=batch_tokens, device="cpu"
    )
    found = make_backend(settings)
    assert isinstance(found, Seq2SeqBackend)
    return found


def to(code: str, *contents: str) -> list[Text]:
    return [Text(content, language_of("en"), language_of(code)) for content in contents]


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_text_is_translated_as_the_model_card_does_it(family: tuple[Path, Call], attempt: int) -> None:
    folder, call = family
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        lines = [call(tokenizer, model, line, 1 if attempt == 1 else 4) for line in LINES]
    assert len(set(lines)) > 2
    replies = dict(backend(folder).translate(to("sw", *LINES), attempt, ()))
    assert replies == {index: Reply(None, CUT) if line is None else Reply(line) for index, line in enumerate(lines)}


def test_lines_stay_lines(family: tuple[Path, Call]) -> None:
    translator = backend(family[0])
    alone = {
        line: reply
        for line, (_, reply) in zip(LINES, sorted(translator.translate(to("sw", *LINES), 1, ())), strict=True)
    }
    good = [line for line in LINES if alone[line].translation is not None]
    bad = [line for line in LINES if alone[line].translation is None]
    assert good or bad
    if good:
        (whole,) = translator.translate(to("sw", f"{good[0]}\n\n  {good[-1]}"), 1, ())
        assert whole[1].translation == f"{alone[good[0]].translation}\n\n{alone[good[-1]].translation}".strip()
    if good and bad:
        (whole,) = translator.translate(to("sw", f"{good[0]}\n{bad[0]}"), 1, ())
        assert whole[1] == Reply(None, CUT)


def test_what_is_done_changes_no_other_batch(family: tuple[Path, Call]) -> None:
    translator = backend(family[0], 60)
    texts = to("sw", *LINES, "\n".join(LINES))
    every = dict(translator.translate(texts, 1, ()))
    assert every.keys() == set(range(len(texts)))
    assert dict(translator.translate(texts, 1, {0, 2, 4})) == {index: every[index] for index in (1, 3, 5)}
    assert dict(backend(family[0], 100_000).translate(texts, 1, ())) == every


def test_every_language_has_batches_of_its_own(family: tuple[Path, Call]) -> None:
    translator = backend(family[0])
    swahili, chinese = to("sw", *LINES), to("zh-Hans", *LINES)
    together = dict(translator.translate([*swahili, *chinese], 1, ()))
    apart = [dict(translator.translate(texts, 1, ())) for texts in (swahili, chinese)]
    assert together == {**apart[0], **{index + len(LINES): reply for index, reply in apart[1].items()}}
    assert apart[0] != apart[1]


def test_what_does_not_fit_is_not_cut(tmp_path: Path) -> None:
    translator = backend(save_nllb(tmp_path / "model"))
    replies = dict(translator.translate(to("sw", "Hi", "Hi\n" + "a" * 200), 1, ()))
    assert replies[1] == Reply(None, TOO_LONG)
    assert replies[0].failed != TOO_LONG


def test_a_language_that_the_model_does_not_know_is_one_line(tmp_path: Path) -> None:
    translator = backend(save_nllb(tmp_path / "model"))
    with pytest.raises(UserError, match=r"languages: this NLLB model does not know 'sr-Latn'"):
        list(translator.translate(to("sr-Latn", "Hi"), 1, ()))
