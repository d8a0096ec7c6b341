"""What a derivation assumes beyond the checkpoint, and the sizes that it is evaluated at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from derivation.config.checks import MAX_SIZE
from derivation.config.schedulers import DEFAULTS
from derivation.errors import typed
from derivation.gpu.profile import SCRATCH
from derivation.libraries import Libraries, libraries
from derivation.options import choices
from derivation.options.checks import check_values
from derivation.options.choices import EAGER, each
from derivation.options.row import Remedy, Row, row


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of a run, named as diffusers' pipelines name them; raises DerivationError for a bad one.

    ``attention`` "xformers" is another name of "efficient", which replaces it, as ``dtype`` "fp16" is of "float16";
    ``vae_dtype`` is the VAE's alone. ``torch``, ``diffusers`` and ``transformers`` are the versions whose allocations
    count (None: libraries.py says which); ``scratch`` is read where a ``gpu`` is named; ``vae_slicing``,
    ``vae_tiling``, ``attention_slicing`` ("auto", "max" or a number) and ``offload`` ("model", "sequential") are what
    the pipeline's ``enable_...`` methods set; ``tile_sample_min_size`` (None: the VAE's sample_size) and
    ``tile_overlap_factor`` are the VAE's attributes. ``channels_last`` is the memory format of the weights of UNet
    and VAE. ``lora`` names LoRA files, separated by commas, whose headers alone are read. ``lora_rank`` is the rank of
    a LoRA on the UNet's attention projections, ``lora_fused`` whether ``fuse_lora`` merged it; ``controlnets`` counts
    ControlNets made from the UNet, ``controlnet`` names folders of others, or their config files, separated by commas;
    ``ip_adapter`` names IP-Adapter files likewise, each given ``ip_adapter_images`` images, ``ip_adapter_tokens`` is
    how many image tokens one of the plain kind adds.
    ``strength`` None is the default of the pipeline's class; ``scheduler`` replaces the checkpoint's, as
    ``Class.from_config(pipe.scheduler.config)`` does; ``negative_prompt`` says whether one is given.
    """

    pipeline: str = row("img2img", "Pipeline", "pipeline", choices=lambda: choices.PIPELINES)
    dtype: str = row(
        "float16",
        "Type of weights and activations; fp16, bf16 and fp32 for short",
        "pipeline",
        choices=lambda: choices.DTYPES,
        aliases=choices.DTYPE_ALIASES,
        matrix=each("dtype", "bfloat16", "float32"),
        remedies=(
            Remedy("float16", {"dtype": "float16"}, "none that is visible; faster", "pipe.to(torch.float16)", 2),
        ),
    )
    vae_dtype: str | None = row(
        None,
        "Type of the VAE's weights where it is another, as pipe.vae.to(...) leaves it",
        "pipeline",
        choices=lambda: choices.DTYPES,
        aliases=choices.DTYPE_ALIASES,
        drawn={"vae": choices.DTYPES},
        matrix=each("vae_dtype", "float32"),
        assumed="the pipeline's first call, which leaves the VAE in the type of the others",
    )
    attention: str = row(
        "efficient",
        "Attention backend; xformers is efficient",
        "pipeline",
        choices=lambda: (*choices.ATTENTION, *choices.ATTENTION_ALIASES),
        aliases=choices.ATTENTION_ALIASES,
        matrix=each("attention", EAGER, "math", "flash"),
        remedies=(
            Remedy("fused attention", {"attention": "efficient"}, "none: the same result, faster", choices.FUSED, 1),
        ),
    )
    gpu: str | None = row(
        None,
        "GPU, architecture or a card's JSON file, such as rtx-4090 or sm89: adds scratch, the allocator, the context.",
        "machine",
    )
    torch: str | None = row(None, "torch version whose allocations count.", "machine")
    diffusers: str | None = row(None, "diffusers version whose allocations count.", "machine")
    transformers: str | None = row(None, "transformers version whose allocations count.", "machine")
    scratch: str = row(
        "expected",
        "Scratch, which cuDNN, cuBLAS and attention take on a GPU",
        "machine",
        choices=lambda: SCRATCH,
    )
    alloc_conf: str | None = row(
        None,
        "PYTORCH_CUDA_ALLOC_CONF of the process, such as expandable_segments:True; read with a GPU.",
        "machine",
    )
    safety_checker: bool = row(
        True,
        "Whether the safety checker runs.",
        "pipeline",
        drawn={"pipeline": (False,)},
        matrix=({"safety_checker": False},),
        remedies=(
            Remedy("no safety checker", {"safety_checker": False}, "no filter", "pipe.safety_checker = None", 8),
        ),
    )
    num_images_per_prompt: int = row(
        1,
        "Images per prompt.",
        "call",
        most=MAX_SIZE,
        drawn={"pipeline": (2, 3)},
        matrix=({"num_images_per_prompt": 2},),
        remedies=(
            Remedy(
                "one image a prompt", {"num_images_per_prompt": 1}, "one call an image", "num_images_per_prompt=1", 4
            ),
        ),
    )
    num_inference_steps: int = row(choices.DEFAULT_STEPS, "Denoising steps.", "call", most=choices.MAX_STEPS)
    strength: float | None = row(
        None,
        "How much img2img and inpainting change the image, in (0, 1].",
        "call",
        drawn={"pipeline": (0.4, 0.75, 1.0)},
    )
    scheduler: str | None = row(
        None,
        "Scheduler class in place of the checkpoint's",
        "call",
        choices=lambda: tuple(sorted(DEFAULTS)),
        drawn={"pipeline": tuple(sorted(DEFAULTS))},
        matrix=each("scheduler", *sorted(DEFAULTS)),
    )
    negative_prompt: bool = row(
        False,
        "Whether a negative prompt is given.",
        "call",
        drawn={"pipeline": (True,)},
        matrix=({"negative_prompt": True},),
    )
    clip_skip: int | None = row(
        None,
        "Last layers of the text encoder to skip.",
        "call",
        most=MAX_SIZE,
        drawn={"pipeline": (1,)},
        matrix=({"clip_skip": 1},),
    )
    vae_slicing: bool = row(
        False,
        "As pipe.vae.enable_slicing() does.",
        "pipeline",
        drawn={"vae": (True,)},
        matrix=({"vae_slicing": True},),
        remedies=(
            Remedy(
                "VAE slicing",
                {"vae_slicing": True},
                "slightly slower with several images",
                "pipe.vae.enable_slicing()",
                3,
            ),
        ),
    )
    vae_tiling: bool = row(
        False,
        "As pipe.vae.enable_tiling() does.",
        "pipeline",
        drawn={"vae": (True,)},
        matrix=({"vae_tiling": True}, {"vae_tiling": True, "vae_slicing": True}),
        remedies=(
            Remedy(
                "VAE tiling", {"vae_tiling": True}, "slower; tones may differ at seams", "pipe.vae.enable_tiling()", 5
            ),
        ),
    )
    tile_sample_min_size: int | None = row(
        None,
        "Side of a VAE tile in pixels, else the VAE's sample_size.",
        "pipeline",
        most=MAX_SIZE,
        drawn={"vae": (32, 64, 100, 128)},
    )
    tile_overlap_factor: float = row(
        choices.TILE_OVERLAP_FACTOR,
        "Part of a VAE tile that the next one repeats, 0 to 0.5.",
        "pipeline",
        drawn={"vae": (0.0, 0.1, 0.3, 0.5)},
    )
    attention_slicing: str | int | None = row(
        None,
        "As pipe.enable_attention_slicing(...) does: auto, max or a slice size.",
        "pipeline",
        words=choices.SLICINGS,
        most=MAX_SIZE,
        drawn={"unet": ("max", 1)},
        matrix=each("attention_slicing", "auto", "max", 2),
        remedies=(
            Remedy("sliced attention", {"attention_slicing": "auto"}, "slower", "pipe.enable_attention_slicing()", 6),
        ),
    )
    channels_last: bool = row(
        False,
        "Whether the weights of UNet and VAE are in torch.channels_last.",
        "pipeline",
        drawn={"unet": (True,), "vae": (True,)},
        matrix=({"channels_last": True},),
    )
    offload: str | None = row(
        None,
        "As pipe.enable_model_cpu_offload() or enable_sequential_cpu_offload() do: model or sequential.",
        "pipeline",
        choices=lambda: choices.OFFLOADS,
        drawn={"unet": ("sequential",), "vae": ("sequential",), "pipeline": choices.OFFLOADS},
        matrix=each("offload", *choices.OFFLOADS),
        remedies=(
            Remedy(
                "model offload",
                {"offload": "model"},
                "weights cross the bus once a call",
                "pipe.enable_model_cpu_offload()",
                7,
            ),
            Remedy(
                "sequential offload",
                {"offload": "sequential"},
                "many times slower",
                "pipe.enable_sequential_cpu_offload()",
                9,
            ),
        ),
        absent="CPU offload",
    )
    lora: str | None = row(
        None,
        "LoRA files in safetensors format, separated by commas; their headers say each layer's rank.",
        "pipeline",
        drawn={"pipeline": ("1", "2")},
        assumed="every LoRA file active at once, in the dtype of the layer that it is on",
        absent="LoRA",
    )
    lora_rank: int | None = row(
        None,
        "Rank of a LoRA on the UNet's attention projections.",
        "pipeline",
        most=MAX_SIZE,
        drawn={"unet": (1, 4, 33)},
        matrix=({"lora_rank": 4}, {"lora_rank": 64, "lora_fused": True}),
        assumed="a LoRA on to_q, to_k, to_v and to_out.0 of every attention of the UNet, of one rank",
        absent="LoRA",
    )
    lora_fused: bool = row(
        False,
        "Whether pipe.fuse_lora() has merged the LoRA.",
        "pipeline",
        drawn={"unet": (True,)},
        assumed="the LoRA's own weights stay beside the merged ones",
    )
    controlnets: int = row(
        0,
        "How many ControlNets, each made from the UNet, condition it.",
        "pipeline",
        least=0,
        most=choices.MAX_CONTROLNETS,
        drawn={"pipeline": (1, 2)},
        matrix=each("controlnets", 1, 2),
        assumed="each ControlNet has the UNet's architecture and one control image a prompt",
        absent="ControlNet",
    )
    controlnet: str | None = row(
        None,
        "ControlNet folders, or their config.json, separated by commas.",
        "pipeline",
        drawn={"pipeline": ("1", "2")},
        assumed="each ControlNet has one control image a prompt",
        absent="ControlNet",
    )
    ip_adapter: str | None = row(
        None,
        "IP-Adapter files in safetensors format, separated by commas; their headers say what they are.",
        "pipeline",
        drawn={"pipeline": ("1", "2")},
        assumed="one ip_adapter_image an IP-Adapter, which the image encoder beside its file, else ViT-H/14, encodes",
        absent="IP-Adapter",
    )
    ip_adapter_images: int = row(
        1,
        "Images that each IP-Adapter is given.",
        "call",
        most=choices.MAX_ADAPTER_IMAGES,
        drawn={"unet": (2, 3)},
        matrix=({"ip_adapter_tokens": 4, "ip_adapter_images": 2},),
    )
    ip_adapter_tokens: int | None = row(
        None,
        "Image tokens that an IP-Adapter adds to the cross-attention.",
        "pipeline",
        most=MAX_SIZE,
        drawn={"unet": (4, 16)},
        matrix=({"ip_adapter_tokens": 4},),
        assumed="the IP-Adapter's images are encoded by OpenCLIP ViT-H/14",
        absent="IP-Adapter",
    )

    def __post_init__(self) -> None:
        for name, hint in _hints(Options).items():
            object.__setattr__(self, name, TABLE[name].spelled(getattr(self, name)))
            typed(name, getattr(self, name), hint)
        for name, entry in TABLE.items():
            entry.check(name, getattr(self, name))
        check_values(self.as_dict())

    @property
    def libraries(self) -> Libraries:
        """The verified versions whose allocations count."""
        return libraries(self.torch, self.diffusers, self.transformers)

    @property
    def image_prompted(self) -> bool:
        """Whether there are IP-Adapters."""
        return self.ip_adapter_tokens is not None or self.ip_adapter is not None

    @property
    def controlled(self) -> bool:
        """Whether there are ControlNets."""
        return self.controlnets > 0 or self.controlnet is not None

    def dtype_of(self, model: str) -> str:
        """Return the type of a model's weights as the pipeline is called."""
        return self.vae_dtype or self.dtype if model == "vae" else self.dtype

    def chosen(self, name: str) -> bool:
        """Return whether an option differs from its default."""
        return bool(getattr(self, name) != _DEFAULTS[name])

    def as_dict(self) -> dict[str, object]:
        """Return the options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def told(self) -> dict[str, object]:
        """Return the options by name, without those of choices.UNTOLD that are not chosen."""
        return {
            name: value for name, value in self.as_dict().items() if name not in choices.UNTOLD or self.chosen(name)
        }


_DEFAULTS = {field.name: field.default for field in fields(Options)}
# Every option by name.
TABLE: Mapping[str, Row] = {field.name: field.metadata["row"] for field in fields(Options)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
