"""Benchmarks: ``python -m pytest tests/benchmarks/bench_derivation.py --benchmark-only``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SD15

from derivation import Derivation, Options, derive
from derivation.ask.quick import Quick
from derivation.call import Call
from derivation.config import bundled, load, unet_config
from derivation.walk.subject import WalkedSubject

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def task(name: str) -> str:
    return "inpaint" if "inpaint" in name else "img2img"


@pytest.mark.parametrize("name", bundled())
def test_cold_derive_with_interpreter_start(benchmark, name):
    code = f"from derivation import derive; derive({name!r}, pipeline={task(name)!r}).peak"
    benchmark.pedantic(run, args=("-c", code), rounds=5)


def test_cold_estimate_command(benchmark):
    arguments = ("-m", "derivation", "estimate", SD15, "--height", "512", "--width", "768", "--json")
    benchmark.pedantic(run, args=arguments, rounds=5)


def test_import_of_sympy_the_unit_of_the_ratios(benchmark):
    benchmark.pedantic(run, args=("-c", "import sympy"), rounds=5)


@pytest.mark.parametrize("options", [(), ("--gpu", "t4"), ("--attention", "math")], ids=["cpu", "t4", "math"])
def test_cold_export_command(benchmark, options):
    benchmark.pedantic(run, args=("-m", "derivation", "export", SD15, "--to", "python", *options), rounds=3)


@pytest.mark.parametrize("name", bundled())
def test_warm_derive(benchmark, name):
    benchmark.pedantic(lambda: derive(name, pipeline=task(name)).peak, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_deriving_grows_linearly_with_the_blocks(benchmark, layers):
    base = load(SD15)
    from dataclasses import replace

    unet = unet_config({"layers_per_block": layers, "cross_attention_dim": 768})
    checkpoint = replace(base, unet=unet)
    benchmark.pedantic(lambda: Derivation(WalkedSubject(checkpoint, Options())).component("unet").generic, rounds=5)


def generated(name: str):
    path = ROOT / "formulas" / "stable_diffusion_v1_5" / name
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_python_call(benchmark):
    benchmark(generated("peak_vram.py").peak_vram, 512, 768)


@pytest.mark.parametrize("is_quick", [True, False], ids=["closed form", "replay"])
def test_verdicts_on_new_sizes(benchmark, is_quick):
    sides = iter([64 * k for k in range(8, 33)])
    derivation = derive(SD15, gpu="h100")
    answer = Quick(derivation).verdict if is_quick else derivation.verdict
    answer(Call(512, 576))
    benchmark.pedantic(lambda: answer(Call(next(sides), 512)), rounds=20)


def test_numpy_million_sizes(benchmark):
    rng = np.random.default_rng(0)
    heights, widths = (8 * rng.integers(1, 512, 1_000_000) for _ in range(2))
    benchmark.pedantic(derive(SD15).lambdify("numpy"), args=(heights, widths), rounds=3)


def test_build_report(benchmark, tmp_path):
    benchmark.pedantic(run, args=("build_report.py", "--output", str(tmp_path)), rounds=1)
