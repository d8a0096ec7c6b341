"""A model's parameters and buffers as storages: what ``model.to(...)`` allocates and frees, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from derivation.config.named_files import MAX_FILES
from derivation.tape.tape import Storage, tape

# The order in which the models and their submodules register what they contain; Module._apply follows it.
REGISTRATION = (
    *("vision_model", "text_model", "embeddings", "pre_layrnorm", "encoder", "decoder", "post_layernorm"),
    *("final_layer_norm", "quant_conv", "post_quant_conv", "text_projection", "visual_projection"),
    *("concept_embeds", "special_care_embeds", "concept_embeds_weights", "special_care_embeds_weights"),
    *("token_embedding", "patch_embedding", "position_embedding", "class_embedding", "position_ids"),
    *("self_attn", "k_proj", "v_proj", "q_proj", "out_proj", "layer_norm1", "mlp", "fc1", "fc2", "layer_norm2"),
    *("nets", "conv_in", "time_embedding", "add_embedding", "linear_1", "cond_proj", "linear_2", "blocks"),
    *("controlnet_cond_embedding", "down_blocks", "controlnet_down_blocks", "controlnet_mid_block"),
    *("up_blocks", "mid_block", "image_projection_layers", "image_embeds", "ln0", "ln1", "attn"),
    *("attentions", "resnets", "downsamplers", "upsamplers", "norm1", "conv1", "attn1", "time_emb_proj", "norm2"),
    *("conv2", "attn2", "conv_shortcut", "norm3", "ff", "net", "norm", "proj_in", "transformer_blocks", "group_norm"),
    *("proj", "proj_out", "norm_out", "layers", "to_q", "to_k", "to_v", "to_out", "processor", "to_k_ip", "to_v_ip"),
    *("conv_norm_out", "conv_out", "encoder_hid_proj", "conv", "base_layer", "lora_A", "lora_B", "default"),
    *(f"default_{number}" for number in range(MAX_FILES)),
    *("weight", "bias", "latents"),
)
PLACES = {name: i for i, name in enumerate(REGISTRATION)}

# path -> shape and dtype
Entries = Mapping[str, tuple[tuple[int, ...], str]]


class ModelWeights:
    """The parameters and buffers of the model ``name``; ``on_gpu`` tells whether the run finds them there."""

    def __init__(self, name: str, entries: Entries, dtype: str, on_gpu: bool) -> None:
        self.name, self.dtype, self.on_gpu = name, dtype, on_gpu
        self.entries = [(path, *entries[path]) for path in registered(entries)]
        # None: not allocated in this run
        self.storages: list[Storage | None] = [None] * len(self.entries)

    def load(self) -> bool:
        """``model.to("cuda")``; returns whether it was on the CPU."""
        if self.on_gpu:
            return False
        self.storages = [tape().load(path, shape, dtype) for path, shape, dtype in self.entries]
        self.on_gpu = True
        return True

    def offload(self) -> bool:
        """``model.to("cpu")``; returns whether it was on the GPU."""
        if not self.on_gpu:
            return False
        for i in range(len(self.entries)):
            self._replace(i, None)
        self.on_gpu = False
        return True

    def to(self, dtype: str, *parts: str) -> None:
        """``model.to(dtype=dtype)``, or of its ``parts``: each new parameter exists before the old one is freed."""
        changed = tape().dtypes
        for module in [f"{self.name}.{part}" for part in parts] or [self.name]:
            for i, (path, shape, old) in enumerate(self.entries):
                if old != dtype and path.startswith(f"{module}."):
                    if self.on_gpu:
                        self._replace(i, tape().load(path, shape, dtype))
                    self.entries[i] = (path, shape, dtype)
            for inner in [name for name in changed if name.startswith(f"{module}.")]:
                del changed[inner]
            if module != self.name or dtype != self.dtype:
                changed[module] = dtype
        self.dtype = self.dtype if parts else dtype

    def _replace(self, i: int, storage: Storage | None) -> None:
        if self.storages[i] is None:
            tape().unload(*self.entries[i])
        self.storages[i] = storage

    def outlive(self) -> None:
        """Leave what is on the GPU allocated after the run."""
        for storage in self.storages:
            if storage is not None:
                storage.disown()


def registered(paths: Mapping[str, object]) -> list[str]:
    """Return the paths, each below a model's name, in the order of ``Module._apply``.

    Those of a real module stand in its own order already: there a child's come before its parent's.
    """
    return list(_registered(tuple(paths)))


@lru_cache(maxsize=256)
def _registered(paths: tuple[str, ...]) -> tuple[str, ...]:
    if any(_place(path) is None for path in paths):
        return tuple(_children_first(list(paths), 1))
    return tuple(sorted(paths, key=lambda path: _place(path) or ()))


def _children_first(paths: list[str], depth: int) -> Iterator[str]:
    """Yield ``paths``, which agree in ``depth`` names, each module's children before its own parameters."""
    children: dict[str, list[str]] = {}
    own: list[str] = []
    for path in paths:
        names = path.split(".")
        if len(names) > depth + 1:
            children.setdefault(names[depth], []).append(path)
        else:
            own.append(path)
    for inside in children.values():
        yield from _children_first(inside, depth + 1)
    yield from own


@lru_cache(maxsize=65536)
def _place(path: str) -> tuple[int, ...] | None:
    """Return what a path is sorted by, None for one with a name that is not known."""
    _, *names = path.split(".")
    places = [int(name) if name.isdigit() else PLACES.get(name) for name in names]
    return tuple(place for place in places if place is not None) if None not in places else None
