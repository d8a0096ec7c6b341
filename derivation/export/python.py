"""Python: the standard library only, exact integers of any size."""

from __future__ import annotations

from derivation.equation.device_code import DeviceCode
from derivation.equation.expression import Writer
from derivation.equation.record import Equation
from derivation.export.render import render

NAMES = {"B": "batch_size", "L": "prompt_length"}
# Arguments of diffusers' pipelines that no tensor's size depends on.
WITHOUT_EFFECT = ("eta", "generator", "image", "num_inference_steps", "prompt", "strength")


def python(equation: Equation, device: DeviceCode | None = None) -> str:
    """Return a module with ``peak_vram`` and ``f``, runnable as a script."""
    return render(
        "peak_vram.py.j2",
        equation,
        device=device,
        write=Writer(NAMES),
        without_effect=without_effect(equation),
    )


def without_effect(equation: Equation) -> tuple[str, ...]:
    """Return the arguments that ``f`` accepts and ignores; SDXL's pipelines may skip an absent negative prompt."""
    single_encoder = "text_encoder_2" not in equation.subject.calls
    return (*WITHOUT_EFFECT, "negative_prompt") if single_encoder else WITHOUT_EFFECT
