"""One row an option: every column is there, and what a switch sets on a real pipeline is what its reader reads."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from conftest import SD15

from derivation import DerivationError, Options
from derivation.config.checkpoint import BUNDLED
from derivation.options import TABLE
from derivation.options.live import live_options
from derivation.options.live.modules import READERS
from derivation.trace.modules import build_pipeline
from derivation.trace.switches import PIPELINE_SWITCHES, SWITCHES

ROOT = Path(__file__).parent.parent / "derivation"
# arguments of build_pipeline, which makes the pipeline as they say
BUILT = {"pipeline", "dtype", "attention", "safety_checker"}
OF_A_PIPELINE = [name for name, row in TABLE.items() if row.home == "pipeline"]
# values that come to the same: a slice of one head is the smallest, float16 the type of the other models
SAME = {("attention_slicing", 1): "max", ("vae_dtype", "float16"): None}
# what a pipeline cannot be seen to do, or has another name
UNREAD = {"sdpa", "xformers", "math", "flash", *TABLE["lora"].draws("pipeline")}
# what an option needs beside it
BESIDE = {"lora_fused": {"lora_rank": 4}}


def values(name):
    row = TABLE[name]
    default = Options.__dataclass_fields__[name].default
    drawn = [*row.drawn.get("unet", ()), *row.drawn.get("vae", ()), *row.drawn.get("pipeline", ())]
    choices = row.choices() if row.choices else (True, False) if isinstance(default, bool) else ()
    return dict.fromkeys(value for value in (default, *drawn, *row.words, *choices) if value not in UNREAD)


def test_every_option_has_every_column_that_concerns_it():
    assert TABLE.keys() == set(Options().as_dict())
    for name, row in TABLE.items():
        assert row.help and (row.help.endswith(".") or row.choices), name
        assert row.home in ("pipeline", "call", "machine"), name
        if row.home == "machine" or name in {*BUILT, "num_inference_steps"}:
            continue
        assert row.draws("pipeline"), f"{name}: nothing for the fuzzer to draw"
    ranks = [remedy.rank for row in TABLE.values() for remedy in row.remedies]
    assert sorted(ranks) == list(range(1, len(ranks) + 1))


def test_what_a_pipeline_knows_has_a_reader_and_a_switch():
    assert set(OF_A_PIPELINE) - BUILT - {"controlnets"} <= {*SWITCHES, *PIPELINE_SWITCHES}
    assert set(OF_A_PIPELINE) == READERS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in OF_A_PIPELINE for value in values(name)], ids=lambda v: str(v)
)
def test_the_reader_reads_what_the_switch_sets(name, value):
    chosen = {**(BESIDE.get(name, {}) if value else {}), name: value}
    built = {key: chosen.pop(key) for key in BUILT & chosen.keys()}
    unset = Options().as_dict()
    switches = tuple((key, own) for key, own in chosen.items() if own != unset[key])
    built = {"pipeline": "txt2img", "attention": "efficient", **built}
    found = live_options(build_pipeline(BUNDLED / SD15, **built, switches=switches))
    assert getattr(found, name) == SAME.get((name, value), value)


def test_few_files_know_an_option():
    # measure/ names the memory format, as torch does
    files = {
        name: [path for path in ROOT.rglob("*.py") if name in path.read_text() and path.parent.name != "measure"]
        for name in ("clip_skip", "vae_slicing", "negative_prompt", "channels_last")
    }
    assert {name: len(paths) for name, paths in files.items() if len(paths) > 9} == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"controlnets": 9}, "integers from 0 to 8"),
        ({"attention_slicing": "some"}, "attention_slicing = 'some' is not supported"),
        ({"lora_rank": 0}, "integers from 1"),
        ({"offload": "disk"}, "model, sequential"),
    ],
)
def test_a_value_out_of_its_row_is_refused(given, said):
    with pytest.raises(DerivationError, match=said):
        Options(**given)


def test_a_file_whose_name_begins_as_a_dtype_keeps_it():
    assert Options(lora="torch.safetensors").lora == "torch.safetensors"
