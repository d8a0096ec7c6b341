"""The architecture itself: imports go one way, the core needs no torch, every block has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "derivation"
CHAIN = ["tape", "walk", "peak"]
HEAVY = ("torch", "diffusers", "transformers")
ALLOWED_HEAVY = ("trace", "verify", "measure")

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {heavy!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocker())
"""


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add("derivation." + node.module if node.level else node.module)
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = part(path)
    if here not in CHAIN:
        return
    later = set(CHAIN[CHAIN.index(here) + 1 :])
    used = {name.split(".")[1] for name in imports(path) if name.startswith("derivation.")}
    assert not used & later


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_oracle_and_measure_import_torch(path):
    if part(path) not in ALLOWED_HEAVY:
        assert not {name.split(".")[0] for name in imports(path)} & set(HEAVY)


def test_deriving_works_where_torch_cannot_be_imported():
    code = BLOCKER.format(heavy=HEAVY) + (
        "from derivation import derive\n"
        "d = derive('stable-diffusion-v1-5/stable-diffusion-v1-5')\n"
        "print(d.component_peaks(height=512, width=512)['unet'], d.peak is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "136321536 True", done.stderr


def test_the_blocker_blocks():
    code = BLOCKER.format(heavy=HEAVY) + "import torch\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch is blocked" in done.stderr


def test_every_block_name_is_diffusers_or_transformers_own():
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    homes = [Path(package.__file__).parent for package in (diffusers, transformers)]
    folders = {"unets", "autoencoders", "transformers", "clip", "controlnets"}
    text = "".join(
        path.read_text()
        for home in homes
        for path in [*home.glob("models/**/*.py")]
        if folders & set(path.parts) or path.parent.name == "models"
    ) + (homes[0] / "pipelines/stable_diffusion/safety_checker.py").read_text()
    for path in (PACKAGE / "walk/blocks").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            decorated = isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Name) and d.id == "block" for d in node.decorator_list
            )
            if decorated:
                assert f"class {node.name}(" in text, f"{path.name}: {node.name}"


def test_a_block_has_one_home():
    seen: dict[str, str] = {}
    for path in [*(PACKAGE / "walk/blocks").glob("*.py"), PACKAGE / "walk/models.py", PACKAGE / "walk/ops.py"]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name[0].isupper():
                assert node.name not in seen, f"{node.name} in {path.name} and {seen[node.name]}"
                seen[node.name] = path.name
