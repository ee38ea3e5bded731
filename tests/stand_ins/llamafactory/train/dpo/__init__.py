from .workflow import run_dpo as run_dpo
