"""Paths and files, the same for every command."""
