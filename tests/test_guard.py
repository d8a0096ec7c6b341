"""will_fit on pipelines that only look like diffusers' own: config dicts, dtypes, devices, processors."""

from __future__ import annotations

import gc
import json
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SD15

from derivation import DerivationError, derive
from derivation.config.checkpoint import BUNDLED
from derivation.guard import _KNOWN, cuda_free_bytes, will_fit

FOLDER = BUNDLED / SD15


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


class Device:
    def __init__(self, kind: str) -> None:
        self.type = kind


class FakeParameter:
    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = f"torch.{dtype}", Device(device)


class AttnProcessor: ...


class AttnProcessor2_0: ...


class SlicedAttnProcessor: ...


class FakeModel:
    def __init__(self, name: str, dtype: str, device: str, processor: object = None, folder: Path = FOLDER) -> None:
        raw = json.loads((folder / name / "config.json").read_text())
        self.config = raw if processor else SimpleNamespace(to_dict=lambda: raw)
        self.weight = FakeParameter(dtype, device)
        self.attention = SimpleNamespace(processor=processor) if processor else None

    def named_parameters(self) -> Iterator[tuple[str, FakeParameter]]:
        yield "weight", self.weight

    def modules(self) -> Iterator[object]:
        yield from (self, self.attention) if self.attention else (self,)

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {"mid.attn.processor": self.attention.processor} if self.attention else {}


class CLIPTextModel(FakeModel): ...


class AutoencoderKL(FakeModel): ...


class UNet2DConditionModel(FakeModel): ...


class StableDiffusionSafetyChecker(FakeModel): ...


class PNDMScheduler:
    def __init__(self) -> None:
        self.config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())


class StableDiffusionImg2ImgPipeline:
    def __init__(self, dtype: str = "float16", device: str = "cpu", processor: type = AttnProcessor2_0) -> None:
        self.config = {"requires_safety_checker": True}
        self.text_encoder = CLIPTextModel("text_encoder", dtype, device)
        self.vae = AutoencoderKL("vae", dtype, device, processor())
        self.unet = UNet2DConditionModel("unet", dtype, device, processor())
        self.safety_checker: Any = StableDiffusionSafetyChecker("safety_checker", dtype, device)
        self.scheduler = PNDMScheduler()


class StableDiffusionPipeline(StableDiffusionImg2ImgPipeline): ...


def expected(height: int, width: int, batch_size: int = 1, **options: Any) -> int:
    found = derive(SD15, **{"pipeline": "img2img", "attention": "efficient", **options})
    return int(found.estimate(height, width, batch_size)["peak_tensor_bytes"])


def test_a_pipeline_on_the_cpu_needs_its_weights_too() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    needed = expected(512, 768)
    assert will_fit(pipe, 512, 768, free_bytes=needed).fits
    assert not will_fit(pipe, 512, 768, free_bytes=needed).sure
    verdict = will_fit(pipe, 512, 768, free_bytes=needed - 1)
    assert (verdict.fits, verdict.needed_bytes, verdict.free_bytes) == (False, needed, needed - 1)


def test_weights_on_the_gpu_are_not_counted_twice() -> None:
    weights = derive(SD15, pipeline="img2img").weights
    on_gpu = StableDiffusionImg2ImgPipeline(device="cuda")
    assert will_fit(on_gpu, 512, 512, free_bytes=0).needed_bytes == expected(512, 512) - sum(weights.values())
    on_gpu.unet.weight.device = Device("cpu")
    assert will_fit(on_gpu, 512, 512, free_bytes=0).needed_bytes == expected(512, 512) - (
        sum(weights.values()) - weights["unet"]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("processor", "attention"), [(AttnProcessor, "eager"), (AttnProcessor2_0, "efficient")])
def test_dtype_and_attention_are_read_from_the_pipeline(dtype: str, processor: type, attention: str) -> None:
    pipe = StableDiffusionPipeline(dtype=dtype, processor=processor)
    verdict = will_fit(pipe, 512, 512, batch_size=2, free_bytes=0)
    assert verdict.needed_bytes == expected(512, 512, 2, pipeline="txt2img", dtype=dtype, attention=attention)


