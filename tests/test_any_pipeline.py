"""Any pipeline: the real call on meta, interpolated, equals plain traces at sizes that were held out."""

from __future__ import annotations

import gzip
import inspect
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from conftest import SD15
from diffusers import GGUFQuantizationConfig
from peft import LoraConfig

from derivation import DerivationError, derive
from derivation.api import Derivation
from derivation.call import Call
from derivation.config.traced import TRACED, bundled_traced, live_configs, traced_folder
from derivation.export import export
from derivation.gpu.profile import hardware
from derivation.guard import will_fit
from derivation.options import Options
from derivation.options.live import live_traced_options
from derivation.tape.events import Allocation, Category
from derivation.tape.grid import Range, Sides
from derivation.tape.loop import normalised
from derivation.tape.recorded import RecordedSubject
from derivation.tape.symbols import as_poly, ceil512, evaluate, symbol
from derivation.tape.tape import Tape
from derivation.trace import store
from derivation.trace.arguments import Arguments
from derivation.trace.build import Description, build
from derivation.trace.interpolate import Parted, fit, parting, points
from derivation.trace.modules import modules_of
from derivation.trace.offloaded import with_model_offload
from derivation.trace.pipeline import TracedPipeline, same
from derivation.trace.quantized import Linear4bit, Linear8bit, parameter_count
from derivation.trace.regimes import entries, lengths, record, regimes
from derivation.trace.scratch import buffers, with_scratch
from derivation.trace.shadows import ShadowTracer
from derivation.trace.standins import word_tokenizer
from derivation.verify.pipelines import SIDES, arguments, checked, description, read
from derivation.verify.streams import naive_peak, naive_peaks
from derivation.verify.traced import equal

DOCUMENTS = {document["class"]: document for document in read(Path(__file__).parent / "tiny_pipelines.jsonl")}
ROOT, FLUX = Path(__file__).resolve().parents[1], "black-forest-labs/FLUX.1-dev"
OPTIONS = Options(pipeline="txt2img", dtype="float32")
# (transformer parameters, all parameters) as published in the checkpoints' safetensors headers or model cards
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
}


@pytest.fixture(scope="module")
def flux() -> tuple[TracedPipeline, RecordedSubject]:
    document = DOCUMENTS["FluxPipeline"]
    made = record(description(document), OPTIONS, "tiny", "tiny Flux", arguments(document), sides=SIDES)
    return TracedPipeline(description(document), OPTIONS, arguments(document), SIDES), made


def test_a_closed_form_equals_plain_traces_at_held_out_sizes(flux) -> None:
    plain, recorded = flux
    derivation, rng = Derivation(recorded, recorded.fixed), random.Random(7)
    peak_vram = derivation.lambdify()
    unit, lengths = recorded.grid.unit, list(recorded.bounds["prompt_length"])
    for batch_size in (1, 1, 2, 3, 8):
        height, width = (unit * rng.randint(4, recorded.sides.most // unit) for _ in range(2))
        call = Call(height, width, batch_size, rng.choice(lengths))
        peak = derivation.weights_bytes + naive_peak(plain.trace(call))
        assert peak_vram(height, width, call.prompt_length, batch_size) == peak
        assert derivation.estimate(call)["peak_tensor_bytes"] == peak
        values = derivation.sizes(call)
        stages = derivation.program(True).at(values).evaluator.peaks(values)
        assert max(bytes_ for bytes_, _ in stages.values()) + derivation.weights_bytes == peak


def test_the_comparison_of_records_sees_one_byte(flux) -> None:
    plain, recorded = flux
    regime = recorded.regimes[-1]
    values = {name: next(v for v in each if each.is_one or v // each.step % 2) for name, each in regime.ranges.items()}
    traced = plain.at(regime.guidance, values)
    assert equal(regime.tape, traced, values)
    last = replace(traced.allocations[-1], nbytes=traced.allocations[-1].nbytes + 1)
    assert not equal(regime.tape, replace(traced, allocations=[*traced.allocations[:-1], last]), values)
    assert not equal(regime.tape, replace(traced, events=traced.events[:-1]), values)


def test_every_export_of_a_traced_pipeline_is_made(flux) -> None:
    derivation = Derivation(flux[1])
    for target in ("json", "javascript", "c", "numpy"):
        assert "not proven between" in export(derivation.equation, target)
    numpy = derivation.lambdify("numpy")
    assert numpy(512, 512, 64, 2) == derivation.lambdify()(512, 512, 64, 2)
    assert derivation.peak.free_symbols and "equation" in derivation.latex()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((512, 512, 63, 1), "prompt_length is 8 to 512 in steps of 8"), ((512, 512, 64, 10), "batch_size is 1 to 9")],
)
def test_generated_code_refuses_what_was_not_covered(flux, sizes, said) -> None:
    derivation = Derivation(flux[1])
    for target in ("math", "numpy"):
        with pytest.raises(ValueError, match=said):
            derivation.lambdify(target)(*sizes)


def test_sizes_that_nothing_covers_are_traced_or_refused(flux) -> None:
    plain, recorded = flux
    odd = Call(64, 64, prompt_length=13)
    alone = Derivation(replace(recorded, retrace=None))
    with pytest.raises(DerivationError, match=r"L = 13.* was not recorded .*with the extra verify it is traced"):
        alone.estimate(odd)
    traced = Derivation(replace(recorded, retrace=lambda guidance, values: plain.at(guidance, values)))
    assert max(traced.stage_peaks(odd).values()) == naive_peak(plain.trace(odd))


def test_a_recorded_pipeline_survives_json(flux) -> None:
    recorded = flux[1]
    again = RecordedSubject.from_document(json.loads(json.dumps(recorded.document())))
    assert again.document() == recorded.document()
    assert Derivation(again).peak == Derivation(recorded).peak
    with pytest.raises(DerivationError, match="format"):
        RecordedSubject.from_document({"format": "derivation-recorded-0"})


def test_a_damaged_record_is_no_record(flux, tmp_path: Path) -> None:
    path = tmp_path / "recorded.json.gz"
    store.store(flux[1], path)
    assert store.read(path).regimes
    path.write_bytes(path.read_bytes()[:100])
    assert store.read(path) is None


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "SanaPipeline", "LTXPipeline"])
def test_other_families_have_a_closed_form(name: str) -> None:
    row = checked(DOCUMENTS[name])
    assert row.runs and row.exact, row.reason


