"""Options of the test run, and the bundled checkpoints by short names."""

from __future__ import annotations

import fcntl
import gc
import json
import random
from pathlib import Path

import pytest
import sympy

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
INPAINTING = "runwayml/stable-diffusion-inpainting"
SD_2_1_BASE = "stabilityai/stable-diffusion-2-1-base"
SD_2_1 = "stabilityai/stable-diffusion-2-1"


# Stable Diffusion's classes with few parameters.
TINY = {
    "unet": {
        "block_out_channels": [32, 32, 32, 32],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def tiny(folder: Path) -> Path:
    """Write SD 1.5 with TINY's values into a folder and return it."""
    source = Path(__file__).parents[1] / "derivation/config/configs" / SD15
    for path in source.rglob("*.json"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**json.loads(path.read_text()), **TINY.get(path.parent.name, {})}))
    return folder


def numbers(expression, at):
    """Return a sympy expression with integers in place of symbols: subs() simplifies a Max on the way, for seconds."""
    return expression.xreplace({symbol: sympy.Integer(int(number)) for symbol, number in at.items()})


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The page of SD 1.5, with its notes and figures beside it: built once, by the first process that needs it."""
    from derivation.report import build

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "page_of_sd15"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return next(folder.glob("*.html"), None) or build([SD15], folder)[0]


def pytest_addoption(parser):
    parser.addoption("--update-formulas", action="store_true", help="rewrite formulas/ with what is generated now")


def pytest_collection_finish():
    # what the imports made lives to the end: no collection need look at it
    gc.freeze()


def small_folders(tmp_path_factory, seeds):
    """Return a folder with a random small checkpoint for each name, by its seed."""
    from derivation.verify.random_configs import random_checkpoint

    found = {}
    for name, seed in seeds.items():
        found[name] = root = tmp_path_factory.mktemp(name)
        for file, content in random_checkpoint(random.Random(seed)).items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text(json.dumps(content))
    return found
