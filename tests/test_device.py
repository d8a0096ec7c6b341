"""Reserved bytes in closed form: a few symbolic replays for all sizes, held to the numeric replay at each."""

import json
import random
import re
import shutil
import subprocess
from collections import Counter
from itertools import compress, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SD15
from jsonschema import Draft202012Validator

from derivation import Derivation, derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.memory import load_pipeline
from derivation.allocator.report import SMALL_SEGMENT_BYTES
from derivation.allocator.simulate import replay
from derivation.allocator.symbolic import Atom, Carried, Points
from derivation.config.checkpoint import BUNDLED
from derivation.equation.device import BEYOND, N
from derivation.errors import DerivationError
from derivation.export import export
from derivation.export.latex_device import bound
from derivation.tape.grid import H, W
from derivation.tape.symbols import symbol

ROOT = Path(__file__).resolve().parent.parent
SIDES = range(512, 2049, 64)
SIZES = list(product(SIDES, SIDES))


@pytest.fixture(scope="module")
def sd15() -> Derivation:
    return derive("stable-diffusion-v1-5/stable-diffusion-v1-5", pipeline="img2img", attention="sdpa", gpu="t4")


def test_four_sums_of_segments_stand_for_all_sizes(sd15: Derivation) -> None:
    form = sd15.equation.device
    always = ["16384*h0*w0"] * 3 + ["32768*h0*w0 + 294912"] * 2 + ["32768*h0*w0 + 4718592", "65536*h0*w0 + 1179648"]
    at_times = {"384*h0*w0", "20480*h0*w0 + 2048*h0 + 2048*w0 + 295168"}
    assert (sum(regime.where for regime in form.reserved_regimes) == 1).all()
    for regime in form.reserved_regimes:
        counts = ((form.points.sums[number][0][0].nbytes, n) for number, n in regime.sums)
        names = [str(nbytes) for nbytes, n in counts for _ in range(n)]
        assert sorted(n for n in names if n not in at_times) == sorted(always)


def test_more_regimes_are_told_apart_and_are_the_replay() -> None:
    d = derive(SD15, attention="sdpa", gpu="t4")
    form, regimes = d.equation.device, d.equation.device.reserved_regimes
    assert [int(regime.where.sum()) for regime in regimes] == [1, 2, 6, 8, 15, 593]
    assert len(d.reserved.args) == len(regimes) and form.headline.count("4420 H W") == 1
    for regime in regimes:
        for height, width in list(compress(form.index, regime.where))[:2]:
            at = {H: height, W: width, N: form.counted_at(height, width)}
            assert all(condition.subs(at) for condition in regime.conditions)
            found = d.device_memory(height=height, width=width)
            assert d.reserved.subs(at) == found.reserved
            # besides these are segments of 2 MiB, and those of 20 MiB that requests below 10 MiB share
            assert 42 <= at[N] <= 85


def test_a_carried_number_adds_up_at_every_point() -> None:
    points = Points([{"h0": h, "w0": 3} for h in range(1, 6)])
    atoms = [Atom(100 * symbol("h0") * symbol("w0"), False), Atom(2 * symbol("h0"), False)]
    first, second = (Carried.of(int(points.atom(a)[2]), points, points.number(((a, 1),))) for a in atoms)
    total = first + second - 512 + 7
    assert int(total) == 1024 + 512 - 512 + 7
    assert (points.vector(points.number_of(total)) == np.array([512, 1024, 1024, 1536, 1536]) + 7).all()
    assert points.number_of(first + second - second) == points.number_of(first)
    assert points.number_of(7 + first) == points.number_of(1031)


@pytest.mark.parametrize("seed", range(4))
def test_eighty_sizes_are_what_the_replay_says(sd15: Derivation, seed: int) -> None:
    form, met = sd15.equation.device, 0
    parameters = sd15.resident
    for height, width in random.Random(10).sample(SIZES, 80)[seed::4]:
        values = sd15.sizes(height=height, width=width)
        allocator = CachingAllocator()
        weights = load_pipeline(allocator, parameters)
        replayed = replay(form.variant.tape, values, weights).run(allocator)
        opened = Counter(segment.total_size for segment in allocator.snapshot())
        [regime] = (regime for regime in form.reserved_regimes if regime.where[form.index[height, width]])
        point = form.index[height, width]
        for number, n in regime.sums:
            assert opened[int(form.points.vector(number)[point])] >= n
        told = int(regime.total[point]) + SMALL_SEGMENT_BYTES * int(form.counted[point])
        assert told == form.reserved_bytes[point] == replayed.reserved_bytes.nbytes
        assert form.allocated_bytes(form.index[height, width]) == replayed.allocated_bytes.nbytes
        met += 1
    assert met == 20


