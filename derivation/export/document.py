"""JSON: expression trees, described by schema.json, that another program can evaluate without us."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from derivation.equation.derived import Stage
from derivation.equation.device_code import DeviceCode
from derivation.equation.expression import Expression, Let, Name
from derivation.equation.function import CaseCode, Condition
from derivation.equation.record import Equation
from derivation.export.render import facts, printable
from derivation.peak.witness import Witness
from derivation.tape.symbols import SYMBOLS
from derivation.tape.tiles import MEANINGS_IN_PIXELS

SCHEMA = "peak_vram/2"
ARGUMENTS = {"L": ("prompt_length", "tokens"), "B": ("batch_size", "prompts")}


def document(equation: Equation, device: DeviceCode | None = None) -> str:
    """Return the JSON document of an equation, and of what the device shows."""
    return json.dumps(as_dict(equation, device), indent=1, ensure_ascii=True) + "\n"


def as_dict(equation: Equation, device: DeviceCode | None = None) -> dict[str, Any]:
    """Return the document as plain data."""
    d, header, function = equation, facts(equation), equation.function
    return {
        "schema": SCHEMA,
        "title": header.title,
        "generator": f"{header.generator}: do not edit",
        "model": printable(d.name),
        "options": d.options.told(),
        "versions": dict(line.split() for line in header.versions),
        "units": "bytes",
        "assumptions": list(header.assumptions),
        "exclusions": list(header.exclusions),
        "operations": {"guidance": function.operations[True], "no_guidance": function.operations[False]},
        "model_weights_bytes": d.weights,
        "arguments": _arguments(equation),
        "symbols": [
            _let(side, "tiles" if side.name[0] == "N" else "pixels / VAE scale factor") for side in function.sides
        ],
        "cases": [_case(case, g, d.weights_bytes) for g, cases in function.cases.items() for case in cases],
        "headline": {name: _headline(d, g) for name, g in (("guidance", True), ("no_guidance", False))},
        **({} if device is None else {"device": _device(equation, device)}),
    }


def _device(equation: Equation, code: DeviceCode) -> dict[str, Any]:
    return {
        "valid_for": {
            "multiples_of": code.step,
            "least_side": code.least,
            "most_side": code.most,
            "prompt_length": equation.defaults["L"],
            "batch_size": equation.defaults["B"],
            "guidance": True,
        },
        "symbols": [_let(side, "pixels / VAE scale factor") for side in code.sides],
        "value": tree(code.value),
        "unit_bytes": code.unit,
        "counted": {str(pixels): n for pixels, n in code.counted.items()},
        "most_counted": code.most_counted,
        "context_bytes": code.context,
        "room_bytes": code.room,
    }


def _conditions(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    return [{"operator": x.operator, "operands": [tree(x.left), x.right]} for x in conditions]


def tree(expression: Expression) -> Any:
    """Return an integer, a name, or {"operator": ..., "operands": [...]}.

    >>> from derivation.equation.expression import add
    >>> tree(add(Name("x"), 1))
    {'operator': 'add', 'operands': ['x', 1]}
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Name):
        return expression.name
    return {"operator": expression.operator, "operands": [tree(x) for x in expression.operands]}


def _arguments(equation: Equation) -> list[dict[str, Any]]:
    meanings = {s.name: s.meaning for s in SYMBOLS}
    sides = [
        {
            "name": name,
            "meaning": f"image {name}",
            "units": "pixels",
            "minimum": equation.sides.least,
            "multiple_of": equation.sides.step,
            **({"maximum": equation.sides.most} if equation.sides.bounded else {}),
            **_fixed(equation, f"{name[0]}0", equation.factor),
        }
        for name in ("height", "width")
    ]
    others = [
        {
            "name": name,
            "argument": argument,
            "meaning": meanings[name],
            "units": units,
            "minimum": 1,
            **_bounded(equation, argument),
            "default": equation.defaults[name],
            **_fixed(equation, name, 1),
        }
        for name, (argument, units) in ARGUMENTS.items()
    ]
    return [*sides, *others]


def _bounded(equation: Equation, argument: str) -> dict[str, int]:
    if (bound := equation.bounds.get(argument)) is None:
        return {}
    steps = {"multiple_of": bound.step} if bound.step > 1 and bound.first % bound.step == 0 else {}
    return {"minimum": bound.first, "maximum": bound.last, **steps}


def _fixed(equation: Equation, name: str, factor: int) -> dict[str, int]:
    return {"fixed": equation.fixed[name] * factor} if name in equation.fixed else {}


def _let(let: Let, units: str) -> dict[str, Any]:
    return {"name": let.name, "value": tree(let.value), "meaning": let.note, "units": units}


def _case(case: CaseCode, guidance: bool, weights_bytes: int) -> dict[str, Any]:
    return {
        "guidance": guidance,
        "conditions": _conditions(case.conditions),
        "constants": {"WEIGHTS_BYTES": weights_bytes},
        "lets": [_let(let, "bytes" if let.note else "elements") for let in case.lets],
        "value": tree(case.result),
    }


def _headline(equation: Equation, guidance: bool) -> dict[str, Any]:
    stage = equation.pipeline_stage(guidance)
    unit = equation.grid.unit
    return {
        "valid_for": f"height and width that are multiples of {unit} pixels; rounding to 512 bytes left out",
        "weights_bytes": equation.weights_bytes,
        **_definitions(equation, stage),
        "terms": [
            {
                "stage": term.point.stage,
                "peak_bytes": str(term.expression),
                "latex": sympy.latex(term.expression),
                "rounding_bytes": term.rounding_bytes,
                "witness": _witness(witness),
            }
            for term, witness in zip(stage.terms, stage.witnesses, strict=True)
        ],
        "crossovers": [
            {"before": c.before, "after": c.after, "latex": c.latex, "at": int(c.at), "sentence": c.sentence}
            for c in equation.crossovers(guidance)
        ],
        "does_not_matter": [{"quantity": x.quantity, "sentence": x.sentence} for x in equation.irrelevant(guidance)],
    }


def _definitions(equation: Equation, stage: Stage) -> dict[str, Any]:
    """Return the symbols of VAE tiles in the terms under their key, nothing where there are none."""
    found = equation.grid.defined(term.expression for term in stage.terms)
    entries = [
        {"symbol": str(name), "value": str(value), "latex": sympy.latex(value), "meaning": MEANINGS_IN_PIXELS[name]}
        for name, value in found.items()
    ]
    return {"definitions": entries} if entries else {}


def _witness(witness: Witness) -> Mapping[str, Any]:
    return {
        "module": witness.module,
        "operator": witness.op,
        "tensors": [
            {
                "module": tensor.module,
                "operator": tensor.op,
                "shape": [str(dim) for dim in tensor.shape],
                "dtype": tensor.dtype,
                "size_bytes": str(tensor.nbytes),
                "count": str(tensor.count),
                "category": tensor.category,
            }
            for tensor in witness.tensors
        ],
    }
