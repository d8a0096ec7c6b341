"""Where recorded pipelines are found: shipped beside their configs, in a cache on disk, or traced now (needs torch)."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from derivation.config.checkpoint import PIPELINE_CLASSES
from derivation.config.traced import LiveConfigs, TracedFolder, live_configs, with_gguf
from derivation.errors import DerivationError, one_of
from derivation.files import write_files
from derivation.gpu.profile import hardware
from derivation.libraries import LIBRARIES as VERSIONED
from derivation.options import Options
from derivation.options.live import live_traced_options, refuse_other_weights
from derivation.tape.recorded import FORMAT, RecordedSubject
from derivation.tape.subject import Subject
from derivation.tape.tape import Tape
from derivation.trace.offloaded import with_model_offload
from derivation.trace.scratch import with_scratch

RECORDED = "recorded.json.gz"
# What a recorded pipeline's options are where the caller names none, by the dtype in which these are published: those
# of the walked classes are Options'.
DEFAULTS: Mapping[str, Any] = {"dtype": "bfloat16", "attention": "flash"}
# Options that tracing obeys.
APPLICABLE = ("dtype", "attention", "pipeline", "gpu", "scratch", "offload", *VERSIONED)
LIBRARIES = ("torch", "diffusers", "transformers")

Progress = Callable[[str], None]
Configs = TracedFolder | LiveConfigs


class Tracing:
    """Traces one folder's pipeline under some options, when it is first asked."""

    def __init__(self, folder: Configs, options: Options) -> None:
        self.folder, self.options = folder, options

    @cached_property
    def _pipeline(self) -> Any:
        module = _module("regimes")
        return module.prepared(_description(module, self.folder), self.options)

    def __call__(self, guidance: bool, values: Mapping[str, int]) -> Tape:
        """Return the tape of a call at integers."""
        tape: Tape = self._pipeline.at(guidance, values)
        return replace(tape, fixed=dict(values))


def subject(
    folder: Configs, given: Mapping[str, Any], progress: Progress = lambda _: None, anew: bool = True
) -> RecordedSubject:
    """Return the recorded pipeline of a folder: shipped, cached, or traced now and cached.

    Sequential offload, of which no record is shipped, is traced where the caller names it, not as one option of many;
    so is offload of models that are cast layer by layer.
    Raises DerivationError for an option that tracing does not obey, and without torch where nothing is recorded.
    """
    usual = {} if folder.class_name in PIPELINE_CLASSES else DEFAULTS
    wanted = Options(**{**usual, "pipeline": folder.task, **given})
    one_of("pipeline", wanted.pipeline, (folder.task,))
    for name, value in wanted.as_dict().items():
        if name not in APPLICABLE and value != getattr(Options(), name):
            raise DerivationError(f"{name} = {value!r} is not supported for {folder.class_name}, which is traced")
    live_casts, groups = (folder.casts, folder.grouped) if isinstance(folder, LiveConfigs) else (False, ())
    if groups and wanted.offload is not None:
        raise DerivationError(f"offload = {wanted.offload!r} is not supported: {groups[0]} has group offload")
    moved = wanted.offload if wanted.offload == "sequential" or live_casts else None
    plain = Options(dtype=wanted.dtype, attention=wanted.attention, pipeline=wanted.pipeline, offload=moved)
    if moved and not anew and not cache_path(folder, plain).is_file():
        raise DerivationError(f"offload = {moved!r} of {folder.class_name} is not recorded: derive with it traces it")
    found = _recorded(folder, plain, progress)
    found = replace(found, under=lambda options: subject(folder, options.as_dict(), progress, anew=False))
    if wanted.offload == "model" and moved is None:
        parameters, order = found.parameters, found.offload_order
        found = found.on(wanted, lambda tape: with_model_offload(tape, parameters, order))
    if wanted.gpu is None:
        return found
    versions = {name: getattr(wanted, name) for name in VERSIONED}
    card = hardware(wanted.gpu, **versions, scratch=wanted.scratch)
    return found.on(wanted, lambda tape: with_scratch(tape, card))


