"""Seeded random configs, options and sizes, single components and whole pipelines, compared with the real code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from derivation.api import Derivation
from derivation.config import Checkpoint, clip_text_config, clip_vision_config, load, unet_config, vae_config
from derivation.options import TABLE, Options
from derivation.options.choices import DTYPES, PIPELINES
from derivation.options.row import Part
from derivation.tape.symbols import TILE_AXES
from derivation.tape.tiles import Tiling, cuts
from derivation.verify import random_configs
from derivation.verify.compare import Verified, compare_component, compare_pipeline, compared
from derivation.verify.random_ip_adapter import write_ip_adapters
from derivation.verify.random_lora import random_lora, write_safetensors
from derivation.walk.components import cross_attentions, lora_layers
from derivation.walk.subject import WalkedSubject

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ATTENTION = ("eager", "math", "efficient", "flash")
PIPELINE = "pipeline"
COMPONENTS = ("unet", "unet", "unet", "vae_encode", "vae_decode", "text_encoder", "safety_checker")
# one case in this many is a whole pipeline
PIPELINE_SHARE = 4
# what a text encoder takes; every prompt has a first and a last token
LENGTHS = {"text_encoder": (1, 2, 8, 77), PIPELINE: (2, 7, 77, 154)}
SIDES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31)

# Options of a component's call by its part of the table; a config's own limits are respected.
PARTS: Mapping[str, Part] = {"unet": "unet", "vae_encode": "vae", "vae_decode": "vae", PIPELINE: "pipeline"}
TILE_OPTIONS = ("tile_sample_min_size", "tile_overlap_factor")
# one option in this many is drawn
OPTION_SHARE = 6


@dataclass(frozen=True, slots=True)
class Case:
    """One random component, or a whole pipeline with the files of its checkpoint; ``seed`` reproduces it."""

    seed: int
    component: str
    config: dict[str, Any]
    options: Options
    sizes: dict[str, int]
    guidance: bool

    def __str__(self) -> str:
        """Return the arguments of ``python -m derivation verify`` that repeat the case, and what it is."""
        s, unset = self.sizes, Options().as_dict()
        chosen = {name: value for name, value in self.options.as_dict().items() if value != unset[name]}
        said = " ".join(f"{name}={value}" for name, value in chosen.items())
        return (
            f"--fuzz 1 --seed {self.seed}  # {self.component} {said} "
            f"h0={s['h0']} w0={s['w0']} B={s['B']} L={s['L']} guidance={self.guidance}"
        )


RANDOM: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "unet": random_configs.random_unet,
    "vae_encode": random_configs.random_vae,
    "vae_decode": random_configs.random_vae,
    "text_encoder": random_configs.random_text_encoder,
    "safety_checker": random_configs.random_safety_checker,
    PIPELINE: random_configs.random_checkpoint,
}
READERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "unet": ("unet", unet_config),
    "vae_encode": ("vae", vae_config),
    "vae_decode": ("vae", vae_config),
    "text_encoder": ("text_encoder", clip_text_config),
    "safety_checker": ("safety_checker", clip_vision_config),
}


def random_case(seed: int, component: str | None = None) -> Case:
    """Return the case of ``seed``: a random component (or the one named) or pipeline, options and sizes."""
    rng = random.Random(seed)
    component = component or (PIPELINE if rng.randrange(PIPELINE_SHARE) == 0 else rng.choice(COMPONENTS))
    config = RANDOM[component](rng)
    options = random_options(rng, component, config.get("unet/config.json", config))
    sizes = {
        "B": rng.choice((1, 1, 2, 3, 5)),
        "L": rng.choice(LENGTHS.get(component, (1, 2, 7, 77, 154))),
        "h0": rng.choice(SIDES),
        "w0": rng.choice(SIDES),
    }
    vae, unset = config.get("vae/config.json", config), Options()
    if vae.get("_class_name") == random_configs.TINY:
        options = replace(options, **{name: getattr(unset, name) for name in ("vae_tiling", *TILE_OPTIONS)})
    if component == PIPELINE and not _casts_vae(config, options):
        options = replace(options, vae_dtype=None)
    if options.vae_tiling and _cut_below_a_latent(vae, options, sizes):
        options = replace(options, **{name: getattr(unset, name) for name in TILE_OPTIONS})
    return Case(seed, component, config, options, sizes, rng.random() < 0.5)


def random_options(rng: random.Random, component: str, unet: Mapping[str, Any]) -> Options:
    """Return options that ``component`` reads and ``unet`` can have, each drawn once in OPTION_SHARE times."""
    values = {name: row.draws(PARTS[component]) for name, row in TABLE.items()} if component in PARTS else {}
    drawn = {name: rng.choice(known) for name, known in values.items() if known and rng.randrange(OPTION_SHARE) == 0}
    if component == PIPELINE:
        drawn |= {"pipeline": rng.choice(PIPELINES), "num_inference_steps": rng.randint(4, 7)}
    for name in _impossible(drawn, unet):
        drawn.pop(name, None)
    return Options(dtype=rng.choice(DTYPES), attention=rng.choice(ATTENTION), **drawn)


def _impossible(drawn: Mapping[str, Any], unet: Mapping[str, Any]) -> Iterator[str]:
    """Yield the drawn options that the others, or the UNet, rule out."""
    types = (*unet.get("down_block_types", ()), *unet.get("up_block_types", ()), unet.get("mid_block_type"))
    if not any("CrossAttn" in (name or "") for name in types):
        yield from ("lora_rank", "lora_fused", "ip_adapter", "ip_adapter_tokens", "ip_adapter_images")
    if "lora" in drawn:
        yield "lora_rank"
    elif "lora_rank" not in drawn:
        yield "lora_fused"
    prompts = {"ip_adapter", "ip_adapter_tokens"} & drawn.keys()
    yield "attention_slicing" if prompts else "ip_adapter_images"
    if "ip_adapter" in prompts:
        yield "ip_adapter_tokens"
    if drawn.get("pipeline") == "inpaint" or {"controlnets", "controlnet"} & drawn.keys():
        # tiles may join to another size than the mask's or the control image's
        yield from TILE_OPTIONS
    if unet.get("mid_block_type") is None or not isinstance(unet.get("layers_per_block"), int) or "controlnet" in drawn:
        yield "controlnets"  # ControlNetModel.from_unet


def _casts_vae(files: Mapping[str, Any], options: Options) -> bool:
    """Return whether the pipeline takes a VAE of another dtype: SDXL's img2img and inpaint with force_upcast."""
    casts = "text_encoder_2/config.json" in files and options.pipeline != "txt2img"
    return casts and files["vae/config.json"].get("force_upcast", False)