def test_the_sympy_forms_are_the_replay(sd15: Derivation) -> None:
    form = sd15.equation.device
    assert len(sd15.device.args) == 4 and sd15.device.free_symbols == {H, W, N}
    for height, width in [(512, 512), (512, 768), (576, 576), (1024, 1024), (1088, 1088), (1600, 1600)]:
        replayed = sd15.device_memory(height=height, width=width)
        at = {H: height, W: width, N: form.counted_at(height, width)}
        assert sd15.allocated.subs({**at, BEYOND: form.beyond_at(height, width)}) == replayed.allocated
        assert sd15.reserved.subs(at) == form.reserved_at(height, width) == replayed.reserved
        assert sd15.device.subs(at) == replayed.device


def test_regimes_are_told_apart_by_decisions_of_the_allocator(sd15: Derivation) -> None:
    *special, general = sd15.equation.device.reserved_regimes
    assert not general.conditions and all(regime.conditions for regime in special)
    for i, regime in enumerate(special):
        for height, width in SIZES[::7]:
            holds = all(c.subs({H: height, W: width}) for c in regime.conditions)
            point = sd15.equation.device.index[height, width]
            earlier = any(other.where[point] for other in special[:i])
            assert earlier or holds == regime.where[point]
    parts = {str(part.bytes): part.tensors for part in general.parts}
    assert parts["2097152*ceiling(H*W/8192)"] == (
        "vae.encoder.conv_in: convolution",
        "vae.encoder.down_blocks.0.resnets.0.norm1: native_group_norm",
        "vae.encoder.down_blocks.0.resnets.0: silu",
    )


FIXED = [
    {"height": 520, "width": 392, "batch_size": 2},
    {"height": 1024, "width": 1024, "batch_size": 3, "prompt_length": 154},
    {"height": 2520, "width": 2520},  # does not fit: the replay's own figures
]


@pytest.mark.parametrize("call", FIXED, ids=str)
def test_one_size_is_the_replay_whatever_it_is(sd15: Derivation, call: dict[str, int]) -> None:
    at, replayed = sd15.at(**call), sd15.device_memory(**call)
    assert (at.allocated, at.reserved, at.device) == (replayed.allocated, replayed.reserved, replayed.device)


OTHERS = [
    ("stabilityai/stable-diffusion-2-1", "img2img"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "txt2img"),
    ("stabilityai/stable-diffusion-xl-refiner-1.0", "img2img"),
    ("runwayml/stable-diffusion-inpainting", "inpaint"),
]


@pytest.mark.parametrize(("model", "pipeline"), OTHERS)
def test_other_checkpoints_at_one_size(model: str, pipeline: str) -> None:
    d = derive(model, pipeline=pipeline, attention="sdpa", gpu="h100")
    at, replayed = d.at(height=832, width=1216), d.device_memory(height=832, width=1216)
    assert (at.allocated, at.reserved, at.device) == (replayed.allocated, replayed.reserved, replayed.device)
    assert "inpaint" in model or at.equation.device.reserved_regimes[0].parts


def test_what_the_forms_do_not_say_is_refused(sd15: Derivation) -> None:
    with pytest.raises(DerivationError, match="gpu"):
        _ = derive("stable-diffusion-v1-5/stable-diffusion-v1-5").device
    for size in [(520, 512), (2048, 2048)]:  # no multiple of 64; a T4 is full
        assert not sd15.equation.device.covers(*size)
        with pytest.raises(DerivationError, match="card has room for, or what at"):
            sd15.equation.device.reserved_at(*size)


