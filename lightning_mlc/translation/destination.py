"""Where prompts go: they stay on this machine, unless the user allows a host."""

from __future__ import annotations

from collections.abc import Collection

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.api_keys import host_of, is_here
from lightning_mlc.translation.plan import Plan


def destination(model: str, plan: Plan, allowed: Collection[str], back: bool) -> str:
    """Say how many prompts go where.

    Args:
        model: The model as the command line names it.
        plan: The texts to translate.
        allowed: Hosts that prompts may be sent to.
        back: Whether translations are translated back.

    Raises:
        UserError: Prompts would be sent to a host that is not allowed.
    """
    count = f"{len(plan.rows)} prompts, {plan.pairs} translations{', and as many back' if back else ''}: "
    if not model.startswith(("http://", "https://")):
        return f"{count}none leaves this machine, {model} runs here"
    host = host_of(model)
    if is_here(model):
        return f"{count}none leaves this machine, they are sent to {host}"
    if host not in {name.lower() for name in allowed}:
        raise UserError(
            "model",
            f"{host} is not this machine, and {len(plan.rows)} prompts would be sent there; "
            f"allow it with --allow_remote {host}",
        )
    return f"{count}all are sent to {host}"
