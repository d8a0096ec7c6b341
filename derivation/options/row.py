"""One row an option: all that the command line, the fuzzer, the matrix, recommend and headers know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from derivation.errors import one_of, positive, unsupported

# What knows an option: a live pipeline's own state, the arguments of its call, or the machine that it runs on.
Home = Literal["pipeline", "call", "machine"]
# What the fuzzer draws options for: one component, or a whole pipeline.
Part = Literal["unet", "vae", "pipeline"]


@dataclass(frozen=True, eq=False, slots=True)
class Remedy:
    """A change of options: what it costs, the line of Python that makes it, and its place in the order of cost."""

    name: str
    change: Mapping[str, object]
    cost: str
    call: str
    rank: int


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one option besides its name, type and default.

    ``help`` is a sentence, or words that the ``choices`` follow, of which ``aliases`` are other names; integers are
    from ``least`` to ``most``, unless they are one of ``words``. ``drawn`` is what the fuzzer draws it from,
    ``matrix`` the option sets that ``verify --all`` adds. ``assumed`` is what a header says where it differs from its
    default, ``absent`` where it does not.
    """

    help: str
    home: Home
    choices: Callable[[], tuple[str, ...]] | None = None
    words: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    least: int = 1
    most: int | None = None
    drawn: Mapping[Part, tuple[Any, ...]] = field(default_factory=dict)
    matrix: tuple[Mapping[str, Any], ...] = ()
    remedies: tuple[Remedy, ...] = ()
    assumed: str = ""
    absent: str = ""

    def spelled(self, value: object) -> object:
        """Return the choice that a text or torch.dtype is but for case, or is another name of; others as they are."""
        text = str(value)
        if self.choices is None or not (isinstance(value, str) or text.startswith("torch.")):
            return value
        names = {**{choice.lower(): choice for choice in self.choices()}, **self.aliases}
        return names.get(text.removeprefix("torch.").lower(), value)

    def check(self, name: str, value: object) -> None:
        """Raise DerivationError for a value of the right type that is not among the choices, or out of range."""
        if value is None or value in self.words:
            return
        if self.choices is not None:
            one_of(name, value, self.choices(), self.aliases)
        elif self.most is not None and self.least == 1:
            positive(name, value, self.most)
        elif self.most is not None and not (isinstance(value, int) and self.least <= value <= self.most):
            raise unsupported(name, value, f"integers from {self.least} to {self.most}")

    def draws(self, part: Part) -> tuple[Any, ...]:
        """Return what the fuzzer draws for ``part``; a whole pipeline draws what its components do."""
        own = self.drawn.get(part, ())
        return own or (self.drawn.get("unet") or self.drawn.get("vae") or () if part == "pipeline" else ())


def row(default: Any, help: str, home: Home, **columns: Any) -> Any:
    """Declare an option: a dataclass field with its default and its row."""
    return dataclasses.field(default=default, metadata={"row": Row(help, home, **columns)})


def flag(name: str, value: object) -> str:
    """Return the command line argument that sets an option.

    >>> flag("vae_tiling", True), flag("lora_rank", 4)
    ('--vae-tiling', '--lora-rank 4')
    """
    key = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key} {value}"
