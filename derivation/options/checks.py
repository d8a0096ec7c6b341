"""Which values of the options are refused beyond their rows: outside real intervals, or beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from derivation.errors import DerivationError


def check_values(options: Mapping[str, Any]) -> None:
    """Raise DerivationError for a number outside its interval, and for options that exclude each other."""
    strength, overlap = options["strength"], options["tile_overlap_factor"]
    tokens, lora, rank = options["ip_adapter_tokens"], options["lora"], options["lora_rank"]
    if strength is not None and not 0 < strength <= 1:
        raise DerivationError(f"strength = {strength} is not in (0, 1]")
    if not 0 <= overlap <= 0.5:
        raise DerivationError(f"tile_overlap_factor = {overlap} is not in [0, 0.5]")
    if options["attention_slicing"] is not None:
        for name, value in (("ip_adapter", options["ip_adapter"]), ("ip_adapter_tokens", tokens)):
            if value is not None:
                said = f"{name} = {value} is not supported with attention_slicing"
                raise DerivationError(f"{said}: its processor replaces the IP-Adapter's")
    if options["ip_adapter"] is not None and tokens is not None:
        raise DerivationError(f"ip_adapter_tokens = {tokens} is not supported with ip_adapter, whose files say it")
    if options["ip_adapter_images"] > 1 and options["ip_adapter"] is None and tokens is None:
        said = f"ip_adapter_images = {options['ip_adapter_images']} is not supported"
        raise DerivationError(f"{said} without an ip_adapter or ip_adapter_tokens")
    if options["lora_fused"] and rank is None and lora is None:
        raise DerivationError("lora_fused = True is not supported without a lora or a lora_rank")
    if lora is not None and rank is not None:
        raise DerivationError(f"lora_rank = {rank} is not supported with lora, whose files have ranks")
    if options["controlnet"] is not None and options["controlnets"]:
        raise DerivationError(f"controlnets = {options['controlnets']} is not supported beside controlnet")
