"""Config files of the Hugging Face Hub, through huggingface_hub and its cache; nothing else is downloaded."""

from __future__ import annotations

import logging
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
# huggingface_hub/constants.py: HF_HUB_ETAG_TIMEOUT
TIMEOUT_S = 10
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
            local = local_files_only or _unreachable(repo_id, file, revision)
            path = huggingface_hub.hf_hub_download(repo_id, file, revision=revision, local_files_only=local)
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
    where = "is not a folder, and cannot be read from the Hugging Face Hub"
    return f"{repo_id} {where}: {reason} (bundled ids: derivation models)"


def _unreachable(repo_id: str, file: str, revision: str | None) -> bool:
    """Return whether a file that is not in the cache cannot be asked for; hf_hub_download would retry for 25 s."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import HfHubHTTPError

    if isinstance(try_to_load_from_cache(repo_id, file, revision=revision), str):
        return False
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), timeout=TIMEOUT_S)
    except HfHubHTTPError:
        return False
    except Exception:  # the HTTP library's own
        return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and warnings: an error is one line."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars, logger = not are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    level = logger.level
    disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()
