"""Exports: exactly the weights of the checkpoint, in a complete folder or none, with a card."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import TEMPLATE, byte_tokenizer, example_rows, save_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.checkpoints.restore import restore
from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.consistency import Consistency
from lightning_mlc.export.model_card import loading_call
from lightning_mlc.objectives import CPO, DPO, KTO, ORPO, SFT, SimPO, Sum
from lightning_mlc.sources import ModelSource
from lightning_mlc.training.recipe import describe_consistency, describe_objective

POLICY = "policy.model."


def fit(folder: Path, model: Path, *more: str, rows: list[Any] | None = None) -> Path:
    """The folder of a run of two steps."""
    data = write_jsonl(folder / "pairs.jsonl", rows or example_rows(12))
    options = {
        "out": folder / "run",
        "model.name_or_path": model,
        "data.train_path": data,
        "data.val_share": 0.25,
        "data.batch_size": 3,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-2,
    }
    run(["fit", *(f"--{key}={value}" for key, value in options.items()), *more])
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder, save_model(folder / "secret-place" / "tiny"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    return fit(folder, save_model(folder / "tiny"), "--model.lora.r=4", "--model.lora.alpha=8")


def export(ckpt: Path, out: Path, *more: str) -> int:
    return main(["export", f"--ckpt_path={ckpt}", f"--out={out}", *more])


def stored(ckpt: Path) -> dict[str, Tensor]:
    """The policy's weights in a checkpoint, read with PyTorch only."""
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    return {key.removeprefix(POLICY): value for key, value in state.items() if key.startswith(POLICY)}


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


# ---- weights -------------------------------------------------------------------------------------------------------


def test_the_file_has_the_weights_of_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    assert export(last(whole), tmp_path / "model") == 0
    written, expected = load_file(tmp_path / "model" / "model.safetensors"), stored(last(whole))
    assert expected.keys() - written.keys() == {"lm_head.weight"}  # it is the embedding
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_adapters_alone_are_those_of_the_checkpoint(adapted: Path, tmp_path: Path) -> None:
    assert export(last(adapted), tmp_path / "model", "--adapters") == 0
    written = load_file(tmp_path / "model" / "adapter_model.safetensors")
    expected = {key.replace(".default", ""): value for key, value in stored(last(adapted)).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_merged_weights_are_the_base_and_the_product_of_the_adapters(adapted: Path, tmp_path: Path) -> None:
    assert export(last(adapted), tmp_path / "model") == 0
    merged = load_file(tmp_path / "model" / "model.safetensors")
    base = load_file(adapted.parent / "tiny" / "model.safetensors")
    lora = stored(last(adapted))
    changed = 0
    for name, value in base.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.default.weight" in lora:
            up, down = lora[f"{place}.lora_B.default.weight"], lora[f"{place}.lora_A.default.weight"]
            value = value + (up @ down) * (8 / 4)
            changed += 1
        assert torch.equal(merged[name], value), name
    assert changed == 3 * 7


@pytest.mark.parametrize("adapters", [False, True])
def test_the_line_told_in_the_end_loads_the_model(
    adapted: Path, tmp_path: Path, adapters: bool, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    import peft

    assert export(last(adapted), tmp_path / "model", *(["--adapters"] if adapters else [])) == 0
    told = capsys.readouterr().out.strip()
    assert told.startswith(f"wrote {tmp_path / 'model'}: load it with ")
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning | UserWarning)]
    call = told.split("load it with ")[1]
    model = eval(call, {"peft": peft, "AutoModelForCausalLM": AutoModelForCausalLM}).eval()  # as a user would
    trained = restore(read_checkpoint(last(adapted)), merge=False).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, right = model(ids).logits, trained(ids).logits
        base = trained.get_base_model()
        with trained.disable_adapter():
            assert not torch.allclose(base(ids).logits, right, atol=0.01)  # something could be lost
    assert torch.equal(found, right) if adapters else torch.allclose(found, right, atol=1e-5)
    assert call.split("(")[0].split(".")[-1] in (tmp_path / "model" / "README.md").read_text()