def recorded(
    folder: Configs, given: Mapping[str, Any], progress: Progress = lambda _: None
) -> tuple[RecordedSubject, dict[str, int]]:
    """Return the recorded pipeline of a folder, and the symbols that have one value in it.

    ``given`` are options, and ``transformer`` where its weights are a GGUF file's; raises DerivationError.
    """
    options = dict(given)
    file = options.pop("transformer", None)
    if file is not None:
        if not isinstance(folder, TracedFolder):
            raise DerivationError("transformer: a live pipeline has its own")
        folder = with_gguf(folder, file, str(options.get("dtype", DEFAULTS["dtype"])))
    found = subject(folder, options, progress)
    return found, found.fixed


def live(
    pipe: object, given: Mapping[str, Any], progress: Progress = lambda _: None
) -> tuple[RecordedSubject, dict[str, int]]:
    """Return the recorded pipeline of a live one; raises DerivationError for what is not read off it."""
    configs, options = live_configs(pipe), live_traced_options(pipe, **given)
    found, fixed = recorded(configs, options, progress)
    refuse_other_weights(pipe, found.parameters)
    return found, fixed


def _recorded(folder: Configs, options: Options, progress: Progress) -> RecordedSubject:
    retrace = Tracing(folder, options)
    shipped = (folder.path / RECORDED,) if isinstance(folder, TracedFolder) else ()
    for path in (*shipped, cache_path(folder, options)):
        if path.is_file():
            found = read(path, retrace)
            if found is not None and found.options == options:
                return found
    module = _module("regimes")
    made: RecordedSubject = module.record(
        _description(module, folder), options, folder.source, folder.name, progress=progress
    )
    store(made, cache_path(folder, options))
    return replace(made, retrace=retrace)


def _description(module: Any, folder: Configs) -> Any:
    description = module.Description
    return description.of(folder.path) if isinstance(folder, TracedFolder) else description.live(folder)


def _module(name: str) -> Any:
    """Return a module that traces; raises DerivationError where torch is not installed."""
    try:
        return import_module(f"derivation.trace.{name}")
    except ImportError as error:
        raise DerivationError(f"method = 'trace' needs the extra verify (missing: {error.name})") from None


def transformer(model: object, options: Options) -> Subject:
    """Return a transformer alone, traced with symbolic sizes; raises DerivationError."""
    found: Subject = _module("subject").TracedTransformer.read(model, options)
    return found


def from_document(document: Mapping[str, Any]) -> Subject:
    """Return the traced subject of ``document()``; raises DerivationError, KeyError or TypeError for anything else."""
    if "format" in document:
        return RecordedSubject.from_document(document)
    found: Subject = _module("subject").TracedTransformer.from_document(document)
    return found


def cache_path(folder: Configs, options: Options) -> Path:
    """Return the file of the cache for a folder's configs, options and the installed versions."""
    key = [FORMAT, folder.contents, options.as_dict(), [_version(name) for name in LIBRARIES]]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "derivation" / f"{digest[:32]}.json.gz"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read(path: Path, retrace: Tracing | None = None) -> RecordedSubject | None:
    """Return the recorded pipeline of a file, None where it is of another format or damaged."""
    try:
        return replace(_read(path, path.stat().st_mtime_ns), retrace=retrace)
    except (OSError, ValueError, KeyError, TypeError, EOFError, DerivationError):
        return None


@lru_cache(maxsize=8)
def _read(path: Path, _: int) -> RecordedSubject:
    return RecordedSubject.from_document(json.loads(gzip.decompress(path.read_bytes())))


def store(recorded: RecordedSubject, path: Path) -> None:
    """Write a recorded pipeline; a cache that cannot be written is left alone."""
    content = json.dumps(recorded.document(), separators=(",", ":")).encode()
    try:
        write_files(path.parent, {path.name: gzip.compress(content, 9, mtime=0)})
    except DerivationError:
        return
