"""Turns the journals of an evaluation into figures, tables and pictures."""
