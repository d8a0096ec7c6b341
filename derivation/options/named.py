"""Options by their names, as a caller gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from derivation.call import NAMES
from derivation.errors import DerivationError, meant
from derivation.gpu.cards import with_memory
from derivation.options import TABLE, Options


def options_of(given: Mapping[str, Any]) -> Options:
    """Return the options called ``given``; raises DerivationError for a name that is none.

    ``memory`` beside them is another capacity of the ``gpu``, such as "12GiB".
    """
    own = {name: value for name, value in given.items() if name != "memory"}
    if (memory := given.get("memory")) is not None:
        own["gpu"] = with_memory(given.get("gpu"), memory)
    for name in own.keys() - TABLE.keys():
        if name in (*NAMES, "guidance_scale"):
            raise DerivationError(f"{name} is an argument of a call: derive(...).at(batch_size=2), .estimate(512, 768)")
        raise DerivationError(f"{name} is no option (supported: {', '.join(TABLE)}{meant(name, TABLE)})")
    return Options(**own)