def told(d: Derivation, height: int, width: int) -> int:
    """Return the reserved bytes that an export of the derivation holds for a size; KeyError where it has a bound."""
    form, code = d.equation.device, d.equation.device_code
    assert code is not None and code.unit == SMALL_SEGMENT_BYTES
    return int(form.shared.total[form.index[height, width]]) + code.unit * code.counted[height * width // 64**2]


def test_a_batch_has_its_own_exports(sd15: Derivation) -> None:
    two = sd15.at(batch_size=2)
    for height, width in [(512, 768), (1024, 832)]:
        assert told(two, height, width) == sd15.device_memory(height, width, 2).reserved
    with pytest.raises(DerivationError, match="fix the sides"):
        _ = derive(SD15, gpu="t4", vae_tiling=True).reserved


MANY_SIZES = [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "txt2img", "t4", 3),
    ("runwayml/stable-diffusion-inpainting", "inpaint", "rtx-4090", 2),
    ("stabilityai/stable-diffusion-2-1", "txt2img", "t4", 2),
    ("stabilityai/stable-diffusion-xl-base-1.0", "txt2img", "h100", 2),
    ("stabilityai/stable-diffusion-xl-base-1.0", "img2img", "t4", 2),
]


@pytest.mark.parametrize(("model", "pipeline", "gpu", "sizes"), MANY_SIZES)
def test_exports_of_other_checkpoints_are_the_replay(model: str, pipeline: str, gpu: str, sizes: int) -> None:
    d = derive(model, pipeline=pipeline, attention="sdpa", gpu=gpu)
    form = d.equation.device
    assert [told(d, *size) for size in SIZES] == [form.reserved_bytes[form.index[size]] for size in SIZES]
    for height, width in random.Random(f"{model} {pipeline}").sample(SIZES, sizes):
        values, allocator = d.sizes(height=height, width=width), CachingAllocator()
        replayed = replay(form.variant.tape, values, load_pipeline(allocator, d.resident)).run(allocator)
        assert told(d, height, width) == replayed.reserved_bytes.nbytes
        if pipeline == "txt2img":
            assert form.allocated_bytes(form.index[height, width]) == replayed.allocated_bytes.nbytes
            at = {H: height, W: width, N: form.counted[form.index[height, width]]}
            assert d.reserved.subs(at) == replayed.reserved_bytes.nbytes


def test_the_headline_and_its_bound_hold_at_every_size(sd15: Derivation) -> None:
    form = sd15.equation.device
    context, loaded, pixel, most = (int(n) for n in re.findall(r"([0-9]+) ?", form.headline.replace(",", ""))[:4])
    assert (context, pixel) == (form.context_bytes, 3648)  # the slope that an H100 and an H200 were measured at
    general = form.reserved_regimes[-1]
    for height, width in SIZES[::29]:
        if general.where[form.index[height, width]] and form.covers(height, width):
            device = form.reserved_at(height, width) + context
            assert 0 <= device - (context + loaded + pixel * height * width) <= most < 120 << 20


@pytest.mark.parametrize("conf", ["expandable_segments:True", "max_split_size_mb:64", "large_segment_size_mb:40"])
def test_the_allocator_is_configured_as_the_process_is(conf: str) -> None:
    d = derive(SD15, attention="sdpa", gpu="h100", alloc_conf=conf)
    values = d.sizes(height=768, width=512)
    allocator = CachingAllocator(AllocatorConfig.parse(conf), total_memory_bytes=80 << 30)
    weights = load_pipeline(allocator, d.resident)
    replayed = replay(d.program().at(values).tape, values, weights).run(allocator)
    at, plain = d.at(height=768, width=512), derive(SD15, attention="sdpa", gpu="h100")
    assert (at.allocated, at.reserved) == (replayed.allocated_bytes.nbytes, replayed.reserved_bytes.nbytes)
    assert at.reserved != plain.device_memory(height=768, width=512).reserved
    if not conf.startswith("expandable"):
        with pytest.raises(DerivationError, match="alloc_conf = "):
            _ = d.reserved


def test_an_option_of_the_allocator_that_is_not_known_is_refused() -> None:
    with pytest.raises(DerivationError, match="unsupported option 'pages'"):
        derive("stable-diffusion-v1-5/stable-diffusion-v1-5", gpu="t4", alloc_conf="pages:huge")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_live_process_says_how_its_allocator_is_configured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from derivation.options.live import live_options
    from derivation.trace.modules import build_pipeline

    pipe = build_pipeline(BUNDLED / SD15, "txt2img", "float16", "efficient")
    assert live_options(pipe).alloc_conf is None
    monkeypatch.setenv(name, "expandable_segments:True")
    assert live_options(pipe).alloc_conf == "expandable_segments:True"
    assert live_options(pipe, alloc_conf="max_split_size_mb:64").alloc_conf == "max_split_size_mb:64"