def test_adapters_say_all_that_names_their_base(tmp_path: Path) -> None:
    """Otherwise they would be used with another revision, or with weights that were never rounded."""
    pytest.importorskip("peft")
    run_folder = fit(tmp_path, save_model(tmp_path / "tiny"), "--model.lora.r=4", "--model.revision=v1.2")
    assert export(last(run_folder), tmp_path / "model", "--adapters") == 0
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["revision"] == "v1.2"
    for source in (ModelSource("a/b", gguf_file="c.gguf"), ModelSource("/secret/c.gguf")):
        expected = 'peft.AutoPeftModelForCausalLM.from_pretrained("out", dtype="auto", gguf_file="c.gguf")'
        assert loading_call("out", source, adapters=True) == expected
        assert "gguf" not in loading_call("out", source, adapters=False)


def test_files_are_for_whom_the_umask_says(whole: Path, tmp_path: Path) -> None:
    byte_tokenizer({"default": TEMPLATE, "other": TEMPLATE}).save_pretrained(tmp_path / "text")  # contains a folder
    before = os.umask(0o027)
    try:
        assert export(last(whole), tmp_path / "model", f"--tokenizer={tmp_path / 'text'}") == 0
    finally:
        os.umask(before)
    written = [tmp_path / "model", *(tmp_path / "model").rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {path.name: 0o750 if path.is_dir() else 0o640 for path in written}
    assert {"model.safetensors", "additional_chat_templates"} <= modes.keys()


def test_large_models_are_written_as_several_files(whole: Path, tmp_path: Path) -> None:
    assert export(last(whole), tmp_path / "model", "--max_shard_size=40KB") == 0
    files = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 2
    # A weight is never split, and the largest is below the limit.
    assert all(file.stat().st_size < 42_000 for file in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in stored(last(whole)).items())


CONFIGURATION = """
from transformers import LlamaConfig


class TimesConfig(LlamaConfig):
    model_type = "times"

    def __init__(self, times=1.0, **rest):
        self.times = times
        super().__init__(**rest)
"""
MODELLING = """
from transformers import LlamaForCausalLM

from .configuration_times import TimesConfig


class TimesForCausalLM(LlamaForCausalLM):
    config_class = TimesConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda *call: call[-1] * config.times)
"""


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_with_code_of_its_own_takes_it_along(tmp_path: Path, lora: bool) -> None:
    """Llama would compute something else with these weights."""
    folder = save_model(tmp_path / "tiny")
    (folder / "configuration_times.py").write_text(CONFIGURATION)
    (folder / "modeling_times.py").write_text(MODELLING)
    config = json.loads((folder / "config.json").read_text())
    places = {
        "AutoConfig": "configuration_times.TimesConfig",
        "AutoModelForCausalLM": "modeling_times.TimesForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "times", "times": 3.0, "auto_map": places}))
    run_folder = fit(tmp_path, folder, "--model.trust_remote_code=true", *(["--model.lora.r=4"] if lora else []))
    assert export(last(run_folder), tmp_path / "model", "--trust_remote_code") == 0
    shutil.rmtree(folder)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", trust_remote_code=True)
    assert type(exported).__name__ == "TimesForCausalLM"
    assert exported.config.times == 3.0
    if not lora:
        assert all(torch.equal(value, exported.state_dict()[name]) for name, value in stored(last(run_folder)).items())
    assert "trust_remote_code=True" in (tmp_path / "model" / "README.md").read_text()


# ---- which checkpoint ----------------------------------------------------------------------------------------------


def test_a_run_that_died_exports_its_newest_whole_checkpoint(whole: Path, tmp_path: Path) -> None:
    died = tmp_path / "died"
    (died / "checkpoints").mkdir(parents=True)
    shutil.copy(last(whole).resolve(), died / "checkpoints" / "step=1.ckpt")
    content = last(whole).read_bytes()
    half = died / "checkpoints" / "step=2.ckpt"
    half.write_bytes(content[: len(content) // 2])
    (died / "checkpoints" / ".step=2.ckpt.1-0.unfinished").write_bytes(content)
    (died / "checkpoints" / "last.ckpt").symlink_to("step=9.ckpt")  # which is gone
    for place in (died, died / "checkpoints"):
        assert export(place, tmp_path / f"of-{place.name}") == 0
        written = load_file(tmp_path / f"of-{place.name}" / "model.safetensors")
        assert torch.equal(written["model.norm.weight"], stored(last(whole))["model.norm.weight"])


def test_a_run_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert export(tmp_path / "run", tmp_path / "model") == 2
    told = capsys.readouterr().err
    assert "there is no complete checkpoint in" in told
    assert "; give a .ckpt file, or the folder of a run" in told
    assert export(Path("last"), tmp_path / "model") == 2
    assert "last does not say which run" in capsys.readouterr().err


# ---- whole or not there --------------------------------------------------------------------------------------------


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can exceed 60 kB, so the weights cannot be written, but the files before them can.

    The limit is lifted as soon as possible, because pytest's own output may go to a larger file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_is_left(
    whole: Path, tmp_path: Path, exists: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if exists:
        (tmp_path / "model").mkdir()
    with small_disk():
        status = export(last(whole), tmp_path / "model")
    assert status == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: --out: cannot write {tmp_path / 'model'} (")
    assert [path.name for path in tmp_path.rglob("*")] == (["model"] if exists else [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_shard_size=much"], "--max_shard_size: cannot read 'much'"),
        (["--max_shard_size=1GB", "--adapters"], "--max_shard_size: adapters are one file"),
        (["--push_to_hub=a/b/c"], "--push_to_hub: 'a/b/c' is not the name of a repository"),
        (["--adapters"], "--adapters: the checkpoint has no adapters"),
        (["--tokenizer=/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_refusals(
    whole: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(last(whole), tmp_path / "model", *more) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert message in told[0]
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_takes_long(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = last(whole), tmp_path / "model"
    assert export(path, out) == 0
    said = capsys.readouterr().err.splitlines()
    own = [line for line in said if line.split(" ")[0] in ("reading", "writing", "comparing")]
    assert own == [
        f"reading {path}: {path.resolve().stat().st_size / 1000:.0f} kB",
        f"writing {out}",
        "comparing what was written with the model that was trained",
    ]


# ---- the card ------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_done(whole: Path, tmp_path: Path) -> None:
    assert export(last(whole), tmp_path / "model") == 0
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["language"] == ["en", "sw", "zh"]
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata  # a folder, which the hub does not know
    assert {"multilingual", "dpo"} <= set(metadata["tags"])
    assert "| objective | DPO (beta 0.1, loss sigmoid, label_smoothing 0.0, rpo_alpha 0.0) |" in body
    assert (
        "| consistency terms | mlc weight 0.8, rows all, temperature 0.2, scale top, layer -1, extractor linear" in body
    )
    assert "| optimizer | AdamW (lr 0.01," in body
    assert "| optimizer steps | 2 |" in body
    assert "| batch | batch_size 3, accumulate 1, processes 1 |" in body
    assert "pairs.jsonl" in body
    results = json.loads((whole / "report" / "summary.json").read_text())
    for language in ("en", "sw", "zh"):
        values = [results[when][f"val/rewards/accuracies/{language}"] for when in ("before", "after")]
        row = next(row for row in body.splitlines() if row.startswith(f"| {language}"))
        assert f"| {values[0]:.0%} → {values[1]:.0%} |" in row
    variance = [results[when]["val/mlc/raw/explained_variance"] for when in ("before", "after")]
    assert f"| explained variance, hidden states | {variance[0]:.4f} → {variance[1]:.4f} |" in body
    assert "After step 2" in body


def test_an_export_has_no_texts_and_no_paths(whole: Path, tmp_path: Path) -> None:
    assert export(last(whole), tmp_path / "model", "--tokenizer", str(whole.parent / "secret-place" / "tiny")) == 0
    words = {response for row in example_rows(12) for response in (row["chosen"], row["rejected"])}
    for path in (tmp_path / "model").iterdir():
        if path.suffix != ".safetensors":
            content = path.read_text(encoding="utf-8")
            assert str(whole.parent) not in content, path.name
            assert "secret-place" not in content, path.name
            assert not any(word in content for word in words), path.name
    assert json.loads((tmp_path / "model" / "lightning_mlc.json").read_text())["source"]["name_or_path"] == "tiny"


def test_the_fingerprint_is_of_the_data(whole: Path, adapted: Path, tmp_path: Path) -> None:
    def fingerprint(run: Path) -> str:
        return str(read_checkpoint(last(run))["lightning_mlc"]["recipe"]["data"]["fingerprint"])

    assert fingerprint(whole) == fingerprint(adapted)  # the same rows in another file of the same name
    rows = example_rows(12)
    rows[3]["chosen"] += "!"
    other = fit(tmp_path, whole.parent / "secret-place" / "tiny", rows=rows)
    assert fingerprint(other) != fingerprint(whole)


def test_every_objective_describes_its_options() -> None:
    for kind in (DPO, KTO, ORPO, SFT, CPO, SimPO):
        assert describe_objective(kind())["name"] == kind.__name__
    assert describe_objective(Sum([DPO(beta=0.3), SFT()], [1.0, 0.5])) == {
        "name": "Sum",
        "objectives": [
            {"name": "DPO", "beta": 0.3, "loss": "sigmoid", "label_smoothing": 0.0, "rpo_alpha": 0.0},
            {"name": "SFT"},
        ],
        "weights": [1.0, 0.5],
    }
    assert describe_consistency(Consistency())["mlc"] == {
        "weight": 0.8,
        "temperature": 0.2,
        "scale": "top",
        "rows": "all",
    }


def test_what_is_switched_off_is_in_the_card(whole: Path, tmp_path: Path) -> None:
    """Unless it is always recorded: most switches are those of an optimizer."""
    options = ["--model.optimizer.fused=false", "--model.optimizer.maximize=true", "--model.optimizer.amsgrad=false"]
    options += [
        "--model.consistency.center=false",
        "--model.consistency.extractor_bias=false",
        "--trainer.gradient_clip_val=0",
    ]
    run_folder = fit(tmp_path, whole.parent / "secret-place" / "tiny", *options)
    assert export(last(run_folder), tmp_path / "model") == 0
    rows = (tmp_path / "model" / "README.md").read_text(encoding="utf-8").splitlines()
    optimizer = next(row for row in rows if row.startswith("| optimizer |"))
    assert "fused False" in optimizer
    assert "maximize True" in optimizer
    assert "amsgrad" not in optimizer
    terms = next(row for row in rows if row.startswith("| consistency terms |"))
    assert "center False" in terms
    assert "extractor_bias False" in terms
    assert "| gradient norm clipped to | 0 |" in rows or "| gradient norm clipped to | 0.0 |" in rows


# ---- the hub -------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files needs."""

    def do_POST(self) -> None:
        received: dict[str, Any] = self.server.received  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = 200
        if self.path == "/api/repos/create":
            received["create"] = json.loads(body)
            answer: Any = {"url": f"{huggingface_hub.constants.ENDPOINT}/me/model", "id": "1", "name": "me/model"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        elif received.get("refuses"):  # the commit
            status, answer = 403, {"error": "no right to write"}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            received["files"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            answer = {
                "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/model/commit/1",
                "commitOid": "1",
                "success": True,
            }
        self.answer(status, answer)

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/model", "siblings": [], "sha": "1"})

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Everything that a hub on this machine received."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.received = {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield server.received  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_push_to_a_private_repository(whole: Path, tmp_path: Path, hub: dict[str, Any]) -> None:
    assert export(last(whole), tmp_path / "model", "--push_to_hub=me/model") == 0
    assert hub["create"]["name"] == "model"
    assert hub["create"].get("organization") == "me"
    assert hub["create"].get("private") is True or hub["create"].get("visibility") == "private"
    assert hub["files"] == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert 'from_pretrained("me/model"' in hub["files"]["README.md"].decode()


def test_a_hub_that_refuses(
    whole: Path, tmp_path: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hub["refuses"] = True
    assert export(last(whole), tmp_path / "model", "--push_to_hub=me/model") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --push_to_hub: cannot push to me/model (")
    assert f"{tmp_path / 'model'} is complete" in told
    assert f"`hf upload me/model {tmp_path / 'model'} --private`" in told  # creates no public repository either
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_push_without_a_login(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert export(last(whole), tmp_path / "model", "--push_to_hub=me/model") == 2
    assert "--push_to_hub: not logged in" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_adapters_of_a_local_model_are_not_pushed(
    adapted: Path, tmp_path: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(last(adapted), tmp_path / "model", "--adapters", "--push_to_hub=me/model") == 2
    assert "adapters need their base model" in capsys.readouterr().err
    assert hub == {}
    assert not os.path.exists(tmp_path / "model")


def test_generation_ends_where_responses_were_trained_to_end(tmp_path: Path) -> None:
    """The chat template determines it, whatever the tokenizer calls EOS."""
    model = save_model(tmp_path / "tiny", template=TEMPLATE.replace("<|end|>", "<|system|>"))
    assert export(last(fit(tmp_path, model)), tmp_path / "out") == 0
    ends = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<|end|>", "<|system|>"])
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == sorted(ends)
