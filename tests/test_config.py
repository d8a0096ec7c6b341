"""The config reader: bundled checkpoints, diffusers' defaults, and one clear line for anything else."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REFINER, SD15, SD_2_1, SDXL

from derivation import config, derive
from derivation.config.checkpoint import BUNDLED
from derivation.config.checks import IgnoredKeys
from derivation.config.json_file import MAX_FILE_BYTES
from derivation.config.schedulers import DEFAULTS
from derivation.errors import DerivationError, UnsupportedConfig

BUILDERS: dict[str, Callable[..., object]] = {
    "unet": config.unet_config,
    "vae": config.vae_config,
    "text_encoder": config.clip_text_config,
    "safety_checker": config.clip_vision_config,
    "scheduler": config.scheduler_config,
}


def raw(part: str, name: str = SD15) -> dict[str, Any]:
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    content: dict[str, Any] = json.loads((BUNDLED / name / part / file).read_text())
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED / SD15, tmp_path / "mine"))


def rejects(call: Any, *parts: str) -> None:
    with pytest.raises(DerivationError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 800, message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", config.bundled())
def test_bundled_loads(name: str) -> None:
    checkpoint = config.load(name)
    assert (checkpoint.name, checkpoint.source) == (name, "bundled")
    assert checkpoint == config.load(name.split("/")[1]) == pickle.loads(pickle.dumps(checkpoint))
    assert hash(checkpoint) == hash(config.load(name))
    assert dataclasses.asdict(checkpoint)["unet"]["act_fn"] == "silu"


def test_bundled_facts() -> None:
    assert len(config.bundled()) == 6
    refiner = config.load("stable-diffusion-xl-refiner-1.0")
    assert refiner.text_encoder is None and refiner.requires_aesthetics_score
    assert not refiner.force_zeros_for_empty_prompt
    assert config.load("stable-diffusion-inpainting").unet.in_channels == 9  # type: ignore[union-attr]
    base = config.load("stable-diffusion-xl-base-1.0")
    assert base.unet and base.unet.transformer_layers_per_block == ((1, 1), (2, 2), (10, 10))
    assert base.unet.reverse_transformer_layers_per_block == ((10,) * 3, (2,) * 3, (1,) * 3)


def test_folder_equals_bundled(folder: Path) -> None:
    here, there = config.load(folder), config.load(SD15)
    assert dataclasses.replace(here, name=there.name, source=there.source) == there
    assert here.source == str(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_round_trip(part: str) -> None:
    built: Any = BUILDERS[part](raw(part))
    assert BUILDERS[part](json.loads(json.dumps(dataclasses.asdict(built)))) == built


def test_asymmetric_unet() -> None:
    given = raw("unet", SDXL)
    given |= {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    }
    unet = config.unet_config(given)
    assert unet.transformer_layers_per_block == ((0, 0), (2, 2), (4, 4))
    assert unet.reverse_transformer_layers_per_block == ((4, 4, 10), (2, 1, 1), (1, 1, 1))


def live(**components: Any) -> Any:
    parts = {
        name: type(cls, (), {"config": raw(name)})()
        for name, cls in (
            ("unet", "UNet2DConditionModel"),
            ("vae", "AutoencoderKL"),
            ("text_encoder", "CLIPTextModel"),
            ("safety_checker", "StableDiffusionSafetyChecker"),
            ("scheduler", "PNDMScheduler"),
        )
    }
    index = {"requires_safety_checker": True, "_name_or_path": "mine", "unet": ("diffusers", "x")}
    return type("StableDiffusionPipeline", (SimpleNamespace,), {})(**{**parts, "config": index, **components})


def test_live_pipeline() -> None:
    there = config.load(SD15)
    here = config.load(live())
    assert dataclasses.replace(here, name=there.name, source="bundled") == there
    assert config.load(live(safety_checker=None)).safety_checker is None
    rejects(lambda: config.load(live(unet=SimpleNamespace(config={}))), "unet", "UNet2DConditionModel")
    rejects(lambda: config.load(live(vae=SimpleNamespace())), "StableDiffusionPipeline.vae.config")


BAD: list[tuple[str, str, object, str]] = [
    ("unet", "in_channels", 0, "from 1"),
    ("unet", "in_channels", True, "integer"),
    ("unet", "in_channels", 4.0, "integer"),
    ("unet", "in_channels", "4\n", "integer"),
    ("unet", "in_channels", 10**5000, "integer of 16610 bits"),
    ("unet", "in_channels", -4, "integer"),
    ("unet", "out_channels", None, "integer"),
    ("unet", "sample_size", [64, 64, 64], "list of two"),
    ("unet", "act_fn", "quick", "silu"),
    ("unet", "norm_eps", math.nan, "finite"),
    ("unet", "norm_num_groups", None, "integer"),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4, "CrossAttnDownBlock2D"),
    ("unet", "down_block_types", [], "list of 1"),
    ("unet", "up_block_types", ["UpBlock2D"], "list of 4 values"),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
    ("unet", "block_out_channels", [320, 640], "list of 4 values"),
    ("unet", "block_out_channels", [320, 640, 1280, [1280]], "integer"),
    ("unet", "attention_head_dim", [5, 10], "list of 4 values"),
    ("unet", "num_attention_heads", 8, "null"),
    ("unet", "layers_per_block", 10**6, "1 to 1000"),
    ("unet", "addition_embed_type", "image", "text_time"),
    ("unet", "class_embed_type", "timestep", "null"),
    ("unet", "only_cross_attention", True, "false"),
    ("unet", "conv_in_kernel", 4, "1, 3, 5"),
    ("unet", "time_embedding_type", "fourier", "positional"),
    ("unet", "_class_name", "UNet2DModel", "UNet2DConditionModel"),
    ("vae", "latent_channels", [4], "integer"),
    ("vae", "scaling_factor", 0, "above 0"),
    ("vae", "force_upcast", 1, "true or false"),
    ("vae", "up_block_types", ["AttnUpDecoderBlock2D"] * 4, "UpDecoderBlock2D"),
    ("vae", "quantization_config", {}, "the keys of AutoencoderKL"),
    ("text_encoder", "hidden_act", "tanh", "quick_gelu, gelu"),
    ("text_encoder", "hidden_size", 770, "num_attention_heads = 12"),
    ("text_encoder", "eos_token_id", [2], "integer"),
    ("text_encoder", "output_hidden_states", True, "false"),
    ("text_encoder", "architectures", ["T5EncoderModel"], "CLIPTextModel"),
    ("safety_checker", "vision_config", {"patch_size": 0}, "vision_config.patch_size"),
    ("safety_checker", "vision_config", {"patch_size": 500}, "up to image_size = 224"),
    ("safety_checker", "projection_dim", "768", "integer"),
    ("scheduler", "_class_name", "DPMSolverSDEScheduler", "PNDMScheduler"),
    ("scheduler", "prediction_type", "noise", "v_prediction"),
    ("scheduler", "skip_prk_steps", 1, "true or false"),
    ("scheduler", "beta_start", math.inf, "finite"),
]


BAD_ELSEWHERE: list[tuple[str, str, object, str, str]] = [
    ("unet", "norm_num_groups", 3, "block_out_channels", "norm_num_groups = 3"),
    ("unet", "attention_head_dim", 7, "block_out_channels", "attention_head_dim = 7"),
    (
        "unet",
        "transformer_layers_per_block",
        [[1, 1], 1, 1, 1],
        "reverse_transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
    ),
    ("unet", "addition_embed_type", "text_time", "addition_time_embed_dim", "addition_time_embed_dim"),
    ("vae", "norm_num_groups", 48, "block_out_channels", "block_out_channels"),
    ("safety_checker", "vision_config", None, "safety_checker.json", "JSON object"),
]
ROWS = [(part, key, value, key, expected) for part, key, value, expected in BAD] + BAD_ELSEWHERE


@pytest.mark.parametrize(
    ("part", "key", "value", "named", "expected"), ROWS, ids=[f"{row[0]}-{row[1]}-{row[4]}" for row in ROWS]
)
def test_bad_value(part: str, key: str, value: object, named: str, expected: str) -> None:
    file = f"somewhere/{part}.json"
    rejects(lambda: BUILDERS[part](raw(part) | {key: value}, file), f"{file}: ", named, expected)


@pytest.mark.parametrize(
    ("part", "keys", "told"),
    [
        ("unet", {"decay": 0.9999, "inv_gamma": 1.0, "use_ema_warmup": False}, "decay, inv_gamma"),
        ("unet", {"atention_head_dim": 8}, "did you mean attention_head_dim?"),
        ("text_encoder", {"d_model": 768}, "d_model"),
        ("scheduler", {"surprise": 1}, "surprise"),
        ("vae", {"a\nb": 1}, "a\\nb"),
    ],
)
def test_keys_that_diffusers_ignores_are_ignored_and_told_once(part: str, keys: dict[str, Any], told: str) -> None:
    with pytest.warns(IgnoredKeys) as caught:
        found = BUILDERS[part](raw(part) | keys, f"{part}.json")
    assert found == BUILDERS[part](raw(part), f"{part}.json")
    assert len(caught) == 1 and told in str(caught[0].message) and f"{part}.json: " in str(caught[0].message)


def test_a_null_flag_is_off(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"requires_safety_checker": None}))
    assert not config.load(folder).requires_safety_checker


def test_a_foreign_pipeline_is_named_before_its_parts(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({"_class_name": "FluxPipeline", "scheduler": ["diffusers", "Unheard"]}))
    rejects(lambda: config.load(folder), str(file), "_class_name = 'FluxPipeline'", "method = 'trace'")


def test_a_scheduler_takes_the_place_of_one_that_is_not_known(folder: Path) -> None:
    file, own = folder / "model_index.json", folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scheduler": ["diffusers", "DPMSolverSDEScheduler"]}))
    own.write_text(json.dumps(json.loads(own.read_text()) | {"_class_name": "DPMSolverSDEScheduler"}))
    rejects(lambda: config.load(folder), str(file), "DPMSolverSDEScheduler")
    assert derive(folder, scheduler="DDIMScheduler").peak == derive(SD15, scheduler="DDIMScheduler").peak


@pytest.mark.parametrize("value", [None, [], 3, "x", {1: 2}])
@pytest.mark.parametrize("part", BUILDERS)
def test_bad_mapping(part: str, value: object) -> None:
    rejects(lambda: BUILDERS[part](value, "a/b.json"), "a/b.json")


def test_unsupported_config_carries_its_parts() -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        config.unet_config({"in_channels": 0})
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.file, error.key, error.value) == ("unet/config.json", "in_channels", 0)
    assert str(error).startswith("unet/config.json: in_channels = 0 is not supported (supported: ")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CONTENT: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"in_channels": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b" " * (MAX_FILE_BYTES + 1), "over 4 MiB"),
    (b"[]", "expected a JSON object"),
    (b'{"norm_eps": NaN}', "norm_eps"),
]


@pytest.mark.parametrize(("content", "expected"), CONTENT, ids=[expected for _, expected in CONTENT])
def test_bad_file(folder: Path, content: bytes, expected: str) -> None:
    (folder / "unet/config.json").write_bytes(content)
    rejects(lambda: config.load(folder), str(folder / "unet/config.json"), expected)


@pytest.mark.parametrize(
    ("break_it", "expected"), [(Path.unlink, "cannot be read"), (_loop, "cannot be read"), (_directory, "not a file")]
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_bad_path(folder: Path, file: str, break_it: Any, expected: str) -> None:
    break_it(folder / file)
    rejects(lambda: config.load(folder), str(folder / file), expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("_class_name", "FluxPipeline", "StableDiffusionPipeline"),
        ("unet", ["diffusers", "FluxTransformer2DModel"], "UNet2DConditionModel"),
        ("unet", "UNet2DConditionModel", "[library, class]"),
        ("image_encoder", ["transformers", "CLIPVisionModelWithProjection"], "null"),
        ("transformer", ["diffusers", "X"], "the keys of model_index.json"),
        ("requires_safety_checker", 1, "true or false"),
    ],
)
def test_bad_index(folder: Path, key: str, value: object, expected: str) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    rejects(lambda: config.load(folder), str(file), key, expected)


@pytest.mark.parametrize("source", ["org/unknown", "", "../configs", "a\nb", "a\0b", "x" * 9999, 3, None, b"x", {}, []])
def test_bad_source(source: object) -> None:
    rejects(lambda: config.load(source), "bundled id")


def test_file_and_broken_link_as_source(folder: Path) -> None:
    assert config.load(folder / "model_index.json").unet == config.load(folder).unet
    rejects(lambda: config.load(folder / "nothing.json"), "neither a file, a folder nor an id")
    (folder / "link").symlink_to("link")
    rejects(lambda: config.load(folder / "link"), "a broken link")


def junk(rng: random.Random, depth: int = 3) -> object:
    scalars = (
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        32,
        64,
        320,
        10**30,
        0.5,
        -1e308,
        math.nan,
        math.inf,
        "",
        "silu",
        "\u2028",
    )
    if depth and rng.random() < 0.3:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(6))]
    return {"a": junk(rng, depth - 1)} if depth and rng.random() < 0.1 else rng.choice(scalars)


@pytest.mark.parametrize("part", BUILDERS)
def test_fuzz_raises_derivation_errors_only(part: str) -> None:
    for seed in range(1500):
        rng = random.Random(seed)
        given = copy.deepcopy(raw(part)) if seed % 50 == 0 else dict(raw(part))
        for name in rng.sample([*given, "surprise", "vision_config_dict", "sample_size"], 2):
            given[name] = junk(rng)
        try:
            hash(BUILDERS[part](given))
        except DerivationError as error:
            assert str(error).isprintable(), f"seed {seed}"
        except Exception as error:
            pytest.fail(f"{part} seed {seed}: {error!r} on {given}")


def signature(cls: Any) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: item.default for name, item in parameters.items() if name != "self"}


@pytest.mark.parametrize(
    ("table", "reference"),
    [(config.UNet2DConditionConfig, "UNet2DConditionModel"), (config.AutoencoderKLConfig, "AutoencoderKL")],
)
def test_model_defaults_are_those_of_diffusers(table: Any, reference: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    expected = signature(getattr(diffusers, reference))
    ours = {field.name: field.metadata["default"] for field in dataclasses.fields(table)}
    assert ours == {name: expected[name] for name in ours}
    assert expected.keys() - ours.keys() <= {"dropout", "addition_embed_type_num_heads"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_scheduler_defaults_are_those_of_diffusers(name: str) -> None:
    expected = signature(getattr(pytest.importorskip("diffusers"), name))
    assert DEFAULTS[name] == {key: () if value == [] else value for key, value in expected.items()}
    assert dict(config.scheduler_config({"_class_name": name}).options) == DEFAULTS[name]


@pytest.mark.parametrize("name", ["CLIPTextConfig", "CLIPVisionConfig"])
def test_clip_defaults_are_those_of_transformers(name: str) -> None:
    reference = getattr(pytest.importorskip("transformers"), name)().to_dict()
    table = {
        field.name: field.metadata["default"] for field in dataclasses.fields(getattr(config, name)) if field.metadata
    }
    assert table == {key: reference[key] for key in table}


PUBLISHED = {
    SD15: (859_520_964, 123_060_480),
    "runwayml/stable-diffusion-inpainting": (859_535_364, 123_060_480),
    SD_2_1: (865_910_724, None),
    "stabilityai/stable-diffusion-2-1-base": (865_910_724, None),
    SDXL: (2_567_463_684, 123_060_480),
    REFINER: (2_259_526_660, None),
}


def parameters(module: Any) -> int:
    return sum(item.numel() for item in module.parameters())


@pytest.mark.parametrize("name", config.bundled())
def test_published_parameter_counts(name: str) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    with torch.device("meta"):
        assert parameters(diffusers.UNet2DConditionModel.from_config(raw("unet", name))) == PUBLISHED[name][0]
        assert parameters(diffusers.AutoencoderKL.from_config(raw("vae", name))) == 83_653_863
        if PUBLISHED[name][1]:
            transformers = pytest.importorskip("transformers")
            text = transformers.CLIPTextConfig(**raw("text_encoder", name))
            assert parameters(transformers.CLIPTextModel(text)) == PUBLISHED[name][1]


def test_published_safety_checker_and_live_pipeline() -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    with torch.device("meta"):
        checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(**raw("safety_checker")))
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**raw("text_encoder")))
        pipeline = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel.from_config(raw("unet")),
            vae=diffusers.AutoencoderKL.from_config(raw("vae")),
            scheduler=diffusers.PNDMScheduler.from_config(raw("scheduler")),
            text_encoder=text,
            safety_checker=checker,
            tokenizer=None,
            feature_extractor=transformers.CLIPImageProcessor(),
            requires_safety_checker=False,
        )
    assert parameters(checker) == 303_981_588
    there, here = config.load(SD15), config.load(pipeline)
    assert here == dataclasses.replace(there, name=here.name, source=here.source, requires_safety_checker=False)
