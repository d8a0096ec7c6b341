"""The oracle: real diffusers and transformers modules on the ``meta`` device, storages watched (needs the extra)."""

from derivation.trace.modules import (
    build_pipeline,
    build_safety_checker,
    build_text_encoder,
    build_unet,
    build_vae,
)
from derivation.trace.runs import trace_component, trace_pipeline
from derivation.trace.sdpa import SdpaMode
from derivation.trace.tracer import Tracer
from derivation.verify.streams import naive_peak, naive_peaks

__all__ = [
    "SdpaMode",
    "Tracer",
    "build_pipeline",
    "build_safety_checker",
    "build_text_encoder",
    "build_unet",
    "build_vae",
    "naive_peak",
    "naive_peaks",
    "trace_component",
    "trace_pipeline",
]