@pytest.mark.parametrize("name", ["CosmosTextToWorldPipeline", "QwenImageEditPipeline", "IFPipeline"])
def test_pipelines_run_without_the_libraries_and_files_that_they_want(name: str) -> None:
    """Cosmos wants torchvision and a guard, Qwen-Image-Edit a processor with the model's own marks, IF ftfy."""
    traced = TracedPipeline(description(DOCUMENTS[name]), OPTIONS, arguments(DOCUMENTS[name]), SIDES)
    assert "pipeline" in naive_peaks(next(iter(traced._tapes.values())))


def test_several_images_of_a_pipeline_that_makes_one_are_refused() -> None:
    traced = TracedPipeline(description(DOCUMENTS["StableVideoDiffusionPipeline"]), OPTIONS, sides=SIDES)
    assert traced.arguments.batched == "image"
    alone = replace(traced.arguments, pipe=type("Alone", (), {"__call__": lambda self, height, width: None})())
    with pytest.raises(DerivationError, match="batch_size = 2"):
        alone.at(Call(64, 64, 2))


def test_what_a_pipeline_rejects_bounds_its_ranges() -> None:
    """CogView3+ has a table of 8 x 8 positions, so 32 pixels; CogVideoX image to video one size."""
    assert checked(DOCUMENTS["CogView3PlusPipeline"]).covered.startswith("h3 2, w3 2, L 8 to 16")
    assert checked(DOCUMENTS["CogVideoXImageToVideoPipeline"]).covered == "h1 1, w1 1, L 16, F 5 to 8, B 1"


def test_an_unknown_class_and_a_broken_config_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DerivationError, match="is no pipeline of diffusers"):
        build(Description("NoSuchPipeline", {}), "float16")
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": ["diffusers", "NoSuchModel"]}')
    with pytest.raises(DerivationError, match="NoSuchModel"):
        derive(folder)
    with pytest.raises(DerivationError, match="vae_tiling"):
        derive(folder, vae_tiling=True)


@pytest.mark.parametrize("model", PUBLISHED)
def test_bundled_configs_have_the_published_parameters(model: str) -> None:
    pipe = build(Description.of(TRACED / model), "bfloat16")
    assert sum(p.numel() for p in modules_of(pipe)["transformer"].parameters()) == PUBLISHED[model]


# Height and width where the class's signature says none: the model cards', and pipeline_z_image.py.
OWN_SIDES = {
    "THUDM/CogVideoX-2b": [480, 720],
    "guoyww/animatediff-motion-adapter-v1-5-2": [512, 512],
}


def test_a_call_without_a_size_has_the_pipelines_own(flux) -> None:
    for name in bundled_traced():
        folder = traced_folder(name)
        call = inspect.signature(getattr(diffusers, folder.class_name).__call__).parameters
        named = [call[side].default for side in ("height", "width")]
        wanted = OWN_SIDES.get(name, [1024, 1024]) if None in named else named
        assert json.loads(gzip.decompress((folder.path / store.RECORDED).read_bytes()))["own_sides"] == wanted, name
    plain, recorded = flux
    own = plain.pipe.default_sample_size * plain.pipe.vae_scale_factor
    assert Arguments(object.__new__(diffusers.ZImagePipeline), {}).default_sides == (1024, 1024)
    assert own and Arguments(plain.pipe, {}).default_sides == (own, own)
    assert recorded.own_sides == tuple(plain.arguments.given[side] for side in ("height", "width"))
    assert recorded.default_sides == (max(recorded.own_sides[0], recorded.sides.least),) * 2
    # of which no regime covers 720: multiples of 64
    assert replace(recorded, own_sides=(720, 1280), sides=Sides(256, 64, 1280)).default_sides == (768, 1280)
    derivation = Derivation(recorded, recorded.fixed)
    assert derivation.estimate() == derivation.estimate(*recorded.default_sides)


