"""The real modules on torch's meta device, their storages watched (needs the extra verify)."""
