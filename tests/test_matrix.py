"""Bundled checkpoints x pipelines x options: a sample is compared, the whole is what the options are."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from derivation.config import bundled
from derivation.options.choices import PIPELINES
from derivation.verify.compare import compared
from derivation.verify.matrix import OPTION_SETS, Entry, matrix

ENTRIES = list(matrix())
# read with a GPU alone, or what every entry has
LEFT_OUT = {
    "gpu",
    "torch",
    "diffusers",
    "transformers",
    "scratch",
    "alloc_conf",
    "pipeline",
    "num_inference_steps",
    "strength",
}
# values that test_tiling.py, test_lora_files.py, test_controlnet.py, test_ip_adapter_files.py and the fuzzer vary
VARIED = {"tile_sample_min_size", "tile_overlap_factor", "lora", "controlnet", "ip_adapter"}


def test_every_checkpoint_pipeline_and_option_is_there():
    from derivation.options import Options

    assert {entry.model for entry in ENTRIES} == set(bundled())
    assert {entry.options["pipeline"] for entry in ENTRIES} == set(PIPELINES)
    chosen = {name for options in OPTION_SETS for name in options}
    assert chosen | LEFT_OUT | VARIED == Options().as_dict().keys()


@pytest.mark.parametrize("entry", ENTRIES[::45], ids=str)
def test_a_sample_equals_the_trace(entry):
    for comparison in entry.compare():
        assert comparison.match, f"{comparison}\nreproduce: python -m derivation verify {entry}"


def test_a_call_that_raises_is_a_mismatch_and_the_rest_goes_on():
    sound, broken = ENTRIES[0], replace(ENTRIES[0], options={"pipeline": "no such"})
    (_, [failed]), (_, found) = compared(Entry.compare, [broken, sound])
    assert not failed.match and "DerivationError" in failed.parting
    assert all(c.match for c in found)