def test_bundled_ids_are_found_by_their_short_names() -> None:
    assert len(bundled_traced()) >= 15
    assert traced_folder("flux.1-dev").name == "black-forest-labs/FLUX.1-dev"
    assert traced_folder(SD15) is None and traced_folder(SD15, any_class=True) is not None


# several ranges


def ranges_of(name: str, least: int, **given: object) -> tuple[TracedPipeline, RecordedSubject]:
    """A tiny pipeline without guidance, of one image: its regimes make the record."""
    document = DOCUMENTS[name]
    traced = TracedPipeline(description(document), OPTIONS, {**arguments(document), **given}, SIDES)
    tokens = lengths(traced)
    tokens = tokens if traced.padded is False else Range(tokens.last, tokens.last)
    found = tuple(regime for regime in regimes(traced, False, tokens) if regime.ranges["B"].is_one)
    unit = traced.grid.unit
    sides = Sides(least * unit, least * unit, SIDES[1])
    made = RecordedSubject(name, name, "tiny", OPTIONS, traced.grid, sides, tokens.last, {}, {}, found, 2)
    return traced, RecordedSubject.from_document(json.loads(json.dumps(made.document())))


def test_prompts_that_a_pipeline_cuts_have_a_range_of_their_own() -> None:
    """pipeline_qwenimage.py keeps max_sequence_length tokens of the prompt and the five that close it."""
    plain, recorded = ranges_of("QwenImagePipeline", 1, max_sequence_length=48)
    assert [str(regime.ranges["L"]) for regime in recorded.regimes] == ["1 to 43", "44 to 48"]
    derivation = Derivation(recorded, recorded.fixed)
    peak_vram = derivation.lambdify()
    unit = recorded.grid.unit
    for side, length in ((5, 1), (19, 43), (19, 44), (32, 48), (4, 31)):
        call = Call(side * unit, 7 * unit, 1, length, guidance=False)
        peak = naive_peak(plain.trace(call))
        assert derivation.estimate(call)["peak_tensor_bytes"] == peak_vram(side * unit, 7 * unit, length) == peak
    with pytest.raises(ValueError, match="prompt_length is 1 to 48"):
        peak_vram(unit * 8, unit * 8, 49)


def test_a_prompt_has_all_its_words_where_a_model_drops_the_padding(flux) -> None:
    """pipeline_z_image.py keeps the tokens of the prompt; Flux all that its tokenizer pads to."""
    document = DOCUMENTS["ZImagePipeline"]
    traced = TracedPipeline(description(document), OPTIONS, {**arguments(document), "max_sequence_length": 64}, SIDES)
    assert lengths(traced).last == 64 and traced.padded and traced.arguments.full
    full = naive_peaks(traced.trace(traced.base()))
    traced.arguments = replace(traced.arguments, full=False)
    short = naive_peaks(traced.trace(traced.base()))
    assert max(full.values()) > max(short.values()) and full["transformer"] > short["transformer"]
    lengths(flux[0])
    assert not flux[0].arguments.full


def test_frames_that_a_loop_decodes_repeat_its_pass() -> None:
    """autoencoder_kl_wan.py decodes a latent frame a pass and appends it to those before."""
    plain, recorded = ranges_of("WanPipeline", 2, num_frames=17)
    regime, two = recorded.regimes
    assert str(regime.ranges["F"]) == "3 to 7" and regime.loop.least == 3 and str(two.ranges["F"]) == "2"
    unit = recorded.grid.unit
    scratched = recorded.on(OPTIONS, lambda tape: with_scratch(tape, hardware("h100")))
    for frames in (5, 9, 17, 25):
        call = Call(6 * unit, 10 * unit, 1, recorded.prompt_length, False, frames)
        traced, sizes = plain.trace(call), recorded.grid.sizes(call.height, call.width)
        values = {**sizes, "B": 1, "L": recorded.prompt_length, "F": recorded.grid.frames.latent(frames)}
        tape = recorded.program(False, {}).at(values).tape
        assert equal(tape, traced, values)
        ours = scratched.program(False, {}).at(values).evaluator.peaks(values)
        card = naive_peaks(with_scratch(traced, hardware("h100")))
        assert {stage: peak for stage, (peak, _) in ours.items()} == card
    with pytest.raises(DerivationError, match=r"F = 8.* was not recorded \(recorded: .*F 3 to 7"):
        Derivation(recorded, recorded.fixed).estimate(Call(6 * unit, 10 * unit, 1, None, False, 29))


# on a card


def test_what_was_not_measured_is_told_on_a_card() -> None:
    """Qwen-Image's VAE convolves videos of one frame."""
    for model, told in ((FLUX, False), ("Qwen/Qwen-Image", True)):
        for gpu in (None, "h100"):
            assert any("conv3d" in line for line in derive(model, gpu=gpu).subject.remarks) == (
                told and gpu is not None
            )


