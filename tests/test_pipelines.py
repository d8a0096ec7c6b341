"""Every pipeline, scheduler and option against the real pipelines: stage peaks and event streams, zero tolerance.

The bundled checkpoints run with a few combinations each, small checkpoints of both families with many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import REFINER, SD15, SD_2_1, SDXL

from derivation import Options, derive
from derivation.config import load
from derivation.errors import DerivationError
from derivation.trace.modules import build_scheduler
from derivation.verify import build_vae
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.walk.components import parameters
from derivation.walk.pipelines.weights import registered
from derivation.walk.schedulers import SCHEDULERS
from derivation.walk.schedulers.base import SPACINGS

INPAINTING = "runwayml/stable-diffusion-inpainting"
SD21_BASE = "stabilityai/stable-diffusion-2-1-base"
TASKS = ("txt2img", "img2img", "inpaint")

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "eos_token_id": 99,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
TEXT_2 = TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 64, "projection_dim": 48}
ADDED = {
    "cross_attention_dim": 96,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 6 * 8,
}
# as published: other classes' keys included
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def index(class_name: str, components: Mapping[str, str], **flags: bool) -> dict[str, Any]:
    return {"_class_name": class_name, **{name: ["library", cls] for name, cls in components.items()}, **flags}


def write(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def small_sd(folder: Path, scheduler: Mapping[str, Any] = SCHEDULER, **unet: Any) -> Path:
    components = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "scheduler": scheduler["_class_name"],
    }
    files = {
        "model_index.json": index("StableDiffusionPipeline", components),
        "unet/config.json": UNET | unet,
        "vae/config.json": VAE,
        "text_encoder/config.json": TEXT,
        "scheduler/scheduler_config.json": scheduler,
    }
    return write(folder, files)


def small_xl(folder: Path, scheduler: Mapping[str, Any] = SCHEDULER, vae: Mapping[str, Any] = VAE, **unet: Any) -> Path:
    components = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "scheduler": scheduler["_class_name"],
    }
    files = {
        "model_index.json": index("StableDiffusionXLPipeline", components, force_zeros_for_empty_prompt=True),
        "unet/config.json": UNET | ADDED | unet,
        "vae/config.json": vae,
        "text_encoder/config.json": TEXT,
        "text_encoder_2/config.json": TEXT_2,
        "scheduler/scheduler_config.json": scheduler,
    }
    return write(folder, files)


def small_lcm(folder: Path) -> Path:
    small_sd(folder, SCHEDULER | {"_class_name": "LCMScheduler"}, time_cond_proj_dim=256)
    content = json.loads((folder / "model_index.json").read_text())
    return write(folder, {"model_index.json": content | {"_class_name": "LatentConsistencyModelPipeline"}})


SMALL = {"sd": small_sd, "xl": small_xl}


def check(
    source: object,
    height: int = 64,
    width: int = 72,
    batch_size: int = 1,
    length: int = 77,
    guidance: bool = True,
    **options: Any,
) -> None:
    options = {"num_inference_steps": 3, "strength": 0.7} | options
    derivation = derive(source, **options)
    for comparison in compare_pipeline(derivation, height, width, batch_size, length, guidance):
        call = f"check({str(source)!r}, {height}, {width}, {batch_size}, {length}, {guidance}, **{options})"
        assert comparison.match, f"{comparison}\nreproduce: {call}"


@pytest.fixture(scope="module", params=sorted(SMALL))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SMALL[request.param](tmp_path_factory.mktemp(request.param))


BUNDLED = [
    *((SD15, task) for task in TASKS),
    (INPAINTING, "inpaint"),
    *((SD_2_1, task) for task in TASKS),
    (SD21_BASE, "img2img"),
    *((SDXL, task) for task in TASKS),
    (REFINER, "img2img"),
    (REFINER, "inpaint"),
]
SCHEDULER_CYCLE = [None, *sorted(SCHEDULERS)]
DTYPE_CYCLE = ["float16", "float16", "bfloat16", "float16", "float32"]


@pytest.mark.parametrize(("number", "case"), enumerate(BUNDLED), ids=str)
def test_bundled_checkpoints_equal_the_trace(number: int, case: tuple[str, str]) -> None:
    name, task = case
    options: dict[str, Any] = {
        "pipeline": task,
        "scheduler": SCHEDULER_CYCLE[number % len(SCHEDULER_CYCLE)],
        "dtype": DTYPE_CYCLE[number % len(DTYPE_CYCLE)],
    }
    check(name, 8, 72, guidance=number % 3 != 0, **options)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@pytest.mark.parametrize("task", TASKS)
def test_every_scheduler_equals_the_trace(small: Path, task: str, scheduler: str) -> None:
    number = TASKS.index(task) + sorted(SCHEDULERS).index(scheduler)
    dtype = DTYPE_CYCLE[number % len(DTYPE_CYCLE)]
    check(small, guidance=number % 2 == 0, pipeline=task, scheduler=scheduler, dtype=dtype, num_inference_steps=5)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_iterations_recorded_once_stand_for_all(tmp_path: Path, scheduler: str) -> None:
    check(small_sd(tmp_path), pipeline="inpaint", scheduler=scheduler, num_inference_steps=20)


DPM, UNIPC = {"_class_name": "DPMSolverMultistepScheduler"}, {"_class_name": "UniPCMultistepScheduler"}
EULER, DDPM = {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "DDPMScheduler"}
DEIS, HEUN = {"_class_name": "DEISMultistepScheduler"}, {"_class_name": "HeunDiscreteScheduler"}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler"}
NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
THRESHOLD = {"thresholding": True}
VARIANTS: list[dict[str, Any]] = [
    {"skip_prk_steps": False, "prediction_type": "v_prediction"},
    *({"_class_name": "DDIMScheduler", "prediction_type": p, "clip_sample": True} for p in ("sample", "v_prediction")),
    {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
    {"_class_name": "DDIMScheduler", "timestep_spacing": "linspace", "set_alpha_to_one": False},
    *({"_class_name": "LCMScheduler", "prediction_type": p, "clip_sample": True} for p in ("sample", "v_prediction")),
    *({"_class_name": "EulerDiscreteScheduler", "prediction_type": p} for p in ("sample", "v_prediction")),
    {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"},
    {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "v_prediction"},
    *(DPM | {"solver_order": order} for order in (1, 2, 3)),
    *(DPM | {"solver_order": order, "algorithm_type": "sde-dpmsolver++"} for order in (1, 2, 3)),
    DPM | {"solver_type": "heun", "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
    DPM | {"solver_order": 3, "euler_at_final": True, "prediction_type": "sample"},
    DPM | {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    *(UNIPC | {"solver_order": order, "lower_order_final": final} for order in (1, 2, 3) for final in (True, False)),
    UNIPC | {"solver_type": "bh1", "prediction_type": "v_prediction", "disable_corrector": [0, 1]},
    UNIPC | {"solver_order": 3, "predict_x0": False, "prediction_type": "v_prediction"},
    *(UNIPC | {"predict_x0": False, "prediction_type": p} for p in ("epsilon", "sample")),
    *({"_class_name": name} | THRESHOLD for name in ("DDIMScheduler", "LCMScheduler")),
    *(chosen | THRESHOLD for chosen in (DPM, UNIPC, DPM | NOISE)),
    DPM | NOISE | {"solver_order": 3},
    DPM | NOISE | {"prediction_type": "sample", "solver_type": "heun"},
    DPM | NOISE | {"algorithm_type": "sde-dpmsolver", "prediction_type": "v_prediction"},
    DPM | NOISE | {"algorithm_type": "deis", "solver_type": "logrho"},
    *(chosen | FLOW for chosen in (DPM, UNIPC | {"solver_order": 3})),
    *(DDPM | {"variance_type": v} for v in ("fixed_small_log", "fixed_large", "fixed_large_log")),
    *(DDPM | {"prediction_type": p} | THRESHOLD for p in ("sample", "v_prediction")),
    DDPM | {"timestep_spacing": "trailing", "steps_offset": 0},
    *({"_class_name": "TCDScheduler", "prediction_type": p} for p in ("sample", "v_prediction")),
    *(DEIS | {"solver_order": order, "lower_order_final": order != 3} for order in (1, 2, 3)),
    *(DEIS | {"solver_order": 3, "prediction_type": p} | THRESHOLD for p in ("sample", "v_prediction")),
    DEIS | FLOW,
    HEUN | {"clip_sample": True, "prediction_type": "sample", "use_karras_sigmas": True},
    HEUN | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    *(
        {"_class_name": f"KDPM2{kind}DiscreteScheduler", "use_karras_sigmas": True, "prediction_type": "v_prediction"}
        for kind in ("", "Ancestral")
    ),
    *({"_class_name": "LMSDiscreteScheduler", "prediction_type": p} for p in ("sample", "v_prediction")),
    {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"},
    {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_schedule": "exponential"},
    *(EDM | {"solver_order": order, "prediction_type": "v_prediction"} for order in (1, 3)),
    *(EDM | {"algorithm_type": "sde-dpmsolver++", "solver_order": order} for order in (1, 2)),
    EDM | {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"} | THRESHOLD,
    EULER | {"interpolation_type": "log_linear"},
    EULER | {"interpolation_type": "log_linear", "timestep_type": "continuous", "prediction_type": "v_prediction"},
    EULER | {"interpolation_type": "log_linear", "use_karras_sigmas": True, "timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_scheduler_options_equal_the_trace(tmp_path: Path, variant: dict[str, Any]) -> None:
    check(small_xl(tmp_path, SCHEDULER | variant), 64, 8, pipeline="img2img", strength=0.8, num_inference_steps=8)


@pytest.mark.parametrize(
    ("batch_size", "length", "options"),
    [
        (2, 77, {"num_images_per_prompt": 2}),
        (2, 77, {"num_images_per_prompt": 3, "negative_prompt": True, "dtype": "bfloat16"}),
        (1, 154, {"num_images_per_prompt": 2, "scheduler": "UniPCMultistepScheduler"}),
        (1, 77, {"negative_prompt": True, "clip_skip": 1}),
        (1, 77, {"strength": 1.0, "attention": "eager"}),
        (3, 9, {"strength": 1.0, "attention": "math", "dtype": "float32"}),
        (1, 77, {"strength": 0.5, "num_inference_steps": 2, "attention": "flash"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", TASKS)
def test_options_equal_the_trace(small: Path, task: str, batch_size: int, length: int, options: dict[str, Any]) -> None:
    check(small, 40, 72, batch_size, length, task != "img2img", pipeline=task, **options)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [None, 1.0, 0.6])
@pytest.mark.parametrize("family", sorted(SMALL))
def test_inpainting_equals_the_trace(tmp_path: Path, family: str, strength: float | None, channels: int) -> None:
    folder = SMALL[family](tmp_path, in_channels=channels)
    check(folder, pipeline="inpaint", strength=strength, num_images_per_prompt=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "change", [{"force_upcast": False}, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}], ids=str
)
def test_vae_options_of_sdxl_equal_the_trace(tmp_path: Path, change: dict[str, Any], dtype: str) -> None:
    check(small_xl(tmp_path, vae=VAE | change), pipeline="img2img", dtype=dtype)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", sorted(SMALL))
def test_guidance_distilled_unets_equal_the_trace(tmp_path: Path, family: str, task: str, guidance: bool) -> None:
    folder = SMALL[family](tmp_path, SCHEDULER | {"_class_name": "LCMScheduler"}, time_cond_proj_dim=256)
    check(folder, guidance=guidance, pipeline=task, num_images_per_prompt=2, negative_prompt=True)
    if guidance:
        derivation = derive(folder, pipeline=task)
        assert derivation.stage_peaks(64, 64) == derivation.stage_peaks(64, 64, guidance=False)


def test_guidance_distilled_unets_with_a_controlnet_equal_the_trace(tmp_path: Path) -> None:
    folder = small_xl(tmp_path, time_cond_proj_dim=256)
    check(folder, pipeline="txt2img", controlnets=1)
    for comparison in compare_components(derive(folder, pipeline="txt2img", controlnets=1), 64, 72):
        assert comparison.match, comparison
    with pytest.raises(DerivationError, match="time_cond_proj_dim = 256 is not supported with controlnets in img2img"):
        _ = derive(folder, pipeline="img2img", controlnets=1).program(True).generic


CONSISTENCY: list[tuple[int, int, bool, dict[str, Any]]] = [
    (1, 77, True, {"pipeline": "txt2img", "num_inference_steps": 1}),
    (2, 77, True, {"pipeline": "txt2img", "num_inference_steps": 20, "num_images_per_prompt": 2, "clip_skip": 1}),
    (1, 154, True, {"pipeline": "txt2img", "dtype": "float32"}),
    (1, 77, True, {"strength": None, "num_inference_steps": 4}),
    (2, 77, False, {"strength": 0.5, "num_inference_steps": 20}),
    (1, 77, True, {"offload": "model"}),
]


@pytest.mark.parametrize(("batch_size", "length", "guidance", "options"), CONSISTENCY, ids=str)
def test_latent_consistency_pipelines_equal_the_trace(
    tmp_path: Path, batch_size: int, length: int, guidance: bool, options: dict[str, Any]
) -> None:
    check(small_lcm(tmp_path), 64, 72, batch_size, length, guidance, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline": "img2img", "num_inference_steps": 50}, "above original_inference_steps = 50 x strength = 0.8"),
        ({"pipeline": "inpaint"}, "pipeline = inpaint"),
        ({"num_inference_steps": 4, "negative_prompt": True}, "negative_prompt = True"),
        ({"pipeline": "txt2img", "controlnets": 1}, "controlnets = 1"),
        ({"num_inference_steps": 4, "scheduler": "DDIMScheduler"}, "DDIMScheduler"),
    ],
    ids=str,
)
def test_what_latent_consistency_pipelines_refuse(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(DerivationError, match=named):
        _ = derive(small_lcm(tmp_path), **options).program(True).generic


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_one_step_equals_the_trace(small: Path, scheduler: str) -> None:
    check(small, guidance=False, pipeline="txt2img", scheduler=scheduler, num_inference_steps=1)


@pytest.mark.parametrize("change", [{}, {"mid_block_add_attention": False, "use_quant_conv": False}], ids=str)
def test_parameters_are_cast_in_their_own_order(tmp_path: Path, change: dict[str, Any]) -> None:
    derived = parameters(load(small_xl(tmp_path, vae=VAE | change)), Options())["vae"]
    real = build_vae(VAE | change).named_parameters()
    assert [(path, derived[path][0]) for path in registered(derived)] == [
        (f"vae.{name}", tuple(parameter.shape)) for name, parameter in real
    ]


def test_the_upcast_vae_of_sdxl_grows_by_the_size_of_its_weights() -> None:
    tape = derive(SDXL, pipeline="txt2img").program(True).generic.tape
    assert sum(a.nbytes for a in tape.allocations if a.loaded) == 2 * 83_653_863


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (SD15, {"scheduler": "RePaintScheduler"}, "scheduler = 'RePaintScheduler' is not supported"),
        (SD15, {"scheduler": "TCDScheduler", "num_inference_steps": 51}, "above original_inference_steps = 50"),
        (SD15, {"clip_skip": 0}, "clip_skip = 0"),
        (SD15, {"pipeline": "img2img", "strength": 0.01}, "denoises no step"),
        (SD15, {"scheduler": "LCMScheduler", "num_inference_steps": 51}, "above original_inference_steps = 50"),
        (INPAINTING, {"pipeline": "txt2img"}, "in_channels = 9"),
        (REFINER, {"pipeline": "txt2img"}, "6 time ids"),
    ],
    ids=str,
)
def test_what_diffusers_refuses_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DerivationError, match=message):
        _ = derive(name, **options).program(True).generic


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    (DPM | {"algorithm_type": "dpmsolver"}, "final_sigmas_type = 'zero'"),
    (DPM | NOISE | FLOW, "prediction_type = 'flow_prediction'"),
    (DPM | NOISE | {"algorithm_type": "sde-dpmsolver", "solver_order": 3}, "solver_order = 3"),
    (DPM | {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    (DPM | {"lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}, "lambda_min_clipped = -5.1"),
    (UNIPC | FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
    (UNIPC | FLOW | {"predict_x0": False}, "prediction_type = 'flow_prediction'"),
    ({"prediction_type": "sample"}, "prediction_type = 'sample'"),
    ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
    (EULER | {"interpolation_type": "cubic"}, "interpolation_type = 'cubic'"),
    (EULER | {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
    (DDPM | {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
]


@pytest.mark.parametrize("keys", [*combinations(SPACINGS, 2), SPACINGS], ids=str)
@pytest.mark.parametrize("chosen", [DPM, UNIPC, EULER], ids=lambda chosen: chosen["_class_name"])
def test_two_spacings_of_the_sigmas_are_refused_as_diffusers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], keys: tuple[str, ...]
) -> None:
    variant = SCHEDULER | chosen | dict.fromkeys(keys, True)
    name = variant["_class_name"]
    # beta sigmas ask for scipy first
    monkeypatch.setattr(f"{getattr(diffusers, name).__module__}.is_scipy_available", lambda: True)
    with pytest.raises(ValueError, match="Only one of"):
        build_scheduler(variant)
    with pytest.raises(DerivationError, match=rf"^{name}: {' = True with '.join(keys)} = True is not supported"):
        _ = derive(small_sd(tmp_path, variant)).program(True).generic


@pytest.mark.parametrize(("variant", "named"), UNSUPPORTED, ids=str)
def test_unsupported_scheduler_options_are_named(tmp_path: Path, variant: dict[str, Any], named: str) -> None:
    with pytest.raises(DerivationError, match=named):
        _ = derive(small_sd(tmp_path, SCHEDULER | variant)).program(True).generic
