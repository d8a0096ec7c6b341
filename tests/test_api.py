"""The public API: round trips, fixed sizes, errors in one line."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from dataclasses import fields

import pytest
from conftest import SD15, SDXL

from derivation import Derivation, DerivationError, derive
from derivation.call import Call
from derivation.config import bundled
from derivation.options import Options
from derivation.options.named import options_of


def test_a_gpu_that_nobody_knows_is_refused_at_once():
    for options in ({"gpu": "unknown"}, {"gpu": "t4", "torch": "x"}, {"torch": "x"}, {"diffusers": "banana"}):
        with pytest.raises(DerivationError):
            derive(SD15, **options)


def test_a_compiled_function_can_be_pickled():
    peak_vram = derive(SD15).lambdify()
    assert pickle.loads(pickle.dumps(peak_vram))(512, 768) == peak_vram(512, 768)


def test_a_call_is_taken_whole_or_by_its_arguments():
    d, call = derive(SD15), Call(512, 768, 2)
    assert d.stage_peaks(call) == d.stage_peaks(512, 768, 2) == d.stage_peaks(call=call)
    assert list(inspect.signature(d.stage_peaks).parameters) == [field.name for field in fields(Call)]
    for given, wrong in (((0, 8), "height = 0"), ((8, 8, True), "batch_size = True"), ((8, 8, 1, 1, 7.5), "guidance")):
        with pytest.raises(DerivationError, match=wrong):
            d.stage_peaks(*given)
    for one in ({"height": 512}, {"width": 512}):
        with pytest.raises(TypeError, match=r"stage_peaks\(\)"):
            d.stage_peaks(**one)


@pytest.mark.parametrize("name", bundled())
def test_round_trips_keep_everything(name):
    pipeline = "inpaint" if "inpaint" in name else "img2img"
    derivation = derive(name, pipeline=pipeline, dtype="bfloat16").at(batch_size=2)
    for back in (pickle.loads(pickle.dumps(derivation)), Derivation.from_json(derivation.to_json())):
        assert back.checkpoint == derivation.checkpoint
        assert (back.options, back.fixed) == (derivation.options, derivation.fixed)
        assert back.stage_peaks(64, 64, 2) == derivation.stage_peaks(64, 64, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint": {}, "options": {}, "fixed": {}}', "null", "3"])
def test_other_json_is_refused_in_one_line(text):
    with pytest.raises(DerivationError) as caught:
        Derivation.from_json(text)
    assert "\n" not in str(caught.value)


def test_fixed_sizes_leave_fewer_symbols():
    derivation = derive(SD15)
    whole = derivation.at(height=512, width=768, batch_size=1, prompt_length=77)
    exact = derivation.estimate(height=512, width=768)["peak_tensor_bytes"]
    assert not whole.peak.free_symbols
    assert 0 <= exact - int(whole.peak) <= max(t.rounding_bytes for t in whole.equation.pipeline_stage().terms)
    assert {str(s) for s in derivation.at(batch_size=1, prompt_length=77).peak.free_symbols} == {"H", "W"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 0, "width": 512}, "height = 0 is not supported"),
        ({"height": 512, "width": -8}, "width = -8 is not supported"),
        ({"height": 512, "width": 512, "batch_size": -1}, "batch_size = -1 is not supported"),
        ({"height": 512.0, "width": 512}, "height = 512.0 is not supported"),
        ({"height": 512, "width": 512, "prompt_length": 0}, "prompt_length = 0 is not supported"),
        ({"height": 1 << 40, "width": 512}, "height = 1099511627776 is not supported"),
    ],
)
def test_bad_sizes_are_one_line(call, message):
    with pytest.raises(DerivationError, match=message):
        derive(SD15).estimate(**call)


def test_txt2img_needs_multiples_of_the_vae_factor():
    with pytest.raises(DerivationError, match=r"height = 515 is not supported \(supported: multiples of 8\)"):
        derive(SD15, pipeline="txt2img").stage_peaks(515, 512)
    img2img = derive(SD15, pipeline="img2img")
    assert img2img.stage_peaks(515, 389) == img2img.stage_peaks(512, 384)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "rtx-9999"}, "rtx-9999"),
        ({"attention": "sage"}, "attention = 'sage' is not supported"),
        ({"dtype": "int8"}, "dtype = 'int8' is not supported"),
        ({"steps": 5}, "steps is no option"),
        ({"method": "guess"}, "method = 'guess' is not supported"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(DerivationError, match=message) as caught:
        derive(SD15, **options).estimate(512, 512)
    assert "\n" not in str(caught.value)


def test_a_gpu_adds_the_allocator_and_the_device():
    found = derive(SD15, gpu="t4", attention="sdpa").estimate(height=512, width=512)
    assert found["requested_bytes"] <= found["allocated_bytes"] <= found["reserved_bytes"] < found["device_bytes"]
    assert found["device_bytes"] - found["reserved_bytes"] == found["context_bytes"]
    left = found["of_bytes"] - found["needs_bytes"]
    assert found["left_bytes"] == left == found["total_bytes"] - found["device_bytes"]
    assert (found["verdict"], found["fits"]) == ("fits", True)
    eager = derive(SD15, gpu="t4", attention="eager").estimate(height=1024, width=1024)
    assert (eager["verdict"], eager["left_bytes"]) == ("does not fit", None)
    assert eager["failed"]["module"].startswith("unet.") and eager["short_bytes"] == eager["failed"]["short_bytes"] > 0


OPTION_SETS = (
    {"offload": "sequential", "safety_checker": False},
    {"lora_rank": 4, "lora_fused": True, "channels_last": True},
    {"controlnets": 2, "attention": "eager", "attention_slicing": "max"},
    {"ip_adapter_tokens": 4, "scheduler": "UniPCMultistepScheduler", "strength": 0.5, "negative_prompt": True},
    {"vae_tiling": True, "tile_sample_min_size": 256, "tile_overlap_factor": 0.5, "vae_slicing": True},
    {"gpu": "t4", "scratch": "upper", "clip_skip": 2, "num_images_per_prompt": 3},
)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_round_trips_keep_every_option(options):
    derivation = derive(SD15, **options).at(height=128, width=64, prompt_length=77)
    for back in (pickle.loads(pickle.dumps(derivation)), Derivation.from_json(derivation.to_json())):
        assert back.options == derivation.options
        assert {name: getattr(back.options, name) for name in options} == options
        assert back.fixed == derivation.fixed
        assert back.estimate(128, 64, 2) == derivation.estimate(128, 64, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fixed", {"h0": "a"}),
        ("fixed", {"zz": 3}),
        ("fixed", {"B": -1}),
        ("fixed", {"B": 1.5}),
        ("fixed", {"h0": 8, "h1": 9}),
        ("fixed", {"w1": 4}),
        ("fixed", [1, 2]),
        ("fixed", None),
        ("options", {"strength": "x"}),
        ("options", {"gpu": 5}),
        ("options", {"nothing": 5}),
        ("options", []),
        ("checkpoint", {"name": 5}),
        ("checkpoint", {"source": [1]}),
        ("checkpoint", {"pipeline_class": "Evil"}),
        ("checkpoint", {"requires_safety_checker": "x"}),
        ("checkpoint", {"unet": 5}),
    ],
)
def test_a_document_with_a_bad_value_is_refused_in_one_line(key, value):
    document = json.loads(derive(SD15).to_json())
    document[key] = {**document[key], **value} if key == "checkpoint" else value
    with pytest.raises(DerivationError) as caught:
        Derivation.from_json(json.dumps(document))
    assert str(caught.value).isprintable()


def test_a_deep_document_is_refused_in_one_line():
    with pytest.raises(DerivationError):
        Derivation.from_json("[" * 100_000)


JUNK = (None, True, 0, -1, 10**40, 0.5, float("nan"), "x", "", "<b>\n", [], ["model"], {}, (1,), b"x")


@pytest.mark.parametrize("name", [field.name for field in fields(Options)])
def test_an_option_takes_its_own_type_or_is_refused_by_name(name):
    default = getattr(Options(), name)
    for value in JUNK:
        try:
            found = options_of({name: value})
        except DerivationError as error:
            assert str(error).startswith(f"{name} = ") and str(error).isprintable()
            continue
        assert type(getattr(found, name)) is type(value)
        assert value is default or not isinstance(value, (list, dict, tuple, bytes))
        assert not isinstance(default, bool) or isinstance(value, bool)


@pytest.mark.parametrize(("name", "layers"), [(SD15, 12), (SDXL, 11)])
def test_clip_skip_leaves_a_hidden_state(name, layers):
    assert derive(name, clip_skip=layers).stage_peaks(64, 64)
    with pytest.raises(DerivationError, match=rf"^clip_skip = {layers + 1} is not supported .*1 to {layers} "):
        derive(name, clip_skip=layers + 1).stage_peaks(64, 64)


@pytest.mark.parametrize("size", ["height", "width", "batch_size", "prompt_length"])
def test_fixing_a_size_at_zero_is_refused(size):
    with pytest.raises(DerivationError, match=f"^{size} = 0 is not supported"):
        derive(SD15).at(**{size: 0})


def test_jupyter_shows_latex_of_what_is_left():
    whole, part = derive(SD15), derive(SD15).at(batch_size=1, prompt_length=77)
    assert whole._repr_latex_().startswith("$\\displaystyle ") and whole._repr_latex_().endswith("$")
    letters = {name: f"{name} " in whole._repr_latex_().replace("}", " ") for name in "BHLW"}
    assert letters == dict.fromkeys("BHLW", True)
    assert "B" not in part._repr_latex_().replace("\\", "") and "L" not in part._repr_latex_()


@pytest.fixture(scope="module")
def adapted():
    return derive(SD15, lora_rank=4)


def test_series_keep_their_index_and_other_indexes_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    function = derive(SD15).lambdify("numpy")
    heights = pandas.Series([512, 768], index=["a", "b"])
    found = function(heights, width=512)
    assert list(found.index) == ["a", "b"] and list(found) == list(function(heights.to_numpy(), 512))
    with pytest.raises(ValueError, match="one index"):
        function(heights, pandas.Series([512, 512], index=["b", "a"]))


@pytest.mark.parametrize("target", ["math", "numpy", "torch"])
def test_lambdify_equals_the_replayed_tape(target, adapted):
    if target == "torch":
        pytest.importorskip("torch")
    peak = adapted.lambdify(target)
    assert int(peak(520, 768, 77, 2, False)) == adapted.weights_bytes + max(
        adapted.stage_peaks(520, 768, 2, 77, False).values()
    )
    with pytest.raises(DerivationError, match="jax"):
        adapted.lambdify("jax")


# The sizes that the model cards say the checkpoints were trained at.
@pytest.mark.parametrize(("model", "side"), [("sd15", 512), ("sd2.1", 768), ("sdxl", 1024), ("refiner", 1024)])
def test_a_call_without_a_size_has_the_pipelines_own(model: str, side: int) -> None:
    d = derive(model)
    assert d.default_sides == (side, side) and d.stage_peaks() == d.stage_peaks(side, side)
    assert d.stage_peaks(batch_size=2) == d.stage_peaks(side, side, 2)
    example = d.at(width=640).equation.example
    assert (example.height, example.width) == (side, 640)


def test_a_stage_that_there_is_not_and_a_library_that_is_missing_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    d = derive(SD15, pipeline="img2img")
    with pytest.raises(
        DerivationError, match=r"stage = 'vae' .*text_encoder, .*; did you mean vae_encode or vae_decode"
    ):
        d.stages["vae"]
    assert "vae" not in d.stages and d.stages.get("vae") is None
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DerivationError, match="target = 'torch' needs torch: pip install torch"):
        d.lambdify("torch")
