"""Where prompts go: they stay on this machine, unless the user allows a host."""

from __future__ import annotations

from collections.abc import Collection

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.api_keys import host_of, is_here
from lightning_mlc.evaluation.systems.proxies import proxy_of


def destination(model: str, what: str, allowed: Collection[str]) -> str:
    """Say where texts go.

    Args:
        model: The model as the command line names it.
        what: The texts in a few words, such as ``20 prompts``.
        allowed: Hosts that they may be sent to.

    Raises:
        UserError: They would be sent to a host that is not allowed, or in clear text through such a proxy.
    """
    if not model.startswith(("http://", "https://")):
        return f"none leaves this machine, {model} runs here"
    host = host_of(model)
    if is_here(model):
        return f"none leaves this machine, they are sent to {host}"
    _require(host, f"{host} is not this machine, and {what} would be sent there", allowed)
    proxy = proxy_of(model)
    if proxy is None:
        return f"all are sent to {host}"
    relay = host_of(proxy)
    if model.startswith("http://") and not is_here(proxy):
        _require(relay, f"the proxy {relay} of the environment would read {what}, because {host} has no https", allowed)
    return f"all are sent to {host}, through the proxy {relay} of the environment"


def _require(host: str, otherwise: str, allowed: Collection[str]) -> None:
    if host not in {name.lower() for name in allowed}:
        raise UserError("model", f"{otherwise}; allow it with --allow_remote {host}")
