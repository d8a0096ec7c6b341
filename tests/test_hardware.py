"""Layer 2 by hand: memory formats, convolution workspace, library buffers, SDPA's choice, public measurements."""

import json
import warnings
from collections.abc import Callable

import pytest
from conftest import SD15

from derivation import derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.replay import Replay
from derivation.allocator.simulate import replay
from derivation.config import load
from derivation.errors import DerivationError
from derivation.evidence import table as evidence
from derivation.evidence.bench import Bench
from derivation.gpu.cards import lookup
from derivation.gpu.profile import Hardware, NearestProfile, asked_of, hardware
from derivation.libraries import NearestVersion
from derivation.options import Options
from derivation.options.choices import ATTENTION, ATTENTION_ALIASES
from derivation.peak.headline import Grid
from derivation.peak.liveness import alive_at
from derivation.tape.evaluate import Evaluator
from derivation.tape.events import Allocation, Category
from derivation.tape.symbols import Size, evaluate, symbol
from derivation.tape.tape import Tape, tape
from derivation.tape.tensor import SymTensor
from derivation.trace.scratch import buffers
from derivation.verdict import ASKED, DOCUMENTED, MARGINS, MEASURED, NEAREST
from derivation.walk import ops
from derivation.walk.attention import scaled_dot_product_attention
from derivation.walk.models import decode, encode
from derivation.walk.ops import Conv2d, GroupNorm, LayerNorm, Linear, elementwise, empty, given

MIB = 1 << 20
CHECKPOINT = load(SD15)
WARM = "cublas workspace"
UPSAMPLER = "decoder.up_blocks.2.upsamplers.0.conv"
LAST_RESNET = "decoder.up_blocks.3.resnets.0.conv1"
BATCH = symbol("B")
# Rows that the profile does not explain, each with its reading in the evidence or the memory model.
RESIDUALS = {"t4-img2img-1800x1200"}


def gpu(name: str = "rtx-4090", **options: str) -> Hardware:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hardware(name, **options)


def values(batch: int, side: int = 512) -> dict[str, int]:
    return {"B": batch, "L": 77, **Grid(8, 4).sizes(side, side)}


def record(
    run: Callable[[], object], card: Hardware | None, at: dict[str, int], dtype: str = "float16", kept: str = ""
) -> Tape:
    ones = frozenset(name for name, value in at.items() if value == 1)
    recorded = Tape(Options(dtype=dtype, attention="sdpa"), card, hint=at, ones=ones, kept={kept: None})
    with recorded.running():
        outputs = run()
        del outputs
    return recorded


def decoder() -> object:
    here = tape()
    latents = given((here.size("B"), 4, here.size("h0"), here.size("w0")), here.options.dtype)
    return decode(elementwise("div", latents), CHECKPOINT.vae)


def encoder() -> object:
    here = tape()
    image = given((here.size("B"), 3, 8 * here.size("h0"), 8 * here.size("w0")), here.options.dtype)
    return encode(image, CHECKPOINT.vae)


def peak(recorded: Tape, at: dict[str, int]) -> tuple[int, str, dict[Category, int]]:
    """Peak bytes, the module there, and the bytes by category."""
    [(nbytes, event)] = Evaluator(recorded).peaks(at).values()
    alive = alive_at(recorded, event)
    by: dict[Category, int] = {}
    for a in alive:
        by[a.category] = by.get(a.category, 0) + evaluate(a.nbytes, at)
    return nbytes, alive[-1].path, by


@pytest.mark.parametrize(
    ("run", "dtype", "tensors", "scratch"),
    [
        # input kept by the caller 64, half-resolution resnet output 32, interpolated 128, output 128, latents 2/32
        (decoder, "float16", 64 + 32 + 128 + 128 + 2 / 32, 128 + 128 + 1.125),
        (decoder, "float32", 2 * (64 + 32 + 128 + 128 + 2 / 32), 256 + 2.25),
        (encoder, "float16", 4 * 64, 64 + 64 + 0.28125),
        (encoder, "float32", 4 * 128, 128 + 0.5625),
    ],
)
def test_rtx_4090_rows_are_tensors_and_scratch_to_the_byte(run, dtype, tensors, scratch):
    at = values(1)
    nbytes, _, by = peak(record(run, gpu(diffusers="0.35"), at, dtype, WARM), at)
    assert nbytes == int((tensors + scratch) * MIB)
    assert by[Category.SCRATCH] == int(scratch * MIB)