def _cut_below_a_latent(config: Mapping[str, Any], options: Options, sizes: Mapping[str, int]) -> bool:
    """Return whether the encoder is given a tile that its convolutions refuse (torch: kernel size above the input)."""
    tiling = Tiling.of(vae_config(config), options)
    tile = (tiling.sample, tiling.latent)
    tiles = (cut for axis in TILE_AXES for cut in cuts(tiling.factor * sizes[f"{axis}0"], axis, tiling, tile))
    return any(cut.side < tiling.factor for cut in tiles)


def compare_case(case: Case) -> list[Verified]:
    """Derive and trace one case: one comparison, or one a stage of a pipeline."""
    if case.component == PIPELINE:
        return _compare_pipeline(case)
    field, read = READERS[case.component]
    checkpoint = replace(load(BASE), **{field: read(case.config)}, text_encoder_2=None)
    derivation = Derivation(WalkedSubject(checkpoint, case.options))
    sides = replace(derivation.grid, vae_scale_factor=1).sizes(case.sizes["h0"], case.sizes["w0"])
    return [compare_component(derivation, case.component, case.config, {**sides, **case.sizes}, case.guidance)]


def _compare_pipeline(case: Case) -> list[Verified]:
    with TemporaryDirectory() as folder:
        for name, content in case.config.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        checkpoint = load(folder)
        derivation = Derivation(WalkedSubject(checkpoint, _with_files(case, checkpoint, folder)))
        s, factor = case.sizes, derivation.grid.vae_scale_factor
        return compare_pipeline(derivation, factor * s["h0"], factor * s["w0"], s["B"], s["L"], case.guidance)


def _with_files(case: Case, checkpoint: Checkpoint, folder: str) -> Options:
    """Return the case's options, random files of LoRAs, ControlNets and IP-Adapters in the place of their number."""
    rng, named = random.Random(case.seed), dict[str, list[Path]]()
    for name, suffix in (("lora", "safetensors"), ("controlnet", "json")):
        if (count := getattr(case.options, name)) is not None:
            named[name] = [Path(folder, f"{name}{number}.{suffix}") for number in range(int(count))]
    layers = lora_layers(checkpoint, case.options) if "lora" in named else {}
    for file in named.get("lora", ()):
        write_safetensors(file, random_lora(rng, layers))
    unet, pools = case.config.get("unet/config.json", {}), rng.random() < 0.3
    for file in named.get("controlnet", ()):
        file.write_text(json.dumps(random_configs.random_controlnet(rng, unet, pools)))
    if (count := case.options.ip_adapter) is not None:
        shapes = cross_attentions(checkpoint, case.options)
        named["ip_adapter"] = write_ip_adapters(Path(folder), int(count), rng, shapes)
    joined: dict[str, Any] = {name: ",".join(map(str, files)) for name, files in named.items()}
    return replace(case.options, **joined)


def run_fuzz(count: int, seed: int = 0) -> Iterator[tuple[Case, list[Verified]]]:
    """Derive and trace ``count`` cases from ``seed`` on, on all processors, and yield them in order."""
    return compared(compare_case, map(random_case, range(seed, seed + count)))
