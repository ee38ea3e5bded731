"""All checks. Each module here holds one; adding a module adds a check."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lightning_mlc.lint.check import Check


@cache
def all_checks() -> dict[str, type[Check]]:
    """All checks by name: those that find errors first."""
    found = []
    for module in iter_modules(__path__):
        of_module = vars(import_module(f"{__name__}.{module.name}"))
        own = [kind for kind in of_module.values() if isinstance(kind, type) and issubclass(kind, Check)]
        found += [kind for kind in own if kind.__module__ == of_module["__name__"]]
    return {kind.name: kind for kind in sorted(found, key=lambda kind: (kind.severity, kind.name))}