def test_the_allocator_keeps_an_unsplit_remainder_of_0_875_mib():
    bench = Bench(CHECKPOINT, Options(), gpu(diffusers="0.35"))
    bench.call(bench.scaled_decode, values(1))
    bench.allocator.empty_cache()
    before = bench.allocator.allocated_bytes.current
    delta = bench.call(bench.scaled_decode, values(1)).allocated_bytes.nbytes - before
    assert delta == int((352.0625 + 257.125 + 0.875) * MIB)


PLANE = 128 * 512 * 512 * 2


@pytest.mark.parametrize(("diffusers", "module"), [("0.21", LAST_RESNET), ("0.42", LAST_RESNET), ("0.35", UPSAMPLER)])
@pytest.mark.parametrize("batch", [2, 8, 16])
def test_open_muse_grows_by_8_planes_an_image(diffusers, module, batch):
    small, large = (
        peak(record(decoder, gpu(diffusers=diffusers), values(n), kept=WARM), values(n)) for n in (batch, batch + 1)
    )
    assert {small[1], large[1]} == {module}
    # two latents' worth beside the planes: latents / scaling_factor and the output of post_quant_conv
    assert large[0] - small[0] == (8 if module == LAST_RESNET else 9.5) * PLANE + 2 * 4 * 64 * 64 * 2


@pytest.mark.parametrize("diffusers", ["0.21", "0.33", "0.36", "0.37", "0.42"])
def test_one_image_is_row_major_in_every_version(diffusers):
    at = values(1)
    assert peak(record(decoder, gpu(diffusers=diffusers), at, kept=WARM), at)[:2] == (int(609.1875 * MIB), UPSAMPLER)


@pytest.mark.parametrize(("diffusers", "batch", "module"), [("0.35", 2, "silu"), ("0.42", 2, "native_group_norm")])
def test_tensors_alone_peak_at_384_mib_an_image(diffusers, batch, module):
    at = values(batch)
    recorded = record(decoder, gpu(diffusers=diffusers, scratch="none"), at, kept=WARM)
    [(nbytes, event)] = Evaluator(recorded).peaks(at).values()
    assert recorded.allocations[recorded.events[event] - 1].op == module
    statistics = nbytes - int(384.0625 * batch * MIB)
    assert 0 <= statistics < 8192 * batch


def channels_last_convolutions(monkeypatch, batch: int, diffusers: str) -> list[str]:
    found: list[str] = []
    original = ops.convolution

    def spy(x: SymTensor, weight: SymTensor, shape: tuple[int, ...]) -> SymTensor:
        if x.is_channels_last():
            found.append(".".join(tape().path))
        return original(x, weight, shape)

    monkeypatch.setattr(ops, "convolution", spy)
    record(decoder, gpu(diffusers=diffusers), values(batch))
    return found


BOTH = ["decoder.up_blocks.0.upsamplers.0.conv", "decoder.up_blocks.1.upsamplers.0.conv"]
LATER = ["decoder.up_blocks.2.resnets.0.conv_shortcut", UPSAMPLER, "decoder.up_blocks.3.resnets.0.conv_shortcut"]


