"""The wheel, installed where there is no checkout: derive, export, the report and every verb of the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from derivation.version import __version__

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
PACKED = ("pyproject.toml", "README.md", "LICENSE", "derivation", "templates")
MODEL = "stable-diffusion-v1-5"
VERBS = (
    ["models"],
    ["estimate", MODEL],
    ["fit", MODEL, "--vram", "8GiB"],
    ["recommend", MODEL, "--vram", "3GiB"],
    ["compare", MODEL, "stable-diffusion-2-1"],
    ["export", MODEL, "--to", "latex"],
    ["export", MODEL, "--to", "python", "--output", "formulas"],
    ["report", "vae.json", "--output", "out"],
    *([verb, "--help"] for verb in ("verify", "measure", "calibrate", "validate")),
)
SCRIPT = """
import json, sys
from pathlib import Path
import derivation
from derivation import cli
from derivation.config.checkpoint import BUNDLED
if __name__ == "__main__":
    assert Path(derivation.__file__).is_relative_to(sys.argv[1])
    Path("vae.json").write_bytes((BUNDLED / "stable-diffusion-v1-5/stable-diffusion-v1-5/vae/config.json").read_bytes())
    print(derivation.derive("stable-diffusion-v1-5", pipeline="img2img").estimate(512, 512)["peak_tensor_bytes"])
    for arguments in json.loads(sys.argv[2]):
        assert cli.run(arguments) == 0, arguments
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKED:
        if (path := ROOT / name).is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    command = [*PIP, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_an_installed_wheel_does_everything_in_an_empty_folder(site, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(site), json.dumps(VERBS)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3143891456" in done.stdout
    assert (tmp_path / "formulas" / "peak_vram.py").is_file()
    [page] = (tmp_path / "out").glob("*.html")
    assert "<math" in page.read_text()


def test_the_wheel_is_typed_and_the_citation_names_its_version(site):
    assert (site / "derivation" / "py.typed").is_file()
    assert f"\nversion: {__version__}\n" in (ROOT / ".github" / "CITATION.cff").read_text()


def test_the_workflow_runs_what_contributors_run():
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
