"""Chat templates that users name, and base models that become usable with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_mlc.checkpoints.finding import find_checkpoint
from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.cli import main
from lightning_mlc.data.templates import ChatTemplate
from lightning_mlc.errors import UserError
from lightning_mlc.sources import CHAT_TEMPLATES, ModelSource, load_tokenizer, set_chat_template
from tests.conftest import save_model, write_jsonl

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "plain": "<s>System:\nBe kind.\n\nUser:\nHello\n\nAssistant:\nHi.</s>\nUser:\nBye\n\nAssistant:\n",
}
"""The published forms: of OpenAI's ChatML, Gemma's and Llama 3's model cards; ``plain`` is our own."""

ONE_TURN = {
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n",
    "gemma": "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>",
    "plain": "<s>User:\nHello\n\nAssistant:\nHi.</s>\n",
}
"""Without the system message, and without a generation header."""


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A model whose tokenizer has no chat template."""
    return save_model(tmp_path / "base", template=None)


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_named_templates(name: str, base_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"])
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    set_chat_template(tokenizer, name)
    assert ChatTemplate(tokenizer).render([MESSAGES], header=True) == [RENDERED[name]]
    assert ChatTemplate(tokenizer).render([MESSAGES[1:3]], header=False) == [ONE_TURN[name]]


def test_templates_that_cannot_be_used(base_model: Path, tmp_path: Path) -> None:
    cases = {
        "gemma": r"gemma needs the token <start_of_turn>, which the tokenizer of .* does not have; take plain",
        str(tmp_path / "none.jinja"): r"cannot read .*none\.jinja \(No such file or directory\); give a Jinja file, or",
        str(tmp_path): r"cannot read .* \(Is a directory\)",
        "chat-ml": r"cannot read chat-ml .*; give a Jinja file, or one of chatml, gemma, llama3, plain",
    }
    (tmp_path / "latin.jinja").write_bytes(b"\xe9{{ messages }}")
    cases[str(tmp_path / "latin.jinja")] = "it is not UTF-8"
    for option, message in cases.items():
        with pytest.raises(UserError, match=f"^model.chat_template: .*{message}"):
            load_tokenizer(ModelSource(str(base_model), chat_template=option))


def test_a_template_with_an_error_is_refused_before_training(
    base_model: Path, tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}")
    assert main(fit_of(base_model, template, pairs_file, tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.chat_template: ")
    assert "endfor" in error
    assert not (tmp_path / "run").exists()


def fit_of(model: Path, template: Path | str, data: Path, out: Path) -> list[str]:
    return [
        "fit",
        f"--model.name_or_path={model}",
        f"--model.chat_template={template}",
        f"--data.train_path={data}",
        f"--out={out}",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--model.objective=SFT",
    ]


def test_a_base_model_is_trained_exported_and_evaluated(base_model: Path, tmp_path: Path, pairs_file: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    assert main(fit_of(base_model, file, pairs_file, tmp_path / "run")) == 0
    checkpoint = find_checkpoint(tmp_path / "run")
    text = file.read_text()
    file.unlink()  # what follows works on a machine that does not have it
    assert Provenance.read(read_checkpoint(checkpoint)).source["chat_template"] == text
    assert main(["export", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'model'}"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == text

    prompts = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": {"en": "bag", "zh": "bed"}}])
    models = ["--models", f"base={base_model}", f"run={checkpoint}", f"export={tmp_path / 'model'}"]
    options = [f"--prompts={prompts}", "--max_new_tokens=2", "--device=cpu", f"--out={tmp_path / 'evaluation'}"]
    assert main(["evaluate", *models, *options, "--chat_template=plain"]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "run", "export"]
