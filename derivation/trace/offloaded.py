"""``enable_model_cpu_offload()`` put onto a traced tape: each component's weights come and go as its hooks move them.

accelerate/hooks.py (CpuOffload.pre_forward): a component's call first sends the one before it in
``model_cpu_offload_seq`` to the CPU, empties the cache, and moves the component to the GPU; the end of the pipeline's
call sends all to the CPU (maybe_free_model_hooks). No torch needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from derivation.tape.events import Allocation, Category, Mark
from derivation.tape.subject import Parameters
from derivation.tape.symbols import DTYPE_BYTES
from derivation.tape.tape import Tape
from derivation.walk.pipelines.weights import registered

CALLS = ("_encode", "_decode")


def with_model_offload(tape: Tape, parameters: Parameters, order: Sequence[str]) -> Tape:
    """Return a tape with the loads and deaths of weights; ``order`` is the pipeline's, of components that it hooks."""
    hooked = [name for name in order if name in parameters]
    previous = dict(zip(hooked[1:], hooked, strict=False))
    moves = _Moves(tape, parameters)
    begins = {mark.event: component for mark in tape.marks if (component := _component(mark.stage, parameters))}
    for i, event in enumerate(tape.events):
        moves.reach()
        if (component := begins.get(i)) is not None:
            moves.offload(previous.get(component))
            moves.load(component)
        moves.events.append(event)
    moves.reach()
    for component in list(moves.loaded):
        moves.offload(component)
    return moves.result()


def _component(stage: str, parameters: Parameters) -> str | None:
    """Return the component that a stage calls, None for the pipeline's own code."""
    names = [stage, *(stage.removesuffix(call) for call in CALLS)]
    return next((name for name in names if name in parameters), None)


class _Moves:
    """A tape that is written anew; ``loaded`` holds the numbers of the weights that are on the GPU."""

    def __init__(self, tape: Tape, parameters: Parameters) -> None:
        self._tape, self._parameters = tape, parameters
        self._allocations = list(tape.allocations)
        self._emptied = list[int]()
        self._places = list[int]()
        self.events = list[int]()
        self.loaded: dict[str, list[int]] = {}

    def reach(self) -> None:
        """Come to the next event of the old tape."""
        self._places.append(len(self.events))

    def load(self, component: str) -> None:
        """Move a component to the GPU, unless it is there."""
        if component in self.loaded:
            return
        entries = self._parameters[component]
        for path in registered(entries):
            shape, dtype = entries[path]
            nbytes = prod(shape) * DTYPE_BYTES[dtype]
            if nbytes:
                self._allocations.append(Allocation(path, "load", shape, dtype, nbytes, Category.WEIGHT))
                self.loaded.setdefault(component, []).append(len(self._allocations))
                self.events.append(len(self._allocations))

    def offload(self, component: str | None) -> None:
        """Move a component to the CPU, if it is on the GPU, and empty the cache."""
        if component in self.loaded:
            self.events += [-number for number in self.loaded.pop(component)]
            self._emptied.append(len(self.events))

    def result(self) -> Tape:
        """Return the new tape."""
        marks = [Mark(self._places[mark.event], mark.stage) for mark in self._tape.marks]
        iterations = [self._places[event] for event in self._tape.iterations]
        changed = replace(self._tape, allocations=self._allocations, events=self.events, emptied=self._emptied)
        return replace(changed, marks=marks, iterations=iterations)
