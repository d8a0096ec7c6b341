"""Symbols, and the record of what a run allocates and frees."""
