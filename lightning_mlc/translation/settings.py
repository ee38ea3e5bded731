"""The options of a translation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_mlc.errors import UserError


@dataclass(frozen=True)
class TranslationSettings:
    """Translates the prompts of a file. Responses are never translated.

    Args:
        file: The data: JSONL, JSON, CSV, Parquet, a saved dataset, ``hf://owner/name``, or ``sample``, in any layout
            of docs/data.md.
        languages: BCP-47 codes of the languages to translate into.
        out: The JSONL file to write, with the prompts in all languages and every other column as it was. What is done
            is kept in a journal next to it, so the same command resumes after a stop.
        model: The model that translates: a folder, a hub id (``owner/name@revision`` pins one), a GGUF file,
            ``package:NAME/FILE.gguf`` (NLLB-200, M2M-100, MADLAD-400 or any chat model), or an OpenAI-compatible
            endpoint, ``http://HOST/v1#MODEL``.
        allow_remote: Hosts that prompts may be sent to. Without it they do not leave this machine.
        source_language: Language of the prompts that are translated.
        system: Translate system messages as well as the messages of the user.
        only_missing: Keep the translations that the file has, and translate only where one is missing.
        redo: Languages to translate again, although the file or the journal has translations.
        verify: ``back`` translates every translation back into the source language and compares it with the source
            (chrF, from 0 to 100).
        max_new_tokens: Longest translation, in tokens.
        batch_tokens: Most tokens of a batch of a local model, prompts and translations together.
        device: ``auto`` for an accelerator if there is one, or a torch device such as ``cpu`` or ``cuda:1``.
        dtype: Precision of a local model; ``auto`` is bfloat16 where the device computes it faster, else float32.
        concurrency: Requests at a time to an endpoint.
        timeout: Seconds to wait for an endpoint's answer.
        retries: How often an endpoint is asked again after a failure that may pass.
        trust_remote_code: Run Python code that the model's repository contains. Read it first.
    """

    file: str
    languages: list[str]
    out: str
    model: str
    allow_remote: list[str] = field(default_factory=list)
    source_language: str = "en"
    system: bool = False
    only_missing: bool = False
    redo: list[str] = field(default_factory=list)
    verify: Literal["back"] | None = None
    max_new_tokens: int = 512
    batch_tokens: int = 8192
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "batch_tokens": 1, "concurrency": 1, "retries": 0}
        for option, smallest in least.items():
            if (value := getattr(self, option)) < smallest:
                raise UserError(option, f"must be at least {smallest}, got {value}")
        if not self.timeout > 0:
            raise UserError("timeout", f"must be above 0, got {self.timeout}")
