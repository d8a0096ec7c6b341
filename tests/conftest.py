"""Options of the test run, and the bundled checkpoints by short names."""

from __future__ import annotations

import gc

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
INPAINTING = "runwayml/stable-diffusion-inpainting"
SD_2_1_BASE = "stabilityai/stable-diffusion-2-1-base"
SD_2_1 = "stabilityai/stable-diffusion-2-1"


def pytest_addoption(parser):
    parser.addoption("--update-formulas", action="store_true", help="rewrite formulas/ with what is generated now")


def pytest_collection_finish():
    # what the imports made lives to the end: no collection need look at it
    gc.freeze()
