"""diffusers' pipelines: ``__call__`` stage by stage, with what a pipeline keeps alive.

A stage lasts from its mark to the next: text_encoder (encode_prompt), vae_encode (prepare_latents, and an
inpainting pipeline's prepare_mask_latents) or prepare_latents (txt2img), unet (the denoising loop and what
precedes it), vae_decode (the call of ``vae.decode``, and the VAE's upcast before it), safety_checker,
postprocess (the VAE's cast back included).
"""

from derivation.walk.pipelines import latent_consistency as latent_consistency  # registers its family
from derivation.walk.pipelines import stable_diffusion as stable_diffusion
from derivation.walk.pipelines import stable_diffusion_xl as stable_diffusion_xl
from derivation.walk.pipelines.base import (
    POSTPROCESS,
    PREPARE_LATENTS,
    SAFETY_CHECKER,
    TEXT_ENCODER,
    UNET,
    VAE_DECODE,
    VAE_ENCODE,
    Pipeline,
    required,
)

__all__ = [
    "POSTPROCESS",
    "PREPARE_LATENTS",
    "SAFETY_CHECKER",
    "TEXT_ENCODER",
    "UNET",
    "VAE_DECODE",
    "VAE_ENCODE",
    "Pipeline",
    "required",
]
