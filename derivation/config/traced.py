"""Pipelines of other classes than the walked ones: their folders, bundled, the user's or the Hub's."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from . import hub
from .checkpoint import BUNDLED, PIPELINE_CLASSES, read_json, task_of
from .checks import INDEX

TRACED = Path(__file__).resolve().parent / "traced"
# The files of a component that a pipeline is built from.
FILES = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TracedFolder:
    """A folder in diffusers' format; ``source`` is "bundled", or where it was found."""

    path: Path
    name: str
    source: str

    @property
    def class_name(self) -> str:
        """The pipeline's class."""
        index = read_json(self.path / INDEX)
        return str(index.get("_class_name")) if isinstance(index, dict) else ""

    @property
    def task(self) -> str:
        """The option ``pipeline`` that the class stands for."""
        return task_of(self.class_name)

    @cached_property
    def contents(self) -> str:
        """A digest of all configs."""
        files = sorted(path for path in self.path.rglob("*.json") if path.is_file())
        content = [[str(path.relative_to(self.path)), path.read_text()] for path in files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def bundled_traced() -> tuple[str, ...]:
    """Return the ids of the bundled pipelines that are traced, sorted."""
    return tuple(sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in TRACED.glob(f"*/*/{INDEX}")))


def traced_folder(model: object, revision: str | None = None, any_class: bool = False) -> TracedFolder | None:
    """Return the folder here of a pipeline whose class is not walked, or of ``any_class``; None for none."""
    if not isinstance(model, str | os.PathLike) or not isinstance(given := os.fspath(model), str):
        return None
    if (name := _bundled(given)) is not None and revision is None:
        return TracedFolder(TRACED / name, name, "bundled")
    path = Path(given)
    if path.is_file() and path.name == INDEX:
        path = path.parent
    if path.is_dir():
        found = TracedFolder(path, path.resolve().name, str(path))
        return found if (path / INDEX).is_file() and (any_class or _is_other(found)) else None
    if any_class and (BUNDLED / given / INDEX).is_file():
        return TracedFolder(BUNDLED / given, given, "bundled")
    return None


def _bundled(given: str) -> str | None:
    named = [known for known in bundled_traced() if given.lower() in (known.lower(), known.split("/")[1].lower())]
    return named[0] if len(named) == 1 else None


def _is_other(folder: TracedFolder) -> bool:
    return folder.class_name.endswith("Pipeline") and folder.class_name not in PIPELINE_CLASSES


def hub_folder(model: object, revision: str | None = None, local_files_only: bool = False) -> TracedFolder:
    """Return the folder of a repository in the Hub's cache, every config fetched; raises DerivationError."""
    name, _, pinned = str(model).partition("@")
    index = hub.fetch(name, INDEX, revision or pinned or None, local_files_only)
    found = TracedFolder(index.parent, name, str(index.parent))
    content = read_json(index)
    components = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    for component in components:
        for file in FILES:
            try:
                hub.fetch(name, f"{component}/{file}", index.parent.name, local_files_only)
            except hub.MissingFile:
                continue
    return found
