"""Which layers of a checkpoint's models have a LoRA: those of the option ``lora_rank``, or of the files of ``lora``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from derivation.config import Checkpoint, UNet2DConditionConfig, controlnet_files
from derivation.config.ip_adapter import ip_adapter_files
from derivation.config.lora import Factor, lora_files, read_lora
from derivation.config.named_files import stamp
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.tape.adapters import Adapters, Ranks
from derivation.walk.ops import lora_shapes

# When each file was written, and its size.
Stamps = tuple[tuple[int, int], ...]
# path -> shape of its weight
Layers = Mapping[str, tuple[int, ...]]
# What diffusers' training scripts give a LoRA.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# lora_conversion_utils.py (_maybe_map_sgm_blocks_to_diffusers): the place of a layer in a block of the original UNet
SGM_PLACES = {"resnets": 0, "attentions": 1, "upsamplers": 2}
# lora_conversion_utils.py (_convert_unet_lora_key): names in the original UNet
SGM_LAYERS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
SGM_OUTER = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that a LoRA may be on: its path, the model's name before it, and the shape of its weight."""

    path: str
    shape: tuple[int, ...]


def stamps(options: Options) -> Stamps:
    """Return what tells the options' files from earlier ones of their names; raises DerivationError for one missing."""
    loras = () if options.lora is None else lora_files(options.lora)
    nets = () if options.controlnet is None else controlnet_files(options.controlnet)
    images = () if options.ip_adapter is None else ip_adapter_files(options.ip_adapter)
    return tuple(stamp(file) for file in (*loras, *nets, *images))


def adapters(layers: Layers, checkpoint: Checkpoint, options: Options) -> Adapters:
    """Return the LoRAs on the ``layers`` of a checkpoint; raises DerivationError for a key that fits none."""
    if (rank := options.lora_rank) is not None:
        own = (path for path in layers if path.startswith("unet.") and path.endswith(PROJECTIONS))
        return Adapters(dict.fromkeys(own, (("default", rank),)))
    targets = _targets(layers, checkpoint)
    found: dict[str, Ranks] = {}
    for number, file in enumerate(lora_files(options.lora or "")):
        for path, rank in _ranks(file, checkpoint, targets).items():
            found[path] = (*found.get(path, ()), (f"default_{number}", rank))
    return Adapters(found)


def _ranks(file: str, checkpoint: Checkpoint, targets: Mapping[tuple[str, str], Target]) -> dict[str, int]:
    """Return the rank of every layer that a file's LoRA is on."""
    pairs: dict[str, dict[bool, tuple[Factor, Target]]] = {}
    for factor in read_lora(file):
        if getattr(checkpoint, factor.model) is None and not checkpoint.whole:
            continue
        target = targets.get((factor.model, factor.layer))
        if target is None:
            raise DerivationError(f"{file}: {factor.key} is on no layer of {checkpoint.name}'s {factor.model}")
        pairs.setdefault(target.path, {})[factor.down] = (factor, target)
    return {path: _rank(file, pair) for path, pair in pairs.items()}


def _rank(file: str, pair: Mapping[bool, tuple[Factor, Target]]) -> int:
    factor, target = next(iter(pair.values()))
    if len(pair) != 2:
        raise DerivationError(f"{file}: {factor.key} has no {'up' if factor.down else 'down'} matrix beside it")
    rank = (pair[True][0].shape or (0,))[0]
    for down, (own, _) in pair.items():
        if rank < 1 or own.shape != lora_shapes(target.shape, rank)[not down]:
            fitting = " x ".join(map(str, target.shape))
            raise DerivationError(f"{file}: {own.key} is {list(own.shape)}, which does not fit a weight of {fitting}")
    return rank


def _targets(layers: Layers, checkpoint: Checkpoint) -> dict[tuple[str, str], Target]:
    """Return every layer by its model and the names that files have for it, "_" for "."."""
    found: dict[tuple[str, str], Target] = {}
    for path, shape in layers.items():
        model, _, layer = path.partition(".")
        for name in _names(model, layer, checkpoint):
            found[model, name] = Target(path, shape)
    return found


def _names(model: str, layer: str, checkpoint: Checkpoint) -> Iterator[str]:
    yield layer.replace(".", "_")
    if model == "unet" and checkpoint.unet is not None and checkpoint.text_encoder_2 is not None:
        yield from _sgm_name(layer, checkpoint.unet)
    elif model != "unet" and not layer.startswith("text_"):  # transformers 5 has no text_model in a CLIPTextModel
        yield "text_model_" + layer.replace(".", "_")


def _sgm_name(layer: str, unet: UNet2DConditionConfig) -> Iterator[str]:
    """Yield the layer's name in the original UNet of SDXL, in which its LoRAs are trained."""
    if layer in SGM_OUTER:
        yield SGM_OUTER[layer]
        return
    part, *names = layer.split(".")
    per_block = unet.layers_per_block[0]
    if part == "mid_block":
        kind, number, *inner = names
        yield "_".join(["middle_block", str(2 * int(number) if kind == "resnets" else 1), *_inner(inner)])
    elif part in ("down_blocks", "up_blocks"):
        block, kind, number, *inner = names
        first = int(block) * (per_block + 1)
        if kind == "downsamplers":
            yield f"input_blocks_{1 + first + per_block}_0_op"
        elif part == "down_blocks":
            yield "_".join([f"input_blocks_{1 + first + int(number)}_{SGM_PLACES[kind]}", *_inner(inner)])
        else:
            place = first + (per_block if kind == "upsamplers" else int(number))
            yield "_".join([f"output_blocks_{place}_{SGM_PLACES[kind]}", *_inner(inner)])


def _inner(names: list[str]) -> Iterator[str]:
    yield from (SGM_LAYERS.get(name, name) for name in names)
