"""One call of a pipeline: the image's size, the batch, the prompt and guidance."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar

from derivation.errors import positive, typed, unsupported

R = TypeVar("R")

# CLIPTokenizer.model_max_length of every Stable Diffusion checkpoint: pipelines pad prompts to it.
DEFAULT_PROMPT_LENGTH = 77
# Longer sides are refused: the bytes of every tensor stay below 2^63.
MAX_SIDE_PIXELS = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one pipeline call that sizes depend on, named as diffusers names them.

    ``height`` and ``width`` are pixels, ``prompt_length`` is tokens, ``batch_size`` prompts; ``guidance`` says whether
    guidance_scale is above 1. Raises DerivationError for a size that is no integer from 1.

    >>> Call(512, 768)
    Call(height=512, width=768, batch_size=1, prompt_length=77, guidance=True)
    """

    height: int
    width: int
    batch_size: int = 1
    prompt_length: int = DEFAULT_PROMPT_LENGTH
    guidance: bool = True

    def __post_init__(self) -> None:
        for name in SIZES:
            positive(name, getattr(self, name))
        typed("guidance", self.guidance, bool)

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return asdict(self)


SIZES = ("height", "width", "batch_size", "prompt_length")
NAMES = tuple(field.name for field in fields(Call))


def parse_size(text: str, key: str = "size") -> tuple[int, int]:
    """Return (height, width) in pixels of "HxW", or of one number, a square; raises DerivationError.

    >>> parse_size("512x768"), parse_size("1024")
    ((512, 768), (1024, 1024))
    """
    found = re.fullmatch(r"\s*([0-9]{1,7})(?:\s*[xX*\N{MULTIPLICATION SIGN}]\s*([0-9]{1,7}))?\s*", text)
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (0 < height <= MAX_SIDE_PIXELS and 0 < width <= MAX_SIDE_PIXELS):
        raise unsupported(key, text, "HEIGHTxWIDTH in pixels, such as 512x768; one number is a square")
    return height, width


def takes_call(method: Callable[..., R]) -> Callable[..., R]:
    """Let ``method(self, call, ...)`` be called with a Call, or with a Call's own arguments in its place."""

    @wraps(method)
    def called(self: Any, *given: Any, **named: Any) -> R:
        if "call" in named or (given and isinstance(given[0], Call)):
            return method(self, *given, **named)
        own = {name: named.pop(name) for name in NAMES if name in named}
        try:
            call = Call(*given, **own)
        except TypeError as error:
            raise TypeError(str(error).replace("Call.__init__()", f"{method.__name__}()")) from None
        return method(self, call, **named)

    called.__signature__ = _spelled_out(method)  # type: ignore[attr-defined]
    return called


def _spelled_out(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of ``method`` with the arguments of Call in place of ``call``."""
    own = inspect.signature(method)
    first, _, *rest = own.parameters.values()
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
    return own.replace(parameters=[first, *inspect.signature(Call).parameters.values(), *keyword])
