"""What the pipelines of both families do with ``ip_adapter_image``."""

from __future__ import annotations

from derivation.config import read_image_encoder
from derivation.tape.events import Category
from derivation.tape.tensor import SymTensor
from derivation.walk.components import projections
from derivation.walk.models import CLIPVisionModelWithProjection
from derivation.walk.ops import cat, elementwise, empty
from derivation.walk.pipelines.base import Pipeline


def prepare_ip_adapter_image_embeds(pipeline: Pipeline) -> tuple[SymTensor, ...]:
    """``prepare_ip_adapter_image_embeds`` of images on the CPU: [N, images, P] or [N, images, S, C] an IP-Adapter.

    N is 2 rows an image of the call under guidance; nothing where the pipeline has no IP-Adapter.
    """
    encoded: list[tuple[SymTensor, SymTensor]] = []
    for projection in projections(pipeline.checkpoint, pipeline.options):
        single_image_embeds, single_negative_image_embeds = encode_image(pipeline, projection.reads_hidden_states)
        if not pipeline.guidance:
            encoded.append((single_image_embeds, single_image_embeds))
        else:
            encoded.append((single_image_embeds, single_negative_image_embeds))
    ip_adapter_image_embeds: tuple[SymTensor, ...] = ()
    for image_embeds, _ in encoded:
        shape = (pipeline.images, *image_embeds.shape)
        single_image_embeds = empty(shape, image_embeds.dtype, "cat", Category.PIPELINE)
        if pipeline.guidance:
            single_negative_image_embeds = elementwise("cat", single_image_embeds, category=Category.PIPELINE)
            single_image_embeds = cat([single_negative_image_embeds, single_image_embeds], 0)
        ip_adapter_image_embeds += (single_image_embeds,)
    return ip_adapter_image_embeds


def encode_image(pipeline: Pipeline, output_hidden_states: bool) -> tuple[SymTensor, SymTensor]:
    """``encode_image``: image_embeds [images, P] and zeros alike, or the last hidden states but one of both."""
    config = read_image_encoder(pipeline.options.ip_adapter)
    shape = (pipeline.options.ip_adapter_images, config.num_channels, config.image_size, config.image_size)
    image = empty(shape, pipeline.options.dtype, "_to_copy", Category.PIPELINE)
    pipeline.models.pre_forward("image_encoder")
    if output_hidden_states:
        image_embeds = hidden_states(pipeline, image)
        image_embeds = elementwise("repeat_interleave", image_embeds, category=Category.PIPELINE)
        uncond_image_embeds = hidden_states(pipeline, elementwise("zeros_like", image, category=Category.PIPELINE))
        uncond_image_embeds = elementwise("repeat_interleave", uncond_image_embeds, category=Category.PIPELINE)
        return image_embeds, uncond_image_embeds
    image_embeds = CLIPVisionModelWithProjection("image_encoder", image, config=config).image_embeds
    image_embeds = elementwise("repeat_interleave", image_embeds, category=Category.PIPELINE)
    uncond_image_embeds = elementwise("zeros_like", image_embeds, category=Category.PIPELINE)
    return image_embeds, uncond_image_embeds


def hidden_states(pipeline: Pipeline, image: SymTensor) -> SymTensor:
    """The encoder's last hidden state but one [images, S, C]."""
    config = read_image_encoder(pipeline.options.ip_adapter)
    pipeline.models.pre_forward("image_encoder")
    return CLIPVisionModelWithProjection(
        "image_encoder", image, config=config, output_hidden_states=True
    ).hidden_states[-2]
