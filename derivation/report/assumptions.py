"""What the numbers assume: the answer in a sentence, the options in few words, what is counted and what is not."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.api import Derivation
from derivation.call import DEFAULT_PROMPT_LENGTH
from derivation.libraries import LIBRARIES
from derivation.options import Options
from derivation.report.answer import LOAD, SIZES, Answer, model_of
from derivation.report.text import human
from derivation.tape.recorded import RecordedSubject
from derivation.tape.symbols import DTYPE_BYTES
from derivation.walk.pipelines import Pipeline

PADDED = "diffusers pads every prompt to 77 tokens, so L = 77 unless embeddings of long prompts are passed in."
Fact = tuple[str, str]

# Options that a chip or a sentence of their own tells.
TOLD = ("pipeline", "dtype", "attention", "gpu", *LIBRARIES, "scratch", "safety_checker")
# diffusers/pipelines/pipeline_utils.py: enable_model_cpu_offload, enable_sequential_cpu_offload
PLACEMENTS = {
    None: "All models stay on the GPU from before the call to its end.",
    "model": "enable_model_cpu_offload: a model comes to the GPU whole when it is first called and leaves when the "
    "next one is called. The safety checker stays there.",
    "sequential": "enable_sequential_cpu_offload: the parameters of each innermost module are on the GPU only while "
    "its forward() runs. Buffers and the safety checker stay there.",
}


def counted(options: Options) -> str:
    """Return what the bytes are bytes of."""
    return "tensors" if options.gpu is None else "tensors and GPU libraries' scratch"


def summary(d: Derivation, found: Answer) -> str:
    """Return the answer in one sentence."""
    first, last = found.totals[0], found.totals[-1]
    if first == last:
        return f"A call with {d.prompt_length} tokens needs {human(first)} of {counted(d.options)} at every image size."
    return (
        f"One {SIZES[0]} × {SIZES[0]} image needs {human(first)} of {counted(d.options)}, of which "
        f"{human(found.weights_bytes)} are weights{'' if d.options.offload is None else ' that stay on the GPU'}; "
        f"{SIZES[-1]} × {SIZES[-1]} needs {human(last)}."
    )


def chips(d: Derivation) -> tuple[str, ...]:
    """Return the options in few words each: what every reader asks, then what differs from the defaults."""
    options = d.options
    checker = "with safety checker" if "safety_checker" in d.calls else "no safety checker"
    return (
        *((options.pipeline, checker) if d.subject.whole else ("component alone",)),
        options.dtype,
        f"{options.attention} attention",
        *changed(options),
        "tensors only, no particular GPU" if options.gpu is None else f"scratch of {options.gpu}",
    )


def changed(options: Options) -> tuple[str, ...]:
    """Return the options that differ from their defaults and have no chip of their own.

    >>> changed(Options(offload="model", vae_slicing=True, gpu="t4"))
    ('vae slicing', 'offload model')
    """
    own = {name: value for name, value in options.as_dict().items() if name not in TOLD and options.chosen(name)}
    return tuple(name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in own.items())


def assumptions(d: Derivation) -> list[Fact]:
    """Return what the numbers include and leave out, as (short name, sentence)."""
    o = d.options
    grid = (
        f"The printed polynomials hold for sides that are multiples of {d.grid.unit} pixels and leave the 512-byte "
        "rounding out; the generated functions and every number of bytes include it and hold for every size."
    )
    return [
        *_counted(o),
        ("Inference only", "No gradients, no optimizer state: the pipeline runs under torch.no_grad()."),
        *([("Where the models are", PLACEMENTS[o.offload])] if d.subject.whole else []),
        ("Options", f"{_listed(o)} No torch.compile."),
        ("Precision", _precision(d)),
        ("Attention", f"Attention runs on the {o.attention!r} backend, with PyTorch's own fallbacks."),
        *([("Prompt length", PADDED)] if d.prompt_length == DEFAULT_PROMPT_LENGTH else []),
        ("Image sides", grid),
        ("Run", _run(d)),
    ]


def _precision(d: Derivation) -> str:
    o = d.options
    loaded = [a for a in d.program().generic.tape.allocations if a.op == LOAD and a.dtype != o.dtype]
    other = sorted({f"{model_of(a.path)} is {a.dtype} while it runs" for a in loaded if a.dtype == "float32"})
    if (vae := o.dtype_of("vae")) != o.dtype:
        other.append(f"the VAE is {vae} until the first image is encoded")
    sentence = f"Weights and activations are {o.dtype} ({DTYPE_BYTES[o.dtype]} bytes an element)"
    return f"{sentence}{', but ' + ', '.join(other) if other else ''}."


def _listed(options: Options) -> str:
    if found := changed(options):
        return f"Beyond diffusers' defaults: {', '.join(found)}."
    return "diffusers' defaults: no VAE slicing or tiling, no attention slicing, no LoRA, ControlNet or IP-Adapter."


def _counted(options: Options) -> list[Fact]:
    tensors = (
        "Bytes of tensors that PyTorch allocates: weights and buffers, activations, and what the pipeline keeps "
        "between stages, each in blocks of 512 bytes as the CUDA caching allocator rounds them."
    )
    left = "blocks that the caching allocator reserves but does not use, the CUDA context, and other programs"
    if options.gpu is None:
        scratch = f"Scratch memory of cuDNN and cuBLAS, {left}: derived for no particular GPU, tensors only."
        return [("Counted", tensors), ("Not counted", scratch)]
    gpu = f"Scratch memory of the GPU libraries (cuDNN, cuBLAS, attention kernels) as on {options.gpu}."
    return [("Counted", tensors), ("Counted too", gpu), ("Not counted", f"{left[0].upper()}{left[1:]}.")]


def _run(d: Derivation) -> str:
    o = d.options
    if isinstance(d.subject, RecordedSubject):
        return f"One call with guidance as the pipeline has it: {'; '.join(d.subject.remarks)}."
    if not d.subject.whole:
        return "Each call of the component by itself, on inputs that exist before it; under guidance 2B rows."
    strength = "" if o.pipeline == "txt2img" else f", strength {Pipeline(d.checkpoint, o, True).strength}"
    images = f"{o.num_images_per_prompt} image{'s' * (o.num_images_per_prompt > 1)} per prompt"
    return (
        f"{o.pipeline}, {o.num_inference_steps} steps{strength}, {images}, classifier-free guidance on unless stated "
        "otherwise."
    )
