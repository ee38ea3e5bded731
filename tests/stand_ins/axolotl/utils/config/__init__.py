from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault


class AxolotlInputConfig(BaseModel):
    model_config = {"populate_by_name": True}

    base_model: str
    datasets: list[dict[str, Any]] | None = None
    micro_batch_size: int | None = 1
    plugins: list[str] | None = None


def prepare_plugins(cfg: DictDefault) -> None:
    manager = PluginManager.get_instance()
    for name in cfg.get("plugins") or []:
        if name not in manager.plugins:
            manager.register(name, required=True)
        manager.plugins[name].register(cfg)


def validate_config(cfg: DictDefault) -> DictDefault:
    schema: type[BaseModel] = AxolotlInputConfig
    for path in PluginManager.get_instance().get_input_args():
        module, name = path.rsplit(".", 1)
        part = getattr(__import__(module, fromlist=[name]), name)
        schema = type("AxolotlInputConfig", (schema, part), {})
    return DictDefault(schema(**cfg.to_dict()).model_dump(exclude_none=True))
