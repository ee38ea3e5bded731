"""Stands in for LLaMA-Factory 0.9.5, whose pins exclude our versions of transformers and datasets.

It has the modules, names and signatures that ``lightning_mlc.plugins.llamafactory`` uses. Its four trainers train
on the responses. Its workflows import them as those of LLaMA-Factory do: ``dpo`` when it runs, the others before.
"""
