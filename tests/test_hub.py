"""Hub ids, revisions and single config files: huggingface_hub is mocked, its errors are its own classes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import errors
from huggingface_hub.utils import logging as hub_logging

from derivation import DerivationError, derive
from derivation.cli import run
from derivation.config import load
from derivation.config.checkpoint import BUNDLED

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
REPO = "someone/fine-tuned"
Call = tuple[str, str, str | None, bool]


class FakeHub:
    """hf_hub_download on a folder that is laid out as huggingface_hub's cache is: snapshots by commit."""

    def __init__(self, root: Path, error: Exception | None = None) -> None:
        self.snapshot, self.error = root / "snapshots" / COMMIT, error
        self.calls: list[Call] = []

    def __call__(self, repo_id: str, filename: str, *, revision: str | None, local_files_only: bool) -> str:
        self.calls.append((repo_id, filename, revision, local_files_only))
        if self.error is not None:
            hub_logging.get_logger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
            raise self.error
        path = self.snapshot / filename
        if not path.is_file():
            raise errors.LocalEntryNotFoundError("x") if local_files_only else _entry_not_found()
        return str(path)


def _response(error: type[Exception]) -> Exception:
    """An error as huggingface_hub raises it: its message has several lines."""
    made = error.__new__(error)
    made.args = ("404 Client Error.\n\nEntry Not Found for url: https://huggingface.co/...",)
    return made


def _entry_not_found() -> Exception:
    return _response(getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    monkeypatch.chdir(tmp_path)

    def install(folder: Path | None = None, error: Exception | None = None) -> FakeHub:
        made = FakeHub(tmp_path / "cache", error)
        if folder is not None:
            shutil.copytree(folder, made.snapshot)
        monkeypatch.setattr(hub, "hf_hub_download", made)
        monkeypatch.setattr("derivation.config.hub._unreachable", lambda *file: False)
        return made

    return install


def test_a_pipeline_of_the_hub_is_read_like_a_folder_all_of_one_commit(fake: Any) -> None:
    made = fake(BUNDLED / SD15)
    found, there = load(REPO), load(SD15)
    assert dataclasses.replace(found, name=there.name, source=there.source) == there
    assert found.name == REPO
    first, *others = made.calls
    assert first == (REPO, "model_index.json", None, False)
    assert {call[2] for call in others} == {COMMIT}
    assert all(call[1].endswith(".json") for call in made.calls)


@pytest.mark.parametrize("given", [{"model": f"{REPO}@fp16"}, {"model": REPO, "revision": "fp16"}])
def test_a_revision_is_asked_for(fake: Any, given: Mapping[str, str]) -> None:
    made = fake(BUNDLED / SD15)
    assert derive(**given).checkpoint.name == f"{REPO}@fp16"
    assert made.calls[0] == (REPO, "model_index.json", "fp16", False)


def test_a_component_of_the_hub_is_read_alone(fake: Any) -> None:
    made = fake(BUNDLED / SD15 / "vae")
    found = derive(REPO, local_files_only=True)
    assert list(found.calls) == ["vae_encode", "vae_decode"]
    assert found.component_peaks(512, 512) == {
        name: peak for name, peak in derive(SD15).component_peaks(512, 512).items() if name in found.calls
    }
    assert all(call[3] for call in made.calls)


def test_what_is_neither_on_the_hub_nor_in_the_cache_is_one_line(fake: Any) -> None:
    made = fake(error=errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(DerivationError, match="the Hub cannot be reached"):
        load(REPO)
    assert [call[3] for call in made.calls] == [False, True]


FAILURES = {
    "GatedRepoError": (errors.GatedRepoError, "the repository is gated"),
    "RepositoryNotFoundError": (errors.RepositoryNotFoundError, "no such repository"),
    "RevisionNotFoundError": (errors.RevisionNotFoundError, "no revision nothing"),
    "EntryNotFoundError": (errors.EntryNotFoundError, "no model_index.json in it"),
    "HFValidationError": (errors.HFValidationError, "not the id of a repository"),
    "OSError": (OSError, "OSError: 404 Client Error. Entry Not Found for url"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_of_the_hub_is_one_line(name: str, fake: Any, capfd: pytest.CaptureFixture[str]) -> None:
    kind, said = FAILURES[name]
    fake(error=_response(kind))
    assert run(["estimate", REPO, "--revision", "nothing"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    where = "is not a folder, and cannot be read from the Hugging Face Hub"
    assert captured.err.startswith(f"error: {REPO} {where}: {said}")
    assert captured.err.count("\n") == 1


def test_a_hostile_config_of_the_hub_is_one_line(fake: Any, capfd: pytest.CaptureFixture[str]) -> None:
    made = fake(BUNDLED / SD15)
    (made.snapshot / "unet" / "config.json").write_text('{"in_channels": "<script>\\n\\u001b[31m"}')
    assert run(["estimate", REPO]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1
    assert "in_channels = '<script>" in captured.err
    assert captured.err.rstrip("\n").isprintable()


@pytest.mark.parametrize("given", [f"{SD15}@main", SD15])
def test_a_revision_of_a_bundled_id_is_the_hubs(given: str, fake: Any) -> None:
    made = fake(BUNDLED / SD15)
    load(given, None if "@" in given else "main")
    assert made.calls[0] == (SD15, "model_index.json", "main", False)


@pytest.mark.parametrize("given", ["./no-such-folder@main", "a/b/c@x", "@", "@main", "a@b@c", "../x"])
def test_what_cannot_be_an_id_never_reaches_the_hub(given: str, fake: Any) -> None:
    made = fake(BUNDLED / SD15)
    with pytest.raises(DerivationError) as caught:
        load(given)
    assert str(caught.value).isprintable()
    assert made.calls == []


# Single files.


@pytest.mark.parametrize(
    ("part", "calls"),
    [
        ("unet", ["unet"]),
        ("vae", ["vae_encode", "vae_decode"]),
        ("text_encoder", ["text_encoder"]),
        ("safety_checker", ["safety_checker"]),
    ],
)
def test_one_components_config_gives_its_calls(part: str, calls: list[str]) -> None:
    path = BUNDLED / SD15 / part / "config.json"
    whole = derive(SD15).component_peaks(512, 768)
    for source in (path, path.parent, str(path)):
        assert derive(source).component_peaks(512, 768) == {name: whole[name] for name in calls}


def test_a_model_index_is_its_folder() -> None:
    assert load(BUNDLED / SD15 / "model_index.json").unet == load(SD15).unet


def test_a_scheduler_alone_runs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", str(BUNDLED / SD15 / "scheduler" / "scheduler_config.json")]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name = 'FluxTransformer2DModel'"),
        ({"architectures": ["T5EncoderModel"]}, "architectures = 'T5EncoderModel'"),
        ({"architectures": 3}, "architectures = 3"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({}, "_class_name = None"),
        ([], "expected a JSON object"),
    ],
    ids=str,
)
def test_another_models_config_is_one_line(
    content: object, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert run(["estimate", str(path)]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(f"error: {path}: ") and captured.err.count("\n") == 1
    assert said in captured.err
