"""Generated files: up to date, executed, and the same number in every language."""

from __future__ import annotations

import ast
import doctest
import json
import operator
import random
import re
import shutil
import subprocess
import sys
import tomllib
import types
from dataclasses import replace
from itertools import product
from math import log2, prod
from pathlib import Path

import numpy as np
import pytest
from conftest import SD15, SD_2_1
from jsonschema import Draft202012Validator

from derivation import Derivation, DerivationError, derive
from derivation.equation.cases import regimes
from derivation.export import CHECKED_IN, TARGETS, compiled, export, generate, write, write_formulas
from derivation.export.render import assumptions, exclusions
from derivation.libraries import DEFAULT
from derivation.tape.grid import B, H, L, W
from derivation.walk.subject import WalkedSubject

ROOT = Path(__file__).resolve().parent.parent
FORMULAS = ROOT / "formulas"
SEED = 20
UPDATE = "pytest tests/test_export.py --update-formulas"


@pytest.fixture(scope="module")
def generated(request):
    if request.config.getoption("--update-formulas"):
        write_formulas(ROOT, generate())
    return generate()


@pytest.fixture(scope="module")
def d():
    return derive(SD15, pipeline="img2img")


@pytest.fixture(scope="module")
def texts(d):
    return {target: export(d.equation, target) for target in TARGETS}


@pytest.fixture(scope="module")
def module(texts):
    loaded = types.ModuleType("peak_vram")
    exec(compile(texts["python"], "peak_vram.py", "exec"), loaded.__dict__)
    return loaded


def truth(d, height, width, length, batch, guidance):
    """What the tape replays, with every decision taken at these sizes."""
    return d.weights_bytes + max(d.stage_peaks(height, width, batch, length, guidance).values())


