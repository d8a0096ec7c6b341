"""VAE tiling in closed form: the same bytes as the walk of every tile, which equals the real modules' trace."""

from __future__ import annotations

import json
import random

import pytest
import sympy
from conftest import SD15, numbers

from derivation import DerivationError, derive
from derivation.config.checkpoint import BUNDLED
from derivation.export import compiled
from derivation.tape.grid import B, H, L, W
from derivation.tape.tiles import Tile, Tiling

OPTIONS = [
    {},
    {"vae_slicing": True},
    {"pipeline": "txt2img", "dtype": "float32"},
    {"tile_sample_min_size": 256, "tile_overlap_factor": 0.5},
    {"tile_sample_min_size": 64, "tile_overlap_factor": 0.0},
    {"offload": "sequential"},
    {"gpu": "t4", "attention": "sdpa"},
]


def image_sizes(seed, tile, count):
    """Yield sides below, at and beyond a tile, so that no, one or two cut tiles are left over."""
    rng = random.Random(seed)
    for _ in range(count):
        yield tuple(max(8, int(tile * rng.choice((0.3, 1, 1.3, 2, 5)) * rng.uniform(0.8, 1.2)) // 8 * 8) for _ in "hw")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_closed_form_equals_the_walk_of_every_tile(options):
    derivation = derive(SD15, vae_tiling=True, **options)
    tile = options.get("tile_sample_min_size", 512)
    for height, width in [(tile, tile), (tile + 8, 8), *image_sizes(str(options), tile, 6)]:
        values = derivation.sizes(height, width, 2, 77)
        form, walk = (program(values).evaluator.peaks(values) for program in programs(derivation))
        assert {stage: peak for stage, (peak, _) in form.items()} == {stage: peak for stage, (peak, _) in walk.items()}


def programs(derivation):
    return derivation.program().regime, derivation.program().at


def test_tile_symbols_count_what_a_loop_counts():
    for side, step in ((64, 48), (32, 16), (8, 8), (5, 3)):
        for h0 in range(1, 200):
            values = Tile(side, step).sizes(h0, side + 1)
            cut = [min(side, h0 - start) for start in range(0, h0, step)]
            whole = [part for part in cut if part == cut[0]]
            assert (values["Th"], values["Nh"]) == (cut[0], len(whole))
            assert [x for x in (values["Rh"], values["Qh"]) if x] == cut[len(whole) :]


def test_the_exported_function_and_the_equation_equal_the_stages():
    derivation = derive(SD15, vae_tiling=True, pipeline="txt2img")
    peak_vram, terms = compiled(derivation.equation), derivation.equation.pipeline_stage().terms
    assert derivation.peak.free_symbols <= {H, W, L, B}
    rng = random.Random(1)
    for height, width in image_sizes(2, 512, 6):
        length, batch = rng.choice((2, 77, 154)), rng.choice((2, 3))
        exact = derivation.weights_bytes + max(derivation.stage_peaks(height, width, batch, length).values())
        assert peak_vram(height, width, length, batch) == exact
        height, width = (-(-side // 64) * 64 for side in (height, width))
        exact = derivation.weights_bytes + max(derivation.stage_peaks(height, width, batch, length).values())
        equation = numbers(derivation.peak, {H: height, W: width, L: length, B: batch})
        tiles = -(-height // 384) * -(-width // 384)
        assert 0 <= exact - equation <= batch * (max(t.rounding_bytes for t in terms) + 511 * tiles)


def test_the_equation_of_a_decoded_image_in_a_tile_is_the_untiled_one():
    plain, tiled = (derive(SD15, vae_tiling=tiling).stages["vae_decode"].peak for tiling in (False, True))
    at = {H: 512, W: 384, L: 77, B: 2}
    assert numbers(plain, at) == numbers(tiled, at)
    assert sympy.diff(tiled.subs({L: 77, B: 1, W: 512, H: 4096 + H}), H) != 0


def test_at_takes_both_sides():
    derivation = derive(SD15, vae_tiling=True)
    with pytest.raises(DerivationError, match="height and width together"):
        derivation.at(height=1024)
    fixed = derivation.at(height=1024, width=1536, prompt_length=77)
    assert {str(s) for s in fixed.peak.free_symbols} == {"B"}


def test_tiles_that_are_no_whole_latents_are_exact_at_a_size_and_have_no_closed_form():
    derivation = derive(SD15, vae_tiling=True, tile_overlap_factor=0.3, tile_sample_min_size=128)
    assert derivation.stage_peaks(264, 136)["vae_decode"] > 0
    with pytest.raises(DerivationError, match=r"tile_overlap_factor = 0\.3 has no closed form with tiles of 128"):
        _ = derivation.peak


def test_tiles_that_do_not_advance_are_one_line():
    with pytest.raises(DerivationError, match="tile_sample_min_size = 4 is not supported"):
        Tiling(4, 8, 0.25)


def test_a_cut_tile_below_one_latent_is_refused_as_by_torch():
    """Tiles of 100 pixels every 75 leave 2 of 152, which three downsamplers bring below their kernel."""
    options = {"vae_tiling": True, "tile_sample_min_size": 100}
    with pytest.raises(DerivationError, match=r"vae\.encoder.*kernel of 3 x 3 does not fit in 2 pixels"):
        derive(SD15, **options).component("vae_encode").at({"h0": 19, "w0": 19, "B": 1, "L": 77})
    runs = pytest.importorskip("derivation.trace.runs")
    config = json.loads((BUNDLED / derive(SD15).checkpoint.name / "vae/config.json").read_text())
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        runs.trace_component("vae_encode", config, height=152, width=152, switches=tuple(options.items()))
