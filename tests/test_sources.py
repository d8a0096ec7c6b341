"""Where checkpoints come from: single files of both libraries, the Hub's cache, revisions, and being offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import errors

from derivation import derive
from derivation.config import load
from derivation.config.checkpoint import BUNDLED
from derivation.errors import DerivationError

V15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SOURCE = BUNDLED / V15
COMMIT, OLDER = "a" * 40, "b" * 40
PARTS = ("unet", "vae", "text_encoder", "safety_checker")


def cached(cache: Path, repo_id: str, files: dict[str, Any], commit: str = COMMIT, ref: str | None = "main") -> None:
    """Write files as huggingface_hub lays out its cache: a snapshot, and a ref that names its commit."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    for name, content in files.items():
        path = repo / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    if ref is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)


def files(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return the files of SD 1.5 with keys of its components changed."""
    found = {str(path.relative_to(SOURCE)): json.loads(path.read_text()) for path in SOURCE.rglob("*.json")}
    for part, keys in changes.items():
        found[f"{part}/config.json"] |= keys
    return found


def command(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "derivation", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        check=False,
    )


def estimate(model: str, cache: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    size = ("--height", "64", "--width", "64", "--json", *more)
    return command("estimate", model, *size, cache=cache, **environment)


@pytest.mark.parametrize("part", PARTS)
def test_a_component_file_is_its_own_checkpoint(part: str) -> None:
    file = SOURCE / part / "config.json"
    alone, whole = load(file), load(V15)
    assert not alone.whole and alone.source == str(file)
    assert getattr(alone, part) == getattr(whole, part)
    assert [name for name in PARTS if getattr(alone, name) is not None] == [part]
    peaks = derive(file).component_peaks(64, 64)
    assert peaks and peaks == {name: derive(V15).component_peaks(64, 64)[name] for name in peaks}


@pytest.mark.parametrize("part", PARTS)
def test_a_component_folder_and_an_index_file_are_read(part: str) -> None:
    assert getattr(load(SOURCE / part), part) == getattr(load(V15), part)
    assert load(SOURCE / "model_index.json").unet == load(V15).unet


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model_type": "clip_text_model"}, "text_encoder"),
        ({"model_type": "clip"}, None),
        ({"model_type": "t5"}, "model_type = 't5'"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "text_encoder"),
        ({"architectures": ["T5EncoderModel"]}, "architectures = 'T5EncoderModel'"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name = 'AutoencoderTiny'"),
        ({"in_channels": 4}, "_class_name = None"),
    ],
    ids=str,
)
def test_the_class_of_a_component_file(tmp_path: Path, content: dict[str, Any], named: str | None) -> None:
    file = tmp_path / "config.json"
    if named is None:
        content |= {"vision_config": {}}
        named = "safety_checker"
    file.write_text(json.dumps(content))
    if "=" in named:
        with pytest.raises(DerivationError, match=named) as caught:
            load(file)
        assert str(caught.value).startswith(f"{file}: ")
    else:
        assert getattr(load(file), named) is not None


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None, bool]]:
    """Stand in for hf_hub_download: a repository with SD 1.5 at main and a narrower UNet at v1; records the calls."""
    heads = {None: COMMIT, "main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
    cached(tmp_path, "org/fine-tune", files())
    cached(tmp_path, "org/fine-tune", files(unet={"block_out_channels": [64, 128, 256, 256]}), OLDER, "v1")
    cached(tmp_path, "org/vae", {"config.json": json.loads((SOURCE / "vae/config.json").read_text())})
    calls: list[tuple[str, str, str | None, bool]] = []

    def hf_hub_download(repo_id: str, file: str, *, revision: str | None, local_files_only: bool) -> str:
        calls.append((repo_id, file, revision, local_files_only))
        if revision not in heads:
            raise errors.RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        path = tmp_path / f"models--{repo_id.replace('/', '--')}" / "snapshots" / heads[revision] / file
        if not path.exists():
            raise errors.EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr("derivation.config.hub._unreachable", lambda *_: False)
    return calls


Downloads = list[tuple[str, str, str | None, bool]]


def test_a_hub_id_reads_json_files_of_one_commit(downloads: Downloads) -> None:
    checkpoint = load("org/fine-tune")
    assert checkpoint.unet == load(V15).unet and checkpoint.name == "org/fine-tune"
    assert downloads[0] == ("org/fine-tune", "model_index.json", None, False)
    assert {revision for _, _, revision, _ in downloads[1:]} == {COMMIT}
    assert {file.rpartition("/")[0] for _, file, _, _ in downloads} == {"", *PARTS, "scheduler"}
    assert all(file.endswith(".json") for _, file, _, _ in downloads)


@pytest.mark.parametrize("given", [("org/fine-tune@v1", None), ("org/fine-tune", "v1")])
def test_a_revision_is_respected(downloads: Downloads, given: tuple[str, str | None]) -> None:
    checkpoint = load(given[0], revision=given[1])
    assert checkpoint.unet is not None and checkpoint.unet.block_out_channels == (64, 128, 256, 256)
    assert checkpoint.name == "org/fine-tune@v1"
    assert [revision for _, _, revision, _ in downloads] == ["v1", *[OLDER] * 6]


def test_a_repository_of_one_component(downloads: Downloads) -> None:
    checkpoint = load("org/vae")
    assert not checkpoint.whole and checkpoint.vae == load(V15).vae
    assert [file for _, file, _, _ in downloads] == ["model_index.json", "config.json"]


def test_local_files_only_is_passed_on(downloads: Downloads) -> None:
    load("org/fine-tune", local_files_only=True)
    assert all(local for *_, local in downloads)


RESPONSE = SimpleNamespace(headers={}, request=None)
FAILURES: list[tuple[Exception, str]] = [
    (errors.GatedRepoError("403", response=RESPONSE), "gated"),
    (errors.RepositoryNotFoundError("404", response=RESPONSE), "no such repository"),
    (errors.RevisionNotFoundError("404", response=RESPONSE), "no revision v9"),
    (errors.LocalEntryNotFoundError("offline"), "model_index.json is not in the cache"),
    (errors.EntryNotFoundError("404"), "no model_index.json in it"),
    (ConnectionResetError("reset\nby peer"), "ConnectionResetError: reset by peer"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES, ids=lambda x: type(x).__name__)
def test_what_the_hub_answers_is_one_line(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    def hf_hub_download(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(DerivationError, match=reason) as caught:
        load("org/fine-tune", revision="v9")
    assert str(caught.value).startswith("org/fine-tune is not a folder") and str(caught.value).isprintable()


def test_a_bundled_id_with_a_revision_is_the_hubs(downloads: Downloads) -> None:
    with pytest.raises(DerivationError, match="no revision v9"):
        load(f"{V15}@v9")
    assert downloads == [(V15, "model_index.json", "v9", False)]


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DerivationError, match=r"pip install 'diffusion-vram-derivation\[hub\]'"):
        load("org/fine-tune")


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
    cached(tmp_path, "org/fine-tune", files(unet={"block_out_channels": [64, 128, 256, 256]}), OLDER, "v1")
    sizes = ("--height", "64", "--width", "64", "--json")
    bundled = json.loads(command("estimate", V15, *sizes, cache=tmp_path).stdout)
    main, older = (json.loads(estimate(f"org/fine-tune{at}", tmp_path).stdout) for at in ("", "@v1"))
    assert main["peak_tensor_bytes"] == bundled["peak_tensor_bytes"] > older["peak_tensor_bytes"]
    assert estimate("org/fine-tune@v2", tmp_path).returncode == 2


def test_a_file_that_the_cache_lacks_is_named(tmp_path: Path) -> None:
    content = files()
    del content["vae/config.json"]
    cached(tmp_path, "org/partial", content)
    done = estimate("org/partial", tmp_path)
    assert done.returncode == 2 and "vae/config.json is not in the cache" in done.stderr
