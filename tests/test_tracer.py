"""The oracle's own tests: toy programs with hand-computed peaks, and SD 1.5's orientation numbers."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15, tiny

from derivation.call import NAMES, Call
from derivation.options import Options
from derivation.peak.liveness import alive_at
from derivation.tape.evaluate import Evaluator, stages
from derivation.tape.tape import Tape
from derivation.verify import (
    SdpaMode,
    Tracer,
    build_safety_checker,
    build_text_encoder,
    build_unet,
    build_vae,
    naive_peak,
    naive_peaks,
    trace_component,
    trace_pipeline,
)

BUNDLED = Path(__file__).parents[1] / "derivation/config/configs"
CHECKPOINT = BUNDLED / SD15
FOLDERS = {"vae_encode": "vae", "vae_decode": "vae"}
STAGES = ["text_encoder", "vae_encode", "unet", "vae_decode", "safety_checker", "postprocess"]


def config(component: str) -> dict[str, Any]:
    folder = CHECKPOINT / FOLDERS.get(component, component)
    return json.loads((folder / "config.json").read_text())


def meta(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def live_curve(tape: Tape) -> list[int]:
    return list(Evaluator(tape).live_bytes({}))


def recorded(tape: Tape) -> tuple[object, ...]:
    return tape.events, tape.allocations, tape.marks


def test_sequential_holds_the_input_of_a_layer_while_it_runs() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    x = meta(4, 256)
    with torch.no_grad(), Tracer({"": model}, [x]) as tracer:
        y = model(x)
    tape = tracer.tape
    # [4, 256] after each of the first two layers, then [4, 256] and [4, 64]
    assert live_curve(tape) == [0, 4096, 8192, 4096, 5120, 1024]
    assert naive_peak(tape) == 8192 and tuple(y.shape) == (4, 64)
    assert [(a.path, a.op) for a in alive_at(tape, 1)] == [("0", "addmm"), ("1", "relu")]


def test_views_known_storages_and_empty_tensors_count_nothing() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(8, 8)
    x = meta(8, 8)
    with torch.no_grad(), Tracer({"": model}, [x]) as tracer:
        _ = model.weight.t(), x.view(64)[3:], x.mul_(2), meta(0, 8)
    assert tracer.tape.events == []


def test_each_storage_is_rounded_up_to_512_bytes() -> None:
    with Tracer() as tracer:
        a, b = meta(1), meta(129)
        del a, b
    assert live_curve(tracer.tape) == [0, 512, 1536, 1024, 0]


def test_a_resize_allocates_before_it_frees() -> None:
    with Tracer() as tracer:
        a = meta(128)
        a.resize_(256)
    assert live_curve(tracer.tape) == [0, 512, 1536, 1024]


def test_values_read_back_are_zeros_on_the_cpu_and_count_nothing() -> None:
    x = meta(3, 4, dtype=torch.float16)
    with Tracer(inputs=[x]) as tracer:
        on_cpu = x.cpu().float().numpy()
        values = x[0, 0].item(), bool(x[0, 0])
        wide = x.to("cpu", torch.float32)
    assert on_cpu.shape == (3, 4) and not on_cpu.any() and wide.dtype == torch.float32
    assert values == (0.0, False) and tracer.tape.events == []


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "ops"),
    [
        ("flash", "float16", 64, ["flash"]),
        ("flash", "bfloat16", 20, ["pad", "pad", "pad", "flash"]),
        ("flash", "float16", 512, ["efficient"]),
        ("flash", "float32", 64, ["efficient"]),
        ("efficient", "float16", 20, ["math"]),
        ("efficient", "float32", 20, ["efficient"]),
        ("efficient", "float32", 18, ["math"]),
        ("math", "float16", 64, ["math"]),
    ],
)
def test_sdpa_takes_the_backend_that_cuda_would_take(backend: str, dtype: str, head_dim: int, ops: list[str]) -> None:
    names = {"flash": "flash", "efficient": "efficient", "constant_pad_nd": "pad", "softmax": "math"}
    q = meta(1, 2, 4, head_dim, dtype=getattr(torch, dtype))
    with torch.no_grad(), SdpaMode(backend), Tracer(inputs=[q]) as tracer:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    allocated = [a.op for a in tracer.tape.allocations if len(a.shape) == 4]
    assert [label for op in allocated for name, label in names.items() if name in op] == ops
    assert out.shape == q.shape


def test_sdpa_refuses_what_it_cannot_route() -> None:
    with pytest.raises(ValueError, match="'cudnn'"):
        SdpaMode("cudnn")
    q = meta(1, 2, 4, 64)
    with SdpaMode("efficient"), pytest.raises(NotImplementedError, match="dropout"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


def test_parameter_counts_are_the_published_ones() -> None:
    models = [
        build_unet(config("unet")),
        build_vae(config("vae")),
        build_text_encoder(config("text_encoder")),
        build_safety_checker(config("safety_checker")),
    ]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        859_520_964,
        83_653_863,
        123_060_480,
        303_981_588,
    ]


@pytest.mark.parametrize(
    ("component", "attention", "expected_bytes"),
    [
        ("unet", "efficient", 136_321_536),
        ("unet", "eager", 1_131_420_160),
        ("vae_encode", "efficient", 335_544_320),
        ("vae_decode", "efficient", 402_685_952),
    ],
)
def test_orientation_numbers(component: str, attention: str, expected_bytes: int) -> None:
    tape = trace_component(component, config(component), attention=attention)
    [(peak, event)] = Evaluator(tape).peaks({}).values()
    assert peak == naive_peak(tape) == expected_bytes
    assert sum(-(-a.nbytes // 512) * 512 for a in alive_at(tape, event)) == expected_bytes


@pytest.mark.parametrize("component", ["text_encoder", "vae_encode", "unet", "vae_decode", "safety_checker"])
@pytest.mark.parametrize("attention", ["efficient", "flash", "math", "eager"])
def test_tracking_paths_changes_no_event(component: str, attention: str) -> None:
    traces = [
        trace_component(component, config(component), attention=attention, height=72, width=136, paths=paths)
        for paths in (True, False)
    ]
    assert traces[0].events == traces[1].events
    assert live_curve(traces[0]) == live_curve(traces[1])


def traced(folder: Path = CHECKPOINT, paths: bool = True, **given: Any) -> Tape:
    """Trace a pipeline under options, at a call whose arguments are among them."""
    call = {name: given.pop(name) for name in NAMES if name in given}
    return trace_pipeline(folder, Options(**given), Call(**{"height": 512, "width": 512, **call}), paths)


def test_no_storage_waits_for_the_cyclic_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    without = traced(**sizes)
    monkeypatch.setattr(gc, "disable", lambda: gc.set_threshold(1, 1, 1))
    monkeypatch.setattr(gc, "enable", lambda: gc.set_threshold(700, 10, 10))
    assert recorded(traced(**sizes)) == recorded(without)


@pytest.mark.parametrize("pipeline", ["img2img", "txt2img"])
def test_a_pipeline_runs_to_its_end_stage_after_stage(pipeline: str) -> None:
    tape = traced(pipeline=pipeline, num_inference_steps=2)
    names = [s if pipeline == "img2img" else s.replace("vae_encode", "prepare_latents") for s in STAGES]
    assert [name for name, _, _ in stages(tape)] == names == list(naive_peaks(tape))
    assert {name: peak for name, (peak, _) in Evaluator(tape).peaks({}).items()} == naive_peaks(tape)
    assert naive_peak(tape) == naive_peaks(tape)["vae_decode"]


def test_tracing_a_pipeline_twice_gives_the_same_events_with_and_without_paths() -> None:
    sizes: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    first, second = (traced(**sizes) for _ in range(2))
    assert recorded(first) == recorded(second)
    assert traced(**sizes, paths=False).events == first.events


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "math", "dtype": "float32"},
        {"attention": "eager", "scheduler": "UniPCMultistepScheduler", "batch_size": 2},
        {"attention": "flash", "offload": "sequential", "vae_tiling": True},
        {"pipeline": "inpaint", "channels_last": True, "controlnets": 1},
        {"strength": 1.0, "lora_rank": 4},
    ],
    ids=str,
)
def test_remembered_kernels_change_no_event(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size: dict[str, Any] = {"height": 72, "width": 64, "num_inference_steps": 2}
    call = {"folder": tiny(tmp_path), **size, **options}
    _, remembered = (traced(**call) for _ in range(2))
    forgetful = SimpleNamespace(run=lambda func, args, kwargs: func(*args, **kwargs))
    monkeypatch.setattr("derivation.trace.tracer.kernels_for", lambda inputs: forgetful)
    assert recorded(traced(**call)) == recorded(remembered)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": False},
        {"num_images_per_prompt": 2},
        {"batch_size": 2, "safety_checker": False},
        {"prompt_length": 154},
        {"prompt_length": 154, "guidance": False},
        {"dtype": "float32", "attention": "flash"},
        {"dtype": "bfloat16", "attention": "eager"},
        {"height": 72, "width": 136, "strength": 0.5, "num_inference_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("pipeline", ["img2img", "txt2img"])
def test_every_option_of_the_pipelines_runs(pipeline: str, options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    tape = traced(pipeline=pipeline, **(sizes | options), paths=False)
    assert list(naive_peaks(tape))[-1] == "postprocess" and tape.marks[0].event == 0
