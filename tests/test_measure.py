"""Measuring without a GPU: the grid, the record file, the subprocess runner, and calibration.

The records here are SYNTHETIC: made up from known coefficients to test the code, measured on nothing.
"""

from __future__ import annotations

import json
import random
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SD15, tiny

from derivation import DerivationError
from derivation.cli import run
from derivation.gpu.profile import Workspace, hardware
from derivation.measure.calibrate import calibrate, least_squares
from derivation.measure.grid import key, parse_integers, parse_list, parse_sizes, points
from derivation.measure.records import FORMAT, Records
from derivation.measure.runner import Job, measure, require_cuda, run_worker
from derivation.measure.validate import RECORDS
from derivation.options import Options

# A stand-in for derivation.measure.worker: says what the job's ``do`` asks for.
FAKE_WORKER = """
import json, os, sys, time
job = json.load(sys.stdin)
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(job["name"] + "\\n")
do = job["do"]
if do == "crash": raise RuntimeError("CUDA error: an illegal memory access")
if do == "kill": os.kill(os.getpid(), 9)
if do == "sleep": time.sleep(30)
if do == "garbage": print("not json"); sys.exit()
print("a library's chatter")
print(json.dumps({"status": do, "peak_allocated_bytes": 7, "rows": [0] * 10_000}))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)
    return (sys.executable, str(script))


def job(name: str, do: str) -> Job:
    return Job(name, {"name": name, "do": do})


def started(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


def test_every_outcome_is_recorded_and_the_rest_goes_on(tmp_path: Path, worker: tuple[str, ...]) -> None:
    records = Records(tmp_path / "out.json")
    asked = [job("a", "ok"), job("b", "oom"), job("c", "crash"), job("d", "kill"), job("e", "garbage"), job("f", "ok")]
    seen: list[str] = []
    counts = measure(asked, records, worker, report=lambda job, record: seen.append(record["status"]))
    assert seen == ["ok", "oom", "error", "error", "error", "ok"]
    assert counts == {"already measured": 0, "ok": 2, "oom": 1, "error": 3}
    kept = Records.open(tmp_path / "out.json").records
    assert "illegal memory access" in kept["c"]["message"]
    assert "exit code -9" in kept["d"]["message"]
    assert kept["a"]["peak_allocated_bytes"] == 7
    assert all(record["date"] for record in kept.values())


def test_resuming_measures_what_is_missing_or_failed(tmp_path: Path, worker: tuple[str, ...]) -> None:
    path = tmp_path / "out.json"
    measure([job("a", "ok"), job("b", "oom"), job("c", "crash")], Records.open(path), worker)
    counts = measure([job("a", "ok"), job("b", "oom"), job("c", "ok"), job("d", "ok")], Records.open(path), worker)
    assert counts == {"already measured": 2, "ok": 2}
    assert started(tmp_path) == ["a", "b", "c", "c", "d"]
    assert Records.open(path).records["c"]["status"] == "ok"


def test_the_file_is_whole_after_every_point(tmp_path: Path, worker: tuple[str, ...]) -> None:
    path = tmp_path / "out.json"
    sizes = []

    def check(job: Job, record: dict[str, Any]) -> None:
        sizes.append(len(Records.open(path).records))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out.json", "worker.py"]

    measure([job(name, "ok") for name in "abc"], Records(path), worker, report=check)
    assert sizes == [1, 2, 3]


def test_a_worker_that_hangs_or_is_missing(worker: tuple[str, ...]) -> None:
    assert "no answer" in run_worker(job("a", "sleep"), worker, timeout_s=0.5)["message"]
    assert run_worker(job("a", "ok"), ("/no/such/python",), 1)["status"] == "error"


def test_the_real_worker_without_cuda_fails_in_one_line() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    payload = {"kind": "pipeline", "model": SD15, "attention": "efficient", "dtype": "float16"}
    found = run_worker(Job("x", payload), (sys.executable, "-m", "derivation.measure.worker"), 120)
    assert found["status"] == "error"
    assert "\n" not in found["message"]


def test_without_cuda_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DerivationError, match="CUDA"):
        require_cuda(("false",))
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert run(["measure", SD15, "--output", str(tmp_path / "out.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: measure needs")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_points_are_the_product_and_keys_tell_them_apart() -> None:
    found = list(points(SD15, Options(), parse_sizes("512,768x512"), [1, 2], ["efficient", "eager"], ["float16"]))
    assert len(found) == 8
    assert len({key(point) for point in found}) == 8
    assert {(p["height"], p["width"]) for p in found} == {(512, 512), (768, 512)}
    with pytest.raises(DerivationError, match="attention"):
        list(points(SD15, Options(), [(512, 512)], [1], ["fast"], ["float16"]))
    with pytest.raises(DerivationError, match="grid"):
        list(points(SD15, Options(), [(8, 8)] * 20_000, [1], ["eager"], ["float16"]))


@pytest.mark.parametrize("text", ["", ",", "512x", "0", "512x0", "-1", "1e3", "9999999", "512;512", "x" * 10_000])
def test_bad_grids(text: str) -> None:
    with pytest.raises(DerivationError, match="grid"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "1.5", "9999999"])
def test_bad_integers(text: str) -> None:
    with pytest.raises(DerivationError, match="batch_sizes"):
        parse_integers("batch_sizes", text)
    assert parse_list("dtypes", "a, b") == ["a", "b"]


OTHER = ("", "[]", "{}", '{"format": "x"}', f'{{"format": "{FORMAT}", "records": {{"a": 1}}}}')


@pytest.mark.parametrize("content", OTHER)
def test_another_files_content_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(content)
    with pytest.raises(DerivationError, match=r"out\.json"):
        Records.open(path)
    assert path.read_text() == content


@pytest.mark.parametrize("target", ["/proc/x.json", "/dev/null/x.json"])
def test_an_unwritable_output_is_one_line_before_anything_runs(
    target: str, tmp_path: Path, worker: tuple[str, ...]
) -> None:
    with pytest.raises(DerivationError, match="output"):
        measure([job("a", "ok")], Records(Path(target)), worker)
    assert started(tmp_path) == []


def synthetic(path: Path, coefficients: tuple[float, float, float], noise: float = 0.0, rows: int = 40) -> Path:
    """Write SYNTHETIC scratch records whose workspace follows ``coefficients``."""
    chosen = random.Random(0)
    made = []
    for _ in range(rows):
        channels, out, side = chosen.choice([64, 320]), chosen.choice([128, 640]), chosen.choice([16, 32, 64])
        shapes = {"input": [2, channels, side, side], "weight": [out, channels, 3, 3]}
        nbytes = [2 * prod(shapes["input"]), 2 * 2 * out * side * side, 2 * prod(shapes["weight"])]
        scratch = sum(c * n for c, n in zip(coefficients, nbytes, strict=True))
        made.append(
            {
                "op": "convolution",
                **shapes,
                "stride": [1, 1],
                "padding": [1, 1],
                "memory_format": "contiguous",
                "output_bytes": nbytes[1],
                "scratch_bytes": round(scratch * (1 + noise * chosen.uniform(-1, 1))),
            }
        )
    made.append({"op": "attention", "query": [1, 1, 1, 1], "key": [1, 1, 1, 1], "scratch_bytes": 0, "output_bytes": 2})
    made.append({**made[0], "scratch_bytes": None})
    record = {
        "kind": "scratch",
        "status": "ok",
        "dtype": "float16",
        "date": "2000-01-01T00:00:00+00:00",
        "versions": {"gpu": "Synthetic GPU", "torch": "0.0", "cudnn": 0},
        "rows": made,
    }
    path.write_text(json.dumps({"format": FORMAT, "records": {"scratch": record}}))
    return path


@pytest.mark.parametrize("coefficients", [(1, 1, 1), (1, 0, 1), (0, 0, 0), (0, 2, 0)])
def test_calibration_finds_the_coefficients(coefficients: tuple[int, int, int], tmp_path: Path) -> None:
    [entry] = calibrate(synthetic(tmp_path / "scratch.json", coefficients))["convolution_workspace"]
    assert tuple(entry["coefficients"].values()) == coefficients
    assert entry["fit"]["residuals"]["rms_bytes"] < 1
    assert entry["fit"]["rows"] == 40
    assert entry["fit"]["separable"]
    assert (entry["date"], entry["fitted_on"]) == ("2000-01-01", ["scratch.json"])
    assert {"architectures", "dtypes", "memory_format", "coefficients", "source", "versions"} <= entry.keys()


def test_the_profile_of_hopper_is_what_calibration_finds() -> None:
    found = calibrate(RECORDS.with_name("gpu-scratch.json"))["convolution_workspace"]
    profile = hardware("h200")
    for entry in found:
        assert entry["architectures"] == ["Hopper"]
        [dtype], channels_last = entry["dtypes"], entry["memory_format"] == "channels_last"
        spatial = profile.convolution_workspace(dtype, channels_last)
        assert entry["coefficients"] == {name: getattr(spatial, name) for name in ("input", "output", "weight")}
        if dtype != "float32":
            assert set(entry["pointwise"].values()) == {0}
            assert profile.convolution_workspace(dtype, channels_last, kernel=1) == Workspace(0, 0, 0)


def test_calibration_reports_noise_as_residuals(tmp_path: Path) -> None:
    [entry] = calibrate(synthetic(tmp_path / "scratch.json", (1, 1, 1), noise=0.02))["convolution_workspace"]
    assert tuple(entry["coefficients"].values()) == (1, 1, 1)
    assert entry["fit"]["residuals"]["rms_bytes"] > 1000
    assert entry["fit"]["residuals_rounded"]["within_5_percent"] == 1.0


def test_shapes_that_are_too_alike_are_said_to_be(tmp_path: Path) -> None:
    [entry] = calibrate(synthetic(tmp_path / "scratch.json", (1, 1, 1), rows=1))["convolution_workspace"]
    assert not entry["fit"]["separable"]


def test_least_squares_never_gives_negative_coefficients() -> None:
    chosen = np.random.default_rng(0)
    for _ in range(50):
        found, _ = least_squares(chosen.uniform(0, 1, (9, 3)), chosen.uniform(-1, 1, 9))
        assert (found >= 0).all()


@pytest.mark.parametrize("broken", ["versions", "rows", "dtype"])
def test_a_record_that_lacks_a_figure_is_one_line(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = synthetic(tmp_path / "scratch.json", (1, 1, 1))
    content = json.loads(path.read_text())
    del content["records"]["scratch"][broken]
    path.write_text(json.dumps(content))
    assert run(["calibrate", str(path)]) == 2
    assert broken in capsys.readouterr().err


def test_calibrate_prints_a_table_and_writes_an_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = synthetic(tmp_path / "scratch.json", (1, 1, 1))
    assert run(["calibrate", str(path), "--output", str(tmp_path / "profile.json")]) == 0
    assert "Synthetic GPU" in capsys.readouterr().out
    assert "convolution_workspace" in json.loads((tmp_path / "profile.json").read_text())


def test_scratch_shapes_are_the_models_own() -> None:
    pytest.importorskip("diffusers")
    from derivation.measure.scratch import shapes

    asked = {"model": SD15, "dtype": "float16", "height": 512, "width": 512, "batch_size": 1, "guidance_scale": 7.5}
    found = shapes({**asked, "attention": "efficient"})
    convolutions = [shape for shape in found if shape["op"] == "convolution"]
    assert {shape["memory_format"] for shape in convolutions} == {"contiguous", "channels_last"}
    assert any(shape["input"] == [1, 256, 512, 512] for shape in convolutions)
    assert any(shape["query"] == [2, 8, 4096, 40] for shape in found if shape["op"] == "attention")


@pytest.mark.parametrize("pipeline", ["txt2img", "img2img"])
def test_the_measured_call_runs_on_the_cpu(pipeline: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import torch

    from derivation.measure.pipeline import backend, call, loaded

    options = Options(
        pipeline=pipeline, dtype="float32", attention="math", safety_checker=False, num_inference_steps=2, strength=1.0
    )
    asked = {"model": str(tiny(tmp_path / "tiny")), **options.as_dict()}
    asked |= {"height": 64, "width": 64, "batch_size": 2, "guidance_scale": 7.5}
    pipe = loaded(asked, to="cpu")
    with torch.no_grad(), backend("math"):
        images = pipe(**call(pipe, asked)).images
    assert [image.size for image in images] == [(64, 64)] * 2