def sizes(count, seed=SEED):
    """Seeded sizes, from one latent to 4096 pixels, prompts around the encoder's limit, batches around 64."""
    rng = random.Random(seed)
    sides = [8, 9, 16, 17, 24, 40, 64, 65, 512, 519, 768, 1024, 4096]
    return [
        (
            rng.choice([rng.choice(sides), rng.randint(8, 4096)]),
            rng.choice([rng.choice(sides), rng.randint(8, 4096)]),
            rng.choice([1, 2, 76, 77, 78, 154, rng.randint(1, 5000)]),
            rng.choice([1, 2, 3, 63, 64, 65, rng.randint(1, 200)]),
            rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def test_checked_in_files_are_up_to_date(generated):
    on_disk = {name: (FORMULAS / name).read_text() for name in generated if (FORMULAS / name).is_file()}
    stale = sorted(name for name, text in generated.items() if on_disk.get(name) != text)
    assert not stale, f"rewrite with: {UPDATE}"


def test_no_stray_files(generated):
    files = (path for path in FORMULAS.rglob("*") if path.is_file() and path.suffix != ".pyc")
    present = {str(path.relative_to(FORMULAS)) for path in files}
    assert present == set(generated)


@pytest.mark.parametrize("entry", CHECKED_IN, ids=lambda entry: entry.folder)
def test_checked_in_python_equals_the_replayed_tape(entry):
    derivation, loaded = derive(entry.model, pipeline=entry.pipeline), types.ModuleType("peak_vram")
    source = FORMULAS / entry.folder / "peak_vram.py"
    exec(compile(source.read_text(), str(source), "exec"), loaded.__dict__)
    for case in sizes(8):
        assert loaded.peak_vram(*case) == truth(derivation, *case), case


def test_versions_are_those_of_the_verify_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in project["optional-dependencies"]["verify"] if "==" in line)
    assert {name: pinned[name] for name in DEFAULT} == DEFAULT


@pytest.mark.parametrize("case", sizes(60), ids=str)
def test_python_equals_the_replayed_tape(d, module, case):
    assert module.peak_vram(*case) == truth(d, *case), f"d.stage_peaks at {case}"


@pytest.mark.parametrize("guidance", [True, False])
def test_python_equals_the_replayed_tape_where_sizes_are_one(d, module, guidance):
    rng = random.Random(SEED)
    cells = list(product((8, 16, 24, 40, 80), (8, 16, 24, 40, 80), (1, 2, 77, 78), (1, 2, 63, 64)))
    for height, width, length, batch in rng.sample(cells, 24):
        case = (height, width, length, batch, guidance)
        assert module.peak_vram(*case) == truth(d, *case), case


@pytest.mark.parametrize("options", [{}, {"gpu": "t4", "attention": "sdpa"}], ids=str)
def test_python_equals_the_replayed_tape_up_to_its_limits(options):
    # Upsample2D copies its input from 2^31 elements on, which each upsampler reaches at another size
    d = derive(SD_2_1, pipeline="img2img", **options)
    peak_vram, largest, rng = d.lambdify(), d.equation.limits, random.Random(SEED)
    drawn = [
        tuple(int(2 ** rng.uniform(3, log2(most))) for most in (largest.side, largest.side, 5000, largest.batch_size))
        for _ in range(60)
    ]
    found = [(2976, 2653, 77, 4), (3777, 3031, 77, 8), (2144, 3511, 77, 8), (1050, 2971, 77, 17)]
    for case in [(*sizes, guidance) for sizes in [*found, *drawn] for guidance in (True, False)]:
        assert peak_vram(*case) == truth(d, *case), case


def test_branches_equal_the_replayed_tape():
    """Without guidance, eager attention on a batch of one skips copies that larger batches make."""
    d = derive(SD15, pipeline="img2img", attention="eager")
    peak_vram = compiled(d.equation, "math")
    long_prompts = [(h, w, n, 1, g) for h, w in ((8, 8), (64, 512)) for n in (1, 20_000) for g in (True, False)]
    for case in [*long_prompts, *sizes(16)]:
        assert peak_vram(*case) == truth(d, *case), case


def test_regimes_reach_every_decision(d):
    """A component's variants cover all combinations of sizes that are 1 and of thresholds."""
    for name in ("unet", "vae_decode"):
        variants = [variant for _, variant in regimes(d.component(name, False), d.equation)]
        for height, width, length, batch in product((1, 2, 3, 5, 9), (1, 2, 3, 5, 9), (1, 2), (1, 2, 64)):
            values = {"B": batch, "L": length, **d.grid.sizes(8 * height, 8 * width)}
            assert any(v.holds(values) for v in variants), (name, values)


def test_exporting_leaves_the_derivation_usable(d, texts):
    before = derive(SD15, pipeline="img2img")
    for sizes_ in ((8, 8, 1, 1), (8, 64, 64, 2), (64, 16, 2, 78)):
        assert d.component_peaks(*sizes_) == before.component_peaks(*sizes_)
        assert d.stage_peaks(*sizes_) == before.stage_peaks(*sizes_)


def test_fixed_sizes():
    d = derive(SD15, pipeline="img2img").at(batch_size=1, prompt_length=77)
    peak_vram = compiled(d.equation, "math")
    assert peak_vram(512, 768) == truth(d, 512, 768, 77, 1, True)
    with pytest.raises(ValueError, match="batch_size = 1"):
        peak_vram(512, 768, batch_size=2)


# The same number everywhere.

INPUTS = sizes(10_000, seed=7)


@pytest.fixture(scope="module")
def expected(module):
    return [module.peak_vram(*case) for case in INPUTS]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arrays_agree(d, expected, library):
    pytest.importorskip(library)
    height, width, length, batch, guidance = (np.array(column) for column in zip(*INPUTS, strict=True))
    if library == "torch":
        import torch

        height, width, length, batch, guidance = map(torch.tensor, (height, width, length, batch, guidance))
    peaks = compiled(d.equation, library)(height, width, length, batch, guidance)
    assert peaks.tolist() == expected


def test_arrays_broadcast(d, module):
    peaks = d.lambdify("numpy")(np.array([[512], [768]]), np.array([512, 1024]))
    assert peaks.tolist() == [[module.peak_vram(h, w) for w in (512, 1024)] for h in (512, 768)]
    with pytest.raises(ValueError, match="width is from 8"):
        d.lambdify("numpy")(512, [8, 7])
    with pytest.raises(TypeError):
        d.lambdify("numpy")(512.0, 512)


def test_math_agrees(d, module):
    assert d.lambdify("math")(512, 768) == module.peak_vram(512, 768)


COMPARE = {">": operator.gt, "==": operator.eq}


def evaluate(tree, names):
    """The whole interpreter that another program needs."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return names[tree]
    x = [evaluate(operand, names) for operand in tree["operands"]]
    match tree["operator"]:
        case "add" | "mul" | "max" as name:
            return {"add": sum, "mul": prod, "max": max}[name](x)
        case "floor_div":
            return x[0] // x[1]
        case "ceil_div":
            return -(-x[0] // x[1])


def peak_of(document, names, guidance):
    for let in document["symbols"]:
        names[let["name"]] = evaluate(let["value"], names)
    for case in document["cases"]:
        tests = ((COMPARE[c["operator"]], *c["operands"]) for c in case["conditions"])
        holds = all(compare(evaluate(left, names), right) for compare, left, right in tests)
        if case["guidance"] == guidance and holds:
            names |= case["constants"]
            for let in case["lets"]:
                names[let["name"]] = evaluate(let["value"], names)
            return evaluate(case["value"], names)
    raise AssertionError("no case holds")


def test_json_agrees(texts, expected):
    document = json.loads(texts["json"])
    found = [
        peak_of(document, {"height": h, "width": w, "L": length, "B": batch}, guidance)
        for h, w, length, batch, guidance in INPUTS
    ]
    assert found == expected


def test_every_checked_in_file_fits_the_schema():
    schema = Draft202012Validator(json.loads((FORMULAS / "schema.json").read_text()))
    files = sorted(FORMULAS.glob("*/peak_vram.json"))
    assert len(files) == len(CHECKED_IN)
    for file in files:
        schema.validate(json.loads(file.read_text()))


def test_json_fits_the_schema(texts):
    schema = json.loads((FORMULAS / "schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(texts["json"]))


def test_json_defines_the_symbols_of_tiles():
    d = derive(SD15, pipeline="txt2img", vae_tiling=True)
    document = json.loads(export(d.equation, "json"))
    Draft202012Validator(json.loads((FORMULAS / "schema.json").read_text())).validate(document)
    for headline in document["headline"].values():
        known = {"H", "W"}
        for entry in headline["definitions"]:
            assert known.issuperset(re.findall(r"\b[A-Z](?:_\{\w\})?(?!\w)", entry["value"]))
            known.add(entry["symbol"])
        used = {name for term in headline["terms"] for name in re.findall(r"[A-Z](?:_\{\w\})?", term["peak_bytes"])}
        assert used <= known | {"L", "B"}


def test_json_names_modules(texts):
    terms = json.loads(texts["json"])["headline"]["guidance"]["terms"]
    assert terms[0]["stage"] == "vae_decode"
    assert terms[0]["witness"]["module"].startswith("vae.decoder.")


def run(command, stdin="", cwd=None):
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def test_javascript_agrees(texts, expected, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (tmp_path / "peak_vram.mjs").write_text(texts["javascript"])
    (tmp_path / "inputs.json").write_text(json.dumps(INPUTS))
    (tmp_path / "main.mjs").write_text(
        'import { readFileSync } from "node:fs";\n'
        'import { peak_vram } from "./peak_vram.mjs";\n'
        'const inputs = JSON.parse(readFileSync(new URL("inputs.json", import.meta.url)));\n'
        "let limit = false;\n"
        "try { peak_vram(2 ** 26, 2 ** 26); } catch (error) { limit = error instanceof RangeError; }\n"
        "console.log(JSON.stringify([limit, inputs.map((x) => peak_vram(...x))]));\n"
    )
    assert json.loads(run(["node", str(tmp_path / "main.mjs")])) == [True, expected]


def node_says(text, calls, tmp_path):
    """Return what an exported module says at some sizes: [peak_vram, stage_vram, WEIGHTS_BYTES] each."""
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    (tmp_path / "peak_vram.mjs").write_text(text)
    (tmp_path / "main.mjs").write_text(
        'import { peak_vram, stage_vram, WEIGHTS_BYTES } from "./peak_vram.mjs";\n'
        f"const found = {json.dumps(calls)}.map((x) => [peak_vram(...x), stage_vram(...x), WEIGHTS_BYTES]);\n"
        "console.log(JSON.stringify(found));\n"
    )
    return json.loads(run([node, str(tmp_path / "main.mjs")]))


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32", "attention": "eager"}, {"pipeline": "txt2img", "vae_tiling": True}],
    ids=str,
)
def test_javascript_knows_every_stage(options, tmp_path):
    rng, d = random.Random(SEED), derive(SD15, **options)
    calls = [
        (8 * rng.choice((1, 2, 3, 7, 64, 129)), 8 * rng.choice((1, 2, 5, 65, 100)), *rest, rng.random() < 0.5)
        for rest in product((1, 77, 78, 231), (1, 3))
    ]
    said = node_says(export(d.equation, "javascript"), calls, tmp_path)
    for (h, w, n, b, g), (peak, stages, weights) in zip(calls, said):
        assert stages == d.stage_peaks(h, w, b, n, g), (h, w, n, b, g)
        assert (peak, weights) == (weights + max(stages.values()), d.weights_bytes)


def test_c_agrees(texts, expected, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    (tmp_path / "peak_vram.h").write_text(texts["c"])
    (tmp_path / "main.c").write_text(
        '#include <inttypes.h>\n#include <stdio.h>\n#include "peak_vram.h"\n'
        "int main(void) {\n  int64_t h, w, l, b;\n  int g;\n"
        '  while (scanf("%" SCNd64 "%" SCNd64 "%" SCNd64 "%" SCNd64 "%d", &h, &w, &l, &b, &g) == 5)\n'
        '    printf("%" PRId64 "\\n", peak_vram(h, w, l, b, g));\n  return 0;\n}\n'
    )
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsanitize=undefined"]
    run([compiler, *flags, str(tmp_path / "main.c"), "-o", str(tmp_path / "main")])
    limits = [int(n) for n in re.findall(r"#define PEAK_VRAM_MAX_\w+ (\d+)", texts["c"])]
    side, length, batch = limits
    corner, beyond = (side, side, length, batch, True), (side + 1, side, length, batch, True)
    rows = [*INPUTS, corner, beyond]
    out = run([str(tmp_path / "main")], "\n".join(" ".join(str(int(x)) for x in row) for row in rows))
    *found, largest, refused = map(int, out.split())
    assert found == expected
    assert (largest, refused) == (compiled_corner(texts, corner), -1)


def compiled_corner(texts, corner):
    namespace = {"__name__": "corner"}
    exec(texts["python"], namespace)
    return namespace["peak_vram"](*corner)


VARIANTS = (
    {"offload": "model"},
    {"offload": "sequential", "pipeline": "txt2img"},
    {"ip_adapter_tokens": 4, "vae_slicing": True},
)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request):
    return derive(SD15, **{"pipeline": "img2img", **request.param})


def test_every_export_of_other_options_equals_the_replayed_tape(variant, tmp_path):
    rng, multiple = random.Random(SEED), 8 if variant.options.pipeline == "txt2img" else 1
    cases = [(h - h % multiple, w - w % multiple, *rest) for h, w, *rest in sizes(6, seed=rng.random())]
    wanted = [truth(variant, *case) for case in cases]
    peak_vram = compiled(variant.equation, "math")
    assert [peak_vram(*case) for case in cases] == wanted
    if multiple == 8:
        with pytest.raises(ValueError, match="multiples of 8"):
            peak_vram(512, 519)
    columns = [np.array(column) for column in zip(*cases, strict=True)]
    assert compiled(variant.equation, "numpy")(*columns).tolist() == wanted
    document = json.loads(export(variant.equation, "json"))
    names = [{"height": h, "width": w, "L": n, "B": b} for h, w, n, b, _ in cases]
    assert [peak_of(document, n, case[4]) for n, case in zip(names, cases, strict=True)] == wanted
    schema = json.loads((FORMULAS / "schema.json").read_text())
    Draft202012Validator(schema).validate(document)
    if (node := shutil.which("node")) is not None:
        (tmp_path / "peak_vram.mjs").write_text(export(variant.equation, "javascript"))
        script = f"import {{ peak_vram }} from './peak_vram.mjs'; console.log(JSON.stringify({json.dumps(cases)}"
        (tmp_path / "main.mjs").write_text(f"{script}.map((x) => peak_vram(...x))));")
        assert json.loads(run([node, str(tmp_path / "main.mjs")])) == wanted
    if (compiler := shutil.which("gcc") or shutil.which("clang")) is not None:
        assert c_peaks(compiler, export(variant.equation, "c"), cases, tmp_path) == wanted


def c_peaks(compiler, header, cases, folder):
    arguments = (", ".join(str(int(x)) for x in case) for case in cases)
    calls = "".join(f'  printf("%" PRId64 "\\n", peak_vram({given}));\n' for given in arguments)
    (folder / "peak_vram.h").write_text(header)
    (folder / "main.c").write_text(
        '#include <inttypes.h>\n#include <stdio.h>\n#include "peak_vram.h"\n'
        f"int main(void) {{\n{calls}  return 0;\n}}\n"
    )
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsanitize=undefined"]
    run([compiler, *flags, str(folder / "main.c"), "-o", str(folder / "main")])
    return [int(line) for line in run([str(folder / "main")]).split()]


def test_the_c_header_has_one_function_and_compiles_alone(texts, tmp_path):
    assert re.findall(r"(?m)^static inline int64_t (\w+)\(", texts["c"]) == ["peak_vram"]
    assert "double" not in texts["c"] and "float " not in texts["c"]
    if (compiler := shutil.which("gcc") or shutil.which("clang")) is None:
        pytest.skip("no C compiler is installed")
    (tmp_path / "peak_vram.h").write_text(texts["c"])
    (tmp_path / "alone.c").write_text('#include "peak_vram.h"\n#include "peak_vram.h"\n')
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    run([compiler, *flags, str(tmp_path / "alone.c")])


@pytest.mark.parametrize(
    ("options", "counted", "left_out", "place"),
    [
        ({}, (), ("CPU offload", "LoRA", "ControlNet", "IP-Adapter"), "all models stay on the GPU"),
        ({"offload": "model"}, ("CPU offload",), ("LoRA",), "each moved to the GPU whole"),
        ({"offload": "sequential"}, ("CPU offload",), ("LoRA",), "each layer's moved to the GPU"),
        ({"lora_rank": 4}, ("LoRA",), ("CPU offload", "ControlNet"), "a LoRA on to_q"),
        ({"controlnets": 2}, ("ControlNet",), ("LoRA", "IP-Adapter"), "one control image a prompt"),
        ({"ip_adapter_tokens": 4}, ("IP-Adapter",), ("LoRA",), "OpenCLIP ViT-H/14"),
    ],
    ids=str,
)
def test_headers_leave_out_what_is_not_counted_only(options, counted, left_out, place):
    chosen = derive(SD15, **options).options
    excluded = "; ".join(exclusions(chosen))
    assert [words for words in counted if words in excluded] == []
    assert [words for words in left_out if words not in excluded] == []
    assert place in "; ".join(assumptions(chosen))


NASTY = '<script>alert(1)</script> */ \\end{document} """ $x^2$ %d \'; `x` ${1} \n\u2028 é'


@pytest.fixture(scope="module")
def hostile(d):
    return Derivation(WalkedSubject(replace(d.checkpoint, name=NASTY), d.options))


@pytest.mark.parametrize("target", TARGETS)
def test_a_hostile_name_stays_a_name(target, hostile, d, tmp_path):
    text = export(hostile.equation, target)
    assert text.isascii()
    for forbidden in ("<script", "\\end{document}", "*/ \\", "${1}", "\u2028"):
        assert forbidden not in text
    if target in ("python", "numpy", "torch"):
        ast.parse(text)
    elif target == "json":
        json.loads(text)
    elif target == "c" and (compiler := shutil.which("gcc")) is not None:
        assert c_peaks(compiler, text, [(512, 512, 77, 1, True)], tmp_path) == [truth(d, 512, 512, 77, 1, True)]
    elif target == "javascript" and (node := shutil.which("node")) is not None:
        (tmp_path / "peak_vram.mjs").write_text(text)
        run([node, "--check", str(tmp_path / "peak_vram.mjs")])


def test_the_generated_python_is_typed(texts, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "peak_vram.py").write_text(texts["python"])
    run([sys.executable, "-m", "mypy", "--strict", "--config-file=", str(tmp_path / "peak_vram.py")])


# The generated Python.


def test_doctests(module):
    results = doctest.testmod(module)
    assert results.attempted >= 2
    assert results.failed == 0


def test_python_runs_alone(texts, tmp_path):
    script = tmp_path / "peak_vram.py"
    script.write_text(texts["python"])
    out = run([sys.executable, "-I", str(script), "--height", "768", "--width", "512"])
    assert out == "3345398272 bytes (3.116 GiB)\n"
    command = [sys.executable, "-I", str(script), "--height", "4", "--width", "8"]
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2
    assert "at least 8" in bad.stderr


def test_python_needs_the_standard_library_only(texts):
    tree = ast.parse(texts["python"])
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= set(sys.stdlib_module_names)


def test_origin_signature(module):
    assert module.f(512, 768, 77) == module.peak_vram(512, 768)
    assert module.f(512, 768, 77, batch_size=3, guidance_scale=1.0) == module.peak_vram(512, 768, 77, 3, False)
    without = module.peak_vram(512, 768, guidance=False)
    assert module.f(512, 768, 77, guidance=False, num_inference_steps=5, strength=0.3) == without
    with pytest.raises(TypeError, match="unexpected arguments: heigth"):
        module.f(512, 768, heigth=3)


@pytest.mark.parametrize("bad", [(7, 512), (512, 0), (512, 512, 0), (512, 512, 77, 0)])
def test_bad_sizes(module, bad):
    with pytest.raises(ValueError, match="at least"):
        module.peak_vram(*bad)


def test_floats_are_refused(module):
    with pytest.raises(TypeError):
        module.peak_vram(512.0, 512)


# LaTeX.


def test_latex_is_balanced(texts):
    body = re.sub(r"\\[{}]", "", texts["latex"])
    assert body.count("{") == body.count("}")
    assert sorted(re.findall(r"\\begin{(\S+?)}", body)) == sorted(re.findall(r"\\end{(\S+?)}", body))
    assert texts["latex"].count(r"\left\{") == texts["latex"].count(r"\right\}")
    first = r"\begin{equation}\label{eq:stable-diffusion-v1-5:peak}"
    assert re.sub(r"(?m)^%.*\n", "", texts["latex"]).startswith(first)


def formulas_of(latex):
    displays = re.findall(r"\\begin{equation}\\label{.*?}(.*?)\\end{equation}", latex, re.DOTALL)
    inline = re.findall(r"\$([^$]+)\$", re.sub(r"(?m)^%.*$", "", latex))
    return [*displays, *inline]


NOTED = [(entry.model, entry.pipeline, {}) for entry in CHECKED_IN] + [(SD15, "img2img", {"vae_tiling": True})]


@pytest.fixture(scope="module")
def noted():
    """Every bundled model's LaTeX with its notes, and tiles'."""
    return {str(n): derive(n[0], pipeline=n[1], **n[2]).latex(notes=True) for n in NOTED}


def test_latex_passes_katex(noted):
    script = (
        "const katex = require('katex'); const fs = require('fs');"
        "for (const x of JSON.parse(fs.readFileSync(0))) katex.renderToString(x, {strict: 'error', displayMode: true});"
        "console.log('ok');"
    )
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require('katex')"], capture_output=True, cwd=ROOT).returncode != 0:
        pytest.skip("node with the katex package is not installed")
    formulas = [formula for latex in noted.values() for formula in formulas_of(latex)]
    assert run([node, "-e", script], json.dumps(formulas), cwd=ROOT) == "ok\n"


@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_fits_a_column(noted, columns, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    for name, latex in noted.items():
        (tmp_path / "main.tex").write_text(
            f"\\documentclass[{columns}]{{article}}\\usepackage{{amsmath}}\\begin{{document}}{latex}\\end{{document}}"
        )
        run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"], cwd=tmp_path)
        log = (tmp_path / "main.log").read_text(errors="replace")
        assert not [w for w in re.findall(r"Overfull \\hbox \(([0-9.]+)pt", log) if float(w) > 10], (name, log)


@pytest.mark.parametrize("guidance", [True, False])
def test_the_numbers_of_the_latex_are_the_exact_peak_but_for_rounding(d, module, guidance):
    display = formulas_of(d.latex())[0 if guidance else 1].replace("{,}", "").replace(r"\,", " ")
    weights = int(re.search(r"underbrace{(\d+)}", display)[1])
    rows = re.search(r"begin{array}{l}(.*?)\\end{array}", display, re.DOTALL)[1].replace("\\qquad", "")
    largest = {True: 352, False: 480}[guidance]  # 511 bytes at most for each of the few tensors alive
    for height, width, length, batch in ((512, 512, 77, 1), (64, 64, 77, 1), (1024, 768, 154, 3), (64, 128, 90000, 1)):
        at = {"H": height, "W": width, "L": length, "B": batch}
        values = []
        for row in re.split(r", *\\\\", rows):
            row = re.sub(r"\\tfrac{(\d+)}{(\d+)}", r"\1/\2", row.replace("\\\\", " ").strip())
            products = [re.sub(r"(?<=[\dA-Z]) +(?=[A-Z])", " * ", part) for part in re.split(r" \+ ", row)]
            values.append(sum(eval(part, {}, at) for part in products))
        assert 0 <= module.peak_vram(height, width, length, batch, guidance) - weights - max(values) <= largest * batch


@pytest.mark.parametrize("entry", CHECKED_IN, ids=lambda entry: entry.folder)
def test_the_table_of_terms_says_the_exact_peak_but_for_rounding_and_fits(entry, tmp_path):
    d = derive(entry.model, pipeline=entry.pipeline)
    table = d.latex("terms")
    last = next(line for line in table.splitlines() if line.strip().startswith("$M$ &"))
    for side, said in zip((512, 768, 1024), re.findall(r"[\d{},]{9,}", last)):
        exact = d.weights_bytes + max(d.stage_peaks(side, side, 1, d.prompt_length).values())
        over = exact - int(re.sub("[{},]", "", said))
        # SDXL frees the VAE's weights of half precision, each less than a block more than its bytes
        most = max(term.rounding_bytes for term in d.equation.pipeline_stage().terms)
        assert -512 * len(d.parameters["vae"]) < over <= most
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    for columns in ("", "[twocolumn]"):
        head = f"\\documentclass{columns}{{article}}\\usepackage{{amsmath,booktabs}}\\begin{{document}}"
        (tmp_path / "main.tex").write_text(f"{head}{table}\\end{{document}}")
        run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"], cwd=tmp_path)
        assert "Overfull" not in (tmp_path / "main.log").read_text(errors="replace")


def test_the_table_of_terms_counts_a_tiled_vae_s():
    d = derive(SD15, pipeline="img2img", vae_tiling=True)
    last = next(line for line in d.latex("terms").splitlines() if line.strip().startswith("$M$ &"))
    for side, said in zip((512, 768, 1024), re.findall(r"[\d{},]{9,}", last)):
        exact = d.weights_bytes + max(d.stage_peaks(side, side, 1, 77).values())
        assert 0 <= exact - int(re.sub("[{},]", "", said)) <= 512 * 64


def test_latex_of_one_stage_and_of_none(d):
    decode = d.latex("vae_decode")
    assert r"M_{\text{vae\_decode}} =" in decode and r"\label{eq:stable-diffusion-v1-5:vae-decode}" in decode
    with pytest.raises(DerivationError, match="which = 'vae' is not supported"):
        d.latex("vae")
    with pytest.raises(DerivationError, match="notes = True is not supported"):
        export(d.equation, "json", notes=True)


# Writing.


def test_write(d, tmp_path):
    [path] = write(d.equation, ["python"], tmp_path / "new" / "folder")
    assert path.read_text() == export(d.equation, "python")
    assert [p.name for p in path.parent.iterdir()] == ["peak_vram.py"]


def test_unwritable_directory(d, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DerivationError, match="cannot be written"):
        write(d.equation, ["python"], tmp_path / "file")


def test_unknown_target(d):
    e = d.equation
    for call in (lambda: export(e, "fortran"), lambda: compiled(e, "latex"), lambda: write(e, ["x"], ".")):
        with pytest.raises(DerivationError, match="is not supported"):
            call()


def test_checked_in_folders_are_distinct():
    assert len({entry.folder for entry in CHECKED_IN}) == len(CHECKED_IN)


# Crossovers.


@pytest.mark.parametrize("attention", ["efficient", "eager"])
def test_area_crossovers_are_where_the_winner_changes(attention):
    d = derive(SD15, pipeline="img2img", attention=attention)
    terms = d.equation.pipeline_stage().terms
    for c in (c for c in d.equation.crossovers() if c.axis == "area"):
        for area, stage in ((int(c.at), c.before), (int(c.at) + 1, c.after)):
            at = {H: area, W: 1, L: c.given["L"], B: c.given["B"]}
            assert max(terms, key=lambda term: term.expression.subs(at)).point.stage == stage


def test_length_crossover_is_symbolic(d):
    [crossing] = [c for c in d.equation.crossovers() if c.axis == "length"]
    assert (crossing.before, crossing.after) == ("vae_decode", "unet")
    assert {H, W} <= crossing.threshold.free_symbols
    assert int(crossing.at) == 35_679


def test_does_not_matter(d):
    found = {item.quantity: item.sentence for item in d.equation.irrelevant()}
    assert "35,679 tokens" in found["prompt length"]
    assert "From 5 UNet calls on" in found["number of denoising steps, strength"]


def test_fewer_steps_never_take_more(module):
    for steps in (1, 2, 3, 4):
        d = derive(SD15, pipeline="img2img", num_inference_steps=steps, strength=1.0)
        for guidance in (True, False):
            assert truth(d, 512, 512, 77, 1, guidance) <= module.peak_vram(512, 512, guidance=guidance)


def test_a_stage_is_defined_as_what_it_needs_beyond_the_weights():
    d = derive(SD15)
    text = d.latex("vae_decode")
    assert r"where $M_{\text{vae\_decode}}$ is the peak of this stage beyond the weights" in text
    assert "The weights are" not in text and "The weights are" in d.latex()


def test_a_traced_header_says_what_its_numbers_are():
    traced = derive("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    header = export(traced.equation, "python").split('"""')[1]
    assert "(WanPipeline)" in header and "txt2img" not in header and "safety_checker" not in header
    assert "exact for every size" not in header and "between them interpolated" in header