@pytest.fixture(scope="module")
def expected(sd15: Derivation) -> dict[tuple[int, int], tuple[int, int, bool]]:
    """What generated code must say of every size: exact where the card has room."""
    form, code = sd15.equation.device, sd15.equation.device_code
    assert code is not None and form.card.total_memory_bytes is not None and form.context_bytes is not None
    found = {}
    for size, point in form.index.items():
        device = int(form.reserved_bytes[point]) + form.context_bytes
        found[size] = device - form.context_bytes, device, device <= form.card.total_memory_bytes
    assert sum(exact for _, _, exact in found.values()) == sum(form.covers(*size) for size in SIZES) > 500
    return found


def test_generated_python_and_numpy_say_what_the_form_says(sd15: Derivation, expected: dict) -> None:
    scalar, arrays = {"__name__": "scalar"}, {"__name__": "arrays"}
    exec(export(sd15.equation, "python"), scalar)
    exec(export(sd15.equation, "numpy"), arrays)
    assert {size: scalar["device_vram"](*size) for size in SIZES} == expected
    columns = (column.tolist() for column in arrays["device_vram"](*np.array(SIZES).T))
    assert dict(zip(SIZES, zip(*columns, strict=True), strict=True)) == expected
    for module in (scalar, arrays):
        for size in [(520, 512), (448, 512), (512, 2112)]:
            with pytest.raises(ValueError):
                module["device_vram"](*size)
    assert "device_vram" not in export(sd15.equation, "python", device=False)


def test_generated_javascript_and_c_say_what_the_form_says(sd15: Derivation, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "peak_vram.mjs").write_text(export(sd15.equation, "javascript"))
    (tmp_path / "run.mjs").write_text(
        'import { device_vram } from "./peak_vram.mjs";\n'
        "for (let h = 512; h <= 2048; h += 64) for (let w = 512; w <= 2048; w += 64) {\n"
        "  const r = device_vram(h, w); console.log(h, w, r.reserved, r.device, Number(r.exact));\n}\n"
    )
    (tmp_path / "peak_vram.h").write_text(export(sd15.equation, "c"))
    (tmp_path / "run.c").write_text(
        '#include <stdio.h>\n#include "peak_vram.h"\nint main(void) {\n'
        "for (int h = 512; h <= 2048; h += 64) for (int w = 512; w <= 2048; w += 64) {\n"
        "int64_t device; bool exact; int64_t reserved = device_vram(h, w, &device, &exact);\n"
        'printf("%d %d %lld %lld %d\\n", h, w, (long long)reserved, (long long)device, exact);\n}\n'
        "return device_vram(520, 512, 0, 0) != -1;\n}\n"
    )
    said = [" ".join(map(str, [*size, *map(int, values)])) for size, values in expected.items()]
    for program, command in (("node", "node run.mjs"), ("cc", "cc -Wall -Werror run.c -o run && ./run")):
        if shutil.which(program):
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert sorted(done.stdout.split("\n")[:-1]) == sorted(said)


