"""A registry: things by name, each registered beside its definition, and a name is taken once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(dict[str, T]):
    """Things by name, of one ``kind``; to take a name twice raises ValueError, which names both homes.

    >>> shapes = Registry[object]("shape")
    >>> shapes.register("round")(round)
    <built-in function round>
    >>> shapes.register("round")(abs)
    Traceback (most recent call last):
    ValueError: shape round is registered twice: builtins.round and builtins.abs
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._homes: dict[str, str] = {}

    def register(self, name: str, made: Callable[[Any], T] | None = None) -> Callable[[F], F]:
        """Return a decorator that registers what it decorates, or what ``made`` makes of it, as ``name``."""

        def registered(thing: F) -> F:
            home = f"{thing.__module__}.{thing.__qualname__}"
            if name in self:
                raise ValueError(f"{self.kind} {name} is registered twice: {self._homes[name]} and {home}")
            self[name] = thing if made is None else made(thing)  # type: ignore[assignment]
            self._homes[name] = home
            return thing

        return registered
