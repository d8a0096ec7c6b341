"""The oracle: real diffusers and transformers modules on the ``meta`` device, storages watched (needs the extra)."""

from derivation.verify.modules import (
    build_pipeline,
    build_safety_checker,
    build_text_encoder,
    build_unet,
    build_vae,
)
from derivation.verify.runs import trace_component, trace_pipeline
from derivation.verify.sdpa import SdpaMode
from derivation.verify.tracer import Alloc, Free, Trace, Tracer, Witness

__all__ = [
    "Alloc",
    "Free",
    "SdpaMode",
    "Trace",
    "Tracer",
    "Witness",
    "build_pipeline",
    "build_safety_checker",
    "build_text_encoder",
    "build_unet",
    "build_vae",
    "trace_component",
    "trace_pipeline",
]
