"""Python: the standard library only, exact integers of any size."""

from __future__ import annotations

from derivation.equation.expression import Writer
from derivation.equation.function import Function
from derivation.export.render import example, render

NAMES = {"B": "batch_size", "L": "prompt_length"}
# Arguments of diffusers' pipelines that no tensor's size depends on.
WITHOUT_EFFECT = ("eta", "generator", "image", "num_inference_steps", "prompt", "strength")


def python(function: Function) -> str:
    """Return a module with ``peak_vram`` and ``f``, runnable as a script."""
    height, width, peak = example(function.derivation)
    return render(
        "peak_vram.py.j2",
        function,
        write=Writer(NAMES),
        without_effect=without_effect(function),
        example={"height": height, "width": width, "bytes": peak},
    )


def without_effect(function: Function) -> tuple[str, ...]:
    """Return the arguments that ``f`` accepts and ignores; SDXL's pipelines may skip an absent negative prompt."""
    single_encoder = function.derivation.checkpoint.text_encoder_2 is None
    return (*WITHOUT_EFFECT, "negative_prompt") if single_encoder else WITHOUT_EFFECT
