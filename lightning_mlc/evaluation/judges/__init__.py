"""Judges: plug-ins that decide for each response whether it is safe."""
