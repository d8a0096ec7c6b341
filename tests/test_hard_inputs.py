"""What nobody should do, and people do: broken configs, one guard in many threads, two jobs in a folder, a kill."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import SD15, tiny
from test_guard import StableDiffusionImg2ImgPipeline

from derivation import DerivationError, derive
from derivation.cli import run
from derivation.config.checkpoint import BUNDLED
from derivation.files import write_files
from derivation.guard import will_fit

ROOT = Path(__file__).parents[1]
VALUES = (None, True, "", "silu", [], [0], {}, {"a": None}, 0, -1, 3, 10**30, 0.5, math.nan, math.inf)
FILES = (
    *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
    *("text_encoder/config.json", "safety_checker/config.json"),
)


def test_four_hundred_broken_configs_are_an_answer_or_one_line(tmp_path: Path) -> None:
    folder, answers, lines = tiny(tmp_path / "model"), 0, set()
    whole = {name: (folder / name).read_text() for name in FILES}
    rng = random.Random(20261128)
    cases = [(name, key, value) for name in FILES for key in json.loads(whole[name]) for value in (*VALUES, ...)]
    for name, key, value in rng.sample(cases, 400):
        broken: dict[str, Any] = json.loads(whole[name])
        broken.pop(key)
        (folder / name).write_text(json.dumps(broken if value is ... else {**broken, key: value}))
        try:
            assert derive(folder).estimate(64, 64)["peak_tensor_bytes"] > 0
            answers += 1
        except DerivationError as error:
            said = str(error)
            assert said.isprintable() and len(said) < 2000, (name, key, value)
            lines.add(said)
        except Exception as error:
            raise AssertionError(f"{name}: {key} = {value!r}: {error!r}") from error
        (folder / name).write_text(whole[name])
    assert answers > 50 and len(lines) > 100


CONTROLNET = {
    "_class_name": "ControlNetModel",
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    **{"norm_num_groups": 32, "transformer_layers_per_block": 1, "mid_block_type": "UNetMidBlock2DCrossAttn"},
    **{"in_channels": 4, "act_fn": "silu", "use_linear_projection": False, "addition_embed_type": None},
    **{"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False, "class_embed_type": None},
}
AUTOENCODER_TINY = {
    "_class_name": "AutoencoderTiny",
    **{"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4, "latent_channels": 4},
    **{"num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 1], "act_fn": "relu", "in_channels": 3},
    **{"out_channels": 3, "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "scaling_factor": 1.0},
}


@pytest.mark.parametrize("config", [CONTROLNET, AUTOENCODER_TINY], ids=lambda config: config["_class_name"])
def test_broken_configs_of_other_parts_are_an_answer_or_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    folder, own = tiny(tmp_path / "model"), tmp_path / "own.json"
    index = json.loads((folder / "model_index.json").read_text())
    options: dict[str, Any] = {"controlnet": str(own), "pipeline": "txt2img"} if config is CONTROLNET else {}
    if config is AUTOENCODER_TINY:
        own = folder / "vae/config.json"
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    answers, lines = 0, set()
    for key, value in [(key, value) for key in config for value in (*VALUES, ...)]:
        broken = {name: each for name, each in config.items() if name != key}
        own.write_text(json.dumps(broken if value is ... else broken | {key: value}))
        try:
            assert derive(folder, **options).estimate(64, 64)["peak_tensor_bytes"] > 0
            answers += 1
        except DerivationError as error:
            said = str(error)
            assert said.isprintable() and len(said) < 2000, (key, value)
            lines.add(said)
    assert answers > 10 and len(lines) > 50


def test_a_broken_config_on_the_command_line_is_one_line_and_exit_code_2(tmp_path: Path, capsys: Any) -> None:
    folder = tiny(tmp_path / "model")
    unet = folder / "unet" / "config.json"
    for value in VALUES[2:13]:
        unet.write_text(json.dumps({**json.loads(unet.read_text()), "block_out_channels": value}))
        assert run(["estimate", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and "block_out_channels" in err and str(unet) in err


def test_eight_threads_share_a_guard() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    calls = [(64 * h, 64 * w, b) for h in (1, 4, 8, 11) for w in (2, 8, 16) for b in (1, 3)]
    d = derive(SD15, pipeline="img2img")
    known = {call: d.estimate(*call)["peak_tensor_bytes"] for call in calls}

    def needs(call: tuple[int, int, int]) -> int | None:
        return will_fit(pipe, *call, free_bytes=0).needed_bytes

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(needs, calls * 4)) == [known[call] for call in calls * 4]


def report(output: Path) -> subprocess.Popen[bytes]:
    """Start the report of a VAE alone."""
    model = BUNDLED / SD15 / "vae" / "config.json"
    command = [sys.executable, str(ROOT / "build_report.py"), str(model), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_reports_in_one_folder_and_a_kill_leave_whole_files(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    start = time.monotonic()
    assert [job.wait(300) for job in [report(shared), report(shared)]] == [0, 0]
    took, same = time.monotonic() - start, contents(shared)
    page = next(name for name in same if name.endswith(".html"))
    assert same[page].rstrip().endswith(b"</html>") and not any(name.endswith(".tmp") for name in same)
    job = report(shared)
    time.sleep(0.8 * took / 2)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(60)
    assert {name: text for name, text in contents(shared).items() if not name.endswith(".tmp")} == same


def test_a_kill_between_two_files_leaves_each_of_them_whole(tmp_path: Path) -> None:
    old, new = ({f"{i}.txt": letter * 100_000 for i in range(40)} for letter in "ab")
    write_files(tmp_path, old)
    child = os.fork()
    if child == 0:  # pragma: no cover
        write_files(tmp_path, new)
        os._exit(0)
    time.sleep(0.004)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in old:
        assert (tmp_path / name).read_text() in (old[name], new[name])
