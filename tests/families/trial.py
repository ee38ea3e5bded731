"""Train one family with the product for two optimizer steps, and repeat this with the plain reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, write_jsonl
from families import plain
from families.architectures import Family, Part
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows
from lightning_mlc.export.folder import export
from lightning_mlc.models.lora import LoRA
from lightning_mlc.models.policy import RowOutputs
from lightning_mlc.objectives import DPO
from lightning_mlc.training.module import AlignmentModule

WEIGHT = 2.0
"""Weight of the MLC loss, large enough that it makes up a large part of the gradient."""
TOLERANCE = 1e-4
"""Largest accepted difference of losses, states, log-probabilities and gradients from the plain reference, as a share.

Float32 rounds by 2 ** -24 = 6e-8. A tiny model adds up a few hundred such errors in a different order than the
reference. The MLC loss divides the errors of nearly parallel states by their differences, which are a hundredth of
their size. By contrast, a wrong layer, a wrongly visible token or a shifted position changes gradients by a twentieth
or more.
"""
ADAPTED = 1e-5
"""The same for logits of a model with merged adapters: each weight is rounded to float32 once more."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""The names of the adapters' factors in ``peft``."""
LANGUAGES = ("en", "sw", "zh")
ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": {"en": "May I take the red bag?", "sw": "Naweza kuchukua mfuko?", "zh": "我能拿包吗?"},
        "chosen": "No, it is not yours.",
        "rejected": "Yes.",
    },
    {
        "id": "b",
        "prompt": {"en": "And hers?", "sw": "Na wake?"},
        "chosen": "No.",
        "rejected": "Sure, take what you like.",
    },
    {
        "id": "c",
        "prompt": {"en": "Whose keys are these?", "sw": "Funguo hizi ni za nani?", "zh": "这是谁的?"},
        "chosen": "I do not know.",
        "rejected": "Mine!",
    },
    {
        "id": "d",
        "prompt": {"en": "So I keep them, then, and the car as well?", "zh": "那我留着?"},
        "chosen": "Ask.",
        "rejected": "Why not?",
    },
]
"""Examples of different lengths, some without all languages. All fit into two steps, in any order."""


