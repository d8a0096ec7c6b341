"""From undominated peaks to the exact function: cases, straight-line code, limits."""