def test_operators_scratch_is_put_where_a_gpu_is_named(flux) -> None:
    tape = flux[1].regimes[-1].tape
    card = hardware("h100")
    scratched = with_scratch(tape, card)
    added = scratched.allocations[len(tape.allocations) :]
    named = Counter(a.op for a in added)
    assert (named["cublas workspace"] == 1 and added[0].nbytes == card.cublas_workspace_bytes()) or added[1].op in named
    assert named["convolution workspace"] <= len(tape.convolutions)
    events = [event for event in scratched.events if abs(event) <= len(tape.allocations)]
    assert events == tape.events
    assert [mark.stage for mark in scratched.marks] == [mark.stage for mark in tape.marks]
    for mark, before in zip(scratched.marks, tape.marks):
        own = [e for e in scratched.events[: mark.event] if abs(e) <= len(tape.allocations)]
        assert len(own) == before.event
    born = {abs(e) for e in scratched.events if e > 0}
    assert born == set(range(1, len(scratched.allocations) + 1))


def test_model_offload_is_what_the_real_hooks_do() -> None:
    """Flux alone ties weights, T5's embedding: ``to_empty``, which puts models on the CPU here, unties them."""
    document, call = DOCUMENTS["FluxPipeline"], Call(128, 192, 1, 64)
    plain, real = (
        TracedPipeline(description(document), replace(OPTIONS, offload=offload), arguments(document), SIDES)
        for offload in (None, "model")
    )
    modules = modules_of(plain.pipe)
    parameters = {name: entries(name, module) for name, module in modules.items()}
    ours = naive_peaks(with_model_offload(plain.trace(call), parameters, plain.pipe.model_cpu_offload_seq.split("->")))
    tied = ceil512(modules["text_encoder_2"].shared.weight.nbytes)
    assert naive_peaks(real.trace(call)) == {**ours, "text_encoder_2": ours["text_encoder_2"] + tied}


# diffusers benchmarks: max_memory_allocated in GiB of FLUX.1-dev's transformer, 1024 x 1024, bfloat16
FLUX_DEV_TRANSFORMER = (22.61, 22.64)


@pytest.mark.skipif(not (TRACED / FLUX / store.RECORDED).is_file(), reason="no shipped record")
def test_a_shipped_pipeline_answers_for_a_card_without_torch() -> None:
    code = (
        f"from derivation import derive; import sys; d = derive({FLUX!r}, gpu='h100'); e = d.estimate(1024, 1024); "
        "print(e['verdict'], e['reserved_bytes'] >= e['allocated_bytes'] >= e['weights_bytes'], 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.split() == ["fits", "True", "False"]


@pytest.mark.skipif(not (TRACED / FLUX / store.RECORDED).is_file(), reason="no shipped record")
def test_flux_dev_takes_what_was_measured() -> None:
    found = derive(FLUX).estimate(1024, 1024)
    transformer = found["model_weights_bytes"]["transformer"] + found["stages_bytes"]["transformer"]
    low, high = FLUX_DEV_TRANSFORMER
    assert low <= round(transformer / 2**30, 2) <= high


# weights in four bits

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}


def quantised(description: Description, names: Sequence[str], **config: object) -> Description:
    parts = {
        name: replace(part, config={**part.config, "quantization_config": {**NF4, **config}}) if name in names else part
        for name, part in description.parts.items()
    }
    return replace(description, parts=parts)


def test_flux_in_four_bits_weighs_what_was_measured() -> None:
    """31.447 and 12.584 GiB were reserved once it was loaded (HF's quantization-backends post); T5's wo in float32."""
    plain = Description.of(TRACED / FLUX)
    weights = {}
    for pipe in (build(plain, "bfloat16"), build(quantised(plain, ("transformer", "text_encoder_2")), "bfloat16")):
        modules = modules_of(pipe)
        tensors = [t for module in modules.values() for t in (*module.parameters(), *module.buffers())]
        wide = sum(t.numel() * 2 for n, t in modules["text_encoder_2"].named_parameters() if n.endswith("wo.weight"))
        weights[pipe] = (sum(ceil512(t.nbytes) for t in tensors), wide)
    (all_16, _), (four, wide) = weights.values()
    assert 0 <= 31.447 - all_16 / 2**30 < 0.1 and 0 <= 12.584 - (four + wide) / 2**30 < 0.1


@pytest.mark.parametrize(("double", "scales"), [(False, []), (True, [("empty_like", 2048), ("add", 2048)])])
def test_a_product_of_many_rows_holds_the_weight_dequantised(double: bool, scales: list[tuple[str, int]]) -> None:
    """bitsandbytes 0.50, backends/cuda/ops.py: gemm_4bit and _dequant_linear_fallback."""
    layer = Linear4bit(torch.nn.Linear(128, 256, device="meta", dtype=torch.bfloat16), double, torch.bfloat16)
    for rows, expected in ((4, [("new_empty", 2048)]), (5, [*scales, ("empty", 65536), ("addmm", 2560)])):
        x = torch.empty(rows, 128, dtype=torch.bfloat16, device="meta")
        with torch.no_grad(), ShadowTracer({"": layer}, [x]) as tracer:
            layer(x)
        assert [(a.op, a.nbytes) for a in tracer.tape.allocations] == expected
        assert naive_peak(tracer.tape) == sum(nbytes for _, nbytes in expected)