def test_a_change_of_the_pipeline_is_seen() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    assert will_fit(pipe, 512, 512, free_bytes=0).needed_bytes == expected(512, 512)
    pipe.safety_checker = None
    assert will_fit(pipe, 512, 512, free_bytes=0).needed_bytes == expected(512, 512, safety_checker=False)
    for model in (pipe.text_encoder, pipe.vae, pipe.unet):
        model.weight = FakeParameter("float32", "cpu")
    smaller = expected(512, 512, safety_checker=False, dtype="float32")
    assert will_fit(pipe, 512, 512, free_bytes=0).needed_bytes == smaller
    for model in (pipe.vae, pipe.unet):
        assert model.attention is not None
        model.attention.processor = AttnProcessor()
    eager = expected(512, 512, safety_checker=False, dtype="float32", attention="eager")
    assert will_fit(pipe, 512, 512, free_bytes=0).needed_bytes == eager


def test_options_that_no_pipeline_object_knows() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    verdict = will_fit(pipe, 512, 512, free_bytes=0, num_images_per_prompt=3, num_inference_steps=20)
    assert verdict.needed_bytes == expected(512, 512, num_images_per_prompt=3, num_inference_steps=20)


def test_generated_code_gives_the_same_answer() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    plain = will_fit(pipe, 520, 392, batch_size=3, free_bytes=0)
    assert will_fit(pipe, 520, 392, batch_size=3, free_bytes=0, compiled=True) == plain


def test_advice_says_what_to_switch_on() -> None:
    pipe = StableDiffusionImg2ImgPipeline(dtype="float32", processor=AttnProcessor)
    assert will_fit(pipe, 512, 512, free_bytes=64 << 30).advice == ()
    advice = will_fit(pipe, 768, 768, free_bytes=8 << 30).advice
    assert any("fused attention" in line for line in advice)
    hopeless = will_fit(pipe, 4096, 4096, free_bytes=3 << 30).advice
    assert "largest image" in hopeless[-1]


def test_what_is_not_supported_is_one_line() -> None:
    with pytest.raises(DerivationError, match="SlicedAttnProcessor"):
        will_fit(StableDiffusionImg2ImgPipeline(processor=SlicedAttnProcessor), 512, 512, free_bytes=1)
    mixed = StableDiffusionImg2ImgPipeline()
    mixed.vae.weight.dtype = "torch.float32"
    with pytest.raises(DerivationError, match="dtype"):
        will_fit(mixed, 512, 512, free_bytes=1)
    with pytest.raises(DerivationError, match="height = 0"):
        will_fit(StableDiffusionImg2ImgPipeline(), 0, 512, free_bytes=1)
    with pytest.raises(DerivationError, match="height = 516"):
        will_fit(StableDiffusionPipeline(), 516, 512, free_bytes=1)
    with pytest.raises(DerivationError, match="magic"):
        will_fit(StableDiffusionPipeline(), 512, 512, free_bytes=1, magic=True)


def test_without_cuda_the_free_bytes_are_needed() -> None:
    with pytest.raises(DerivationError, match="free_bytes"):
        will_fit(StableDiffusionImg2ImgPipeline(), 512, 512)


def test_the_arguments_of_the_pipelines_own_call() -> None:
    pipe = StableDiffusionImg2ImgPipeline()
    image = SimpleNamespace(size=(768, 512))
    asked = {"prompt": ["a", "b"], "image": image, "generator": object(), "output_type": "pil", "free_bytes": 0}
    assert will_fit(pipe, **asked).needed_bytes == expected(512, 768, 2)
    alone = derive(SD15, pipeline="img2img").estimate(512, 768, guidance=False)["peak_tensor_bytes"]
    assert will_fit(pipe, prompt="a", image=[image], guidance_scale=1.0, free_bytes=0).needed_bytes == alone
    array = SimpleNamespace(shape=(1, 3, 256, 320))
    assert will_fit(pipe, image=array, strength=0.4, negative_prompt="x", free_bytes=0).needed_bytes == expected(
        256, 320, strength=0.4, negative_prompt=True
    )
    assert will_fit(pipe, prompt="a", free_bytes=0).needed_bytes == expected(512, 512)