def make_model(family: Family, folder: Path) -> Path:
    """Save a random model of ``family`` in ``folder``, with its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = family.config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and norms start at 0 and 1, and with these values a forgotten one would not show.
            if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@dataclass(frozen=True)
class Settings:
    """A trained part, and the way it is trained."""

    consistency: Consistency
    packing: bool | None
    lora: LoRA | None = None


SETTINGS: dict[Part, Settings] = {
    "weights": Settings(Consistency(mlc=MLC(weight=WEIGHT), extractor="linear", extractor_dim=16), None),
    "middle": Settings(Consistency(mlc=MLC(weight=WEIGHT), extractor="none", layer=0.5), False),
    "adapters": Settings(
        Consistency(mlc=MLC(weight=WEIGHT), extractor="frozen", extractor_dim=16, layer=0.5), None, LoRA(r=4, alpha=8)
    ),
}
"""Cases that cover packing and padding, the last and a middle layer, every extractor, whole weights and adapters."""


class Recorder(AlignmentModule):
    """Records the last step: its examples, weights, outputs and gradients."""

    ids: tuple[str, ...]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    extractor: dict[str, Tensor]
    outputs: list[tuple[TokenRows, RowOutputs]]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        assert self.policy is not None
        assert self.representation is not None
        if batch_idx == 0:
            self.policy.register_forward_hook(self._keep)
        self.ids, self.outputs = batch.ids, []
        self.weights = {name: value.detach().clone() for name, value in self.policy.model.named_parameters()}
        self.extractor = {
            name: value.detach().clone() for name, value in self.representation.extractor.named_parameters()
        }

    def _keep(self, policy: nn.Module, inputs: tuple[Any, ...], output: RowOutputs) -> None:
        if torch.is_grad_enabled():  # otherwise this is the reference, which is the model without adapters
            self.outputs.append((inputs[0], output))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        assert self.policy is not None
        assert self.representation is not None
        named = [*self.policy.model.named_parameters()]
        named += [(f"extractor.{name}", value) for name, value in self.representation.extractor.named_parameters()]
        self.gradients = {name: value.grad.clone() for name, value in named if value.grad is not None}


def train(folder: Path, settings: Settings) -> Recorder:
    """Take two steps of the product on two examples each. The first moves the weights enough to affect the second."""
    torch.manual_seed(0)
    module = Recorder(
        str(folder),
        DPO(beta=plain.BETA),
        settings.consistency,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2),
        lora=settings.lora,
        packing=settings.packing,
    )
    data = MultilingualData(str(folder / "rows.jsonl"), val_share=0.0, batch_size=2, name_or_path=str(folder))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return module


def reference_step(folder: Path, module: Recorder, layer: int, dtype: torch.dtype) -> plain.Step:
    """Take the same step with the plain reference, from the weights that the product had before it.

    ``layer`` is an index into the model's ``hidden_states``.
    """
    tokenizer = byte_tokenizer()
    model, initial = plain.load(folder, dtype), plain.load(folder, dtype)
    adapters = find_adapters(module, model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in adapters:
                value.add_(adapters[name].added())
            elif not adapters:
                value.copy_(module.weights[name])
    examples = []
    for row in (next(row for row in ROWS if row["id"] == name) for name in module.ids):
        prompts = row["prompt"]
        responses = (plain.tokens_of(tokenizer, prompts["en"], row[key]) for key in ("chosen", "rejected"))
        translations = tuple(plain.tokens_of(tokenizer, text) for name, text in prompts.items() if name != "en")
        examples.append(plain.Example(*responses, translations))
    found = plain.step(model, initial, examples, layer, WEIGHT, module.extractor or None)
    gradients = found.gradients
    for name, adapter in adapters.items():
        zero = torch.zeros_like(model.get_parameter(name))
        down, up = adapter.gradients(gradients.get(name, zero))
        gradients |= {f"{name} down": down, f"{name} up": up}
    return found


def find_adapters(module: Recorder, model: PreTrainedModel) -> dict[str, plain.Adapter]:
    """Return the adapters of the last step, by the name of the weight that they change."""
    if module.lora is None:
        return {}
    found = {}
    dtype = next(model.parameters()).dtype
    for name, down in module.weights.items():
        if not name.endswith(DOWN):
            continue
        weight = adapted_weight(module, name.removesuffix(DOWN))
        layer = model.get_submodule(weight.rpartition(".")[0])
        parameter = model.get_parameter(weight)
        experts = parameter.shape[0] if parameter.dim() == 3 else 1
        transposed = isinstance(layer, Conv1D) or (experts > 1 and getattr(layer, "is_transposed", False))
        up = module.weights[name.removesuffix(DOWN) + UP]
        scale = module.lora.alpha / module.lora.r
        found[weight] = plain.Adapter(down.to(dtype), up.to(dtype), scale, transposed, experts)
    return found


def adapted_weight(module: Recorder, layer: str) -> str:
    """Return the plain model's name for the weight that the adapters in ``layer`` of ``peft``'s model change."""
    assert module.policy is not None
    # If several parameters of a module have adapters, their wrappers are nested.
    parameter = getattr(module.policy.model.get_submodule(layer), "parameter_name", "weight")
    return f"{layer.removeprefix('base_model.model.').replace('.base_layer', '')}.{parameter}"


def adapter_gradients(module: Recorder) -> dict[str, Tensor]:
    """Return the product's gradients under the names that :func:`reference_step` uses."""
    renamed = {}
    for name, value in module.gradients.items():
        for ours, theirs in ((DOWN, "down"), (UP, "up")):
            if name.endswith(ours):
                renamed[f"{adapted_weight(module, name.removesuffix(ours))} {theirs}"] = value
    return renamed


