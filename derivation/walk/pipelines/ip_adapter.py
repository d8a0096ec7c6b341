"""What the pipelines of both families do with ``ip_adapter_image``."""

from __future__ import annotations

from derivation.config import image_encoder
from derivation.tape.events import Category
from derivation.tape.tensor import SymTensor
from derivation.walk.models import CLIPVisionModelWithProjection
from derivation.walk.ops import cat, elementwise, empty
from derivation.walk.pipelines.base import Pipeline


def prepare_ip_adapter_image_embeds(pipeline: Pipeline) -> SymTensor | None:
    """``prepare_ip_adapter_image_embeds`` of one image on the CPU: [N, 1, P], or [2 N, 1, P] under guidance.

    None where the pipeline has no IP-Adapter.
    """
    if pipeline.options.ip_adapter_tokens is None:
        return None
    image_embeds, negative_image_embeds = encode_image(pipeline)
    width = image_embeds.shape[1]
    single_image_embeds = empty((pipeline.images, 1, width), image_embeds.dtype, "cat", Category.PIPELINE)
    if pipeline.guidance:
        single_negative_image_embeds = elementwise("cat", single_image_embeds, category=Category.PIPELINE)
        single_image_embeds = cat([single_negative_image_embeds, single_image_embeds], 0)
    return single_image_embeds


def encode_image(pipeline: Pipeline) -> tuple[SymTensor, SymTensor]:
    """``encode_image``: image_embeds [1, P] and zeros alike."""
    config = image_encoder()
    shape = (1, config.num_channels, config.image_size, config.image_size)
    image = empty(shape, pipeline.options.dtype, "_to_copy", Category.PIPELINE)
    pipeline.models.pre_forward("image_encoder")
    image_embeds = CLIPVisionModelWithProjection("image_encoder", image, config=config)
    image_embeds = elementwise("repeat_interleave", image_embeds, category=Category.PIPELINE)
    uncond_image_embeds = elementwise("zeros_like", image_embeds, category=Category.PIPELINE)
    return image_embeds, uncond_image_embeds
