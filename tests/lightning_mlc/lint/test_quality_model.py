"""Scores of pairs, compared with plain calculations of one pair at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from quality_models import END, POSITIONS, START, counted, save_counting_model, save_quality_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_mlc.errors import UserError
from lightning_mlc.lint import model_batches
from lightning_mlc.lint.quality_model import QualityModel
from lightning_mlc.sources import ModelSource

PAIRS = [
    ("Where is the station?", "Kituo kiko wapi?"),
    ("Where?", "Wapi?"),
    ("Kituo kiko wapi?", "Where is the station?"),
    ("How do I keep a bicycle from rusting?", "Как зимой уберечь велосипед?"),
    ("half \ud83d", "nusu"),
]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Padding changes the order of sums in float32; scores of the random models are between 0.1 and 10."""


def load(folder: Path) -> QualityModel:
    return QualityModel.load(ModelSource(str(folder)), "cpu")


def by_hand(folder: Path, kind: str, source: str, translation: str) -> float:
    """The score of one pair without padding, from ids that are put together here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (
        tokenizer(text.encode(errors="replace").decode(), add_special_tokens=False)["input_ids"]
        for text in (source, translation)
    )
    parts = [[START, *first, END], [*([END] if kind == "xlm-roberta" else []), *second, END]]
    types = [0] * len(parts[0]) + [int(kind == "bert")] * len(parts[1])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([parts[0] + parts[1]]), token_type_ids=torch.tensor([types])).logits
    return float(logits.squeeze())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_scores_are_those_of_transformers(tmp_path: Path, kind: str, left: bool) -> None:
    folder = save_quality_model(tmp_path / "model", kind)
    if left:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    expected = torch.tensor([by_hand(folder, kind, *pair) for pair in PAIRS])
    assert expected.std() > 0.1  # otherwise a wrong order would not be seen
    torch.testing.assert_close(torch.tensor(load(folder).scores(PAIRS)), expected, **ROUNDING)


def test_the_batch_does_not_change_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save_quality_model(tmp_path / "model"))
    together = model.scores(PAIRS)
    alone = [model.scores([pair])[0] for pair in PAIRS]
    monkeypatch.setattr(model_batches, "BATCH_TOKENS", 120)
    in_parts = model.scores(PAIRS[::-1])[::-1]
    for found in (alone, in_parts):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(together), **ROUNDING)


def test_the_longer_text_of_a_long_pair_is_cut(tmp_path: Path) -> None:
    model = load(save_quality_model(tmp_path / "model"))
    kept = POSITIONS - 4 - len("Wapi?")
    long, cut = model.scores([("a" * kept + "b" * 300, "Wapi?"), ("a" * kept, "Wapi?")])
    assert long == pytest.approx(cut, rel=1e-6)
    assert cut != pytest.approx(model.scores([("a" * (kept - 1), "Wapi?")])[0], rel=1e-3)


def test_a_model_with_set_weights(tmp_path: Path) -> None:
    pairs = [("a" * source, "b" * translation) for source, translation in ((9, 9), (9, 12), (12, 9), (5, 90), (90, 5))]
    expected = [counted(*pair) for pair in pairs]
    assert expected[0] == pytest.approx(torch.tanh(torch.tensor(2.0).sqrt()).item())
    assert load(save_counting_model(tmp_path / "model")).scores(pairs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_labels": 3}, "has 3 labels, and a score is one label"),
        ({"architectures": None}, "names no class in its configuration and estimates no quality"),
        ({"architectures": ["XLMRobertaModel"]}, "is a XLMRobertaModel and estimates no quality"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = save_quality_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if (labels := changes.pop("num_labels", None)) is not None:
        changes["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        changes["label2id"] = {name: int(number) for number, name in changes["id2label"].items()}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as told:
        load(folder)
    assert said in str(told.value)
    assert "TransQuest/monotransquest-da-multilingual@refs/pr/2" in str(told.value)


def test_a_chat_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat")
    with pytest.raises(UserError, match="is a LlamaForCausalLM and estimates no quality"):
        load(folder)
    with pytest.raises(UserError, match="is a GGUF file, and those hold chat models"):
        load(tmp_path / "chat.gguf")


def test_a_tokenizer_that_joins_both_texts_is_refused(tmp_path: Path) -> None:
    """A reward model of the usual kind has one label, too, and would read source and translation as one text."""
    folder = save_quality_model(tmp_path / "model")
    chat = save_model(tmp_path / "chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat / name, folder / name)
    with pytest.raises(UserError, match="puts nothing between a source and its translation"):
        load(folder)


def test_incomplete_models_are_refused(tmp_path: Path) -> None:
    folder = save_quality_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("classifier.out_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, such as classifier\.out_proj\.weight"):
        load(folder)
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "classifier.out_proj.weight": lost}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        UserError, match=r"lacks its tokenizer: the one that was found has \d tokens, and the model 259"
    ):
        load(folder)
