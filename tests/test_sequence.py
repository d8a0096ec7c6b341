"""Several calls in one process: what is cached between them, held to the allocator driven by hand."""

import json
from typing import Any

import pytest
from conftest import SD15

from derivation import Derivation, derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import load_pipeline, weight_bytes
from derivation.ask.sequence import sequence
from derivation.call import Call
from derivation.cli import run
from derivation.errors import DerivationError
from derivation.tape.symbols import evaluate
from derivation.verdict import NO_FIT

CALLS = [Call(768, 512), Call(512, 512), Call(640, 640)]


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
KINDS = [
    (SD15, {"num_inference_steps": 3}),
    (SD15, {"num_inference_steps": 3, "offload": "model"}),
    (SD15, {"num_inference_steps": 3, "offload": "sequential"}),
    (SDXL, {"num_inference_steps": 2, "pipeline": "txt2img"}),
    (SDXL, {"num_inference_steps": 2, "pipeline": "txt2img", "offload": "model"}),
]


class Process:
    """Calls by hand, event by event: weights by path; those loaded again and cuBLAS's workspace stay."""

    def __init__(self, d: Derivation) -> None:
        self.d, self.allocator = d, CachingAllocator()
        self.here = load_pipeline(self.allocator, d.resident)

    def call(self, call: Call, empty_cache: bool) -> int:
        values, allocator = self.d.sizes(call), self.allocator
        tape = self.d.program().at(values).tape
        allocator.reset_peak_memory_stats()
        stays = [a.path if a.op == "load" else a.op if a.op == "cublas workspace" else "" for a in tape.allocations]
        assert not tape.loops and all(a.count == 1 for a in tape.allocations)
        live = {i: self.here.pop(stays[i]) for i, a in enumerate(tape.allocations) if a.loaded}
        for place, event in enumerate(tape.events, 1):
            index = abs(event) - 1
            if event < 0:
                allocator.free(live.pop(index))
            elif stays[index] == "cublas workspace" and stays[index] in self.here:
                live[index] = self.here.pop(stays[index])
            else:
                live[index] = allocator.malloc(evaluate(tape.allocations[index].nbytes, values))
            for _ in range(tape.emptied.count(place)):
                allocator.empty_cache()
        for index, handle in live.items():
            if stays[index]:
                self.here[stays[index]] = handle
            else:
                allocator.free(handle)
        if empty_cache:
            allocator.empty_cache()
        return allocator.reserved_bytes.peak

    @property
    def cached(self) -> int:
        return self.allocator.reserved_bytes.current - self.allocator.allocated_bytes.current


@pytest.mark.parametrize("empty_cache", [False, True])
@pytest.mark.parametrize(("model", "options"), KINDS, ids=str)
def test_calls_after_one_another_are_one_process(model: str, options: dict[str, Any], empty_cache: bool) -> None:
    d = derive(model, gpu="h100", **options)
    process = Process(d)
    for k, (turn, call) in enumerate(zip(sequence(d, CALLS, empty_cache), CALLS, strict=True)):
        assert turn.call == call and turn.verdict.fits
        assert turn.cached_before_bytes == process.cached
        assert turn.memory.reserved == process.call(call, empty_cache)
        assert turn.memory.allocated == process.allocator.allocated_bytes.peak
        assert turn.cached_after_bytes == process.cached
        assert k or turn.memory.reserved == d.device_memory(call).reserved
    kept = {name for name in process.here if name != "cublas workspace"}
    assert kept == set(weight_bytes(d.resident)) and len(process.here) == len(kept) + 1


def test_a_call_that_loses_weights_has_no_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    d = derive(SDXL, gpu="h100", num_inference_steps=2, pipeline="txt2img")
    tape = d.program().at(d.sizes(CALLS[0])).tape
    last = max(i for i, a in enumerate(tape.allocations) if a.op == "load" and not a.loaded)
    monkeypatch.setattr(tape, "events", [*tape.events, -last - 1])
    with pytest.raises(DerivationError, match=r"then = .* leave the weights as they found them"):
        sequence(d, CALLS)


def test_what_follows_a_call_that_does_not_fit_is_not_told() -> None:
    d = derive(SD15, gpu="rtx-3060", num_inference_steps=2)
    [fits, fails] = sequence(d, [Call(512, 512), Call(4096, 4096), Call(512, 512)])
    assert fits.verdict.fits and fails.verdict.verdict == NO_FIT
    with pytest.raises(DerivationError, match="gpu"):
        sequence(derive(SD15), CALLS)


def test_then_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["estimate", "sd15", "--gpu", "rtx-3060", "--num-inference-steps", "2", "--size", "768"]
    assert run([*asked, "--then", "512x512", "--then", "640", "--json"]) == 0
    [second, third] = json.loads(capsys.readouterr().out)["then"]
    assert (second["height"], third["width"]) == (512, 640)
    assert second["cached_before_bytes"] > 0 and second["reserved_bytes"] >= third["cached_before_bytes"]
    assert run([*asked, "--then", "4096"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("then 4096 x 4096: needs more than ")
    assert run([*asked, "--then", "big"]) == 2
    assert run(["estimate", "sd15", "--then", "512"]) == 2