def test_the_json_document_says_what_the_form_says(sd15: Derivation, expected: dict) -> None:
    document = json.loads(export(sd15.equation, "json"))
    Draft202012Validator(json.loads((ROOT / "derivation/export/schema.json").read_text())).validate(document)
    device = document["device"]
    operators = {"add": sum, "mul": prod, "floor_div": lambda x: x[0] // x[1], "ceil_div": lambda x: -(-x[0] // x[1])}

    def value(tree: Any, names: dict[str, int]) -> int:
        if isinstance(tree, dict):
            return operators[tree["operator"]]([value(x, names) for x in tree["operands"]])
        return names[tree] if isinstance(tree, str) else tree

    for (height, width), (reserved, _, _) in expected.items():
        names = {"height": height, "width": width}
        for let in device["symbols"]:
            names[let["name"]] = value(let["value"], names)
        counted = device["counted"][str(height * width // 64**2)]
        assert value(device["value"], names) + counted * device["unit_bytes"] == reserved


def python_of(formula: str) -> str:
    """Return a LaTeX sum as Python."""
    formula = formula.replace("2^{21} ", "2**21*")
    plain = re.sub(r"&\\quad|\\\\|[{}.]|\\,", " ", formula.replace("{,}", "").replace(r"\le", "<=")).strip().rstrip(",")
    return re.sub(r"(?<=[\dHW)]) +(?=[HWs])", "*", " ".join(plain.split()))


def test_the_latex_is_what_the_replay_says(sd15: Derivation) -> None:
    latex = sd15.latex("device")
    sums = [python_of(found) for found in re.findall(r"N = (.*?)\n  \\end", latex, re.DOTALL)]
    conditions = [re.findall(r"\$(.*?)\$", line) for line in re.findall(r"here (\$.*), it is", latex)]
    told = [[python_of(each) for each in row] for row in conditions]
    context = int(re.search(r"underbrace{(.*?)}_", latex)[1].replace("{,}", ""))
    plain = latex.replace("{,}", "")
    steps = [(int(most), int(n)) for n, most in re.findall(r"\$(\d+)\$ up to \$(\d+)\$", plain)]
    beyond = int(re.search(r"\$(\d+)\$ beyond", plain)[1])
    for height, width in [(512, 512), (576, 640), (1024, 1024), (1088, 1088), (704, 1920), (1536, 1856)]:
        n = next((n for most, n in steps if height * width <= most), beyond)
        names = {"H": height, "W": width, "n": n, "s": segments}
        row = next((i for i, each in enumerate(told, 1) if all(eval(c, {}, names) for c in each)), 0)
        shown = sd15.device_memory(height, width).device
        assert context + (1 << 21) * eval(sums[row], {}, names) == shown, (height, width, row)
    assert "$B = 1$ and $L = 77$" in latex and not any("- " in each for row in conditions for each in row)


def test_what_has_too_many_steps_is_bounded_by_the_nearest_line_above() -> None:
    draw = random.Random(5)
    found = [(pixels, 20 + 19 * pixels // 2**16 - draw.randrange(9)) for pixels in range(2**18, 2**22, 2**14)]
    start, slope = map(int, re.search(r"at most \$(-?\d+) \+ (\d+)\\,H W / 2\^\{16\}\$", bound(found)).groups())
    above = [start + slope * pixels / 2**16 - n for pixels, n in found]
    # the drawn numbers are at most 8 below a line, whose slope is 19
    assert slope == 19 and 0 <= min(above) < 1 and max(above) < 11


def test_the_latex_of_one_size_names_it(sd15: Derivation) -> None:
    latex = sd15.at(height=512, width=768, batch_size=2).latex("device")
    assert "$H = 512$ and $W = 768$" in latex and "$B = 2$ and $L = 77$" in latex
    [context, units] = re.findall(r"underbrace{([\d{},]+)}|N = (.*)$", latex, re.MULTILINE)
    [n] = re.findall(r"\$(\d+)\$\.$", latex, re.MULTILINE)
    shown = int(context[0].replace("{,}", "")) + (1 << 21) * eval(python_of(units[1]), {}, {"n": int(n)})
    assert shown == sd15.device_memory(512, 768, 2).device


def segments(nbytes: int) -> int:
    return 10 if nbytes < 10 << 20 else -(-nbytes >> 21)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_fits_a_column(sd15: Derivation, tmp_path: Path) -> None:
    head = "\\documentclass[twocolumn]{article}\\usepackage{amsmath}\\begin{document}"
    (tmp_path / "main.tex").write_text(f"{head}{sd15.latex('device')}\\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert "Overfull" not in (tmp_path / "main.log").read_text(errors="replace")


def test_the_latex_of_the_device_needs_a_gpu() -> None:
    with pytest.raises(DerivationError, match="gpu"):
        derive(SD15).latex("device")


def test_the_latex_takes_another_card(sd15: Derivation) -> None:
    one = sd15.at(height=512, width=768)
    plain = Derivation(one.subject.changed(gpu=None), one.fixed)
    assert plain.latex("device", gpu=one.options.gpu) == one.latex("device")
    assert plain.latex("tensors") == plain.latex() != one.latex("tensors") == plain.latex(gpu=one.options.gpu)
