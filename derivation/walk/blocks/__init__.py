"""diffusers' and transformers' modules, one file for each of theirs: ``forward()`` line by line.

Each ``@block`` function is one class. Its tensors come first, its constructor's arguments are keywords.
"""
