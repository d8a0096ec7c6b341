"""Every verified pair of diffusers and transformers against its own modules, each in an environment made for it.

The environments share this one's torch and accelerate; run as a module it compares under what is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from derivation.api import derive
from derivation.call import Call
from derivation.errors import DerivationError
from derivation.libraries import PAIRS
from derivation.verify.compare import compare_pipeline
from derivation.verify.verification import SD15, circumstances, installed

MODELS = (SD15, "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-xl-base-1.0")
# whole calls, whose streams hold every component's
CASES: tuple[tuple[Mapping[str, Any], Call], ...] = (
    ({"pipeline": "img2img"}, Call(344, 616)),
    ({"pipeline": "txt2img"}, Call(512, 512, guidance=False)),
    ({"pipeline": "img2img", "attention": "eager"}, Call(256, 256)),
    ({"pipeline": "txt2img", "dtype": "bfloat16"}, Call(344, 616)),
)
STEPS = {"num_inference_steps": 4}
ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def run_versions(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what each pair's comparison found; environments are kept in ``folder`` and used again.

    Raises DerivationError where one cannot be made or holds other versions.
    """
    for diffusers, transformers in PAIRS:
        environment = folder / f"{diffusers}-{transformers}"
        if not environment.exists():
            packages = (f"diffusers=={diffusers}", f"transformers=={transformers}")
            _printed([*PIP, "--target", str(environment), *packages], environment)
        found = json.loads(_printed([sys.executable, "-W", "ignore", "-m", __name__], environment))
        if (found["versions"]["diffusers"], found["versions"]["transformers"]) != (diffusers, transformers):
            raise DerivationError(f"{environment} holds {found['versions']}: delete it")
        yield found


def _printed(command: list[str], environment: Path) -> str:
    """Return the last line that ``command`` prints, with the environment's packages before this one's."""
    path = os.pathsep.join([str(environment), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DerivationError(f"{' '.join(command)}: exit code {done.returncode}: {last}")
    return (done.stdout.splitlines() or [""])[-1]


def compare_installed() -> dict[str, Any]:
    """Compare every model and case under the versions that are installed; what has no trace is told apart."""
    result: dict[str, Any] = {**circumstances(), "calls": 0, "stages": 0, "failed": [], "untraced": []}
    for model in MODELS:
        for options, call in CASES:
            case = {"model": model, **options, **call.as_dict()}
            derivation = derive(model, **{**STEPS, **options, **installed()})
            try:
                found = compare_pipeline(derivation, call)
            except NotImplementedError as error:  # an operator that has no meaning on meta
                result["untraced"].append({**case, "reason": str(error).split(" raises")[0]})
                continue
            result["calls"] += 1
            result["stages"] += len(found)
            result["failed"] += [{**case, **asdict(c)} for c in found if not c.match]
    return result


if __name__ == "__main__":
    print(json.dumps(compare_installed()))
