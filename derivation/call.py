"""One call of a pipeline: the image's size, the batch, the prompt and guidance."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar

from derivation.errors import positive, typed, unsupported

R = TypeVar("R")

# CLIPTokenizer.model_max_length of every Stable Diffusion checkpoint: pipelines pad prompts to it.
DEFAULT_PROMPT_LENGTH = 77
# The side of an image, in pixels, of which neither a call nor a model says any: Stable Diffusion 1.5's.
DEFAULT_SIDE = 512
# Longer sides are refused: the bytes of every tensor stay below 2^63.
MAX_SIDE_PIXELS = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one pipeline call that sizes depend on, named as diffusers names them.

    ``height`` and ``width`` are pixels, ``prompt_length`` is tokens, ``batch_size`` prompts; ``guidance`` says whether
    guidance_scale is above 1; ``num_frames`` is a video's. ``prompt_length`` and ``num_frames`` are the pipeline's
    defaults where they are None. Raises DerivationError for a size that is no integer from 1.

    >>> Call(512, 768)
    Call(height=512, width=768, batch_size=1, prompt_length=None, guidance=True, num_frames=None)
    """

    height: int
    width: int
    batch_size: int = 1
    prompt_length: int | None = None
    guidance: bool = True
    num_frames: int | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            if (value := getattr(self, name)) is not None or name not in OPTIONAL:
                positive(name, value)
        typed("guidance", self.guidance, bool)

    def filled(self, prompt_length: int) -> Call:
        """Return the call with its prompt length, ``prompt_length`` where it says none."""
        return self if self.prompt_length is not None else replace(self, prompt_length=prompt_length)

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments by name, ``num_frames`` where it is given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


SIZES = ("height", "width", "batch_size", "prompt_length", "num_frames")
OPTIONAL = ("prompt_length", "num_frames")
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


def size_text(height: int, width: int) -> str:
    """Return a size in pixels as ``parse_size`` reads it."""
    return f"{height}x{width}"


def takes_call(method: Callable[..., R]) -> Callable[..., R]:
    """Let ``method(self, call, ...)`` be called with a Call, or with a Call's own arguments in its place.

    The call's prompt length is ``self.prompt_length`` where it says none, its sides ``self.default_sides``.
    """

    @wraps(method)
    def called(self: Any, *given: Any, **named: Any) -> R:
        if "call" in named or (given and isinstance(given[0], Call)):
            call, *rest = (named.pop("call"),) if "call" in named else given
            return method(self, call.filled(self.prompt_length), *rest, **named)
        own = {name: named.pop(name) for name in NAMES if name in named}
        sides = () if given or {"height", "width"} & own.keys() else self.default_sides
        try:
            call = Call(*sides, *given, **own)
        except TypeError as error:
            raise TypeError(str(error).replace("Call.__init__()", f"{method.__name__}()")) from None
        return method(self, call.filled(self.prompt_length), **named)

    called.__signature__ = _spelled_out(method)  # type: ignore[attr-defined]
    return called


def _spelled_out(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of ``method`` with the arguments of Call in place of ``call``."""
    own = inspect.signature(method)
    first, _, *rest = own.parameters.values()
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
    sizes = [
        parameter.replace(default=None, annotation="int | None") if name in ("height", "width") else parameter
        for name, parameter in inspect.signature(Call).parameters.items()
    ]
    return own.replace(parameters=[first, *sizes, *keyword])