@pytest.mark.parametrize(
    ("diffusers", "batch", "expected"),
    [
        ("0.32", 2, BOTH + LATER),
        ("0.33", 2, BOTH),
        ("0.36", 2, BOTH),
        ("0.37", 2, BOTH + LATER),
        ("0.32", 1, []),
        ("0.42", 1, []),
    ],
)
def test_convolutions_in_channels_last(monkeypatch, diffusers, batch, expected):
    assert channels_last_convolutions(monkeypatch, batch, diffusers) == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_formats_are_those_of_the_real_decoder(monkeypatch, batch):
    """CPU convolutions keep formats as CUDA's do; CPU group norm does not, so its input is made row-major."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    channels = (32, 32, 16, 8)
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels[::-1],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        layers_per_block=2,
    ).eval()
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[object, ...]) -> None:
            if torch._prims_common.suggest_memory_format(args[0]) == torch.channels_last:
                found.append(name)

        return hook

    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(watch(name))
        elif isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    with torch.no_grad():
        vae.decode(torch.zeros(batch, 4, 4, 4))
    derived = channels_last_convolutions(monkeypatch, batch, "0.42")
    assert [name for name in found if name.startswith("decoder")] == derived


def test_without_a_gpu_there_is_no_scratch():
    recorded = record(decoder, None, values(2))
    assert not [a for a in recorded.allocations if a.category is Category.SCRATCH]


@pytest.mark.parametrize(("scratch", "expected"), [("expected", 0), ("upper", 2 * 128 + 1.125 / 2), ("none", 0)])
def test_scratch_modes_on_a_channels_last_convolution(scratch, expected):
    def run() -> object:
        x = empty((2, 256, 256, 256), "float16", "input").permute(0, 3, 1, 2)
        return Conv2d("conv", x, 256, 3, padding=1)

    recorded = record(run, gpu(scratch=scratch), {})
    ops_seen = [a.op for a in recorded.allocations]
    assert "convolution weight" in ops_seen
    scratch_bytes = sum(a.nbytes for a in recorded.allocations if a.op == "convolution workspace")
    assert scratch_bytes == (0 if scratch != "upper" else 2 * 2 * 256**3 * 2 + 256 * 256 * 9 * 2)
    assert (expected > 0) == (scratch_bytes > 0)


def allocations(run: Callable[[], object], card: Hardware) -> list[tuple[str, int]]:
    return [(a.op, a.nbytes) for a in record(run, card, {}).allocations]


@pytest.mark.parametrize("scratch", ["expected", "none"])
def test_bfloat16_before_ampere_convolves_in_columns(scratch: str) -> None:
    """slow_conv2d: C R S P Q elements of one image, whatever the batch; nothing where the kernel is 1 x 1."""
    card = hardware("t4", scratch=scratch)

    def run() -> object:
        x = empty((2, 64, 32, 24), "bfloat16", "input")
        return Conv2d("one", x, 8, 1), Conv2d("three", x, 16, 3, stride=2, padding=1)

    found = [(a.op, a.nbytes) for a in record(run, card, {}).allocations if a.category is Category.SCRATCH]
    assert found == [("convolution columns", 64 * 9 * 16 * 12 * 2)]
    out = Allocation(("three",), "convolution", (2, 16, 16, 12), "bfloat16", 0, Category.ACTIVATION)
    inside = buffers(out, ((2, 64, 32, 24), (16, 64, 3, 3)), card).inside
    assert [(a.op, a.nbytes) for a in inside] == found
    assert buffers(out, ((2, 64, 16, 12), (16, 64, 1, 1)), card).inside == ()


def video(card: Hardware, dtype: str, out_channels: int, kernel: int) -> list[tuple[str, int]]:
    """What a convolution [1, 96, 4, 64, 48] -> [1, K, 2, 64, 48] allocates inside."""
    nbytes = out_channels * 2 * 64 * 48 * {"float32": 4}.get(dtype, 2)
    out = Allocation(("conv",), "convolution", (1, out_channels, 2, 64, 48), dtype, nbytes, Category.ACTIVATION)
    shapes = ((1, 96, 4, 64, 48), (out_channels, 96, *(kernel,) * 3))
    return [(a.op, a.nbytes) for a in buffers(out, shapes, card).inside]


def test_convolutions_of_videos() -> None:
    """cuDNN's rules are those of images; torch 2.9 unfolds half precision."""
    given, out, weight = 96 * 4 * 64 * 48, 32 * 2 * 64 * 48, 32 * 96 * 27
    half, single = 2 * (given + out + weight), 4 * (given + weight)
    for torch, dtype, expected in (
        ("2.8", "float16", ("convolution workspace", half)),
        ("2.9", "float16", ("convolution columns", 96 * 27 * 2 * 64 * 48 * 2)),
        ("2.10", "bfloat16", ("convolution workspace", half)),
        ("2.9", "float32", ("convolution workspace", single)),
    ):
        assert video(hardware("a100-80gb", torch=torch), dtype, 32, 3) == [expected]
    assert video(hardware("h200", torch="2.13"), "float16", 32, 3) == [("convolution workspace", half + 147)]
    assert video(hardware("h200", torch="2.13"), "float16", 32, 1) == [("convolution workspace", 0)]


@pytest.mark.parametrize(("batch", "planes"), [(1, 2), (2, 1), (BATCH, 2), (2 * BATCH, 1)])
def test_volta_transposes_the_output_of_one_image_alone(batch: Size, planes: int) -> None:
    """256 to 256 channels: a batch whose size is not known counts as one image, which asks for more."""

    def run() -> object:
        return Conv2d("conv", empty((batch, 256, 64, 64), "float16", "input"), 256, 3, padding=1)

    tape = record(run, hardware("v100"), {}, "float16")
    [nbytes] = [a.nbytes for a in tape.allocations if a.op == "convolution workspace"]
    rest = 256 * 256 * 9 * 2 + (16 if planes == 2 else 6 * 64 * 64 + 144)
    assert nbytes == batch * 256 * 64 * 64 * 2 * planes + rest


