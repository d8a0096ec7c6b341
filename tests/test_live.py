"""What is read off real diffusers pipelines: switched on as users do it, with the bytes that a trace has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from accelerate import dispatch_model
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from peft import LoraConfig

from derivation import DerivationError, derive
from derivation.ask.recommend import REMEDIES
from derivation.call import Call
from derivation.config.ip_adapter import IMAGE_ENCODER
from derivation.guard import will_fit
from derivation.options import Options
from derivation.options.live import live_options
from derivation.trace.modules import build_pipeline
from derivation.trace.offload import meta_as_gpu, on_cpu
from derivation.trace.runs import trace_pipeline
from derivation.trace.switches import switch_on
from derivation.verify.streams import naive_peak

BLOCK = 512
STEPS = {"num_inference_steps": 4}
RUNNING = {library.__name__: str(library.__version__) for library in (torch, diffusers, transformers)}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": [4, 8],
        "cross_attention_dim": 32,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32, 32, 32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "eos_token_id": 99,
        "pad_token_id": 1,
        "bos_token_id": 0,
    },
    "safety_checker/config.json": {
        "architectures": ["StableDiffusionSafetyChecker"],
        "projection_dim": 16,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    for name, content in CONFIGS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


def copied(pipe: Any, copy: Callable[[Any], Any] = deepcopy) -> Any:
    """Give the pipeline models of its own: those that build_pipeline makes are shared."""
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            setattr(pipe, name, copy(model))
    return pipe


@pytest.fixture
def pipe(folder: Path) -> Any:
    return copied(build_pipeline(folder, "txt2img"))


def processors(processor: type) -> Callable[[Any], None]:
    return lambda pipe: [model.set_attn_processor(processor()) for model in (pipe.unet, pipe.vae)] and None


def lora(pipe: Any, **config: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, **config}))


def fused(pipe: Any) -> None:
    lora(pipe)
    pipe.fuse_lora()


def channels_last(pipe: Any) -> None:
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)


def freeu_on_and_off(pipe: Any) -> None:
    pipe.enable_freeu(**FREEU)
    pipe.disable_freeu()


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)


def small_tiles(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    pipe.vae.tile_overlap_factor = 0.5


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)


TILES = {"vae_tiling": True, "tile_sample_min_size": 64, "tile_overlap_factor": 0.5}
SWITCHED: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "nothing": (lambda pipe: None, {}),
    "eager": (processors(AttnProcessor), {"attention": "eager"}),
    "fused": (processors(AttnProcessor2_0), {}),
    "xformers": (processors(XFormersAttnProcessor), {}),
    "VAE slicing": (lambda pipe: pipe.vae.enable_slicing(), {"vae_slicing": True}),
    "VAE tiling": (lambda pipe: pipe.vae.enable_tiling(), {"vae_tiling": True}),
    "small tiles": (small_tiles, TILES),
    "slicing auto": (lambda pipe: pipe.enable_attention_slicing(), {"attention_slicing": "auto"}),
    "slicing max": (lambda pipe: pipe.enable_attention_slicing("max"), {"attention_slicing": "max"}),
    "slicing 2": (lambda pipe: pipe.enable_attention_slicing(2), {"attention_slicing": 2}),
    "channels_last": (channels_last, {"channels_last": True}),
    "LoRA": (lora, {"lora_rank": 4}),
    "LoRA of rank 9": (lambda pipe: lora(pipe, r=9), {"lora_rank": 9}),
    "fused LoRA": (fused, {"lora_rank": 4, "lora_fused": True}),
    "FreeU off again": (freeu_on_and_off, {}),
    "no safety checker": (lambda pipe: setattr(pipe, "safety_checker", None), {"safety_checker": False}),
    "torch.compile": (compiled, {}),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_exactly_what_was_switched_on_is_found(name: str, pipe: Any) -> None:
    switch_on, expected = SWITCHED[name]
    switch_on(pipe)
    assert live_options(pipe) == Options(pipeline="txt2img", **RUNNING, **expected)


@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_task_and_dtype(folder: Path, task: str, dtype: str) -> None:
    assert live_options(build_pipeline(folder, task, dtype)) == Options(pipeline=task, dtype=dtype, **RUNNING)


BUILT: list[dict[str, Any]] = [
    {"controlnets": 1},
    {"controlnets": 2},
    {"ip_adapter_tokens": 4},
    {"ip_adapter_tokens": 16},
    {"offload": "model"},
    {"offload": "sequential"},
    {"ip_adapter_tokens": 4, "lora_rank": 8, "vae_slicing": True},
    {"controlnets": 1, "attention_slicing": "max"},
    {"lora_rank": 2, "offload": "model", "channels_last": True},
]


@pytest.mark.parametrize("options", BUILT, ids=str)
def test_what_the_verification_switches_on_is_found(folder: Path, options: dict[str, Any]) -> None:
    pipe = build_pipeline(folder, "img2img", switches=tuple(options.items()))
    assert live_options(pipe) == Options(pipeline="img2img", **RUNNING, **options)


def mixed_slices(pipe: Any) -> None:
    pipe.unet.set_attention_slice([1, 1, 1, 1, 4, 4, 4, 4])


def device_map(pipe: Any) -> None:
    copied(pipe, on_cpu)
    pipe.unet = dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)


def group_offload(pipe: Any) -> None:
    copied(pipe, on_cpu)
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def one_offloaded(pipe: Any) -> None:
    copied(pipe, on_cpu)
    with meta_as_gpu():
        from accelerate import cpu_offload_with_hook

        pipe.unet, _ = cpu_offload_with_hook(pipe.unet, "meta")


def published_encoder(pipe: Any, **changed: int) -> None:
    config = json.loads(IMAGE_ENCODER.read_text()) | changed
    config = transformers.CLIPVisionConfig(**config)
    with torch.device("meta"):
        pipe.register_modules(image_encoder=transformers.CLIPVisionModelWithProjection(config).half())


def adapter(pipe: Any) -> None:
    with torch.device("meta"):
        switch_on(pipe.unet, {"ip_adapter_tokens": 4})


def other_encoder(pipe: Any) -> None:
    adapter(pipe)
    published_encoder(pipe, num_hidden_layers=3)


def disabled_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.disable_lora()


def second_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS), "second")


def half_channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def half_float32(pipe: Any) -> None:
    torch.nn.Module.to(pipe.text_encoder, torch.float32)


def foreign_controlnet(pipe: Any) -> None:
    with torch.device("meta"):
        pipe.controlnet = diffusers.ControlNetModel.from_unet(pipe.unet).to(pipe.unet.dtype)
        pipe.controlnet.register_to_config(block_out_channels=(64, 64))


UNSUPPORTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "FreeU": (lambda pipe: pipe.enable_freeu(**FREEU), "enable_freeu = on"),
    "DoRA": (lambda pipe: lora(pipe, use_dora=True), "DoRA"),
    "disabled LoRA": (disabled_lora, "disabled"),
    "two LoRAs": (second_lora, "2 adapters"),
    "LoRA on to_q alone": (lambda pipe: lora(pipe, target_modules=["to_q"]), "on 8 layers"),
    "LoRA on the text encoder": (
        lambda pipe: pipe.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"])),
        "LoRA = on text_encoder",
    ),
    "a device_map": (lambda pipe: setattr(pipe, "hf_device_map", {"unet": 0}), "device_map = {'unet': 0}"),
    "a model's device_map": (device_map, "device_map"),
    "group offload": (group_offload, "unet"),
    "one model offloaded": (one_offloaded, "offload = "),
    "other processors": (lambda pipe: pipe.unet.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
    "two kinds of processors": (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), "attn_processors"),
    "slices of two sizes": (mixed_slices, "slice_size"),
    "channels_last by half": (half_channels_last, "torch.channels_last"),
    "a text encoder in float32": (half_float32, "'text_encoder': torch.float32"),
    "float8 storage": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float16),
        "unet's hooks = layerwise_casting",
    ),
    "an eager text encoder": (
        lambda pipe: pipe.text_encoder.set_attn_implementation("eager"),
        "text_encoder's attn_implementation = 'eager'",
    ),
    "a foreign ControlNet": (foreign_controlnet, "controlnet.config: block_out_channels = (64, 64)"),
    "an image encoder without an IP-Adapter": (published_encoder, "image_encoder = ('transformers'"),
    "an IP-Adapter without an image encoder": (adapter, "image_encoder = NoneType"),
    "another image encoder": (other_encoder, "image_encoder = of 3 layers"),
    "a tile of another latent size": (
        lambda pipe: setattr(pipe.vae, "tile_latent_min_size", 7),
        "tile_latent_min_size = 7",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_one_line_with_what_is(name: str, pipe: Any) -> None:
    switch_on, said = UNSUPPORTED[name]
    switch_on(pipe)
    with pytest.raises(DerivationError, match=r"is not supported \(supported: .") as caught:
        will_fit(pipe, 64, 64, free_bytes=1)
    message = str(caught.value)
    assert said in message
    assert message.isprintable()


# Bytes: what will_fit says of a live pipeline is what the real call allocates.


def rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def resident_bytes(pipe: Any) -> int:
    """Parameters and buffers that are on the device throughout: on meta, which is the device of these pipelines."""
    tensors = {
        id(tensor): tensor
        for model in pipe.components.values()
        if isinstance(model, torch.nn.Module)
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(rounded(tensor.nbytes) for tensor in tensors.values() if tensor.device.type == "meta")


TRACED: list[dict[str, Any]] = [
    {},
    {"vae_slicing": True},
    {"attention_slicing": "max"},
    {"channels_last": True},
    {"lora_rank": 4},
    {"lora_rank": 4, "lora_fused": True},
    {"controlnets": 1},
    {"ip_adapter_tokens": 4},
    {"offload": "model"},
    {"offload": "sequential"},
]


@pytest.mark.parametrize("options", TRACED, ids=str)
def test_will_fit_says_what_the_real_call_takes(folder: Path, options: dict[str, Any]) -> None:
    switches = tuple(options.items())
    pipe = build_pipeline(folder, "txt2img", switches=switches)
    size = {"height": 64, "width": 72, "batch_size": 2}
    traced = trace_pipeline(folder, Options(pipeline="txt2img", **options, **STEPS), Call(**size), paths=False)
    needed = resident_bytes(pipe) + naive_peak(traced)
    assert will_fit(pipe, **size, **STEPS, free_bytes=needed).fits
    verdict = will_fit(pipe, **size, **STEPS, free_bytes=needed - 1)
    assert (verdict.fits, verdict.needed_bytes) == (False, needed)


CHANGES = {name: row[0] for name, row in SWITCHED.items() if row[1]}
CHANGES["another scheduler"] = other_scheduler


def unfused_then_fused(pipe: Any) -> Iterator[None]:
    lora(pipe)
    yield
    pipe.unet.fuse_lora()
    yield


@pytest.mark.parametrize("name", CHANGES)
def test_a_switch_after_the_first_call_is_seen(name: str, pipe: Any) -> None:
    will_fit(pipe, 128, 128, free_bytes=0, **STEPS)
    CHANGES[name](pipe)
    fresh = derive(pipe, **STEPS).estimate(128, 128)["peak_tensor_bytes"]
    assert will_fit(pipe, 128, 128, free_bytes=0, **STEPS).needed_bytes == fresh


def test_fusing_and_disabling_a_lora_after_the_first_call_is_seen(pipe: Any) -> None:
    for _ in unfused_then_fused(pipe):
        fresh = derive(pipe).estimate(64, 64)["peak_tensor_bytes"]
        assert will_fit(pipe, 64, 64, free_bytes=0).needed_bytes == fresh
    pipe.unet.unfuse_lora()
    assert not will_fit(pipe, 64, 64, free_bytes=0).fits
    pipe.disable_lora()
    with pytest.raises(DerivationError, match="disabled"):
        will_fit(pipe, 64, 64, free_bytes=0)


def test_later_calls_on_a_real_pipeline_take_microseconds(pipe: Any) -> None:
    will_fit(pipe, 64, 64, free_bytes=1 << 30)
    best = min(_seconds(pipe) for _ in range(5))
    assert best < 500e-6, f"{best * 1e6:.0f} microseconds"


def _seconds(pipe: Any) -> float:
    start = time.perf_counter()
    for _ in range(50):
        will_fit(pipe, 64, 64, free_bytes=1 << 30)
    return (time.perf_counter() - start) / 50


@pytest.mark.parametrize("options", [{"controlnets": 1}, {"controlnets": 2}, {"ip_adapter_tokens": 4}], ids=str)
def test_weights_that_are_on_the_gpu_are_not_counted_again(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("derivation.guard._device", lambda parameter: "cuda")
    switches = tuple(options.items())
    pipe = build_pipeline(folder, "txt2img", switches=switches)
    traced = trace_pipeline(folder, Options(pipeline="txt2img", **options, **STEPS), Call(64, 64), paths=False)
    assert will_fit(pipe, 64, 64, free_bytes=0, **STEPS).needed_bytes == naive_peak(traced)


ON_MODELS = [remedy for remedy in REMEDIES if remedy.call.startswith("pipe.") and "offload" not in remedy.change]


@pytest.mark.parametrize("remedy", ON_MODELS, ids=lambda remedy: remedy.name)
def test_a_remedys_line_of_python_does_what_it_says(remedy: Any, pipe: Any) -> None:
    processors(AttnProcessor)(pipe)
    pipe.to(torch.float32)
    before = live_options(pipe)
    exec(remedy.call, {"pipe": pipe, "torch": torch, "AttnProcessor2_0": AttnProcessor2_0})
    changed = live_options(pipe).as_dict()
    assert {key: value for key, value in changed.items() if value != before.as_dict()[key]} == remedy.change


@pytest.mark.parametrize("remedy", [r for r in REMEDIES if "offload" in r.change], ids=lambda remedy: remedy.name)
def test_the_offload_remedies_name_methods_of_the_pipeline(remedy: Any, pipe: Any) -> None:
    method = remedy.call.removeprefix("pipe.").removesuffix("()")
    assert callable(getattr(pipe, method))


class Skipping(diffusers.models.attention.BasicTransformerBlock):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def _skip(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if type(module) is diffusers.models.attention.BasicTransformerBlock:
            module.__class__ = Skipping


def _patch(pipe: Any) -> None:
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _widen(pipe: Any) -> None:
    pipe.unet.conv_out = torch.nn.Conv2d(32, 8, 3, padding=1, device="meta", dtype=torch.float16)


def _extend(pipe: Any) -> None:
    pipe.vae.spare = torch.nn.Parameter(torch.empty(10, device="meta", dtype=torch.float16))


def _mix(pipe: Any) -> None:
    pipe.unet.conv_out.to(torch.float32)


def _prune(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].conv1.bias = None


CHANGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a class of one's own": (_skip, "'s class = "),
    "a patched forward": (_patch, "unet.forward = "),
    "a forward hook": (lambda pipe: pipe.vae.register_forward_hook(print), "vae's forward hooks = "),
    "a wider module": (_widen, "unet.conv_out.weight = "),
    "an extra parameter": (_extend, "vae.spare = "),
    "a module in another type": (_mix, "unet.conv_out.weight = "),
    "a pruned layer": (_prune, "unet = "),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_runs_otherwise_than_its_config_says_is_refused_by_name(pipe: Any, name: str) -> None:
    change, said = CHANGED[name]
    change(pipe)
    for ask in (lambda: derive(pipe), lambda: will_fit(pipe, 64, 64, free_bytes=1)):
        with pytest.raises(DerivationError, match="is not supported") as caught:
            ask()
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("height", ["64", {}, [64], 6.4, 0, True])
def test_will_fit_refuses_what_is_no_size_in_one_line(pipe: Any, height: object) -> None:
    with pytest.raises(DerivationError, match="height = "):
        will_fit(pipe, height, 64, free_bytes=1)


@pytest.mark.parametrize("pipe", [None, 3, {}, [], "x"])
def test_will_fit_refuses_what_is_no_pipeline(pipe: object) -> None:
    with pytest.raises(DerivationError):
        will_fit(pipe, 64, 64, free_bytes=1)
