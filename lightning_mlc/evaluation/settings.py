"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_mlc.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """How safe is a model in every language, and how useful does it stay?

    Args:
        models: Models to evaluate and compare. The first is the baseline of all comparisons. Each is a folder, a hub
            id (``owner/name@revision`` pins one), a GGUF file, ``package:NAME/FILE.gguf``, a ``.ckpt`` file of this
            project, or an OpenAI-compatible endpoint, ``http://HOST/v1#MODEL``. ``NAME=MODEL`` sets the model's name in
            reports.
        prompts: Harmful prompts: files in any layout of docs/data.md, MultiJail's CSV, saved datasets,
            ``hf://owner/name``, or ``sample``. Rows need no responses.
        ordinary: Prompts that a model should answer, to measure how often it declines them: files as above. Rows
            with ``"kind": "ordinary"`` in any file count as ordinary, too.
        judges: Judges of the responses: ``refusal`` (rules, offline, weak), ``margin`` (likelihoods, without
            generation), ``qwen3guard``, ``qwen3guard_loose``, ``llama_guard``, ``polyguard`` (guard models), ``llm``
            (any chat model). ``JUDGE=MODEL`` names the model, written as under models: ``llm=https://HOST/v1#gpt-4o``.
        languages: BCP-47 codes of the languages to evaluate; null for all languages of the prompts.
        source_language: Language of prompts whose column does not name one, and of chosen and rejected responses.
        seen: Languages that the models were trained on, to see whether safety transfers to the others; null reads them
            from the checkpoint or the exported folder.
        limit: Number of rows to use of each prompt set, from the first row on; null for all.
        out: Folder for all results. The same command resumes a run that was stopped.
        max_new_tokens: Longest response to generate, in tokens.
        batch_tokens: Maximum number of tokens in a batch, prompts and responses together.
        engine: Library that runs local models: ``transformers``, ``vllm``, or ``auto``, which is vLLM if it is
            installed and a GPU exists (checkpoints and GGUF files always run with transformers).
        device: ``auto`` for an accelerator if one exists, or a torch device such as ``cpu`` or ``cuda:1``.
        dtype: Precision of local models; ``auto`` is bfloat16 if the device computes it faster, otherwise float32. The
            choice is that of ``trainer.precision: auto``, but on a CPU it depends on the CPU's features only, not on
            a trial.
        chat_template: Chat template for local models that have none (base models): a Jinja file, or ``plain``,
            ``chatml``, ``gemma`` or ``llama3``. Other models keep their own.
        openings: JSON file with lists of texts, ``refusals`` and ``compliances``, for the judge ``margin``; null for
            the built-in openings.
        reference: Name of one of the models. Reward margins are then those of DPO with this reference and beta = 1;
            null uses log-probabilities per token.
        representation_prompts: Number of prompts whose hidden states are compared at every layer; 0 for none.
        bootstrap: Number of resamples for a confidence interval.
        seed: Seed of the resamples.
        concurrency: Maximum number of requests at a time to an endpoint.
        timeout: Seconds to wait for an endpoint's answer.
        retries: How often to repeat a request to an endpoint after a temporary failure.
        show_text: Add prompts and responses to the report. They are harmful by design, so by default they are not shown
            anywhere.
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
    chat_template: str | None = None
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
            raise UserError("prompts", "is not set; give one or more files, or 'sample'")
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