def test_norms_hold_a_row_major_copy_and_their_coefficients():
    image = 2 * 8 * 4 * 4 * 2

    def run() -> object:
        x = empty((2, 16, 8), "float16", "input").transpose(1, 2)
        return GroupNorm("norm", x, 4), LayerNorm("norm", x)

    found = allocations(run, gpu())
    assert found[1:] == [
        ("clone", image),
        ("native_group_norm", image),
        *[("native_group_norm", 2 * 4 * 2)] * 2,
        *[("native_group_norm", 2 * 8 * 4)] * 2,
        *[("native_layer_norm", image)] * 2,
        *[("native_layer_norm", 2 * 8 * 4)] * 2,
    ]


def test_a_biased_linear_folds_a_transposed_input_and_adds_in_place():
    """The weight requires grad, so ATen folds: LinearAlgebra.cpp should_fold."""

    def run() -> object:
        return Linear("to_q", empty((2, 16, 8), "float16", "input").transpose(1, 2), 32)

    assert [op for op, _ in allocations(run, gpu())] == ["input", "clone", "mm", "cublas workspace"]


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.8", ["addmm", "cublas workspace", "cublaslt workspace", "addmm", "cublaslt workspace"]),
        ("2.9", ["addmm", "cublas workspace", "cublaslt workspace", "addmm"]),
        ("2.13", ["addmm", "cublas workspace", "addmm"]),
    ],
)
def test_workspaces_of_matrix_products(torch, expected):
    def run() -> object:
        x = given((1, 16, 8), "float16")
        return [Linear("fc", x, 8) for _ in range(2)]

    assert [op for op, _ in allocations(run, gpu(torch=torch))] == expected


@pytest.mark.parametrize(
    ("name", "torch", "mib"),
    [("t4", "2.8", 8.125), ("h100", "2.6", 32), ("sm120", "2.8", 8.125), ("sm120", "2.13", 32)],
)
def test_cublas_workspace(name, torch, mib):
    assert gpu(name, torch=torch).cublas_workspace_bytes() == mib * MIB


@pytest.mark.parametrize(
    ("name", "torch", "dtype", "head_dim", "expected"),
    [
        ("t4", "2.8", "float16", 40, "efficient_attention"),
        ("t4", "2.8", "bfloat16", 40, "_safe_softmax"),
        ("t4", "2.8", "float32", 42, "efficient_attention"),
        ("a100-40gb", "2.8", "float16", 160, "flash_attention"),
        ("a100-40gb", "2.8", "bfloat16", 512, "efficient_attention"),
        ("rtx-4090", "2.8", "float32", 64, "efficient_attention"),
        ("h100", "2.8", "float16", 64, "flash_attention"),
        ("h100", "2.9", "float16", 160, "cudnn_attention"),
        ("h100", "2.10", "float16", 64, "flash_attention"),
        ("h100", "2.11", "float16", 64, "cudnn_attention"),
        ("sm100", "2.6", "float16", 64, "_safe_softmax"),
        ("sm100", "2.11", "float16", 160, "flash_attention"),
        ("sm120", "2.11", "float16", 64, "flash_attention"),
    ],
)
def test_sdpa_choice(name, torch, dtype, head_dim, expected):
    def run() -> object:
        query, key, value = (given((1, 2, 8192, head_dim), dtype) for _ in range(3))
        return scaled_dot_product_attention(query, key, value)

    assert expected in [op for op, _ in allocations(run, gpu(name, torch=torch))]
    assert "cudnn" not in (*ATTENTION, *ATTENTION_ALIASES)


def test_split_kv_of_the_deepest_cross_resolution_on_an_a100():
    """memory_model.md section 4: n = 2 for the D = 160, L = 256 layers; 5.2 MB (6.3 MB newer)."""
    card = gpu("a100-40gb")
    assert card.num_splits(2 * 8, 256, 256, 160) == 2
    assert card.num_splits(2 * 8, 4096, 4096, 40) == 1

    def run() -> object:
        query, key, value = (given((2, 8, 256, 160), "float16") for _ in range(3))
        return scaled_dot_product_attention(query, key, value)

    split = [nbytes for op, nbytes in allocations(run, card) if op == "flash_attention split"]
    assert split == [2 * 2 * 8 * 256 * 4, 2 * 2 * 8 * 256 * 192 * 4]


def test_efficient_accumulates_in_float32_beyond_128():
    def run() -> object:
        query, key, value = (given((1, 1, 4096, 512), "float16") for _ in range(3))
        return scaled_dot_product_attention(query, key, value)

    assert allocations(run, gpu("t4")) == [("efficient_attention", 4 << 20), ("efficient_attention", 8 << 20)]


