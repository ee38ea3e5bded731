from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any


class BasePlugin:
    def __init__(self) -> None: ...

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class PluginManager:
    _instance: PluginManager | None = None

    def __init__(self) -> None:
        self.plugins: OrderedDict[str, BasePlugin] = OrderedDict()

    @classmethod
    def get_instance(cls) -> PluginManager:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def register(self, plugin_name: str, *, required: bool = False) -> None:
        module, name = plugin_name.rsplit(".", 1)
        self.plugins[plugin_name] = getattr(importlib.import_module(module), name)()

    def get_input_args(self) -> list[str]:
        return [path for plugin in self.plugins.values() if (path := plugin.get_input_args()) is not None]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        for plugin in self.plugins.values():
            plugin.post_trainer_create(cfg, trainer)
