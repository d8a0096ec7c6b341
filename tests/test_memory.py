"""A tape whose modules are copied from a memory is the tape of a run that remembers nothing."""

from __future__ import annotations

import pytest
from conftest import SD15, SDXL

from derivation import derive
from derivation.equation.cases import generic_sizes, regimes
from derivation.tape.program import Program
from derivation.tape.tape import Tape


def facts(tape):
    kept = tape.events, tape.allocations, list(tape.guards.values()), tape.marks, tape.loops, tape.cut
    return *kept, tape.emptied, tape.alive, tape.tile


def from_scratch(program: Program, tape: Tape) -> Tape:
    fresh = Tape(tape.options, tape.hardware, hint=tape.hint, ones=tape.ones, fixed=tape.fixed)
    with fresh.running():
        outputs = program._run()
        del outputs
    return fresh


@pytest.mark.parametrize(
    ("model", "guidance", "options"),
    [
        (SD15, False, {}),
        (SD15, True, {"gpu": "t4", "channels_last": True, "vae_slicing": True}),
        (SD15, False, {"gpu": "rtx-4090", "controlnets": 2, "offload": "sequential", "pipeline": "txt2img"}),
        (SD15, True, {"attention": "eager", "attention_slicing": "auto", "lora_rank": 4}),
        (SDXL, True, {"vae_tiling": True, "offload": "model"}),
        (SDXL, True, {"gpu": "a100", "attention": "math", "ip_adapter_tokens": 4}),
    ],
)
def test_a_remembered_tape_is_a_recorded_one_in_every_regime(model, guidance, options):
    derivation = derive(model, **options)
    equation = derivation.equation
    sizes = generic_sizes(equation)
    programs = [derivation.component(name, guidance) for name in derivation.calls]
    whole = derivation.program(guidance)
    seen = [(program, cell, variant.tape) for program in programs for cell, variant in regimes(program, equation)]
    cells = dict.fromkeys(cell for _, cell, _ in seen)
    seen += [(whole, cell, whole.regime(cell.values(sizes)).tape) for cell in list(cells)[::8]]
    for program, _, tape in seen:
        assert facts(from_scratch(program, tape)) == facts(tape)


def test_a_module_is_recorded_once_and_copied_under_another_path():
    tape = derive(SD15).component("safety_checker").generic.tape
    paths = [a.path for a in tape.allocations if a.op == "native_layer_norm"]
    assert len(set(paths)) == 2 * 24 + 2
    assert tape.memory is not None
    layers = [found for key, found in tape.memory.items() if key[0].__name__ == "CLIPEncoderLayer"]
    assert [len(found) for found in layers] == [1]
