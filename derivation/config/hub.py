"""Config files of the Hugging Face Hub, through huggingface_hub and its cache; nothing else is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DerivationError

EXTRA = "pip install 'diffusion-vram-derivation[hub]'"
# huggingface_hub/errors.py: the most specific class decides
REASONS = {
    "GatedRepoError": "the repository is gated: accept its terms on the Hub, then log in (hf auth login)",
    "RepositoryNotFoundError": "no such repository, or a private one (hf auth login)",
    "RevisionNotFoundError": "no revision {revision}",
    "LocalEntryNotFoundError": "{file} is not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set",
    "EntryNotFoundError": "no {file} in it",
    "HFValidationError": "not the id of a repository",
}
MISSING = ("LocalEntryNotFoundError", "EntryNotFoundError")


class MissingFile(DerivationError):
    """A repository without the file that was asked for, or one whose cached part has no such file.

    ``cached`` tells which: whether the cache alone was looked at, or was all that could be reached.
    """

    cached = False


def fetch(repo_id: str, file: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the path of one JSON file of a repository in huggingface_hub's cache, downloaded if need be.

    The file's folder is named by its commit. Raises MissingFile, else DerivationError, in one line.
    """
    assert file.endswith(".json")
    try:
        import huggingface_hub
    except ImportError:
        raise DerivationError(_line(repo_id, f"huggingface_hub is not installed ({EXTRA})")) from None
    try:
        with _quiet():
            path = huggingface_hub.hf_hub_download(
                repo_id, file, revision=revision, local_files_only=local_files_only
            )
    except Exception as error:  # the HTTP library below huggingface_hub, and its errors, differ by version
        names = [cls.__name__ for cls in type(error).__mro__]
        reason = next((REASONS[name] for name in names if name in REASONS), None)
        said = reason or " ".join(f"{names[0]}: {error}".split())[:200]
        line = _line(repo_id, said.replace("{file}", file).replace("{revision}", str(revision)))
        if not any(name in MISSING for name in names):
            raise DerivationError(line) from None
        missing = MissingFile(line)
        missing.cached = MISSING[0] in names
        raise missing from None
    return Path(path)


def _line(repo_id: str, reason: str) -> str:
    return f"{repo_id} is not a folder, and not on the Hugging Face Hub: {reason} (bundled ids: derivation models)"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub's progress bars, warnings and notes on its retries off stderr: an error is one line."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()
