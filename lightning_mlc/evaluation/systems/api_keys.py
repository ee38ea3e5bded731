"""The API key of each endpoint. A key is sent only to the host that it is meant for."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from lightning_mlc.errors import UserError

API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key, if only one host needs a key."""


def variable_of(url: str) -> str:
    """The environment variable with the key of only this ``url``'s host, such as ``OPENAI_API_KEY_API_EXAMPLE_COM``."""
    return f"{API_KEY}_{re.sub(r'[^0-9A-Za-z]', '_', host_of(url)).upper()}"


def key_of(url: str, urls: Collection[str]) -> str | None:
    """The key to send to ``url``; None for no key.

    The variable of the host comes first. The key of the general variable goes to the only host that is asked over
    https, or to this machine if no host is. So it is never sent over a network in clear text, and never to two hosts.

    Args:
        url: Address of the endpoint.
        urls: Addresses of all endpoints of the evaluation.

    Raises:
        UserError: The general variable could be meant for several hosts, or a key cannot be sent.
    """
    if own := _key_in(variable_of(url)):
        return own
    general = _key_in(API_KEY)
    if not general:
        return None
    wanting = [other for other in urls if not os.environ.get(variable_of(other))]
    remote = {host_of(other): other for other in wanting if _is_encrypted(other) and not is_here(other)}
    if len(remote) > 1:
        raise UserError(
            API_KEY,
            f"can be the key of only one host, but these need one: {', '.join(remote)}; "
            f"set {' and '.join(map(variable_of, remote.values()))} instead",
        )
    return general if (host_of(url) in remote if remote else is_here(url)) else None


def host_of(url: str) -> str:
    """The host of ``url``, without its port."""
    return urlsplit(url).hostname or ""


def _key_in(variable: str) -> str:
    """The key in an environment variable, without spaces and line breaks around it; empty if there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(variable, "has a character that no key has, such as a line break or a curly quote; set it anew")
    return key


def _is_encrypted(url: str) -> bool:
    return urlsplit(url).scheme == "https"


def is_here(url: str) -> bool:
    """Whether ``url`` is an address of this machine itself (a loopback address)."""
    host = host_of(url)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
