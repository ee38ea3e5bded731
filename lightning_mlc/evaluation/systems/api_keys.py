"""Which key goes to which endpoint: a key is for the host that it was given for, and no other is shown it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from lightning_mlc.errors import UserError

API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key of the one host that needs one."""


def variable_of(url: str) -> str:
    """The environment variable with the key of this ``url``'s host alone: ``OPENAI_API_KEY_API_EXAMPLE_COM``."""
    return f"{API_KEY}_{re.sub(r'[^0-9A-Za-z]', '_', _host(url)).upper()}"


def key_of(url: str, urls: Collection[str]) -> str | None:
    """The key to send to ``url``, where ``urls`` are all that are asked; None for none.

    A host's own variable comes first. The general one goes to the one host that is asked over https, or to this
    machine where there is none: never in clear text over a network, and never to two.

    Raises:
        UserError: The general one could be for several hosts.
    """
    if own := os.environ.get(variable_of(url)):
        return own
    general = os.environ.get(API_KEY)
    if not general:
        return None
    wanting = [other for other in urls if not os.environ.get(variable_of(other))]
    remote = {_host(other): other for other in wanting if _is_encrypted(other) and not _is_here(other)}
    if len(remote) > 1:
        raise UserError(
            API_KEY,
            f"is for one of {', '.join(remote)}, but does not say which; "
            f"set {' and '.join(map(variable_of, remote.values()))} instead",
        )
    return general if (_host(url) in remote if remote else _is_here(url)) else None


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _is_encrypted(url: str) -> bool:
    return urlsplit(url).scheme == "https"


def _is_here(url: str) -> bool:
    host = _host(url)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
