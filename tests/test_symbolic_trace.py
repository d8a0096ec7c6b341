"""The second derivation: real modules run with symbolic sizes, compared as expressions; transformers by trace."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy
import sympy
from conftest import SD15, SDXL
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv, Mod

from derivation import Derivation, DerivationError, Options, derive
from derivation.call import Call
from derivation.config import load
from derivation.config.checkpoint import BUNDLED
from derivation.export import export
from derivation.tape.symbols import evaluate, symbol
from derivation.tape.tape import Tape
from derivation.trace.polynomials import RELATIONS, Decision, Translation, compared, floor_div
from derivation.trace.subject import TracedTransformer
from derivation.trace.symbolic import GENERIC, SymbolicSizes, symbolic_trace, with_levels
from derivation.verify.agree import agree
from derivation.verify.fuzz import READERS, random_case
from derivation.verify.streams import naive_peak
from derivation.walk.subject import WalkedSubject

COMPONENTS = ("vae_encode", "vae_decode", "unet")

SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 3,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 2,
    "num_single_layers": 2,
    "guidance_embeds": True,
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "num_layers": 2,
    "out_channels": 8,
    "caption_channels": 4096,
    "sample_size": 128,
}
# (height, width, batch_size, prompt_length, guidance)
CALLS = [(1024, 1024, 1, 120, True), (512, 1536, 2, 120, True), (16, 64, 1, 8, False)]


def config_of(model: str, component: str) -> dict[str, object]:
    folder = "unet" if component == "unet" else "vae"
    return json.loads((BUNDLED / model / folder / "config.json").read_text())


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("attention", ["efficient", "eager"])
@pytest.mark.parametrize("model", [SD15, SDXL])
def test_two_derivations_agree_as_expressions(model, attention, component):
    derived = derive(model, attention=attention).component(component).generic.tape
    traced = symbolic_trace(component, config_of(model, component), attention=attention)
    agreement = agree(derived, traced)
    assert agreement.match, agreement.parting
    assert agreement.allocations == len(derived.allocations) == len(traced.allocations)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "flash", "dtype": "bfloat16"},
        {"attention": "math", "dtype": "float32"},
    ],
    ids=str,
)
def test_other_backends_and_dtypes_agree(options):
    for component in COMPONENTS:
        derived = derive(SD15, **options).component(component, guidance=False).generic.tape
        traced = symbolic_trace(component, config_of(SD15, component), guidance=False, **options)
        assert agree(derived, traced).match, (component, agree(derived, traced))


@pytest.mark.parametrize("seed", range(100, 106))
def test_random_configs_agree_as_expressions(seed):
    component = COMPONENTS[seed % 3]
    case = random_case(seed, component)
    field, read = READERS[component]
    checkpoint = replace(load(SD15), **{field: read(case.config)})
    chosen = {"dtype": case.options.dtype, "attention": case.options.attention}
    derived = Derivation(WalkedSubject(checkpoint, Options(**chosen))).component(component, case.guidance).generic.tape
    agreement = agree(derived, symbolic_trace(component, case.config, guidance=case.guidance, **chosen))
    assert agreement.match, f"{agreement.parting}\nreproduce: {case}"


def test_a_difference_is_found():
    traced = symbolic_trace("vae_decode", config_of(SD15, "vae_decode"), attention="eager")
    derivation = derive(SD15)
    assert "derived" in str(agree(derivation.component("vae_decode").generic.tape, traced).parting)
    assert "derived 162" in str(agree(derivation.component("vae_encode").generic.tape, Tape(traced.options)).parting)


@pytest.mark.parametrize("model", [SD15, SDXL])
def test_sides_that_every_level_divides_agree(model):
    config = config_of(model, "unet")
    level = len(config["block_out_channels"]) - 1
    traced = symbolic_trace("unet", config, level=level)
    agreement = agree(derive(model).component("unet").generic.tape, traced, level=level)
    assert agreement.match, agreement.parting


def test_decisions_are_bounds_and_two_of_diffusers_own():
    traced = symbolic_trace("unet", config_of(SD15, "unet"))
    values = with_levels({"B": 2, "L": 77, "h0": 64, "w0": 97})
    decisions = [guard for guard in traced.guards.values() if isinstance(guard, Decision)]
    bounds = [guard for guard in traced.guards.values() if guard not in decisions]
    assert all(guard.holds(values) for guard in bounds)
    # UNet2DConditionModel.forward: forward_upsample_size; Upsample2D.forward: max(scale factors) * numel > 2**31
    assert not any(isinstance(guard.relation, sympy.Eq) for guard in decisions)
    assert all(guard.relation.has(Mod) or guard.relation.has(IntTrueDiv) for guard in decisions)


def test_a_specialised_symbol_raises():
    sizes = SymbolicSizes(Tape(Options()), GENERIC)
    assert sizes["B"] == GENERIC["B"]
    with pytest.raises(DerivationError, match="specialised B = 3"):
        sizes.decide()


def test_floor_division_equals_integers():
    rng = random.Random(7)
    found = 0
    for _ in range(3000):
        level, shift = rng.randrange(4), rng.randrange(1, 3)
        dividend = rng.choice((1, 2, 4, 8)) * symbol(f"h{level}") + rng.randint(-9, 9)
        divisor = rng.choice((1, 2, 4, 8, 1 << shift))
        quotient = floor_div(dividend, divisor)
        for h0 in (1, 2, 3, 5, 8, 29, 64):
            values = with_levels({"h0": h0})
            if quotient is not None:
                found += 1
                assert evaluate(quotient, values) == evaluate(dividend, values) // divisor, (dividend, divisor, h0)
    assert found > 1000


def traced(config, options=None):
    return Derivation(TracedTransformer.read(config, options))


def test_expressions_without_a_polynomial_raise():
    h0 = sympy.Symbol("s1", integer=True, positive=True)
    translation = Translation({})
    translation.symbols[h0] = "h0"
    assert translation.polynomial(FloorDiv(FloorDiv(h0 - 1, 2), 2) + 1) == symbol("h2")
    assert translation.polynomial(Mod(2 * h0, 2)) == 0
    for expression in (FloorDiv(h0, 2), FloorDiv(h0 - 1, 3), sympy.Rational(1, 2) * h0, Mod(h0, 8)):
        with pytest.raises(DerivationError, match="is no polynomial"):
            translation.polynomial(expression)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
def test_guards_say_the_relation(relation):
    for constant in (-70, -3, 0, 3):
        for h0 in (2, 3, 4, 69, 70, 71):
            difference = symbol("h0") + constant
            asked = relation(h0 + constant, 0)
            if asked:
                guards = compared(relation, difference, h0 + constant > 0)
                assert all(guard.holds({"h0": h0}) for guard in guards), (constant, h0, guards)
                others = [h for h in range(2, 80) if all(guard.holds({"h0": h}) for guard in guards)]
                assert all(relation(h + constant, 0) for h in others)


@pytest.mark.parametrize("attention", ["efficient", "math", "eager"])
@pytest.mark.parametrize("config", [SD3, FLUX, PIXART], ids=lambda config: config["_class_name"])
def test_traced_transformers_equal_the_numeric_trace(config, attention):
    if attention == "eager" and config is not PIXART:
        with pytest.raises(DerivationError, match="eager"):
            traced(config, Options(attention=attention))
        return
    derivation = traced(config, Options(attention=attention))
    for height, width, batch_size, prompt_length, guidance in CALLS:
        numeric = naive_peak(derivation.subject.measure(Call(height, width, batch_size, prompt_length, guidance)))
        peaks = derivation.component_peaks(height, width, batch_size, prompt_length, guidance)
        assert peaks == {"transformer": numeric}
        total = derivation.estimate(height, width, batch_size, prompt_length, guidance)["peak_tensor_bytes"]
        assert total == numeric + derivation.weights_bytes


# a block of each kind but the plain one in the middle, which the numeric trace has: each of 48 cells is traced anew
@pytest.mark.parametrize("config", [{**SD3, "num_layers": 2}], ids=lambda config: config["_class_name"])
def test_a_traced_equation_is_exported_as_a_walked_one_is(config):
    derivation = traced(config)
    peak_vram, rng = derivation.lambdify("math"), random.Random(7)
    calls = [(16 * rng.randint(1, 60), 16 * rng.randint(1, 60), rng.choice((1, 2, 5)), 77, True) for _ in range(6)]
    for height, width, batch_size, length, guidance in calls:
        numeric = naive_peak(derivation.subject.measure(Call(height, width, batch_size, length, guidance)))
        assert peak_vram(height, width, length, batch_size, guidance) == derivation.weights_bytes + numeric
    columns = [numpy.array(column) for column in zip(*((h, w, n, b) for h, w, b, n, _ in calls))]
    assert derivation.lambdify("numpy")(*columns).tolist() == [peak_vram(h, w, n, b) for h, w, b, n, _ in calls]
    document = json.loads(export(derivation.equation, "json"))
    assert [a["multiple_of"] for a in document["arguments"][:2]] == [16, 16]
    assert "transformer" in derivation.latex() and "\\begin{align" in derivation.latex()
    for size in (520, 8, 3088):
        with pytest.raises(ValueError, match="height and width"):
            peak_vram(size, 512)
    assert Derivation.from_json(derivation.to_json()).peak == derivation.peak


def test_a_traced_derivation_is_one():
    derivation = traced(FLUX)
    assert derivation.method == "trace"
    assert derivation.peak.free_symbols == set(sympy.symbols("H W L B", integer=True, positive=True))
    fixed = derivation.at(height=1024, width=1024, batch_size=1, prompt_length=512)
    estimate = derivation.estimate(1024, 1024, prompt_length=512)
    assert estimate["method"] == "trace"
    assert 0 <= estimate["peak_tensor_bytes"] - fixed.peak <= 512 * 64
    assert derivation.stages["transformer"].witness.tensors


def test_bad_input_is_one_line():
    bad = [
        lambda: traced({}),
        lambda: traced(3),
        lambda: traced("/nowhere"),
        lambda: traced({**SD3, "patch_size": 4}),
        lambda: traced({**SD3, "num_layers": 10**9}),
        lambda: traced(SD3, Options(vae_tiling=True)),
        lambda: traced({**SD3, "num_layers": "x"}).peak,
        lambda: traced({**SD3, "caption_projection_dim": 7}).peak,
        lambda: traced({**SD3, "more": object()}).peak,
        lambda: traced(SD3).component_peaks(520, 512),
        lambda: traced(SD3).component_peaks(4096, 512),
    ]
    for request in bad:
        with pytest.raises(DerivationError) as caught:
            request()
        assert "\n" not in str(caught.value)
