"""What was measured, and how the predictions compare."""
