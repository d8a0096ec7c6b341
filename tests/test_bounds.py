"""Work is bounded: what grows with the request is a closed form, or refused by a line that states the limit."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import SD15

from derivation import DerivationError, derive
from derivation.allocator.simulate import pair_roles
from derivation.ask.fit import fit
from derivation.config import unet_config, vae_config
from derivation.config.checkpoint import BUNDLED
from derivation.tape.block import Recording
from derivation.tape.tape import Tape

TILED = {"vae_tiling": True, "tile_sample_min_size": 64}


@pytest.fixture
def steps(monkeypatch):
    """How often a tape records an allocation, and how often a module is copied instead."""
    counts: Counter[str] = Counter()
    for cls, name in ((Tape, "allocate"), (Recording, "copied")):
        method = getattr(cls, name)

        def counted(self, *args, method=method, name=name):
            counts[name] += 1
            return method(self, *args)

        monkeypatch.setattr(cls, name, counted)
    return counts


def test_peaks_with_tiles_take_no_more_steps_for_a_larger_image(steps):
    taken = []
    for side in (512, 8192):
        derivation = derive(SD15, **TILED)
        steps.clear()
        derivation.stage_peaks(side, side)
        taken.append(steps["allocate"])
    assert taken[1] <= taken[0] < 10_000


def test_fit_walks_no_tile(steps):
    derivation = derive(SD15, vae_tiling=True)
    found = fit(derivation, 8 << 30)
    assert found.image is not None
    assert steps["allocate"] < 10_000


def test_tiles_that_are_alike_are_walked_once(steps):
    derivation, taken = derive(SD15, **TILED), []
    for side in (256, 512):
        values = derivation.sizes(side, side)
        steps.clear()
        tape = derivation.program().at(values).tape
        taken.append((steps["allocate"], len(tape.events)))
    (few, short), (many, long) = taken
    assert long > 2 * short
    assert many - few < (long - short) / 10, taken


def test_an_iteration_that_ends_as_it_began_pairs_nothing():
    assert pair_roles({1: 8, 2: 8}.__getitem__, frozenset({1, 2}), frozenset({2, 1})) == {}
    assert pair_roles({1: 8, 2: 8, 3: 8}.__getitem__, {1, 2}, {1, 3}) == {1: 1, 3: 2}


def test_too_many_tiles_for_a_card_are_one_line():
    with pytest.raises(DerivationError, match=r"^vae_tiling: 43 x 43 tiles of 64 pixels .* \(supported: 512 tiles\)$"):
        derive(SD15, gpu="t4", **TILED).device_memory(2048, 2048)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"transformer_layers_per_block": 1000}, r"transformer_layers_per_block = .* at most 1000 in all; these are"),
        ({"layers_per_block": 1000}, r"layers_per_block = .* at most 1000 in all; these are 8000"),
        ({"layers_per_block": [126, 125, 125, 125]}, "at most 1000 in all; these are 1002"),
        ({"transformer_layers_per_block": [61, 59, 1, 1]}, None),
        ({"layers_per_block": [125, 125, 125, 125], "transformer_layers_per_block": 1}, None),
    ],
    ids=str,
)
def test_layers_are_bounded_in_all(changed, said):
    config = json.loads((BUNDLED / SD15 / "unet/config.json").read_text()) | changed
    if said is None:
        unet_config(config)
    else:
        with pytest.raises(DerivationError, match=said):
            unet_config(config)


def test_a_vae_of_the_most_layers_is_read():
    config = json.loads((BUNDLED / SD15 / "vae/config.json").read_text())
    assert vae_config({**config, "layers_per_block": 1000}).layers_per_block == 1000
