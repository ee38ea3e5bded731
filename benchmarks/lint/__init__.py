"""Measures how many planted faults ``lightning-mlc lint`` finds, its false alarms, time and memory."""
