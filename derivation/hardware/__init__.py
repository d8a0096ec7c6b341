"""What hardware and the allocator add to tensors: scratch profiles, allocator replay, GPU table."""
