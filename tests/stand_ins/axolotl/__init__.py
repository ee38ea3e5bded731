"""Stands in for Axolotl 0.21.0, which needs Python 3.12 and pins other versions of what we use.

It has the documented hooks of plug-ins that ``lightning_mlc.plugins.axolotl`` uses, and what Axolotl does with them: it
registers the plug-ins that a configuration lists, derives the schema of the configuration from theirs, and calls them
with the trainer.
"""