def compare(module: Recorder, found: plain.Step) -> dict[str, float]:
    """Return relative differences, by compared quantity."""
    metrics = module.trainer.callback_metrics

    def off(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
        difference = (ours.detach().to(theirs.dtype) - theirs.detach()).norm()
        return float(difference / theirs.detach().norm().clamp(min=max(least, 1e-12)))

    differences = {
        "objective": off(metrics["train/objective/loss"], found.objective),
        "consistency": off(metrics["train/mlc/loss"], found.consistency),
        "states": 0.0,
        "logps": 0.0,
    }
    texts = {row["id"]: row for row in ROWS}
    tokenizer = byte_tokenizer()
    compared = 0
    for rows, output in module.outputs:
        for index in range(len(rows)):
            row, kind = texts[module.ids[int(rows.example[index])]], int(rows.kind[index])
            key = {CHOSEN: "chosen", REJECTED: "rejected", NO_RESPONSE: None}[kind]
            prompt = row["prompt"][LANGUAGES[int(rows.language[index])]]
            theirs = found.found[plain.tokens_of(tokenizer, prompt, "" if key is None else row[key])]
            assert output.states is not None
            differences["states"] = max(differences["states"], off(output.states[index], theirs.state))
            if key is not None:
                differences["logps"] = max(differences["logps"], off(output.logps[index], theirs.logp))
            compared += 1
    assert compared == len(found.found)
    ours = module.gradients if module.lora is None else adapter_gradients(module)
    theirs = found.gradients
    if module.lora is not None:
        # Some layers use a weight without calling its module. Adapters there never run, and their effect stays 0.
        theirs = {name: value for name, value in theirs.items() if name in ours}
        assert theirs.keys() == ours.keys()
    total = float(torch.stack([value.norm() for value in theirs.values()]).norm())
    names = ours.keys() | theirs.keys()
    zero = torch.zeros(())
    # If a parameter's gradient is almost 0, only the rounding errors of larger ones remain.
    parts = {name: off(ours.get(name, zero), theirs.get(name, zero.to(torch.float64)), 0.01 * total) for name in names}
    worst = max(parts, key=lambda name: parts[name])
    differences[f"gradients ({worst})"] = parts[worst]
    assert total > 0
    return differences


def exported_agrees(folder: Path, module: Recorder) -> float:
    """Return the relative difference of logits between the exported, reloaded model and the trained model."""
    assert module.policy is not None
    module.trainer.save_checkpoint(folder / "last.ckpt")
    out = export(folder / "last.ckpt", folder / "exported").folder
    ids = torch.tensor([byte_tokenizer()("<|user|>May I take the red bag?<|end|>\n<|assistant|>")["input_ids"]])
    module.policy.eval()
    with torch.no_grad():
        trained = module.policy.model(input_ids=ids, use_cache=False).logits
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    return float((loaded - trained).norm() / trained.norm())


def trial(family: Family, part: Part, folder: Path) -> dict[str, Any]:
    """Train, compare, export and compare again. Returns figures for the table of families and for the assertions."""
    settings = SETTINGS[part]
    make_model(family, folder)
    module = train(folder, settings)
    assert module.policy is not None
    depth = int(module.policy.causal_lm.config.get_text_config().num_hidden_layers)
    layer = -1 if settings.consistency.layer == -1 else round(depth / 2) - family.states_from
    try:
        found = reference_step(folder, module, layer, torch.float64)
    except RuntimeError:  # some families use float32 in part
        found = reference_step(folder, module, layer, torch.float32)
    differences = compare(module, found)
    result: dict[str, Any] = {
        "packed": any(rows.packing is not None for rows, _ in module.outputs),
        "reference": str(found.objective.dtype).removeprefix("torch."),
        "differences": differences,
    }
    if settings.lora is not None:
        adapted = {name.rpartition(" ")[0].removesuffix(".weight") for name in adapter_gradients(module)}
        result["adapted"] = sorted({name.rpartition(".")[2] for name in adapted})
    if part != "middle":
        result["export"] = exported_agrees(folder, module)
    return result


def write_result(folder: Path, family: Family, part: Part, result: dict[str, Any]) -> None:
    """Save ``result`` in ``folder`` for :mod:`families.table`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{family.name}.{part}.json".replace("/", "-")
    (folder / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
