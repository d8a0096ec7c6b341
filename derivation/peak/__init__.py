"""From a tape to its undominated peaks and their closed form."""
