"""cuDNN asked of a card that is not there: the question, the table, and, where the wheel is, the answers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SD15

from derivation import DerivationError
from derivation.cli import run
from derivation.gpu.cards import lookup
from derivation.gpu.profile import hardware
from derivation.measure import asked, cudnn
from derivation.measure.asked import Question, Table, ask
from derivation.measure.cudnn import Convolution, Cudnn, properties, version_text
from derivation.measure.validate import RECORDS

SCRATCH = RECORDS.with_name("gpu-scratch.json")
SHAPES = [((1, 128, 513, 513), (128, 128, 3, 3), (2, 2), (0, 0)), ((2, 4, 64, 64), (320, 4, 3, 3), (1, 1), (1, 1))]
POINTWISE = ((2, 320, 64, 64), (320, 320, 1, 1), (1, 1), (0, 0))
ANSWERER = """
import json, sys
rows = json.load(sys.stdin)["rows"]
print(json.dumps({"status": "ok", "workspace_bytes": [row[0] * row[4] if row[0] < 4 else None for row in rows]}))
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cuDNN 9.19 that answers N K bytes, and no plan from N = 4 on: MADE UP."""
    script = tmp_path / "worker.py"
    script.write_text(ANSWERER)
    monkeypatch.setattr(asked, "WORKER", (sys.executable, str(script)))
    here = SimpleNamespace(version=91900, require=lambda card: Cudnn.require(here, card))
    monkeypatch.setattr(asked, "installed", lambda: here)


@pytest.fixture
def wheel() -> Cudnn:
    try:
        found = cudnn.installed()
    except DerivationError as error:
        pytest.skip(str(error))
    if found.version != 91900:
        pytest.skip(f"gpu-scratch.json was measured with cuDNN 9.19.0, here is {version_text(found.version)}")
    return found


def test_a_convolution_as_torch_runs_it() -> None:
    torch = pytest.importorskip("torch")
    odd, video = (
        ((3, 8, 20, 31), (16, 8, 3, 3), (2, 1), (1, 0)),
        ((3, 8, 5, 20, 31), (16, 8, 3, 3, 1), (1, 2, 1), (0, 1, 0)),
    )
    for image, weight, stride, padding in [*SHAPES, POINTWISE, odd, video]:
        x = torch.empty(image, device="meta")
        convolve, last = {
            4: (torch.nn.functional.conv2d, torch.channels_last),
            5: (torch.nn.functional.conv3d, torch.channels_last_3d),
        }[len(image)]
        y = convolve(x, torch.empty(weight, device="meta"), stride=stride, padding=padding)
        asked_of = Convolution(image, weight, stride, padding, "float16", True)
        assert asked_of.output == tuple(y.shape)
        assert asked_of.strides(image) == x.to(memory_format=last).stride()
        assert Convolution(image, weight, stride, padding, "float16", False).strides(image) == x.stride()


def test_a_card_as_cudnn_reads_it() -> None:
    card = properties(lookup("rtx 4090"))
    assert (card["deviceVer"], card["multiProcessorCount"]) == (890, 128)
    assert properties(lookup("rtx 5090"))["deviceVer"] == 1200
    with pytest.raises(DerivationError, match="card = 'sm75' is not supported"):
        properties(lookup("sm75"))


def test_a_table_is_read_as_it_was_written(tmp_path: Path, library: None) -> None:
    path = tmp_path / "table.json"
    assert ask("t4", [*SHAPES, POINTWISE], ["float16"], path) == "9.19.0"
    table = Table.open(path)
    assert table.shapes == SHAPES
    assert table.text() == path.read_text()
    question = Question("t4", "float16", "contiguous", "9.19.0")
    assert table.columns[question] == [128, 640]
    assert dict(table.answers())[question][0] == (Convolution(*SHAPES[0], "float16", False), 128)
    assert {q.memory_format for q in table.columns} == {"contiguous", "channels_last"}


def test_what_a_table_lacks_is_asked_alone(tmp_path: Path, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path, more = tmp_path / "table.json", ((4, 8, 8, 8), (8, 8, 3, 3), (1, 1), (1, 1))
    ask("t4", SHAPES, ["float16"], path)
    seen: list[int] = []
    worker = asked.run_worker
    monkeypatch.setattr(asked, "run_worker", lambda job, *a: seen.append(len(job.payload["rows"])) or worker(job, *a))
    ask("t4", [SHAPES[1], more], ["float16"], path)
    assert seen == [1, 1]
    ask("rtx-4090", [more], ["float16", "float32"], path)
    assert seen == [1, 1, 3, 3, 3, 3]
    assert Table.open(path).columns[Question("t4", "float16", "contiguous", "9.19.0")] == [128, 640, None]


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    for card, version, said in (
        ("v100", None, "cuDNN 9.19.0 has no kernels for Volta"),
        ("t4", "9.10.2", "cudnn_version = '9.10.2' is not supported"),
        ("t5", None, "gpu = 't5' is not supported"),
    ):
        with pytest.raises(DerivationError, match=said):
            ask(card, SHAPES, ["float16"], path, version)
    monkeypatch.setattr(asked, "WORKER", (sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"))
    with pytest.raises(DerivationError, match=r"card = t4: cuDNN 9\.19\.0 failed on float16 contiguous: exit code -11"):
        ask("t4", SHAPES, ["float16"], path)
    assert not path.exists()


@pytest.mark.parametrize("content", ["[]", '{"format": "x"}', f'{{"format": "{asked.FORMAT}"}}'])
def test_another_files_content_is_refused_and_kept(content: str, tmp_path: Path, library: None) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(DerivationError, match=r"table\.json"):
        ask("t4", SHAPES, ["float16"], path)
    assert path.read_text() == content


def test_without_the_wheel_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(DerivationError, match=r"cuDNN is not installed: pip install .*\[cudnn\]"):
        cudnn.installed.__wrapped__()
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(__path__=[str(tmp_path)]))
    with pytest.raises(DerivationError, match="cuDNN is not installed"):
        cudnn.installed.__wrapped__()
    with pytest.raises(DerivationError, match="cuDNN cannot be loaded"):
        Cudnn(tmp_path)


def test_the_command_wants_a_card_and_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "table.json")]
    for given in (["--card", "t4"], ["--scratch", "--cudnn-version", "9.19.0"]):
        assert run(["measure", SD15, *given, *output]) == 2
        assert "--scratch with it" in capsys.readouterr().err


def test_hopper_answers_as_it_was_measured(wheel: Cudnn) -> None:
    """All shapes of gpu-scratch.json but pointwise ones: where an image is large, 19 in 20 are equal within 512 B."""
    near = {True: [0, 0], False: [0, 0]}
    card, known = properties(lookup("h200")), set()
    for record in json.loads(SCRATCH.read_text())["records"].values():
        for row in record["rows"] if record["status"] == "ok" else ():
            if row["op"] != "convolution" or row["weight"][-1] == 1 or row["memory_format"] != "contiguous":
                continue
            shape = (tuple(row[name]) for name in ("input", "weight", "stride", "padding"))
            question = Convolution(*shape, record["dtype"], False)
            if question in known or record["dtype"] == "float32":
                continue
            known.add(question)
            counts = near[question.input[2] * question.input[3] >= 128 * 128]
            counts[0] += abs(wheel.plans(card, question)[0].workspace_bytes - row["scratch_bytes"]) <= 512
            counts[1] += 1
    assert near[True][1] > 100
    assert near[True][0] / near[True][1] > 0.9
    assert near[False][0] / near[False][1] > 0.8


def test_workspaces_follow_from_the_architecture_and_the_multiprocessors(wheel: Cudnn) -> None:
    other = {"totalGlobalMem": 2**35, "l2CacheSize": 2**26, "smClockRateKHz": 2520000, "maxThreadsPerSM": 1536}
    other |= {"memClockRateKHz": 10501000, "maxSharedMemoryPerBlockOptin": 101376, "driverVer": 12040}
    counted = {"multiProcessorCount": 71}
    other |= {"maxCtasPerSM": 24, "reservedSharedMemoryPerBlock": 1024, "deviceName": "another", "pciDeviceId": 4}
    for key in ("t4", "rtx-3060", "a100-80gb", "rtx-4090", "h200", "rtx-5090"):
        card = properties(lookup(key))
        for dtype in ("float16", "float32"):
            for channels in (128, 320, 1280):
                shape = ((2, channels, 48, 64), (640, channels, 3, 3), (1, 1), (1, 1))
                question = Convolution(*shape, dtype, False)
                changed = {**card, **other, **({} if key == "t4" else counted)}
                assert wheel.plans(card, question) == wheel.plans(changed, question) != []


def test_a_column_is_what_the_library_answers(wheel: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nvidia

    root = Path(nvidia.__path__[0]).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *sys.path]))
    ask("t4", SHAPES, ["float16", "bfloat16"], tmp_path / "table.json")
    for question, rows in Table.open(tmp_path / "table.json").answers():
        for convolution, nbytes in rows:
            plans = wheel.plans(properties(lookup("t4")), convolution)
            assert nbytes == (plans[0].workspace_bytes if plans else None)
            assert (nbytes is None) == (question.dtype == "bfloat16")


@pytest.mark.parametrize("card", ["a100-80gb", "rtx-4090", "h200", "rtx-5090"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convolutions_of_videos_follow_the_rules_of_images(wheel: Cudnn, card: str, dtype: str) -> None:
    """Shapes of CogVideoX, Wan and AnimateDiff with large images: within 2 %."""
    profile = hardware(card)
    for image, k, kernel in (
        ((1, 192, 6, 240, 416), 192, (3, 3, 3)),
        ((1, 256, 19, 240, 360), 256, (3, 3, 3)),
        ((1, 128, 13, 256, 256), 512, (3, 3, 3)),
        ((1, 320, 16, 128, 128), 320, (3, 1, 1)),
    ):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        question = Convolution(image, (k, image[1], *kernel), (1, 1, 1), padding, dtype, False)
        workspace = profile.convolution_workspace(dtype, False, *profile.video_kind(dtype, 3, image[1]))
        expected = workspace.nbytes(image, question.output, question.weight, 2)
        [plan] = wheel.plans(properties(lookup(card)), question)
        assert plan.workspace_bytes == pytest.approx(expected, rel=0.02)


def test_profiles_that_were_asked_of_cudnn_are_its_answers() -> None:
    """Of convolutions whose tensors are large, a share within 1 % of what the table has: a rule, not every engine."""
    share = {
        (row["card"], row["dtype"], row["memory_format"]): row["within_1_percent"] / row["large"]
        for row in asked.agreement(asked.RECORDS)
        if row["cudnn"] == {"v100-16gb": "9.10.2"}.get(row["card"], "9.19.0")
    }
    for card in ("v100-16gb", "t4", "rtx-2080-ti"):
        assert share[card, "float32", "contiguous"] > 0.85
        assert share[card, "float32", "channels_last"] > 0.9
    assert min(n for (card, *_), n in share.items() if card == "rtx-5090") > 0.7
    assert share["v100-16gb", "float16", "contiguous"] > 0.7
    assert not {key for key in share if key[1] == "bfloat16" and key[0] in ("v100-16gb", "t4", "rtx-2080-ti")}


@pytest.mark.parametrize(
    ("card", "dtype", "shape", "workspace_bytes"),
    [
        ("v100-16gb", "float16", ((1, 256, 512, 512), (128, 256, 3, 3), (1, 1), (1, 1)), 136380560),
        ("v100-16gb", "float16", ((1, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 269615120),
        ("v100-16gb", "float16", ((2, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 271188112),
        ("v100-16gb", "float32", ((1, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 6554624),
        ("t4", "float32", ((1, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 6554624),
        ("t4", "float32", ((1, 256, 513, 513), (256, 256, 3, 3), (2, 2), (0, 0)), 393344),
        ("rtx-5090", "float16", ((1, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 269615120),
        ("rtx-5090", "float32", ((1, 256, 512, 512), (256, 256, 3, 3), (1, 1), (1, 1)), 270794768),
    ],
)
def test_a_profile_by_hand(card: str, dtype: str, shape: asked.Shape, workspace_bytes: int) -> None:
    """cuDNN's bytes, as the table has them, and the profile's."""
    [n] = {
        n
        for question, answers in Table.open(asked.RECORDS).answers()
        for convolution, n in answers
        if (question.card, question.dtype, question.memory_format) == (card, dtype, "contiguous")
        and convolution == Convolution(*shape, dtype, False)
    }
    image, weight, stride, _ = shape
    kind = (3, weight[1], weight[0], stride != (1, 1), image[0] > 1)
    profile = hardware(card).convolution_workspace(dtype, False, *kind)
    out = Convolution(*shape, dtype, False).output
    assert n == workspace_bytes == profile.nbytes(image, out, weight, {"float16": 2, "float32": 4}[dtype])
