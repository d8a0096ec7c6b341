"""LoRAs on the layers of models: where they are, their names and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# An adapter's name and its rank, in the order in which a layer runs them.
Ranks = tuple[tuple[str, int], ...]


class Adapters:
    """The LoRAs of a run by the path of the layer, its model's name before it; every one of them is active."""

    def __init__(self, layers: Mapping[str, Ranks]) -> None:
        self.layers = layers
        self.models = frozenset(path.split(".")[0] for path in layers)
        inside: dict[str, list[tuple[str, Ranks]]] = {}
        for path, ranks in layers.items():
            names = path.split(".")
            for depth in range(1, len(names) + 1):
                inside.setdefault(".".join(names[:depth]), []).append((".".join(names[depth:]), ranks))
        numbers: dict[tuple[tuple[str, Ranks], ...], int] = {}
        self._inside = {path: numbers.setdefault(tuple(own), len(numbers) + 1) for path, own in inside.items()}

    def of(self, path: Sequence[str]) -> Ranks:
        """Return the LoRAs of the layer at ``path``."""
        return self.layers.get(".".join(path), ()) if self.layers else ()

    def inside(self, path: Sequence[str]) -> int:
        """Return a number that two modules share where the same LoRAs are at the same places in them; 0 for none."""
        return self._inside.get(".".join(path), 0) if self.layers else 0

    def freeze(self, path: Sequence[str]) -> bool:
        """Return whether the weights of the model at ``path`` require no gradient (peft's inject_adapter)."""
        return bool(path) and path[0] in self.models


NO_ADAPTERS = Adapters({})