def test_a_card_that_is_named_is_asked_about_whole() -> None:
    pipe, card = StableDiffusionImg2ImgPipeline(device="cuda"), derive(SD15, pipeline="img2img", gpu="rtx-3060")
    found = will_fit(pipe, 1024, 1024, batch_size=2, gpu="rtx-3060")
    assert found.verdict == card.verdict(1024, 1024, 2) and (found.free_bytes, found.resident_bytes) == (None, 0)
    # weights that are on the card already are counted once: in what is needed of what is free beside them
    beside = will_fit(pipe, 1024, 1024, gpu="rtx-3060", free_bytes=1 << 30)
    weights = sum(card.weights.values())
    assert beside.verdict == card.verdict(1024, 1024, free_bytes=(1 << 30) + weights)
    assert beside.resident_bytes == weights and not beside.fits and "VAE tiling" in " ".join(beside.advice)


class FakeCuda(SimpleNamespace):
    """torch as will_fit reads it: the card, its free memory, and what the process holds."""

    def __init__(self, name: str, free: int, reserved: int = 0, allocated: int = 0) -> None:
        card = SimpleNamespace(name=name, major=8, minor=6, total_memory=12 << 30)
        cuda = SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_properties=lambda device: card,
            get_device_capability=lambda: (8, 6),
            mem_get_info=lambda: (free, 12 << 30),
            memory_reserved=lambda: reserved,
            memory_allocated=lambda: allocated,
        )
        super().__init__(cuda=cuda, __version__="2.9.1+cu126")


def test_the_card_torch_and_what_is_held_are_read_off_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StableDiffusionImg2ImgPipeline(device="cuda")
    weights = sum(derive(SD15, pipeline="img2img").weights.values())
    held, cached = 100 << 20, 300 << 20
    fake = FakeCuda("NVIDIA GeForce RTX 3060", 6 << 30, weights + held + cached, weights + held)
    monkeypatch.setitem(sys.modules, "torch", fake)
    found = will_fit(pipe, 1024, 1024)
    d = derive(SD15, pipeline="img2img", gpu="rtx-3060", torch="2.9.1+cu126", attention="sdpa")
    assert found.free_bytes == (6 << 30) + cached
    assert found.verdict == d.verdict(1024, 1024, free_bytes=(6 << 30) + cached + weights)
    assert found.needed_bytes == d.device_memory(1024, 1024).reserved - weights
    assert found.assumed == () and found.margin_bytes == found.verdict.margin_bytes
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setitem(sys.modules, "torch", FakeCuda("NVIDIA Card That Nobody Knows", 1 << 30))
    other = will_fit(pipe, 1024, 1024)
    assert not other.fits and other.verdict.short_bytes > 0
    assert other.assumed == (
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is not replayed",
        "NVIDIA Card That Nobody Knows is not in the table: as any card of sm86",
    )


def test_what_goes_wrong_inside_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for pipe in (SimpleNamespace(unet=5), SimpleNamespace(vae=None, unet=None)):
        with pytest.raises(DerivationError) as caught:
            will_fit(pipe, 512, 512, free_bytes=1)
        assert "\n" not in str(caught.value)


def test_free_bytes_count_what_pytorch_has_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda: (5_000, 9_000),
        memory_reserved=lambda: 2_000,
        memory_allocated=lambda: 1_500,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert cuda_free_bytes() == 5_500


def test_later_calls_take_microseconds_and_a_dead_pipeline_is_forgotten() -> None:
    pipe = StableDiffusionImg2ImgPipeline(device="cuda")
    will_fit(pipe, 512, 512, free_bytes=1 << 33)
    best = min(_seconds(pipe) for _ in range(5))
    assert best < 200e-6, f"{best * 1e6:.0f} microseconds"
    reference = weakref.ref(pipe)
    gc.collect()
    before = len(_KNOWN)
    del pipe
    gc.collect()
    assert reference() is None
    assert len(_KNOWN) == before - 1


def _seconds(pipe: object) -> float:
    start = time.perf_counter()
    for _ in range(100):
        will_fit(pipe, 512, 512, free_bytes=1 << 33)
    return (time.perf_counter() - start) / 100
