"""The GPU table: look-up by any spelling, sources for every figure, errors that name what is known."""

import json
import warnings
from pathlib import Path

import pytest
from conftest import SD15

from derivation import derive
from derivation.errors import DerivationError
from derivation.gpu.cards import (
    TABLE,
    Gpu,
    SeveralCards,
    known,
    lookup,
    memory_bytes,
    of_device,
    variants,
    with_memory,
)

MIB = 1 << 20
RAW = json.loads(TABLE.read_text(encoding="utf-8"))
GPUS = [lookup(key) for key in known()]


@pytest.mark.parametrize("spelling", ["rtx-4090", "RTX 4090", "rtx4090", "RTX_4090", "NVIDIA GeForce RTX 4090"])
def test_lookup_ignores_case_spaces_and_vendor(spelling: str) -> None:
    assert lookup(spelling).key == "rtx-4090"


@pytest.mark.parametrize("spelling", ["sm89", "SM_89", "sm 89", "Ada Lovelace"])
def test_architecture_entry_has_no_sizes(spelling: str) -> None:
    gpu = lookup(spelling)
    assert gpu.is_architecture and gpu.sm == "sm89"
    assert gpu.total_memory_bytes is gpu.nvidia_smi_bytes is gpu.context_bytes is None


# Spellings of people and of torch.cuda.get_device_name, with the key they mean.
SPELLINGS = {
    "4090": "rtx-4090",
    "rtx 3060 12gb": "rtx-3060",
    "RTX 3090 (24 GB)": "rtx-3090",
    "a100 80gb": "a100-80gb",
    "v100 32 GiB": "v100-32gb",
    "Tesla T4": "t4",
    "A6000": "a6000",
    "4060 ti 16gb": "rtx-4060-ti-16gb",
    "RTX 4070 laptop": "rtx-4070-laptop",
    "NVIDIA GeForce RTX 3080 Laptop GPU": "rtx-3080-laptop",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_free_text_finds_the_card(spelling: str) -> None:
    assert lookup(spelling).key == SPELLINGS[spelling]


@pytest.mark.parametrize(("name", "meant"), [("rtx 4900", "rtx-4090"), ("sm88", "sm89"), ("h100 sxm5", "h100")])
def test_a_close_miss_is_asked_about(name: str, meant: str) -> None:
    with pytest.raises(DerivationError, match=rf"{name}.*did you mean {meant}\?"):
        lookup(name)


@pytest.mark.parametrize("name", ["MI300X", "Radeon RX 7900 XTX", "mps", "M3 Max", "xpu", "Intel Arc A770", "TPU v4"])
def test_other_vendors_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(DerivationError, match="NVIDIA cards: other vendors") as error:
        lookup(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


def test_a_capacity_that_the_card_has_not_is_another_card() -> None:
    card, other = lookup("rtx-3060"), lookup("rtx-3060 8GiB")
    assert with_memory("rtx-3060", "8GiB") == "rtx-3060 8GiB" and lookup(other.key) == other
    assert (other.nvidia_smi_bytes, other.estimated, card.estimated) == (8192 * MIB, True, False)
    # the RTX 3060 Ti's figures: torch 2.11 sees 7833 of 8192 MiB
    assert other.total_memory_bytes == 7833 * MIB
    assert (other.compute_capability, other.sm_count) == (card.compute_capability, card.sm_count)
    assert not lookup("sm89 16GiB").is_architecture
    for gpu, memory in ((None, "8GiB"), ("rtx-3060", "much")):
        with pytest.raises(DerivationError, match="memory"):
            with_memory(gpu, memory)
    assert derive(SD15, gpu="rtx-3060", memory="8GiB").options.gpu == "rtx-3060 8GiB"


def test_a_name_without_the_capacity_that_tells_which_card_says_which_is_taken() -> None:
    sized = {
        "V100": ("v100-16gb", "v100-32gb"),
        "a100": ("a100-80gb", "a100-40gb"),
        "RTX 3080": ("rtx-3080", "rtx-3080-12gb"),
    }
    for name, keys in {**sized, "4060 ti": ("rtx-4060-ti", "rtx-4060-ti-16gb")}.items():
        assert tuple(card.key for card in variants(name)) == keys and lookup(name).key == keys[0]
    assert not any(variants(name) for name in ("t4", "a100 40gb", "rtx-3080-12gb", "3080 8GiB", "h100", "sm86", "no"))
    with pytest.warns(SeveralCards) as told:
        derive(SD15, gpu="A100")
    said = "gpu = 'A100' is taken as a100-80gb, 79.25 GiB; there is a100-40gb, 39.59 GiB"
    assert [str(warning.message) for warning in told] == [said]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derive(SD15, gpu="3080", memory="12GiB")


def test_a_live_card_is_told_apart_by_its_memory() -> None:
    # torch's name of both is the same
    names = {total: of_device("NVIDIA GeForce RTX 3080", total * MIB) for total in (10240, 12288 - 200)}
    assert names == {10240: "rtx-3080 10GB", 12088: "rtx-3080-12gb 12GB"}
    assert [lookup(name).key for name in names.values()] == ["rtx-3080", "rtx-3080-12gb"]
    assert of_device("NVIDIA GeForce RTX 3060", 1) == "rtx-3060"


def test_a_bare_number_beyond_any_card_is_refused() -> None:
    assert memory_bytes("140") == 140 << 30 and memory_bytes("12288GiB") == 12288 << 30
    for text in ("141", "8192", "12288.5"):
        with pytest.raises(DerivationError, match=rf"memory = '{text}' .*did you mean {text}MiB or {text}GiB\?"):
            memory_bytes(text)


def test_a_card_that_the_table_lacks_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"name": "RTX 4070 Mini", "compute_capability": [8, 9], "nvidia_smi_bytes": 8188 * MIB}))
    card = lookup(str(path))
    assert (card.name, card.architecture, card.sm, card.total_memory_bytes) == (
        "RTX 4070 Mini", "Ada Lovelace", "sm89", lookup("rtx-4060-laptop").total_memory_bytes
    )  # fmt: skip
    path.write_text(json.dumps({"compute_capability": [9, 0], "total_memory_bytes": 1 << 36, "context_bytes": 1 << 29}))
    own = lookup(str(path)).nearest_context()
    assert own is not None and own[0] == 1 << 29 and not lookup(str(path)).estimated
    for text, said in BAD_FILES.items():
        path.write_text(text)
        with pytest.raises(DerivationError, match=said) as error:
            lookup(str(path))
        assert "\n" not in str(error.value)


