"""Where the models' weights are during one call: diffusers' ``enable_..._cpu_offload`` and accelerate's hooks.

Without offload all are on the GPU throughout. Under model offload a model is moved there whole when it is first
called (accelerate/hooks.py: CpuOffload), under sequential offload each leaf's parameters are, for the time of
the leaf's ``forward`` (AlignDevicesHook; ``Tape.scope``).
"""

from __future__ import annotations

from collections.abc import Mapping

from derivation.config import Checkpoint
from derivation.options import Options
from derivation.tape.tape import EXCLUDED_FROM_CPU_OFFLOAD, tape
from derivation.walk.components import is_buffer, parameters
from derivation.walk.pipelines.weights import Entries, ModelWeights

# model_cpu_offload_seq of both families' pipelines: a model's call sends the one before it to the CPU
MODEL_CPU_OFFLOAD_SEQ = ("text_encoder", "text_encoder_2", "image_encoder", "unet", "vae")
# pipeline_controlnet_img2img.py, pipeline_controlnet_inpaint_sd_xl.py: no image_encoder in their sequences, where it
# waits for the call's end as a ControlNet does
WITHOUT_IMAGE_ENCODER = (("StableDiffusion", "img2img"), ("StableDiffusionXL", "inpaint"))


class Models:
    """The weights of a pipeline's models in one call."""

    def __init__(self, checkpoint: Checkpoint, options: Options, family: str) -> None:
        self.hooked = options.offload == "model"
        self.weights = {
            name: ModelWeights(name, entries, options.dtype_of(name), stays(name, options))
            for name, entries in parameters(checkpoint, options).items()
        }
        alone = options.controlled and (family, options.pipeline) in WITHOUT_IMAGE_ENCODER
        left_out = "image_encoder" if alone else ""
        chain = [name for name in MODEL_CPU_OFFLOAD_SEQ if name in self.weights and name != left_out]
        self.previous = dict(zip(chain[1:], chain, strict=False))

    def pre_forward(self, name: str) -> bool:
        """Run the hook before a call of the model ``name``; returns whether it moved the model, hence its inputs."""
        if not self.hooked:
            return False
        if name in self.previous and self.weights[self.previous[name]].offload():
            tape().empty_cache()
        return self.weights[name].load()

    def to(self, name: str, dtype: str, *parts: str) -> None:
        """``model.to(dtype=dtype)``, or of its ``parts``, wherever the model is."""
        self.weights[name].to(dtype, *parts)

    def maybe_free_model_hooks(self) -> None:
        """The end of ``__call__``: under model offload every model goes to the CPU, and those that stay come back."""
        if self.hooked:
            for weights in self.weights.values():
                weights.offload()
            tape().empty_cache()
            for name in EXCLUDED_FROM_CPU_OFFLOAD:
                if name in self.weights:
                    self.weights[name].load()
        for weights in self.weights.values():
            weights.outlive()


def stays(model: str, options: Options) -> bool:
    """Return whether a model's parameters are on the GPU throughout."""
    return options.offload is None or model in EXCLUDED_FROM_CPU_OFFLOAD


def resident(models: Mapping[str, Entries], options: Options) -> dict[str, Entries]:
    """Return what stays on the GPU of each model; sequential offload leaves the buffers there (cpu_offload)."""
    left = options.offload == "sequential"
    found = {
        model: entries if stays(model, options) else {path: e for path, e in entries.items() if left and is_buffer(e)}
        for model, entries in models.items()
    }
    return {model: entries for model, entries in found.items() if entries}