def test_math_peaks_at_9_bytes_a_score():
    """memory_model.md section 4: 9 Sc + 8 E + 8 Ek, with three small buffers."""
    tokens, head_dim = 4096, 64
    scores, elements = tokens * tokens, tokens * head_dim

    def run() -> object:
        query, key, value = (given((1, 1, tokens, head_dim), "bfloat16") for _ in range(3))
        return scaled_dot_product_attention(query, key, value)

    recorded = record(run, gpu("t4"), {}, "bfloat16", WARM)
    [(nbytes, _)] = Evaluator(recorded).peaks({}).values()
    assert 9 * scores <= nbytes - 8 * elements - 8 * elements <= 9 * scores + 4 * tokens


def test_unknown_hardware():
    with pytest.raises(DerivationError, match="gtx-480"):
        hardware("gtx-480")
    with pytest.raises(DerivationError, match="scratch"):
        hardware("t4", scratch="guess")
    with pytest.warns(NearestProfile, match="as measured on Turing"):
        hardware("p100")
    with pytest.warns(NearestVersion, match="torch 2.5"):
        hardware("t4", torch="2.1")
    with pytest.raises(DerivationError, match="no convolution workspace"):
        Hardware((6, 1)).convolution_workspace("float16", False)


def test_a_context_that_nobody_documented_is_that_of_the_nearest_card_and_says_so():
    derivation = derive(CHECKPOINT.name, gpu="t4", attention="sdpa")
    assert derivation.estimate(64, 64)["context_source"] == "Tesla T4"
    found = derive(CHECKPOINT.name, gpu="rtx-5090", attention="sdpa").estimate(64, 64)
    assert found["context_source"].startswith("nearest documented card: ")


def test_a_loop_replays_as_its_iterations_written_out():
    at = values(1, 64)
    bench = Bench(CHECKPOINT, Options(num_inference_steps=12), gpu())
    run = bench.pipeline()
    recorded = record(run, gpu(), at)
    rolled = replay(recorded, at)
    assert rolled.loops
    result = rolled.run()
    assert result.allocated_bytes.nbytes >= Evaluator(recorded).live_bytes(at).max()
    once = Replay(rolled.events, rolled.sizes).run(CachingAllocator())
    assert once.allocated_bytes.nbytes <= result.allocated_bytes.nbytes


@pytest.fixture(scope="module")
def comparisons() -> dict[str, evidence.Prediction]:
    return {c.measurement.id: c for c in evidence.measured_vs_predicted()}


@pytest.mark.parametrize("row", evidence.measurements(), ids=lambda row: row.id)
def test_measured_vs_predicted(comparisons, row):
    comparison = comparisons[row.id]
    if comparison.within is not None:
        assert comparison.within == (row.id not in RESIDUALS), f"{comparison.error:+.3%}"
    assert comparison.judged or abs(comparison.error) < 0.0001


def test_the_recorded_predictions_are_those_of_the_replays(comparisons, request):
    text = evidence.document(comparisons.values())
    if request.config.getoption("--update-formulas"):
        evidence.PREDICTIONS.write_text(text, encoding="utf-8")
    rewrite = "rewrite with: pytest tests/test_hardware.py --update-formulas"
    assert evidence.PREDICTIONS.read_text(encoding="utf-8") == text, rewrite
    assert {p.measurement.id: p for p in evidence.recorded()} == comparisons


def test_open_muse_vae_rows_to_the_allocator_block(comparisons):
    """8 planes an image from N = 2, 9.5 at N = 1: within 4 KiB of the published bytes."""
    for row in ("openmuse-vae-1", "openmuse-vae-2", "openmuse-vae-8"):
        comparison = comparisons[row]
        assert abs(comparison.predicted - comparison.measurement.value) <= 4096


def test_open_muse_unet_rows_grow_as_published(comparisons):
    small, large = comparisons["openmuse-unet-4"], comparisons["openmuse-unet-8"]
    published = large.measurement.value - small.measurement.value
    assert large.predicted - small.predicted == pytest.approx(published, abs=1 << 20)


def test_the_margin_of_a_documented_card_is_the_worst_public_row(comparisons):
    worst = max((c for c in comparisons.values() if c.judged), key=lambda c: c.measurement.value / c.predicted)
    margins = json.loads(MARGINS.read_text())
    asked = {ASKED.format(asked_of(lookup(name))) for name in ("v100", "rtx-5090")}
    assert {DOCUMENTED, NEAREST, *asked} == {key for key in margins if key not in ("note", MEASURED)}
    for trusted in (DOCUMENTED, NEAREST, *asked):
        found = margins[trusted]["measured_bytes"], margins[trusted]["predicted_bytes"]
        assert found == (int(worst.measurement.value), worst.predicted)
