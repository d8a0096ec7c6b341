"""Versions: text that is none, nearest neighbours, and the bytes that each rule moves, computed from its tensors."""

from __future__ import annotations

import json
import tomllib
import warnings
from math import prod
from pathlib import Path

import pytest

import derivation.evidence
from derivation import DerivationError, derive
from derivation.ask.recommend import recommend
from derivation.call import Call
from derivation.export.render import facts
from derivation.gpu.profile import UnfusedAttention
from derivation.libraries import DEFAULT, PAIRS, RULES, VERIFIED, NearestVersion, libraries, nearest, parse_version
from derivation.tape.symbols import ceil512

EVIDENCE = Path(derivation.evidence.__file__).parent
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# [1, 77, 768] in float16, and CLIP's causal mask [77, 77] in a block of 512 bytes
HIDDEN, MASK = 77 * 768 * 2, 12_288
SIDE = {"height": 1024, "width": 1024}


def peak(component: str, model: str = SD15, **options: object) -> int:
    return derive(model, **options).component_peaks(**SIDE)[component]


def test_text_that_is_no_version_is_refused_everywhere():
    for library in VERIFIED:
        for text in ("banana", "2", "2.x", ""):
            with pytest.raises(DerivationError, match=f"{library} = .* is not a version"):
                derive(SD15, **{library: text})
    assert parse_version("torch", "2.8.0+cu126") == (2, 8)


def test_a_rule_begins_before_it_ends_and_has_a_source():
    for rule in RULES.values():
        assert rule.library in VERIFIED and rule.what and rule.source
        assert (rule.since or (0, 0)) < (rule.until or (99, 0))


def test_a_verified_version_is_itself_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error", NearestVersion)
        for diffusers, transformers in PAIRS:
            found = derive(SD15, diffusers=diffusers, transformers=transformers).options.libraries
            assert (found.diffusers, found.transformers) == (diffusers, transformers)
        assert derive(SD15, torch="2.13.0+cpu").options.libraries.torch == DEFAULT["torch"]


@pytest.mark.parametrize(
    ("library", "text", "expected"),
    [
        ("diffusers", "0.21.4", "0.30.3"),
        ("diffusers", "0.99.0", "0.42.1"),
        ("transformers", "4.42.4", "4.44.2"),
        ("transformers", "4.99.0", "4.57.1"),
        ("transformers", "5.0.0", "5.3.0"),
        ("transformers", "6.0.0", "5.24.0"),
        ("torch", "2.1.0", "2.5"),
    ],
)
def test_another_version_is_its_nearest_neighbour_and_says_so_in_one_line(library, text, expected):
    assert nearest(library, text) == expected
    with pytest.warns(NearestVersion) as told:
        derive(SD15, **{library: text})
    [message] = [str(warning.message) for warning in told]
    assert text in message and expected in message and "\n" not in message


def test_half_a_pair_brings_the_other_half():
    assert libraries(diffusers="0.35.2").transformers == "4.57.1"
    assert libraries(transformers="4.44.2").diffusers == "0.30.3"
    assert libraries().transformers == DEFAULT["transformers"]


def test_transformers_4_keeps_a_causal_mask():
    assert peak("text_encoder", transformers="4.57.1") - peak("text_encoder") == MASK
    # the math path takes it in place of the float32 bias that it made of a boolean mask
    eager = [peak("text_encoder", transformers=version, attention="eager") for version in ("4.57.1", "5.24.0")]
    assert eager[0] - eager[1] == MASK - ceil512(4 * 77 * 77)


def test_transformers_4_53_copies_queries_keys_and_values_on_the_math_path():
    found = peak("text_encoder", transformers="4.53.3", attention="eager")
    assert found - peak("text_encoder", transformers="4.57.1", attention="eager") == 3 * HIDDEN


