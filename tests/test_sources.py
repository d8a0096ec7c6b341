"""Where checkpoints come from: single files of both libraries, the Hub and its cache, revisions, and being offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from conftest import SD15
from huggingface_hub import errors
from huggingface_hub.utils import logging as hub_logging

from derivation import derive
from derivation.cli import run
from derivation.config import load
from derivation.config.checkpoint import BUNDLED
from derivation.errors import DerivationError

SOURCE = BUNDLED / SD15
COMMIT, OLDER = "a" * 40, "b" * 40
CALLS = {
    "unet": ["unet"],
    "vae": ["vae_encode", "vae_decode"],
    "text_encoder": ["text_encoder"],
    "safety_checker": ["safety_checker"],
}
NARROW = {"block_out_channels": [64, 128, 256, 256]}


def cached(cache: Path, repo_id: str, files: dict[str, Any], commit: str = COMMIT, ref: str = "main") -> None:
    """Write files as huggingface_hub lays out its cache: a snapshot, and a ref that names its commit."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    for name, content in files.items():
        path = repo / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)


def files(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return the files of SD 1.5 with keys of its components changed."""
    found = {str(path.relative_to(SOURCE)): json.loads(path.read_text()) for path in SOURCE.rglob("*.json")}
    for part, keys in changes.items():
        found[f"{part}/config.json"] |= keys
    return found


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one printable line of a request that the command line refuses."""
    assert run(["estimate", *arguments]) == 2
    captured = capfd.readouterr()
    line = captured.err.removesuffix("\n")
    assert captured.out == "" and line.startswith("error: ") and line.isprintable()
    return line.removeprefix("error: ")


# Single files.


@pytest.mark.parametrize("part", CALLS)
def test_one_components_config_is_its_own_checkpoint(part: str) -> None:
    file, whole = SOURCE / part / "config.json", derive(SD15)
    peaks = whole.component_peaks(512, 768)
    for source in (file, file.parent, str(file)):
        alone = derive(source)
        assert not alone.checkpoint.whole
        assert getattr(alone.checkpoint, part) == getattr(whole.checkpoint, part)
        assert [name for name in CALLS if getattr(alone.checkpoint, name) is not None] == [part]
        assert alone.component_peaks(512, 768) == {name: peaks[name] for name in CALLS[part]}
    assert load(file).source == str(file)


def test_a_model_index_is_its_folder() -> None:
    assert load(SOURCE / "model_index.json").unet == load(SD15).unet


def test_a_scheduler_alone_runs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, str(SOURCE / "scheduler" / "scheduler_config.json"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"model_type": "clip_text_model"}, "text_encoder"),
        ({"model_type": "clip", "vision_config": {}}, "safety_checker"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "text_encoder"),
    ],
    ids=str,
)
def test_the_class_of_a_component_file(tmp_path: Path, content: dict[str, Any], part: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert getattr(load(file), part) is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name = 'FluxTransformer2DModel'"),
        ({"_class_name": "VQModel"}, "_class_name = 'VQModel'"),
        ({"architectures": ["T5EncoderModel"]}, "architectures = 'T5EncoderModel'"),
        ({"architectures": 3}, "architectures = 3"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"model_type": "t5"}, "model_type = 't5'"),
        ({"in_channels": 4}, "_class_name = None"),
        ({}, "_class_name = None"),
        ([], "expected a JSON object"),
    ],
    ids=str,
)
def test_another_models_config_is_one_line(
    content: object, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    line = refused(capfd, str(file))
    assert line.startswith(f"{file}: ") and said in line


# The Hub.


@dataclass
class Hub:
    """Stands in for hf_hub_download on a cache; ``main`` and ``v1`` name its commits. Records the calls."""

    cache: Path
    failure: Exception | None = None
    calls: list[tuple[str, str, str | None, bool]] = field(default_factory=list)

    def __call__(self, repo_id: str, file: str, *, revision: str | None, local_files_only: bool) -> str:
        self.calls.append((repo_id, file, revision, local_files_only))
        if self.failure is not None:
            hub_logging.get_logger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
            raise self.failure
        heads = {None: COMMIT, "main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
        if revision not in heads:
            raise errors.RevisionNotFoundError("404", response=RESPONSE)
        path = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / heads[revision] / file
        if not path.exists():
            raise errors.LocalEntryNotFoundError("x") if local_files_only else errors.EntryNotFoundError("404")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with SD 1.5 at main and a narrower UNet at v1, SD 1.5's own, and one of a VAE."""
    made = Hub(tmp_path)
    cached(tmp_path, "org/fine-tune", files())
    cached(tmp_path, "org/fine-tune", files(unet=NARROW), OLDER, "v1")
    cached(tmp_path, SD15, files())
    cached(tmp_path, "org/vae", {"config.json": json.loads((SOURCE / "vae/config.json").read_text())})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made)
    monkeypatch.setattr("derivation.config.hub._unreachable", lambda *_: False)
    return made


def test_a_hub_id_is_read_like_a_folder_all_of_one_commit(hub: Hub) -> None:
    found, there = load("org/fine-tune"), load(SD15)
    assert replace(found, name=there.name, source=there.source) == there
    assert found.name == "org/fine-tune"
    assert hub.calls[0] == ("org/fine-tune", "model_index.json", None, False)
    assert {revision for _, _, revision, _ in hub.calls[1:]} == {COMMIT}
    assert {file.rpartition("/")[0] for _, file, _, _ in hub.calls} == {"", *CALLS, "scheduler"}
    assert all(file.endswith(".json") for _, file, _, _ in hub.calls)


@pytest.mark.parametrize("given", [("org/fine-tune@v1", None), ("org/fine-tune", "v1")])
def test_a_revision_is_respected(hub: Hub, given: tuple[str, str | None]) -> None:
    checkpoint = derive(given[0], revision=given[1]).checkpoint
    assert checkpoint.unet is not None and list(checkpoint.unet.block_out_channels) == NARROW["block_out_channels"]
    assert checkpoint.name == "org/fine-tune@v1"
    assert [revision for _, _, revision, _ in hub.calls] == ["v1", *[OLDER] * 6]


@pytest.mark.parametrize("given", [(f"{SD15}@main", None), (SD15, "main")])
def test_a_bundled_id_with_a_revision_is_the_hubs(hub: Hub, given: tuple[str, str | None]) -> None:
    load(*given)
    assert hub.calls[0] == (SD15, "model_index.json", "main", False)


def test_a_repository_of_one_component(hub: Hub) -> None:
    found = derive("org/vae")
    assert not found.checkpoint.whole and list(found.calls) == CALLS["vae"]
    assert found.checkpoint.vae == load(SD15).vae
    assert [file for _, file, _, _ in hub.calls] == ["model_index.json", "config.json"]


@pytest.mark.parametrize("name", ["org/fine-tune", "org/vae"])
def test_local_files_only_is_passed_on(hub: Hub, name: str) -> None:
    derive(name, local_files_only=True)
    assert all(local for *_, local in hub.calls)


def test_what_is_neither_on_the_hub_nor_in_the_cache_is_looked_up_in_both(hub: Hub) -> None:
    hub.failure = errors.LocalEntryNotFoundError("offline")
    with pytest.raises(DerivationError, match=r"model_index.json is not in the cache, and the Hub cannot be reached"):
        load("org/fine-tune")
    assert [local for *_, local in hub.calls] == [False, True]


RESPONSE = SimpleNamespace(headers={}, request=None)
# huggingface_hub's messages have several lines
SAID = "404 Client Error.\n\nEntry Not Found for url: https://huggingface.co/..."
FAILURES: list[tuple[Exception, str]] = [
    (errors.GatedRepoError(SAID, response=RESPONSE), "the repository is gated"),
    (errors.RepositoryNotFoundError(SAID, response=RESPONSE), "no such repository"),
    (errors.RevisionNotFoundError(SAID, response=RESPONSE), "no revision v9"),
    (errors.LocalEntryNotFoundError(SAID), "model_index.json is not in the cache"),
    (errors.EntryNotFoundError(SAID), "no model_index.json in it"),
    (errors.HFValidationError(SAID), "not the id of a repository"),
    (OSError(SAID), "OSError: 404 Client Error. Entry Not Found for url"),
    (ConnectionResetError("reset\nby peer"), "ConnectionResetError: reset by peer"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES, ids=lambda x: type(x).__name__)
def test_what_the_hub_answers_is_one_line(
    hub: Hub, capfd: pytest.CaptureFixture[str], failure: Exception, reason: str
) -> None:
    hub.failure = failure
    where = "org/fine-tune is not a folder, and cannot be read from the Hugging Face Hub"
    assert refused(capfd, "org/fine-tune", "--revision", "v9").startswith(f"{where}: {reason}")


def test_a_revision_that_a_bundled_ids_repository_lacks_is_named(hub: Hub) -> None:
    with pytest.raises(DerivationError, match="no revision v9"):
        load(f"{SD15}@v9")
    assert hub.calls == [(SD15, "model_index.json", "v9", False)]


def test_a_hostile_config_of_the_hub_is_one_line(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    cached(hub.cache, "org/hostile", files(unet={"in_channels": "<script>\n\u001b[31m"}))
    assert "in_channels = '<script>" in refused(capfd, "org/hostile")


@pytest.mark.parametrize("given", ["./no-such-folder@main", "a/b/c@x", "@", "@main", "a@b@c", "../x"])
def test_what_cannot_be_an_id_never_reaches_the_hub(
    given: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DerivationError) as caught:
        load(given)
    assert str(caught.value).isprintable()
    assert hub.calls == []


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DerivationError, match=r"pip install 'diffusion-vram-derivation\[hub\]'"):
        load("org/fine-tune")


# The real huggingface_hub, in a process of its own: it reads its settings when it is imported.


def estimate(model: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "derivation", "estimate", model, "--height", "64", "--width", "64", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        check=False,
    )


def test_offline_is_one_line(tmp_path: Path) -> None:
    done = estimate("org/never-seen", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "org/never-seen is not a folder" in done.stderr and "HF_HUB_OFFLINE is set" in done.stderr


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path: Path) -> None:
    """Port 9 of the machine itself refuses connections; huggingface_hub would retry for 25 s and log each time."""
    done = estimate("org/never-seen", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "the Hub cannot be reached" in done.stderr


def test_the_cache_is_enough_offline(tmp_path: Path) -> None:
    cached(tmp_path, "org/fine-tune", files())
    cached(tmp_path, "org/fine-tune", files(unet=NARROW), OLDER, "v1")
    bundled = derive(SD15).estimate(64, 64)
    main, older = (json.loads(estimate(f"org/fine-tune{at}", tmp_path).stdout) for at in ("", "@v1"))
    assert main["peak_tensor_bytes"] == bundled["peak_tensor_bytes"] > older["peak_tensor_bytes"]
    assert estimate("org/fine-tune@v2", tmp_path).returncode == 2


def test_a_file_that_the_cache_lacks_is_named(tmp_path: Path) -> None:
    content = files()
    del content["vae/config.json"]
    cached(tmp_path, "org/partial", content)
    done = estimate("org/partial", tmp_path)
    assert done.returncode == 2 and "vae/config.json is not in the cache" in done.stderr
