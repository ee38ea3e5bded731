"""The proxy that requests to an endpoint go through."""

from __future__ import annotations

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lightning_mlc.evaluation.systems.api_keys import host_of, is_here


def proxy_of(url: str) -> str | None:
    """The address of the proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY``, ...) names for ``url``.

    None: there is none. An address of this machine is asked without a proxy, because prompts for it are not to leave
    the machine.
    """
    if is_here(url) or proxy_bypass(host_of(url)):
        return None
    proxies = getproxies()
    found = proxies.get(urlsplit(url).scheme) or proxies.get("all")
    return found if not found or "://" in found else f"http://{found}"