BAD_FILES = {
    "[]": "object with name",
    "no": "cannot be read",
    '{"compute_capability": [1, 2], "nvidia_smi_bytes": 1}': r"compute_capability = \[1, 2\].*\[8, 9\]",
    '{"compute_capability": [8, 9]}': "nvidia_smi_bytes",
    '{"compute_capability": [8, 9], "total_memory_bytes": "12GiB"}': "total_memory_bytes",
    '{"compute_capability": [8, 9], "vram": 1}': "vram",
}


def test_an_estimated_total_follows_the_nearest_card_that_was_read() -> None:
    # Ada cards of 8188 MiB: torch sees 7806 MiB on the RTX 4060 and 4070 laptop cards
    assert lookup("rtx-4060").total_memory_bytes == 7806 * MIB and lookup("rtx-4060").estimated
    assert "RTX 4060 Laptop GPU" in lookup("rtx-4060").sources["total_memory_bytes"]
    assert lookup("gtx-1660-super").total_memory_bytes == 5918 * MIB


@pytest.mark.parametrize("name", ["gtx 42", ""])
def test_unknown_lists_the_known_in_one_line(name: str) -> None:
    with pytest.raises(DerivationError) as error:
        lookup(name)
    assert "\n" not in str(error.value)
    assert all(key in str(error.value) for key in ("t4", "rtx-5090", "sm120"))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.key)
def test_every_figure_has_a_source_and_sizes_are_plausible(gpu: Gpu) -> None:
    figures = ("compute_capability", "sm_count", "total_memory_bytes", "nvidia_smi_bytes", "context_bytes")
    for name in figures:
        assert (getattr(gpu, name) is None) == (name not in gpu.sources)
    if gpu.total_memory_bytes is not None and gpu.nvidia_smi_bytes is not None:
        # The driver keeps some memory back: torch never sees more than nvidia-smi's total.
        # 326 MiB of a 4 GiB card.
        assert 0.92 * gpu.nvidia_smi_bytes < gpu.total_memory_bytes <= gpu.nvidia_smi_bytes


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.key)
def test_context_is_its_own_or_a_named_neighbour(gpu: Gpu) -> None:
    assert (gpu.context_bytes is None) == (gpu.context_nearest is not None)
    nearest = gpu.nearest_context()
    assert nearest is not None
    assert nearest[0] == nearest[1].context_bytes


def test_every_card_has_its_architecture_entry() -> None:
    assert {lookup(key).sm for key in RAW["gpus"]} <= set(RAW["architectures"])


def test_t4() -> None:
    t4 = lookup("Tesla T4")
    # 15828320256 B / 2^30 = 14.74 GiB, torch; 15360 MiB, nvidia-smi
    assert (t4.total_memory_bytes, t4.nvidia_smi_bytes) == (15828320256, 15360 * MIB)
    # context: the median of 0.111, 0.112, 0.139 and 0.150 GiB, (0.112 + 0.139) / 2 = 0.1255 GiB = 128.5 MiB
    assert t4.context_bytes is not None
    assert abs(t4.context_bytes / 2**30 - (0.112 + 0.139) / 2) < 5e-5
    assert t4.compute_capability == (7, 5) and t4.sm_count == 40