def test_diffusers_0_35_decodes_sdxl_with_its_middle_in_float16():
    new, old = (derive(SDXL, pipeline="txt2img", diffusers=d) for d in ("0.36.0", "0.35.2"))
    parts = ("vae.post_quant_conv.", "vae.decoder.conv_in.", "vae.decoder.mid_block.")
    shapes = [shape for path, (shape, _) in new.subject.parameters["vae"].items() if path.startswith(parts)]
    weights = sum(ceil512(4 * prod(shape)) - ceil512(2 * prod(shape)) for shape in shapes)
    # at the peak the latents [1, 4, 128, 128] are alive before the division and after post_quant_conv, too
    latents = 2 * (4 * 128 * 128 * 2)
    found, known = (d.estimate(**SIDE)["stages_bytes"]["vae_decode"] for d in (old, new))
    assert known - found == weights + latents
    eager = [derive(SDXL, pipeline="txt2img", diffusers=d, attention="eager") for d in ("0.36.0", "0.35.2")]
    found, known = (d.estimate(**SIDE)["stages_bytes"]["vae_decode"] for d in eager)
    assert known == found


def test_diffusers_0_30_upsamples_bfloat16_in_float32():
    """The last upsample of [1, 256, H/2, W/2] has a float32 copy and its result in float32: 384 H W bytes more."""
    old, new = (peak("vae_decode", dtype="bfloat16", diffusers=d) for d in ("0.30.3", "0.31.0"))
    assert old - new == 384 * 1024 * 1024
    assert peak("vae_decode", diffusers="0.30.3") == peak("vae_decode")


def test_headers_name_only_verified_versions():
    with pytest.warns(NearestVersion):
        d = derive(SD15, diffusers="99.0", torch="2.1")
    assert facts(d.equation).versions == ("torch 2.5", "diffusers 0.42.1", "transformers 5.23.0")


def test_a_live_pipeline_says_which_versions_it_runs_on():
    torch, diffusers, transformers = map(pytest.importorskip, VERIFIED)
    from derivation.config.checkpoint import BUNDLED
    from derivation.options.live import live_options
    from derivation.trace.modules import build_pipeline

    found = live_options(build_pipeline(BUNDLED / SD15, "txt2img"))
    assert (found.torch, found.diffusers, found.transformers) == (
        str(torch.__version__),
        diffusers.__version__,
        transformers.__version__,
    )


def test_the_recorded_run_is_of_every_verified_pair_and_has_no_mismatch():
    found = json.loads((EVIDENCE / "versions.json").read_text())
    versions = [pair["versions"] for pair in found["pairs"]]
    assert tuple((v["diffusers"], v["transformers"]) for v in versions) == PAIRS
    assert {parse_version("torch", v["torch"]) for v in versions} == {parse_version("torch", DEFAULT["torch"])}
    assert found["match"] and not any(pair["failed"] for pair in found["pairs"])
    assert [len(pair["untraced"]) for pair in found["pairs"]] == [2] + [0] * (len(PAIRS) - 1)
    assert sum(pair["calls"] for pair in found["pairs"]) == 12 * len(PAIRS) - 2


def test_the_bounds_name_what_is_imported():
    """measure imports accelerate and peft; typer below 0.13 cannot read ``str | None``."""
    project = tomllib.loads((EVIDENCE.parents[1] / "pyproject.toml").read_text())["project"]
    assert {"accelerate", "peft"} <= set(project["optional-dependencies"]["measure"])
    assert "typer>=0.13" in project["dependencies"]


def test_bfloat16_before_ampere_takes_the_math_path_and_says_so():
    """The largest scores [16, 16384, 16384] of SD 1.5 at 1024 squared: 16 GiB in float32, none with a fused kernel."""
    with pytest.warns(UnfusedAttention, match="float16 has one"):
        d = derive(SD15, pipeline="txt2img", dtype="bfloat16", attention="sdpa", gpu="v100-32gb")
    found = recommend(d, None, Call(1024, 1024))
    first = found.steps[0]
    assert first.name == "float16" and first.needed and first.saves_bytes > 16 << 30
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedAttention)
        derive(SD15, dtype="float16", attention="sdpa", gpu="v100-32gb")
        derive(SD15, dtype="bfloat16", attention="sdpa", gpu="a100-40gb")
