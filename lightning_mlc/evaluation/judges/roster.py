"""Makes the judges that the command line names."""

from __future__ import annotations

import re
from typing import Any

from lightning_mlc.errors import UserError, renamed
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.judges.base import Exchange, Judge
from lightning_mlc.evaluation.judges.formats import FORMATS, Format
from lightning_mlc.evaluation.judges.prompted import PromptedJudge
from lightning_mlc.evaluation.judges.refusal import RefusalJudge
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.evaluation.systems.api_keys import key_of
from lightning_mlc.evaluation.systems.endpoint import Endpoint, EndpointGenerator
from lightning_mlc.evaluation.systems.resolved import Placement, ResolvedSystem
from lightning_mlc.evaluation.systems.system import System, require_address

MARGIN = "margin"
"""The judge that uses likelihoods and needs no responses."""


def judge_specs(settings: EvaluationSettings) -> list[tuple[str, str]]:
    """Name and model of each judge in ``settings``: ``JUDGE=MODEL``, or a judge with its default model."""
    found = []
    for text in settings.judges:
        name, _, spec = text.partition("=")
        default = FORMATS[name].default if name in FORMATS else None
        found.append((name, spec or default or ""))
    return found


def make_judges(settings: EvaluationSettings, placement: Placement | None = None) -> list[Judge]:
    """The judges of responses that ``settings`` name, which are all except ``margin``.

    Args:
        settings: The settings of the evaluation.
        placement: Where local judges run; None chooses it from ``settings``.

    Raises:
        UserError: A judge does not exist, lacks a model, or has a model that it cannot use.
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
        if system.is_endpoint:
            require_address(spec, "judges")
        judges.append(_prompted(system, FORMATS[name], settings, placement))
    if len({judge.name for judge in judges}) < len(judges):
        raise UserError("judges", "a judge is named twice")
    return judges


def _prompted(system: System, form: Format, settings: EvaluationSettings, placement: Placement | None) -> PromptedJudge:
    """A judge that asks the model ``system``.

    Raises:
        UserError: The model cannot judge: for example, it has no chat template.
    """
    example = Exchange([{"role": "user", "content": "?"}], "!", "en")
    asked: dict[str, Any] = {"wording": digest(form.ask(example)), "max_new_tokens": form.max_new_tokens}
    if system.is_endpoint:
        identity = system.identity | asked
        endpoint = endpoint_of(system, form.max_new_tokens, settings)
        return PromptedJudge(system.label, form, identity, lambda: EndpointGenerator(endpoint))
    with renamed(("models",), "judges"):  # a judge is a system, whose errors name the option `models`
        identity = system.identity | asked
        resolved = ResolvedSystem.of(
            system, settings, placement or Placement.of(settings), form.max_new_tokens, on_long_prompt="cut"
        )
        # A chat template that refuses the format is reported before anything runs.
        resolved.chat.prompt(form.ask(example), "judges", form.header)
    identity |= resolved.journal_settings | {"engine": resolved.engine}
    return PromptedJudge(system.label, form, identity, lambda: resolved.generator(settings.batch_tokens, form.header))


def endpoint_of(system: System, max_new_tokens: int, settings: EvaluationSettings) -> Endpoint:
    """How to ask the endpoint ``system``, which is one of those in ``settings``.

    Raises:
        UserError: It is unclear which endpoint the key in the environment belongs to.
    """
    named = [re.search(r"https?://[^#]*", text) for text in (*settings.models, *settings.judges)]
    key = key_of(system.spec, [found[0] for found in named if found])
    return Endpoint(system.spec, max_new_tokens, key, settings.concurrency, settings.timeout, settings.retries)
