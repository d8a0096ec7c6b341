"""Several calls in one process: what is cached between them, held to one long replay by hand."""

import json

import pytest
from conftest import SD15

from derivation import derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import load_pipeline
from derivation.allocator.simulate import replay
from derivation.ask.sequence import sequence
from derivation.call import Call
from derivation.cli import run
from derivation.errors import DerivationError
from derivation.verdict import NO_FIT

CALLS = [Call(768, 512), Call(512, 512), Call(640, 640)]


@pytest.mark.parametrize("empty_cache", [False, True])
def test_calls_after_one_another_are_one_replay(empty_cache: bool) -> None:
    d = derive(SD15, gpu="rtx-3060", num_inference_steps=3)
    allocator = CachingAllocator()
    weights = load_pipeline(allocator, d.resident)
    loaded = allocator.reserved_bytes.current - allocator.allocated_bytes.current
    for k, (turn, call) in enumerate(zip(sequence(d, CALLS, empty_cache), CALLS, strict=True)):
        assert turn.call == call and turn.verdict.fits
        assert turn.cached_before_bytes == allocator.reserved_bytes.current - allocator.allocated_bytes.current
        values = d.sizes(call)
        result = replay(d.program().at(values).tape, values, weights).run(allocator)
        assert (turn.memory.allocated, turn.memory.reserved) == (
            result.allocated_bytes.nbytes,
            result.reserved_bytes.nbytes,
        )
        for handle in result.live.values():
            allocator.free(handle)
        if empty_cache:
            allocator.empty_cache()
        alone = d.device_memory(call).reserved
        assert turn.memory.reserved == alone if k == 0 else turn.memory.reserved >= alone or empty_cache
        assert (turn.cached_after_bytes <= loaded + (4 << 20)) == empty_cache


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
