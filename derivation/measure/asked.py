"""What cuDNN asks for in every convolution of a model on a card that is not there: one table, a column a question.

``python -m derivation.measure.asked`` answers one question in a process of its own: a library that meets a card which
it does not know may crash.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

from derivation.config.json_file import read_json
from derivation.errors import DerivationError, unsupported
from derivation.files import write_file
from derivation.gpu.cards import Gpu, lookup
from derivation.gpu.profile import Hardware, hardware
from derivation.measure.cudnn import Convolution, installed, properties, version_text
from derivation.measure.runner import Job, run_worker
from derivation.tape.symbols import DTYPE_BYTES

FORMAT = "derivation-workspaces-1"
RECORDS = Path(__file__).parent.parent / "evidence" / "cudnn-workspaces.json"
WORKER = (sys.executable, "-m", "derivation.measure.asked")
TIMEOUT_S = 600.0
# bytes of input and output from which a workspace is judged: those that a peak is made of
LARGE = 32 * 1024 * 1024
FORMATS = ("contiguous", "channels_last")
# [N, C, H, W], [K, C, R, S], (stride), (padding)
Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Question:
    """One column of the table: all its shapes on a card, in a type and a memory format."""

    card: str
    dtype: str
    memory_format: str
    cudnn: str

    def asks(self, shape: Shape) -> Convolution:
        """Return the convolution of a row."""
        image, weight, stride, padding = shape
        return Convolution(image, weight, stride, padding, self.dtype, self.memory_format == "channels_last")


@dataclass
class Table:
    """The shapes, and for each question the bytes of the first plan's workspace, None where cuDNN has no plan."""

    shapes: list[Shape] = field(default_factory=list)
    columns: dict[Question, list[int | None]] = field(default_factory=dict)
    dates: dict[Question, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Table:
        """Return the table of a file, an empty one where there is none; raises DerivationError for another format."""
        if not path.exists():
            return cls()
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else content
            raise unsupported(f"{path}: format", found, FORMAT)
        try:
            table = cls([_shape(row) for row in content["convolutions"]])
            for entry in content["answers"]:
                question = Question(*(str(entry[name]) for name in Question.__slots__))
                table.columns[question] = [None if n is None else int(n) for n in entry["workspace_bytes"]]
                table.dates[question] = str(entry["date"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DerivationError(f"{path}: not such a table ({type(error).__name__} {error})") from None
        return table

    def answers(self) -> Iterable[tuple[Question, list[tuple[Convolution, int | None]]]]:
        """Yield each question with its convolutions and their workspaces' bytes."""
        for question, column in self.columns.items():
            shapes = self.shapes[: len(column)]
            yield question, [(question.asks(shape), n) for shape, n in zip(shapes, column, strict=True)]

    def text(self) -> str:
        """Return the file's content, one line a shape and a question."""
        shapes = ",\n  ".join(json.dumps(_row(shape)) for shape in self.shapes)
        entries = ",\n  ".join(
            json.dumps({**asdict(question), "date": self.dates[question], "workspace_bytes": column})
            for question, column in self.columns.items()
        )
        note = "N, C, H, W of the input, K, R, S of the weight, stride and padding"
        head = f'"format": "{FORMAT}",\n "row": "{note}"'
        return f'{{\n {head},\n "convolutions": [\n  {shapes}\n ],\n "answers": [\n  {entries}\n ]\n}}\n'


def _row(shape: Shape) -> list[int]:
    image, weight, stride, padding = shape
    return [*image, weight[0], *weight[2:], *stride, *padding]


def _shape(row: Sequence[int]) -> Shape:
    n, c, h, w, k, r, s, *rest = map(int, row)
    step_h, step_w, pad_h, pad_w = rest
    return (n, c, h, w), (k, c, r, s), (step_h, step_w), (pad_h, pad_w)


def convolutions(points: Iterable[Mapping[str, Any]]) -> list[Shape]:
    """Return the distinct convolutions of the models at the sizes of ``points``, traced on the meta device."""
    from derivation.measure.scratch import shapes

    sizes = {(p["model"], p["height"], p["width"], p["batch_size"]): p for p in points}
    found = (row for point in sizes.values() for row in shapes(point) if row["op"] == "convolution")
    names = ("input", "weight", "stride", "padding")
    return list(dict.fromkeys(_read(*(row[name] for name in names)) for row in found))


def _read(image: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Shape:
    return tuple(image), tuple(weight), tuple(stride), tuple(padding)


def ask(
    card: str,
    shapes: Iterable[Shape],
    dtypes: Sequence[str],
    path: Path,
    version: str | None = None,
    report: Callable[[], None] = lambda: None,
) -> str:
    """Ask for every shape that the table of ``path`` lacks, write it after each column, and return cuDNN's version.

    Pointwise convolutions are left out: PyTorch's own order differs there. Raises DerivationError for another version
    of cuDNN than is installed, a card that it has no kernels for, or where it crashed.
    """
    found, table = lookup(card), Table.open(path)
    here = _checked(found, version)
    known = dict.fromkeys(table.shapes)
    known.update(dict.fromkeys(shape for shape in shapes if shape[1][2:] != (1, 1)))
    table.shapes = list(known)
    for dtype in dtypes:
        for memory_format in FORMATS:
            question = Question(found.key, dtype, memory_format, here)
            column = table.columns.setdefault(question, [])
            column += _asked(question, table.shapes[len(column) :])
            table.dates[question] = datetime.now(UTC).isoformat("T", "seconds")
            write_file(path, table.text())
            report()
    return here


def _checked(card: Gpu, version: str | None) -> str:
    library = installed()
    here = version_text(library.version)
    if version is not None and version != here:
        raise unsupported("cudnn_version", version, f"{here}, which is installed; others: pip install")
    library.require(card)
    properties(card)
    return here


def _asked(question: Question, shapes: Sequence[Shape]) -> list[int | None]:
    if not shapes:
        return []
    payload = {**asdict(question), "rows": [_row(shape) for shape in shapes]}
    answer = run_worker(Job("", payload), WORKER, TIMEOUT_S)
    if answer["status"] != "ok":
        said = f"card = {question.card}: cuDNN {question.cudnn} failed on {question.dtype} {question.memory_format}"
        raise DerivationError(f"{said}: {answer['message']}")
    return list(answer["workspace_bytes"])


def agreement(path: Path) -> list[dict[str, Any]]:
    """Return how far the profile of a card is from each column of a table, for convolutions of LARGE tensors.

    A type that cuDNN does not convolve there has no row. Raises DerivationError for another file.
    """
    rows: list[dict[str, Any]] = []
    for question, answers in Table.open(path).answers():
        card = hardware(question.card)
        pairs = [(_expected(card, shape), n, shape) for shape, n in answers if n is not None and _large(shape)]
        if not pairs:
            continue
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        rows.append(
            {
                **asdict(question),
                "large": len(pairs),
                "within_1_kib": sum(abs(mine - n) <= 1024 for mine, n, _ in pairs),
                "within_1_percent": sum(abs(mine - n) <= n // 100 for mine, n, _ in pairs),
                "largest_difference_bytes": worst[0] - worst[1],
                "of": f"{worst[2].input} to {worst[2].output[1]}",
            }
        )
    return rows


def _large(shape: Convolution) -> bool:
    """Whether a peak can be made of it: PyTorch splits batches of more elements (ConvShared.cpp)."""
    sizes = prod(shape.input), prod(shape.output)
    return sum(sizes) * DTYPE_BYTES[shape.dtype] >= LARGE and max(sizes) < 2**31


def _expected(card: Hardware, shape: Convolution) -> int:
    strided = shape.output[2:] != shape.input[2:]
    kind = (shape.weight[2], shape.weight[1], shape.weight[0], strided, shape.input[0] > 1)
    workspace = card.convolution_workspace(shape.dtype, shape.channels_last, *kind)
    return int(workspace.nbytes(shape.input, shape.output, shape.weight, DTYPE_BYTES[shape.dtype]))


def answer(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the workspaces of one question's rows."""
    question = Question(*(payload[name] for name in Question.__slots__))
    library, card = installed(), properties(lookup(question.card))
    plans = (library.plans(card, question.asks(_shape(row))) for row in payload["rows"])
    return {"status": "ok", "workspace_bytes": [found[0].workspace_bytes if found else None for found in plans]}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
