"""From files of multilingual prompts to the batches of a step."""

from lightning_mlc.data.datamodule import MultilingualData

__all__ = ["MultilingualData"]
