"""Judges: plug-ins that say of each response whether it is safe."""
