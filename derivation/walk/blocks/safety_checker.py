"""diffusers/pipelines/stable_diffusion/safety_checker.py."""

from __future__ import annotations

from derivation.config import CLIPVisionConfig
from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.modeling_clip import CLIPVisionModel
from derivation.walk.ops import Linear, div, elementwise, empty, parameter

CONCEPTS = 17
SPECIAL_CARE = 3


@block
def StableDiffusionSafetyChecker(clip_input: SymTensor, images: SymTensor, *, config: CLIPVisionConfig) -> SymTensor:
    """clip_input [N, 3, 224, 224] -> ``images`` unchanged; the cosine distances go to the CPU."""
    concept_embeds = parameter("concept_embeds", (CONCEPTS, config.projection_dim))
    special_care_embeds = parameter("special_care_embeds", (SPECIAL_CARE, config.projection_dim))
    parameter("concept_embeds_weights", (CONCEPTS,))
    parameter("special_care_embeds_weights", (SPECIAL_CARE,))
    pooled_output = CLIPVisionModel("vision_model", clip_input, config=config)[1]
    image_embeds = Linear("visual_projection", pooled_output, config.projection_dim, bias=False)
    cosine_distance(image_embeds, special_care_embeds)
    cosine_distance(image_embeds, concept_embeds)
    return images


def cosine_distance(image_embeds: SymTensor, text_embeds: SymTensor) -> SymTensor:
    """[N, K], [M, K] -> [N, M]."""
    normalized_image_embeds = normalize(image_embeds)
    normalized_text_embeds = normalize(text_embeds)
    shape = (normalized_image_embeds.shape[0], normalized_text_embeds.shape[0])
    return empty(shape, image_embeds.dtype, "mm")


def normalize(x: SymTensor) -> SymTensor:
    """``F.normalize``: [N, K] -> [N, K]."""
    denom = empty((x.shape[0], 1), x.dtype, "linalg_vector_norm")
    denom = elementwise("clamp_min", denom)
    return div(x)
