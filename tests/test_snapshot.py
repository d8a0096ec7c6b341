"""The replay as PyTorch's memory snapshot: what PyTorch's own reader makes of it, and its sums."""

from __future__ import annotations

import pickle
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import SD15

from derivation.api import derive
from derivation.cli import run

OPENED = {"alloc": 1, "free_completed": -1}
RESERVED = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
SMALL = {"pipeline": "txt2img", "num_inference_steps": 3}


def total(entries: list[dict[str, Any]], signs: dict[str, int]) -> list[int]:
    return list(accumulate(signs[e["action"]] * e["size"] for e in entries if e["action"] in signs))


@pytest.mark.parametrize("alloc_conf", [None, "expandable_segments:True"])
def test_the_entries_add_up_to_what_the_replay_counts(alloc_conf: str | None) -> None:
    derivation = derive(SD15, gpu="t4", alloc_conf=alloc_conf, **SMALL)
    found, memory = derivation.snapshot(512, 640), derivation.device_memory(512, 640)
    [entries] = found["device_traces"]
    assert max(total(entries, OPENED)) == memory.requested
    assert max(total(entries, RESERVED)) == memory.reserved
    assert sum(s["total_size"] for s in found["segments"]) == total(entries, RESERVED)[-1]
    assert sum(s["requested_size"] for s in found["segments"]) == total(entries, OPENED)[-1]
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in found["segments"])


def test_pytorch_reads_the_file_and_names_the_modules(tmp_path: Path) -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz")
    file = tmp_path / "snapshot.pickle"
    assert run(["estimate", "sd15", "--gpu", "t4", "--snapshot", str(file), "--num-inference-steps", "3"]) == 0
    found = pickle.loads(data := file.read_bytes())
    assert data[:2] == b"\x80\x04"  # MemoryViz.js refuses a newer protocol
    assert "cudaMalloc" in viz.trace(found) and "total_reserved" in viz.segsum(found)
    named = {frame["filename"] for entry in found["device_traces"][0] for frame in entry["frames"]}
    assert {"unet.conv_in.weight", "unet.conv_in", "vae.decoder.conv_out"} <= named


def test_a_call_that_does_not_fit_ends_with_its_request() -> None:
    derivation = derive(SD15, gpu="t4", **SMALL)
    last = derivation.snapshot(4096, 4096)["device_traces"][0][-1]
    failed = derivation.device_memory(4096, 4096).failed
    assert failed is not None and (last["action"], last["size"]) == ("oom", failed["requested_bytes"])
    assert last["frames"][0]["filename"] == failed["module"]


def test_a_snapshot_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "sd15", "--snapshot", str(tmp_path / "s")]) == 2
    assert "gpu" in capsys.readouterr().err and not list(tmp_path.iterdir())
