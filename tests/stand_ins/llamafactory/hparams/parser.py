from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml


def read_args(args: dict[str, Any] | list[str] | None = None) -> dict[str, Any] | list[str]:
    """As LLaMA-Factory, which does it with OmegaConf: a file, and ``key=value`` or ``block.key=value`` after it."""
    if args is not None:
        return args
    if not sys.argv[1].endswith((".yaml", ".yml")):
        return sys.argv[1:]
    found = yaml.safe_load(Path(sys.argv[1]).read_text())
    for word in sys.argv[2:]:
        name, value = word.split("=", 1)
        *blocks, key = name.split(".")
        inner = found
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[key] = yaml.safe_load(value)
    return found
