"""The architecture itself: imports go one way, the core needs no torch, every block has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "derivation"
# every package and top-level module, each below those that may import it; __init__ is the package's public face
PARTS = """
    version errors registry text files call libraries gpu config options tape walk trace peak allocator equation
    verdict export api ask guard __init__ verify evidence measure report cli __main__
"""
ORDER = PARTS.split()
UP_TODAY: set[tuple[str, str]] = set()
LOOSE = {"__init__", "__main__", "version", "errors", "registry", "text", "files", "call", "libraries", "api", "guard"}
LOOSE |= {"verdict"}
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
ALLOWED_HEAVY = ("trace", "verify", "measure")
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_FOLDERS = 350, 25, 16
LONG_TODAY = {"allocator/allocator.py", "trace/runs.py", "walk/ops.py"}

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {heavy!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocker())
"""

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def module(path: Path) -> str:
    """``derivation.tape.symbols``; a package's ``__init__`` has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Every module that the file names in an import: in functions and under TYPE_CHECKING, too."""
    names: set[str] = set()
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            home = ".".join([*parents, *filter(None, [node.module])])
            inside = {f"{home}.{alias.name}" for alias in node.names}
            names |= inside & MODULES.keys()
            names |= {home} if inside - MODULES.keys() else set()
    return names


def part(name: str) -> str:
    return [*name.split("."), "__init__"][1]


USED = {name: {used for used in imports(path) if used in MODULES} for name, path in MODULES.items()}
ARROWS = {(part(name), part(used)) for name, all_used in USED.items() for used in all_used if part(name) != part(used)}


def known(arrow: tuple[str, str]):
    marks = [pytest.mark.xfail(strict=True, reason="to be turned")] if arrow in UP_TODAY else []
    return pytest.param(arrow, marks=marks, id="-".join(arrow))


def test_every_part_has_its_place_in_the_order():
    assert len(set(ORDER)) == len(ORDER)
    assert {part(name) for name in MODULES} <= set(ORDER)


@pytest.mark.parametrize("arrow", map(known, sorted(ARROWS | UP_TODAY)))
def test_no_arrow_runs_up(arrow):
    above, below = arrow
    if ORDER.index(above) < ORDER.index(below):
        found = sorted(
            f"{name} imports {used}"
            for name, all_used in USED.items()
            for used in all_used
            if (part(name), part(used)) == arrow
        )
        assert not found


def reached(name: str) -> set[str]:
    """Every module that importing ``name`` imports."""
    found: set[str] = set()
    new = USED[name]
    while new:
        found |= new
        new = {used for other in new for used in USED[other]} - found
    return found


def test_no_circle_of_modules():
    assert not [name for name in USED if name in reached(name)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_trace_verify_and_measure_import_torch(path):
    if part(module(path)) not in ALLOWED_HEAVY:
        assert not {name.split(".")[0] for name in imports(path)} & set(HEAVY)


def test_the_tree_is_the_stages():
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(folders) <= MOST_FOLDERS
    assert {path.stem for path in PACKAGE.glob("*.py")} <= LOOSE


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_short(path):
    if str(path.relative_to(PACKAGE)) not in LONG_TODAY:
        assert len(path.read_text().splitlines()) <= MOST_FILE_LINES


def test_nine_functions_of_ten_are_short():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lines = sorted(
        node.end_lineno - node.lineno + 1
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, functions)
    )
    assert lines[len(lines) * 9 // 10] <= MOST_FUNCTION_LINES, lines[-20:]


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
    text = (
        "".join(
            path.read_text()
            for home in homes
            for path in [*home.glob("models/**/*.py")]
            if folders & set(path.parts) or path.parent.name == "models"
        )
        + (homes[0] / "pipelines/stable_diffusion/safety_checker.py").read_text()
    )
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


def test_a_registry_refuses_a_name_that_is_taken():
    from derivation.walk.schedulers import SCHEDULERS
    from derivation.walk.schedulers.base import Scheduler, register

    taken = type("DDIMScheduler", (Scheduler,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError) as caught:
        register(taken)
    home = "derivation.walk.schedulers.ddim.DDIMScheduler"
    assert str(caught.value) == f"scheduler DDIMScheduler is registered twice: {home} and elsewhere.DDIMScheduler"
    assert SCHEDULERS["DDIMScheduler"] is not taken


def named_in(*names: str) -> set[str]:
    """The files whose code, docstrings apart, has a name or a text that is one of ``names``."""
    found = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            said = (getattr(node, key, None) for key in ("id", "name", "attr", "value"))
            if any(isinstance(word, str) and word in names for word in said):
                found.add(str(path.relative_to(PACKAGE)))
    return found


def test_a_gpu_is_an_entry_of_the_table_alone():
    assert not named_in("L40S", "l40s", "L4", "l4")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_is_two_files(name):
    found = named_in(name)
    assert "config/schedulers.py" in found
    assert len(found) == 2


@pytest.mark.parametrize("target", ["arrays", "c", "document", "javascript"])
def test_an_export_format_is_two_files(target):
    assert {name for name, used in USED.items() if f"derivation.export.{target}" in used} == {"derivation.export"}


def test_the_options_name_what_is_registered():
    from derivation.config.schedulers import DEFAULTS
    from derivation.options.choices import ATTENTION, ATTENTION_ALIASES, EAGER, SDPA
    from derivation.walk.attention import BACKENDS, CUDNN
    from derivation.walk.schedulers import SCHEDULERS

    assert {*ATTENTION, CUDNN} == {EAGER, SDPA, *BACKENDS}
    assert set(ATTENTION_ALIASES.values()) <= set(BACKENDS)
    assert DEFAULTS.keys() == SCHEDULERS.keys()
