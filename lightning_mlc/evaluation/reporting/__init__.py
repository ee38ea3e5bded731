"""From the journals of an evaluation to figures, tables and pictures."""