# torch.cuda.max_memory_reserved in MiB at 1024 x 1024 on an H100, as HF's quantization-backends post recorded it
@pytest.mark.parametrize(
    ("model", "reserved_mib", "more_mib"),
    # transformers of that time kept T5's wo, 24 of [4096, 10240], in float32 beside four bits, today's in bfloat16
    [(FLUX, 37033.98, 0), ("diffusers/FLUX.1-dev-bnb-4bit", 17695.74, 24 * 4096 * 10240 * 2 / 2**20)],
)
def test_flux_reserves_what_was_measured(model: str, reserved_mib: float, more_mib: float) -> None:
    predicted = derive(model, gpu="h100").estimate(1024, 1024)["reserved_bytes"] / 2**20
    assert abs((predicted + more_mib) / reserved_mib - 1) < 0.02


def test_an_image_of_one_size_and_frames_beyond_the_usual() -> None:
    """CogVideoX cuts convolutions by their size, so that 480 x 720 is recorded alone; LTX-Video has 9 to 161 frames."""
    video = derive("THUDM/CogVideoX-2b")
    assert video.lambdify()(480, 720, 226, 1) == video.estimate(480, 720)["peak_tensor_bytes"]
    with pytest.raises(ValueError, match="derived for"):
        video.lambdify()(480, 704, 226, 1)
    ltx = derive("Lightricks/LTX-Video")
    with pytest.raises(ValueError, match="derived for batch_size = 1"):
        ltx.lambdify()(512, 704, 128, 2)
    peaks = [ltx.estimate(512, 704, num_frames=frames)["peak_tensor_bytes"] for frames in (17, 81, 161)]
    assert peaks == sorted(set(peaks)) and ltx.lambdify()(512, 704, 128, 1) == peaks[-1]


