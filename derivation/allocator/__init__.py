"""PyTorch's caching allocator: a replay of its decisions on a tape."""
