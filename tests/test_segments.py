"""The report's sum of segments, held to the numeric replay's own segments."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import SD15

from derivation import derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import load_pipeline
from derivation.allocator.report import SMALL_SEGMENT_BYTES
from derivation.allocator.simulate import replay
from derivation.report.answer import SIZES
from derivation.report.document import Mark, Table
from derivation.report.segments import segments_table, shares
from derivation.text import grouped


def test_each_segment_is_one_of_the_replay() -> None:
    d = derive(SD15, pipeline="txt2img", gpu="rtx-3060", num_inference_steps=5)
    form = d.equation.device
    found = shares(form, d, [form.index[side, side] for side in SIZES])
    context, weights, small_weights, *called, small = (share.counts for share in found)
    for i, side in enumerate(SIZES):
        allocator, values = CachingAllocator(), d.sizes(side, side)
        handles = load_pipeline(allocator, d.resident)
        loaded = Counter(segment.total_size for segment in allocator.snapshot() if segment.segment_type == "large")
        replay(d.program().at(values).tape, values, handles).run(allocator)
        large = Counter(segment.total_size for segment in allocator.snapshot() if segment.segment_type == "large")
        opened = Counter[int]()
        for counts in called:
            opened[counts[i][1]] += counts[i][0]
        assert large - loaded == +opened
        assert weights[i] == (1, sum(n * nbytes for nbytes, n in loaded.items()))
        in_small = allocator.reserved_bytes.peak - sum(n * nbytes for nbytes, n in large.items())
        assert small_weights[i][1] + small[i][1] == in_small and in_small % SMALL_SEGMENT_BYTES == 0
        assert context[i] == (1, form.context_bytes)


@pytest.mark.parametrize("options", [{}, {"alloc_conf": "expandable_segments:True"}], ids=str)
def test_the_sum_is_what_nvidia_smi_shows(options: dict[str, str]) -> None:
    d = derive(SD15, pipeline="img2img", gpu="t4", num_inference_steps=10, **options)
    table = segments_table(d, SIZES)
    assert isinstance(table, Table)
    shown = [cell.text for cell in table.rows[-1].cells if isinstance(cell, Mark)]
    assert shown == [grouped(d.device_memory(side, side).device or 0) for side in SIZES]


def test_there_is_no_sum_without_a_card_that_has_room() -> None:
    assert segments_table(derive(SD15), SIZES) is None
    assert segments_table(derive(SD15, gpu="t4", vae_tiling=True), SIZES) is None
    assert segments_table(derive(SD15, gpu="t4 4GiB", num_inference_steps=10), SIZES) is None