def ddim(folder: Path) -> Path:
    """A folder of the tiny DDIM pipeline's configs."""
    parts = DOCUMENTS["DDIMPipeline"]["parts"]
    index = {"_class_name": "DDIMPipeline", **{name: part[:2] for name, part in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(parts[name][2]))
    return folder


def test_sequential_offload_is_traced_through_its_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate/utils/modeling.py: set_module_tensor_to_device empties the cache after each weight that it loads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = ddim(tmp_path)
    moved, on_card = (derive(folder, offload="sequential", gpu=gpu) for gpu in (None, "h100"))
    options = Options(pipeline="txt2img", dtype="bfloat16", attention="flash", offload="sequential")
    plain = TracedPipeline(Description.of(folder), options)
    call = Call(19 * plain.grid.unit, 16 * plain.grid.unit, 2, plain.arguments.prompt_length)
    traced, estimate = plain.trace(call), moved.estimate(call)
    assert estimate["weights_bytes"] == 0 and estimate["peak_tensor_bytes"] == naive_peak(traced)
    assert len(traced.emptied) == plain.arguments.steps * len(list(plain.pipe.unet.parameters()))
    tape = on_card.program(True).at(on_card.sizes(call)).tape
    loads = [tape.allocations[tape.events[i - 1] - 1].shape for i in tape.emptied]
    assert loads == [traced.allocations[traced.events[i - 1] - 1].shape for i in traced.emptied]


def test_tracing_tells_its_sizes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ddim(tmp_path)
    said: list[str] = []
    first = derive(tmp_path, progress=said.append)
    assert said[0] == "building DDIMPipeline" and any("B = " in line for line in said)
    said.clear()
    assert derive(tmp_path, progress=said.append).peak == first.peak and not said
    # what recommend asks of every pipeline takes no minutes
    with pytest.raises(DerivationError, match="offload = 'sequential' of DDIMPipeline is not recorded"):
        first.subject.changed(offload="sequential")
    assert not said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_eight_bits_holds_its_rows_in_int8_and_the_product_in_int32(dtype: torch.dtype) -> None:
    """bitsandbytes 0.50, MatMul8bitLt: int8_vectorwise_quant, then int8_mixed_scaled_mm, without outliers."""
    layer = Linear8bit(torch.nn.Linear(128, 256, device="meta", dtype=dtype), 6.0)
    x = torch.empty(1, 5, 128, dtype=dtype, device="meta")
    with torch.no_grad(), ShadowTracer({"": layer}, [x]) as tracer:
        assert tuple(layer(x).shape) == (1, 5, 256)
    sizes = [a.nbytes for a in tracer.tape.allocations]
    given, quantised_rows, product = 5 * 128 * 2, [5 * 4, 5 * 128, 5 * 128 * 2, 5 * 128], [5 * 256 * 4, 5 * 256 * 2]
    cast = dtype is torch.bfloat16
    assert [n for n in sizes if n > 1] == [given] * cast + quantised_rows + product + [5 * 256 * 2] * cast
    assert naive_peak(tracer.tape) == sum(map(ceil512, [20, 640, *product, *([5 * 256 * 2] * cast)]))
    assert tracer.unknown


def test_models_in_eight_bits_are_traced_and_run(live) -> None:
    eight = {"load_in_4bit": False, "load_in_8bit": True}
    tiny = quantised(description(DOCUMENTS["FluxPipeline"]), ("transformer", "text_encoder_2"), **eight)
    traced = TracedPipeline(tiny, OPTIONS, arguments(DOCUMENTS["FluxPipeline"]), SIDES)
    own = entries("", traced.pipe.transformer)
    for name, module in live.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert own[f".{name}.weight"] == (tuple(module.weight.shape), "int8")
            assert own[f".{name}.SCB"] == ((module.out_features,), "float32")
    assert any(a.dtype == "int32" for a in traced.trace(Call(128, 192, 1, 64)).allocations)


def test_layers_of_bitsandbytes_are_read_off_a_live_pipeline(live) -> None:
    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x

    forward.__module__ = "bitsandbytes.nn.modules"
    live.transformer.x_embedder.__class__ = type("Linear4bit", (torch.nn.Linear,), {"forward": forward})
    live.transformer.hf_quantizer = object()
    live.transformer.register_to_config(quantization_config=type("Config", (), {"to_dict": lambda self: dict(NF4)})())
    assert live_traced_options(live)["dtype"] == "float32"
    pipe = build(Description.live(live_configs(live)), "float32")
    assert isinstance(pipe.transformer.x_embedder, Linear4bit)


def test_another_quantisation_is_one_line() -> None:
    tiny = quantised(description(DOCUMENTS["FluxPipeline"]), ("transformer",), quant_method="quanto")
    with pytest.raises(DerivationError, match=r"quantization_config = .* quant_method bitsandbytes, torchao"):
        build(tiny, "bfloat16")


# pytorch issue 132300: conv3d of bfloat16 [1, 3, 24, 740, 1316] by 128 x 3 x 3 x 3 x 3 peaks at 9.26 GiB; it leaves
# cuDNN, as it did before 9.3 for outputs of over 2**31 elements
def test_conv3d_outside_cudnn_takes_columns() -> None:
    volume, filters = (24, 740, 1316), (128, 3, 3, 3, 3)
    given, made = (1, 3, *volume), (1, 128, *volume)
    nbytes = 2 * prod(made)
    out = Allocation("", "convolution", made, "bfloat16", nbytes, Category.ACTIVATION)
    found = buffers(out, (given, filters), hardware("h100", torch="2.9.1"))
    inside = [2 * 3 * 27 * prod(volume)]
    assert [a.nbytes for a in found.inside] == inside and [a.nbytes for a in found.kept] == [32 << 20]
    whole = sum(ceil512(2 * prod(shape)) for shape in (given, filters, made)) + inside[0] + (32 << 20)
    assert f"{whole / 2**30:.2f}" == "9.26"


@pytest.mark.parametrize(
    ("torch_version", "dtype", "kernel", "counted"),
    [
        ("2.8", "bfloat16", 3, False),
        ("2.9.1", "float32", 3, False),
        ("2.9.1", "float16", 1, False),
        ("2.9.1", "float16", 3, True),
        ("2.10", "float16", 3, False),
    ],
)
def test_when_conv3d_leaves_cudnn(torch_version: str, dtype: str, kernel: int, counted: bool) -> None:
    """Convolution.cpp: use_cudnn, of torch 2.9."""
    out = Allocation("", "convolution", (1, 8, 4, 16, 16), dtype, 8, Category.ACTIVATION)
    shapes = ((1, 8, 4, 16, 16), (8, 8, kernel, kernel, kernel))
    [inside] = buffers(out, shapes, hardware("h100", torch=torch_version)).inside
    assert inside.op == ("convolution columns" if counted else "convolution workspace")
    grouped = ((1, 16, 4, 16, 16), (8, 8, kernel, kernel, kernel))
    assert not buffers(out, grouped, hardware("h100", torch=torch_version)).inside


def test_qwens_vae_asks_for_what_torch_could_not_allocate() -> None:
    """pytorch issue 177406: "Tried to allocate 5.06 GiB", torch 2.9.1, Qwen-Image's VAE in bfloat16."""
    d = derive("Qwen/Qwen-Image", gpu="h100", torch="2.9.1")
    values = d.sizes(1024, 1024)
    tape = d.program(True).at(values).tape
    columns = {evaluate(a.nbytes, values) for a in tape.allocations if a.op == "convolution columns"}
    assert f"{max(columns) / 2**30:.2f}" == "5.06"
    assert any("takes columns" in line for line in d.subject.remarks)


# shadows


def test_values_that_follow_from_the_call_are_known() -> None:
    with ShadowTracer() as tracer:
        ids = torch.tensor([[3, 5, 0, 0]]).to("meta")
        mask = ids > 0
        length, positions = mask.sum().item(), mask.nonzero()
        chosen = torch.empty(4, 2, device="meta")[mask[0]]
        ids[0, 1] = 7
        changed = ids.tolist()
    assert (length, tuple(positions.shape), tuple(chosen.shape), changed) == (2, (2, 2), (2, 2), [[3, 7, 0, 0]])
    assert not tracer.unknown


def test_what_nobody_knows_reads_as_zeros_and_is_noted() -> None:
    with ShadowTracer() as tracer:
        noise = torch.randn(4, device="meta")
        assert noise.sum().item() == 0.0
        kept = noise[noise > 0]
    assert tuple(kept.shape) == (4,) and tracer.unknown


def test_a_word_is_a_token() -> None:
    tokenizer = word_tokenizer("CLIPTokenizer", 77)
    assert len(tokenizer("a cat, sat").input_ids) == 4 + 2
    # pipeline_kolors.py hands its encoder the positions that its own tokenizer gives
    padded = word_tokenizer("ChatGLMTokenizer", 256)(["a cat"], padding="max_length", max_length=8, return_tensors="pt")
    assert padded["position_ids"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]
    # pipeline_qwenimage.py drops the 34 tokens of its template before the prompt
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    )
    assert len(word_tokenizer("Qwen2Tokenizer")(template).input_ids) == 34


