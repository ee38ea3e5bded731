"""Who judges: from the names on the command line to judges."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lightning_mlc.errors import UserError, renamed
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.judges.base import Exchange, Judge
from lightning_mlc.evaluation.judges.formats import FORMATS, Format
from lightning_mlc.evaluation.judges.prompted import PromptedJudge
from lightning_mlc.evaluation.judges.refusal import RefusalJudge
from lightning_mlc.evaluation.settings import Settings
from lightning_mlc.evaluation.systems.api_keys import key_of
from lightning_mlc.evaluation.systems.endpoint import Endpoint, EndpointGenerator
from lightning_mlc.evaluation.systems.engines import engine_of, local_generator
from lightning_mlc.evaluation.systems.generation import Generator
from lightning_mlc.evaluation.systems.local import chat_of, choose_device, choose_dtype
from lightning_mlc.evaluation.systems.system import System, is_address

MARGIN = "margin"
"""The judge that looks at likelihoods, and at no response."""


def judge_specs(settings: Settings) -> list[tuple[str, str]]:
    """Name and model of each judge that ``settings`` name: ``JUDGE=MODEL``, or the model that it comes with."""
    found = []
    for text in settings.judges:
        name, _, spec = text.partition("=")
        default = FORMATS[name].default if name in FORMATS else None
        found.append((name, spec or default or ""))
    return found


def make_judges(settings: Settings) -> list[Judge]:
    """The judges of responses that ``settings`` name (all but ``margin``).

    Raises:
        UserError: There is no such judge, or it needs a model, or has one for no reason.
    """
    judges: list[Judge] = []
    known = ("refusal", MARGIN, *FORMATS)
    for name, spec in judge_specs(settings):
        if name not in known:
            raise UserError("judges", f"there is no judge '{name}'; choose from {', '.join(known)}")
        if name in ("refusal", MARGIN):
            if spec:
                raise UserError("judges", f"'{name}' takes no model; write {name}")
            if name == "refusal":
                judges.append(RefusalJudge())
            continue
        if not spec:
            raise UserError("judges", f"'{name}' needs a model; write {name}=MODEL or {name}=http://HOST/v1#MODEL")
        system = System(name, spec)
        if system.is_endpoint and not is_address(spec):
            raise UserError("judges", f"write an endpoint as {name}=http://HOST/v1#MODEL, got {spec}")
        form = FORMATS[name]
        with renamed(("models",), "judges"):  # a judge is a system, whose errors name the option `models`
            identity = system.identity | _circumstances(system, form, settings)
        judges.append(PromptedJudge(name, form, identity, _generator(system, form, settings)))
    if len({judge.name for judge in judges}) < len(judges):
        raise UserError("judges", "one is named twice")
    return judges


def _circumstances(system: System, form: Format, settings: Settings) -> dict[str, Any]:
    """What the verdicts of ``system`` depend on beside itself.

    Raises:
        UserError: It cannot judge: it has no chat template, say.
    """
    example = Exchange([{"role": "user", "content": "?"}], "!", "en")
    found: dict[str, Any] = {"wording": digest(form.ask(example)), "max_new_tokens": form.max_new_tokens}
    if system.is_endpoint:
        return found
    device = choose_device(settings.device)
    chat = chat_of(system, form.max_new_tokens, "cut")
    chat.prompt(form.ask(example), "judges", form.header)  # a template that refuses it says so before anything runs
    template = chat.tokenizer.chat_template
    return found | {
        "dtype": choose_dtype(settings.dtype, device),
        "device": device.type,
        "engine": engine_of(system, settings),
        "chat_template": digest(str(template)),
    }


def _generator(system: System, form: Format, settings: Settings) -> Callable[[], Generator]:
    if system.is_endpoint:
        endpoint = endpoint_of(system, form.max_new_tokens, settings)
        return lambda: EndpointGenerator(endpoint)

    def make() -> Generator:
        return local_generator(system, form.max_new_tokens, settings, form.header, on_long_prompt="cut")

    return make


def endpoint_of(system: System, max_new_tokens: int, settings: Settings) -> Endpoint:
    """How to ask the endpoint ``system``, one of those that ``settings`` name.

    Raises:
        UserError: It is not clear whether a key is for it.
    """
    named = [re.search(r"https?://[^#]*", text) for text in (*settings.models, *settings.judges)]
    key = key_of(system.spec, [found[0] for found in named if found])
    return Endpoint(system.spec, max_new_tokens, key, settings.concurrency, settings.timeout, settings.retries)
