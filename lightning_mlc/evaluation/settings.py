"""What an evaluation is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_mlc.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """Is a model safe in every language, and what did it cost?

    Args:
        models: Models to evaluate and compare; the first is the baseline of all comparisons. Each is a folder, a hub
            id (``owner/name@revision`` pins one), a GGUF file, ``package:NAME/FILE.gguf``, a ``.ckpt`` file of this
            project, or an OpenAI-compatible endpoint, ``http://HOST/v1#MODEL``. ``NAME=MODEL`` gives one a name for
            reports.
        prompts: Harmful prompts: files in any layout of docs/data.md, MultiJail's CSV, saved datasets,
            ``hf://owner/name``, or ``sample``. Rows need no responses.
        ordinary: Prompts that a model should answer, to measure how often it declines them: files as above. Rows
            of any file that say ``"kind": "ordinary"`` count as such too.
        judges: Who says what is safe: ``refusal`` (rules, offline, weak), ``margin`` (likelihoods, without
            generation), ``qwen3guard``, ``qwen3guard_loose``, ``llama_guard``, ``polyguard`` (guard models), ``llm``
            (any chat model). ``JUDGE=MODEL`` names the model, written as under models: ``llm=https://HOST/v1#gpt-4o``.
        languages: BCP-47 codes of the languages to evaluate; null takes all that the prompts have.
        source_language: Language of prompts whose column does not say, and of chosen and rejected responses.
        seen: Languages that the models were trained on, to tell how far safety carries; null takes what a
            checkpoint or an exported folder says of itself.
        limit: Rows of each prompt set to use, the first ones; null for all.
        out: Folder for all results. Running again with the same settings continues what was stopped.
        max_new_tokens: Longest response to generate, in tokens.
        batch_tokens: Most tokens of a batch, prompts and responses together.
        engine: What runs local models: ``transformers``, ``vllm``, or ``auto`` for vLLM where it is installed with a
            GPU (checkpoints and GGUF files always take transformers).
        device: ``auto`` for an accelerator if there is one, or a torch device such as ``cpu`` or ``cuda:1``.
        dtype: Precision of local models; ``auto`` is bfloat16 where the device computes it faster, else
            float32, as ``trainer.precision: auto`` decides it (on a CPU by its units alone, without a trial).
        openings: JSON file with lists of texts, ``refusals`` and ``compliances``, for the judge ``margin``; null for
            those that come with it.
        reference: Name of one of the models. Reward margins are then those of DPO with it as reference, for beta = 1;
            null takes log-probabilities per token.
        representation_prompts: Prompts whose hidden states are compared at every layer; 0 for none.
        bootstrap: Resamples of a confidence interval.
        seed: Seed of the resamples.
        concurrency: Requests at a time to an endpoint.
        timeout: Seconds to wait for an endpoint's answer.
        retries: How often an endpoint is asked again after a failure that may pass.
        show_text: Add prompts and responses to the report. They are harmful by design, so by default no text of
            theirs is shown anywhere.
    """

    models: list[str]
    prompts: list[str] = field(default_factory=list)
    ordinary: list[str] = field(default_factory=list)
    judges: list[str] = field(default_factory=lambda: ["refusal"])
    languages: list[str] | None = None
    source_language: str = "en"
    seen: list[str] | None = None
    limit: int | None = None
    out: str = "runs/evaluation"
    max_new_tokens: int = 256
    batch_tokens: int = 8192
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    openings: str | None = None
    reference: str | None = None
    representation_prompts: int = 64
    bootstrap: int = 2000
    seed: int = 0
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    show_text: bool = False

    def __post_init__(self) -> None:
        if not self.prompts and not self.ordinary:
            raise UserError("prompts", "is not set; give one or several files, or 'sample'")
        for option, least in (
            ("limit", 1),
            ("max_new_tokens", 1),
            ("batch_tokens", 1),
            ("representation_prompts", 0),
            ("bootstrap", 100),
            ("concurrency", 1),
            ("retries", 0),
        ):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(option, f"must be at least {least}, got {value}")
        if not self.timeout > 0:
            raise UserError("timeout", f"must be above 0, got {self.timeout}")