# interpolation


def program(values: dict[str, int], branch: int = 1 << 30) -> Tape:
    with ShadowTracer() as tracer:
        x = torch.empty(values["B"], 3, 2 * values["h1"], values["w1"] + 1, device="meta")
        y = torch.empty(values["h1"] * values["w1"], values["h1"] * values["w1"], dtype=torch.int8, device="meta")
        if values["h1"] > branch:
            z = torch.empty(8, device="meta")
    del x, y
    return normalised(tracer.tape)


RANGES = {"h1": Range(3, 40), "w1": Range(3, 40), "B": Range(2, 9)}


def test_sizes_become_polynomials() -> None:
    through, held = points(RANGES, 0)
    first, second = (a.nbytes for a in fit(program, through, held).allocations)
    batch, height, width = symbol("B"), symbol("h1"), symbol("w1")
    assert first == 24 * batch * height * (width + 1) and second == as_poly(height * width) ** 2


def test_a_structure_that_depends_on_a_size_is_told() -> None:
    through, held = points(RANGES, 0)
    with pytest.raises(Parted) as error:
        fit(lambda values: program(values, 20), through, held)
    assert "h1" in error.value.symbols
    assert parting(program(through[0]), program(through[0], 0)) is not None


def test_a_size_that_no_polynomial_gives_is_told() -> None:
    def padded(values: dict[str, int]) -> Tape:
        with ShadowTracer() as tracer:
            x = torch.empty(-(-values["h1"] // 8) * 8, device="meta")
        del x
        return normalised(tracer.tape)

    through, held = points(RANGES, 0)
    with pytest.raises(Parted) as error:
        fit(padded, through, held)
    assert error.value.symbols == {"h1"}


# live pipelines


@pytest.fixture
def live() -> Any:
    pipe = build(description(DOCUMENTS["FluxPipeline"]), "float32")
    for model in modules_of(pipe).values():
        model.to_empty(device="cpu")
    pipe.text_encoder_2.tie_weights()
    return pipe


def test_a_live_pipeline_is_traced_from_its_configs(flux, live, monkeypatch, tmp_path) -> None:
    plain, recorded = flux
    asked: list[Description] = []

    def once(described: Description, options: Options, *_: object, **__: object) -> RecordedSubject:
        asked.append(described)
        return replace(recorded, options=options)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("derivation.trace.regimes.record", once)
    derivation, call = derive(live, attention="efficient"), Call(256, 128, 2, 64)
    traced = TracedPipeline(asked[0], OPTIONS, arguments(DOCUMENTS["FluxPipeline"]), SIDES)
    peak = derivation.weights_bytes + naive_peak(traced.trace(call))
    assert same(traced.trace(call), plain.trace(call)) and peak == derivation.estimate(call)["peak_tensor_bytes"]
    for free_bytes in (peak, peak - 1):
        sizes = {"max_sequence_length": 64, "prompt": ["a", "b"], "num_inference_steps": 9, "attention": "efficient"}
        assert will_fit(live, 256, 128, free_bytes=free_bytes, **sizes).fits == (free_bytes == peak)
    with pytest.raises(DerivationError, match="FluxPipeline, which is traced"):
        will_fit(live, 256, 128, free_bytes=1, num_images_per_prompt=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda pipe: pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2)),
            "transformer's hooks = ",
        ),
        (lambda pipe: pipe.transformer.set_attention_backend("_native_math"), "transformer's attention = "),
        (lambda pipe: pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"])), r"to_q = an adapter's layer"),
        (lambda pipe: pipe.vae.enable_tiling(), "vae.use_tiling = True"),
        (lambda pipe: pipe.text_encoder.half(), "dtype = "),
        (lambda pipe: setattr(pipe, "tokenizer", Path()), "FluxPipeline.tokenizer = PosixPath"),
    ],
)
def test_what_is_not_read_off_a_live_pipeline_is_told(live, change, said) -> None:
    change(live)
    with pytest.raises(DerivationError, match=said):
        derive(live)


