from .workflow import run_sft as run_sft
