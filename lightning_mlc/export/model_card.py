"""The ``README.md`` of an exported model: its training settings, its data and its validation results.

All of it comes from the checkpoint. It contains no text of the data. Local files and models appear without their paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.report.measured import Measured
from lightning_mlc.report.table import OVERALL, PER_LANGUAGE, SUMMARIES
from lightning_mlc.sources import ModelSource

RECIPE = {
    "objective": "objective",
    "consistency": "consistency terms",
    "reference": "reference",
    "lora": "adapters",
    "optimizer": "optimizer",
    "schedule": "learning-rate schedule",
    "gradient_clip_val": "gradient norm clipped to",
    "steps": "optimizer steps",
    "batch": "batch",
    "precision": "precision",
    "strategy": "strategy",
    "seed": "seed",
    "data": "data",
    "versions": "versions",
}
"""The entries of a recipe that the card shows, and their labels."""


def model_card(provenance: Provenance, measured: Measured | None, name: str, adapters: bool = False) -> str:
    """Write the card of a model in the Hugging Face format: YAML for machines, then Markdown.

    Args:
        provenance: The record of the checkpoint.
        measured: Validation results of the run. None: there are none.
        name: Name of the model: that of its repository or folder.
        adapters: Whether the export has adapters only.

    Returns:
        The text of ``README.md``.
    """
    recipe = provenance.recipe or {}
    languages = list((recipe.get("data") or {}).get("languages") or provenance.languages or [])
    parts = [
        f"---\n{_metadata(recipe, languages, adapters)}\n---",
        f"# {name}",
        _summary(provenance, recipe, languages),
        "## How to load it\n\n" + _loading(name, ModelSource(**provenance.source), adapters),
        "## Training\n\n" + _recipe({**recipe, "lora": provenance.lora}),
        "## Validation\n\n" + _validation(measured, languages),
        "Reward accuracy is how often the model prefers the good response to the bad one, given the prompt in that "
        "language. These figures describe the training. They do not show whether the model is safe: measure its "
        "safety in every language that its users speak."
        if measured and measured.get("latest")
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loading_call(name: str, source: ModelSource, adapters: bool) -> str:
    """Write the Python expression that loads an exported model.

    Args:
        name: Folder or repository of the export.
        source: The model that the training started from. Adapters load it too, with its options.
        adapters: Whether the export has adapters only.
    """
    loader = "peft.AutoPeftModelForCausalLM" if adapters else "AutoModelForCausalLM"
    options = [f'"{name}"', 'dtype="auto"']
    if adapters and source.gguf_name is not None:
        options.append(f'gguf_file="{source.gguf_name}"')
    if source.trust_remote_code:
        options.append("trust_remote_code=True")
    return f"{loader}.from_pretrained({', '.join(options)})"


def _metadata(recipe: Mapping[str, Any], languages: Sequence[str], adapters: bool) -> str:
    objective = recipe.get("objective")
    tags = ["lightning-mlc", "alignment", "multilingual", *([objective["name"].lower()] if objective else [])]
    data = ModelCardData(
        # The hub accepts languages without scripts and regions.
        language=list(dict.fromkeys(code.split("-")[0] for code in languages)) or None,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        base_model=recipe.get("base_model"),
        tags=tags,
    )
    text: str = data.to_yaml()
    return text


def _summary(provenance: Provenance, recipe: Mapping[str, Any], languages: Sequence[str]) -> str:
    base = f"`{ModelSource(**provenance.source).short_name}`"
    text = f"{base}, trained with lightning-mlc {provenance.version}"
    if languages:
        text += f". Source language (of the responses): {languages[0]}"
    if languages[1:]:
        use = "only measured, because no consistency term was on" if recipe.get("consistency") == {} else "of prompts"
        text += f"; other languages ({use}): {', '.join(languages[1:])}"
    return text + "."


def _loading(name: str, source: ModelSource, adapters: bool) -> str:
    imports = (
        "import peft\nfrom transformers import AutoTokenizer"
        if adapters
        else ("from transformers import AutoModelForCausalLM, AutoTokenizer")
    )
    return (
        f"```python\n{imports}\n\nmodel = {loading_call(name, source, adapters)}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    rows = [(label, _phrase(recipe[key])) for key, label in RECIPE.items() if recipe.get(key) not in (None, {})]
    if not rows:
        return "Unknown: the checkpoint was written by an earlier version."
    return _table(["", ""], rows)


def _phrase(value: Any) -> str:
    """Write ``value`` of a recipe in one line, such as ``DPO (beta 0.1, loss sigmoid)``."""
    if isinstance(value, Mapping):
        options = [f"{key} {_phrase(part)}" for key, part in value.items() if key != "name" and part is not None]
        text = ", ".join(options)
        return (f"{value['name']} ({text})" if text else str(value["name"])) if "name" in value else text
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_phrase(part) for part in value) + "]"
    return str(value)


def _validation(measured: Measured | None, languages: Sequence[str]) -> str:
    if measured is None or not (latest := measured.get("latest")):
        return "The run had no validation before this checkpoint."
    before, after = measured.get("before"), latest["results"]
    metrics = [metric for metric in PER_LANGUAGE if any(f"val/{metric}/{language}" in after for language in languages)]

    def cell(metric: str, form: str) -> str:
        values = [results.get(f"val/{metric}") for results in (before, after) if results]
        shown = ["-" if value is None else form.format(value) for value in values]
        return " → ".join(shown) if set(shown) != {"-"} else "-"

    rows = [
        [f"{row} (source)" if row == languages[0] else row]
        + [cell(f"{metric}/{row}", PER_LANGUAGE[metric][1]) for metric in metrics]
        for row in (*languages, *SUMMARIES)
    ]
    overall = [(label, cell(metric, "{:.4f}")) for metric, label in OVERALL.items() if f"val/{metric}" in after]
    when = f"After step {latest['step']}" + (", with the initial model before the arrow" if before else "") + "."
    return "\n\n".join(
        [when, _table(["language", *(PER_LANGUAGE[metric][0] for metric in metrics)], rows), _table(["", ""], overall)]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
