from __future__ import annotations

from typing import Any


class DictDefault(dict):  # type: ignore[type-arg]
    """A dictionary whose keys are attributes, None where there is none, as are the blocks in it."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for name, value in self.items():
            if isinstance(value, dict):
                self[name] = DictDefault(value)

    def __missing__(self, name: str) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def to_dict(self) -> dict[str, Any]:
        return {name: value.to_dict() if isinstance(value, DictDefault) else value for name, value in self.items()}
