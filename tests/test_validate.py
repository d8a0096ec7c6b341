"""Calls measured on an H200 against their predictions: counters, and every allocation in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from derivation import DerivationError, derive
from derivation.allocator.memory import device_memory
from derivation.measure.records import Records
from derivation.measure.validate import RECORDS, measured_calls, predict, recorded, summary
from derivation.options import Options
from derivation.tape.symbols import evaluate
from derivation.tape.tape import Tape
from derivation.verify.streams import unrolled
from derivation.walk.pipelines import POSTPROCESS

HISTORIES = Records.open(RECORDS.with_name("gpu-history.json"), must_exist=True).records
# what a split-K convolution adds at most: an accumulator of 128 x 256 float32 on each of 132 multiprocessors
SPLIT_K_BYTES = 132 * 128 * 256 * 4 + 1024
# what a large shape's workspace has more than a small one's
SMALL_SHAPE = 147 - 16
# one block: the allocator's smallest, which timesteps and random states take
BLOCK = 512
SAMPLE = measured_calls()[::16]


@pytest.fixture(scope="module")
def rows():
    return [predict(record) for record in SAMPLE]


def test_tensors_are_predicted_to_what_convolution_kernels_choose(rows):
    for row in rows:
        assert -SPLIT_K_BYTES < row.predicted["requested"] - row.measured["requested"] <= SMALL_SHAPE, str(row)


def test_the_allocator_and_nvidia_smi_are_predicted_to_three_percent(rows):
    for row in rows:
        for counter in row.measured:
            assert abs(row.error(counter)) < 0.03, f"{counter} of {row}"


def test_the_recorded_run_is_what_the_derivation_says_now(rows):
    _, found = recorded()
    assert len(found) == len(measured_calls())
    assert rows == found[::16]


def test_most_calls_are_predicted_to_the_byte():
    found = summary(recorded()[1])
    for counter in ("requested", "allocated", "reserved", "device"):
        assert found[counter]["equal"] >= found[counter]["calls"] / 2


def test_the_summary_counts(rows):
    found = summary(rows)
    assert found["requested"]["calls"] == len(rows)
    worst = max(rows, key=lambda row: abs(row.error("reserved")))
    assert found["reserved"]["largest_error"] == worst.error("reserved")
    assert found["reserved"]["largest_error_call"] == str(worst)


@pytest.mark.parametrize("record", HISTORIES.values(), ids=lambda r: f"{r['model']} {r['pipeline']} {r['attention']}")
def test_every_allocation_of_a_real_call_is_derived_in_its_order(record):
    """Convolution workspaces may be larger, and blocks of one unit (scalars, timesteps) may be elsewhere.

    Up to the postprocessing: the safety checker blackens what random weights draw. With the workspaces as they were
    the replay reserves what was measured.
    """
    given = {name: record[name] for name in Options().as_dict() if name in record}
    derivation = derive(record["model"], **{**given, "gpu": "h200", "torch": "2.11"})
    values = derivation.sizes(record["height"], record["width"], record["batch_size"], 77)
    tape = derivation.program(record["guidance_scale"] > 1).at(values).tape
    derived, real = list(_derived(tape, values)), [nbytes for nbytes in record["events"] if nbytes > 0]
    at, workspaces = 0, dict[int, int]()
    for tensor, nbytes, op, after in derived:
        while at < len(real) and real[at] != nbytes:
            workspace = op == "convolution workspace" and -SMALL_SHAPE <= real[at] - nbytes < SPLIT_K_BYTES
            if workspace:
                assert workspaces.setdefault(tensor, real[at]) == real[at]  # the same in each iteration
            if workspace or nbytes <= BLOCK < real[at]:
                break
            unasked = after == "convolution" and real[at] < SPLIT_K_BYTES
            assert real[at] <= BLOCK or unasked, f"{op} of {nbytes} B derived, {real[at]} B allocated"
            at += 1
        else:
            at += 1
            continue
        at += nbytes > BLOCK
    equal = set(real) & {nbytes for _, nbytes, *_ in derived}
    assert sum(nbytes in equal for nbytes in real if nbytes > BLOCK) > 0.95 * sum(n > BLOCK for n in real)
    asked = [replace(a, nbytes=workspaces.get(tensor, a.nbytes)) for tensor, a in enumerate(tape.allocations)]
    found = device_memory("h200", derivation.resident, replace(tape, allocations=asked), values)
    assert found.reserved == record["run"]["peak_reserved_bytes"]


def _derived(tape: Tape, values: Mapping[str, int]) -> Iterator[tuple[int, int, str, str]]:
    """Yield tensor, bytes, operator and the operator before of every allocation up to the postprocessing."""
    [end] = [mark.event for mark in tape.marks if mark.stage == POSTPROCESS]
    last = tape.events[end]
    before = ""
    for event in unrolled(tape):
        if event == last:
            return
        allocation = tape.allocations[abs(event) - 1]
        if event < 0:
            continue
        for _ in range(evaluate(allocation.count, values)):
            yield event - 1, evaluate(allocation.nbytes, values), allocation.op, before
            before = allocation.op


@pytest.mark.parametrize("content", ['{"format": "derivation-measurements-1", "records": {}}', "[]", "{"])
def test_a_file_without_calls_is_one_line(content, tmp_path: Path):
    path = tmp_path / "out.json"
    path.write_text(content)
    with pytest.raises(DerivationError, match=r"out\.json"):
        measured_calls(path)


@pytest.mark.parametrize("missing", ["run", "versions", "height", "model", "guidance_scale"])
def test_a_broken_record_is_one_line(missing):
    with pytest.raises(DerivationError, match="not a record of measure"):
        predict({name: value for name, value in SAMPLE[0].items() if name != missing})


@pytest.mark.parametrize(
    "change", [{"batch_size": 1 << 100}, {"height": -8}, {"attention": "<b>"}, {"model": "/no/such"}], ids=str
)
def test_a_record_of_another_call_than_measure_makes_is_one_line(change):
    with pytest.raises(DerivationError):
        predict({**SAMPLE[0], **change})
