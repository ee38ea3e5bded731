from .workflow import run_pt as run_pt
