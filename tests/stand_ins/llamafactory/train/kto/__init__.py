from .workflow import run_kto as run_kto
