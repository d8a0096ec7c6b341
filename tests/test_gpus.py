"""The GPU table: look-up by any spelling, sources for every figure, errors that name what is known."""

import json

import pytest

from derivation.errors import DerivationError
from derivation.gpu.cards import TABLE, Gpu, known, lookup

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


@pytest.mark.parametrize("name", ["gtx 42", "", "sm88"])
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
        assert 0.94 * gpu.nvidia_smi_bytes < gpu.total_memory_bytes <= gpu.nvidia_smi_bytes


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