def test_a_model_kept_in_eight_bits_is_traced_with_its_casts(live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read off a live pipeline equals ``enable_layerwise_casting`` called on the models on ``meta``."""

    def enabled(pipe: Any) -> Any:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        return pipe

    document, call = DOCUMENTS["FluxPipeline"], Call(128, 192, 3, 64)
    read = Description.live(live_configs(enabled(live)))
    traced = TracedPipeline(read, OPTIONS, arguments(document), SIDES)
    regime = next(regimes(traced, True, Range(64, 64)))
    monkeypatch.setattr("derivation.trace.pipeline.build", lambda *given: enabled(build(*given)))
    real = TracedPipeline(description(document), OPTIONS, arguments(document), SIDES)
    assert same(traced.trace(call), real.trace(call))
    values = {**real.grid.sizes(call.height, call.width), "B": 3, "L": 64}
    assert regime.covers(values) and equal(regime.tape, real.trace(call), values)
    assert entries("", traced.pipe.transformer) == entries("", live.transformer)
    dtypes = Counter(dtype for _, dtype in entries("", live.transformer).values())
    assert dtypes["float8_e4m3fn"] > dtypes["float32"] > 0
    assert live_traced_options(live)["dtype"] == "float32"


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_cast_model_is_offloaded_through_the_real_hooks(live, monkeypatch: pytest.MonkeyPatch, offload: str) -> None:
    """Model offload holds the component's own weights, in eight bits, beside what a call of it on the GPU allocates."""
    live.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    document, call = DOCUMENTS["FluxPipeline"], Call(128, 192, 1, 64)
    read = Description.live(live_configs(live))
    on_gpu, moved = (
        TracedPipeline(read, replace(OPTIONS, offload=each), arguments(document), SIDES) for each in (None, offload)
    )
    peaks, alone = naive_peaks(moved.trace(call)), naive_peaks(on_gpu.trace(call))
    weights = [t for part in (live.transformer.parameters(), live.transformer.buffers()) for t in part]
    assert {t.dtype for t in weights} >= {torch.float8_e4m3fn}
    resident = sum(ceil512(t.nbytes) for t in weights) if offload == "model" else 0
    assert peaks["transformer"] == alone["transformer"] + resident
    asked: list[Options] = []

    def traced(_: object, options: Options, __: object) -> Any:
        asked.append(options)
        raise DerivationError("traced with these")

    monkeypatch.setattr(store, "_recorded", traced)
    with pytest.raises(DerivationError, match="traced with these"):
        derive(live, offload=offload)
    assert asked[0].offload == offload


def from_gguf(pipe: Any) -> Any:
    """Give a pipeline's transformer weights of some of GGUF's types, as diffusers' quantizer does."""
    from diffusers.quantizers.gguf import GGUFQuantizer
    from diffusers.quantizers.gguf.utils import GGUFParameter, gguf

    model, kinds = pipe.transformer, gguf.GGMLQuantizationType
    state = dict(model.state_dict())
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % 32 == 0]
    for name, kind in zip(linear, [kinds.Q8_0, kinds.Q4_0, kinds.Q5_1] * len(linear), strict=False):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        (rows, columns), device = state[f"{name}.weight"].shape, state[f"{name}.weight"].device
        data = torch.zeros(rows, columns // block * size, dtype=torch.uint8, device=device)
        state[f"{name}.weight"] = GGUFParameter(data, quant_type=kind)
    state["x_embedder.bias"] = state["x_embedder.bias"].to(torch.float32)
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(compute_dtype=torch.float32))
    quantizer._process_model_before_weight_loading(model, None, state_dict=state)
    for name, weight in state.items():
        quantizer.create_quantized_param(model, weight, name, weight.device)
    model.register_to_config(quantization_config=quantizer.quantization_config)
    model.hf_quantizer = quantizer
    return pipe


def test_weights_of_a_gguf_file_are_traced_with_the_layers_that_dequantise_them(live, monkeypatch) -> None:
    """What is read off a live pipeline equals diffusers' quantizer on ``meta``."""
    pytest.importorskip("gguf")
    document, call = DOCUMENTS["FluxPipeline"], Call(128, 192, 1, 64)
    read = Description.live(live_configs(from_gguf(live)))
    traced = TracedPipeline(read, OPTIONS, arguments(document), SIDES)
    monkeypatch.setattr("derivation.trace.pipeline.build", lambda *given: from_gguf(build(*given)))
    real = TracedPipeline(description(document), OPTIONS, arguments(document), SIDES)
    assert same(traced.trace(call), real.trace(call))
    assert any(a.op == "bitwise_and" and a.dtype == "uint8" for a in real.trace(call).allocations)
    assert entries("", traced.pipe.transformer) == entries("", live.transformer)
    plain = build(description(document), "float32").transformer
    assert parameter_count(traced.pipe.transformer) == parameter_count(plain)
    assert live_traced_options(live)["dtype"] == "float32"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_trace_of_stable_diffusion_is_the_walk_and_the_timesteps(batch_size: int) -> None:
    """What the walk leaves on the CPU: PNDM's timesteps, int64, one more than the passes."""
    options = Options(pipeline="txt2img", attention="efficient")
    traced = TracedPipeline(Description.of(traced_folder(SD15, any_class=True).path), options)
    call = Call(256, 320, batch_size, 77)
    walked = derive(SD15, "txt2img", num_inference_steps=traced.arguments.steps)
    assert naive_peak(traced.trace(call)) == max(walked.stage_peaks(call).values()) + ceil512(8 * 6)


def test_the_bundled_pipelines_are_listed_beside_the_walked_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from derivation.cli import main

    with pytest.raises(SystemExit) as done:
        main(["models", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert done.value.code in (0, None) and listed[FLUX] == "FluxPipeline" and SD15 in listed
