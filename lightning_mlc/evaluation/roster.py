"""Who judges: from the names on the command line to judges."""

from __future__ import annotations

import re
from collections.abc import Callable

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.endpoint import Endpoint, EndpointGenerator
from lightning_mlc.evaluation.engines import local_generator
from lightning_mlc.evaluation.generation import Generator
from lightning_mlc.evaluation.judges.base import Judge
from lightning_mlc.evaluation.judges.formats import FORMATS, Format
from lightning_mlc.evaluation.judges.prompted import PromptedJudge
from lightning_mlc.evaluation.judges.refusal import RefusalJudge
from lightning_mlc.evaluation.keys import key_of
from lightning_mlc.evaluation.settings import Settings
from lightning_mlc.evaluation.systems import System

MARGIN = "margin"
"""The judge that looks at likelihoods, and at no response."""


def make_judges(settings: Settings) -> list[Judge]:
    """The judges of responses that ``settings`` name (all but ``margin``).

    Raises:
        UserError: There is no such judge, or it needs a model, or has one for no reason.
    """
    judges: list[Judge] = []
    known = ("refusal", MARGIN, *FORMATS)
    for text in settings.judges:
        name, _, spec = text.partition("=")
        if name not in known:
            raise UserError(f"judges: there is no judge '{name}'; choose from {', '.join(known)}")
        if name in ("refusal", MARGIN):
            if spec:
                raise UserError(f"judges: '{name}' takes no model; write {name}")
            if name == "refusal":
                judges.append(RefusalJudge())
            continue
        spec = spec or FORMATS[name].default or ""
        if not spec:
            raise UserError(f"judges: '{name}' needs a model; write {name}=MODEL or {name}=http://HOST/v1#MODEL")
        system = System(name, spec)
        if system.is_endpoint and "#" not in spec:
            raise UserError(f"judges: write an endpoint as {name}=http://HOST/v1#MODEL, got {text}")
        judges.append(PromptedJudge(name, FORMATS[name], system.identity, _generator(system, FORMATS[name], settings)))
    if len({judge.name for judge in judges}) < len(judges):
        raise UserError("judges: one is named twice")
    return judges


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
