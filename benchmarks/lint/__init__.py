"""How well `lightning-mlc lint` finds planted faults, and how fast."""
