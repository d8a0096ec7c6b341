"""The command line: the contract of ``estimate``, tables, one-line errors, and arguments at random."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import SD15, SDXL

from derivation import derive
from derivation.cli import PANELS, output, run
from derivation.config import load
from derivation.config.checkpoint import BUNDLED
from derivation.measure.validate import measured_calls

# a component alone is exported in no time
VAE = str(BUNDLED / SD15 / "vae" / "config.json")
CONTRACT = (
    f"estimate {SD15} --pipeline img2img --height 512 --width 768 --batch-size 1 --prompt-length 77 "
    "--guidance-scale 5.0 --dtype float16 --attention efficient --json"
)


def command(text: str | Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = text.split() if isinstance(text, str) else list(text)
    return subprocess.run(
        [sys.executable, "-m", "derivation", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def failing(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run in this process; return the one line on stderr of a request that cannot be answered."""
    code = run(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    line = captured.err.removesuffix("\n")
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_estimate_prints_one_json_object_that_is_the_derivations_estimate() -> None:
    done = command(CONTRACT)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"weights_bytes", "components_bytes", "stages_bytes", "peak_stage", "witness"} <= found.keys()
    assert found["figure"] == "peak_tensor_bytes"
    derivation = derive(SD15, pipeline="img2img", dtype="float16", attention="efficient")
    assert derivation.options.as_dict().items() <= found.items()
    expected = derivation.estimate(height=512, width=768, batch_size=1, prompt_length=77, guidance=True)
    assert found.pop("guidance_scale") == 5.0
    assert found == json.loads(json.dumps(expected))


def test_estimate_is_quick_and_never_imports_torch() -> None:
    probe = (
        "import sys, derivation.cli as cli; code = cli.run(sys.argv[1:]); "
        "sys.exit(code or 3 * bool({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", probe, *CONTRACT.split()], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    # seconds of CPU, which other processes do not stretch much; 1.2 on the build machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


@pytest.mark.parametrize(("scale", "guidance"), [("1.0", False), ("0", False), ("1.01", True), ("7.5", True)])
def test_guidance_is_on_above_one(scale: str, guidance: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", SD15, "--guidance-scale", scale, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guidance"] is guidance


def test_table_names_models_stages_units_and_exact_bytes() -> None:
    done = command(CONTRACT.removesuffix(" --json"))
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    peak = json.loads(command(CONTRACT).stdout)["peak_tensor_bytes"]
    for text in ("safety_checker", "vae_decode", "<- peak", "GiB", "MiB", f"{peak:,} bytes", "vae.decoder.up_blocks"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 200


def test_no_color_and_ascii_streams(capsys: pytest.CaptureFixture[str]) -> None:
    done = command(f"estimate {SD15}", NO_COLOR="1", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0
    assert done.stdout.isascii()


VERBS = {command.__name__: (panel, command) for panel, commands in PANELS.items() for command in commands}


@pytest.mark.parametrize("name", VERBS)
def test_the_one_example_of_every_verb_works_as_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "verify":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("derivation.measure.runner.PROBE", ("false",))
    monkeypatch.setattr("derivation.report.build", lambda models, folder, *_, **__: [folder / models[0]])
    monkeypatch.setattr("derivation.measure.validate.measured_calls", lambda _: measured_calls()[:3])
    # the VAE of the same checkpoint, against the real module
    monkeypatch.setattr(
        "derivation.cli.derived.load", lambda model, revision=None: load(VAE if model == "sd15" else model)
    )
    [example] = re.findall(r"Example: derivation (.*)", VERBS[name][1].__doc__ or "")
    assert example.split()[0] == name
    code, printed = run(example.split()), capsys.readouterr()
    if name == "measure":  # all that it lacks is a GPU
        assert (code, printed.err.startswith("error: measure needs")) == (2, True)
    else:
        assert (code, "error: " in printed.err, bool(printed.out)) == (0, False, True)


def test_help_is_in_panels_and_whole_at_100_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run([]) == 0
    printed = capsys.readouterr().out
    for name, (panel, command) in VERBS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        assert f"{panel}:" in printed and f"  {name}".ljust(13) + summary in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert run(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    places = ("The call:", "--size", "The pipeline:", "--dtype", "The machine:", "--gpu")
    assert sorted(places, key=printed.index) == list(places)


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("estimate sd15 --size 512x768", f"estimate {SD15} --height 512 --width 768"),
        ("estimate sd-1.5 --size 640", "estimate stable-diffusion-v1-5 --height 640 --width 640"),
        ("estimate sd2.1", "estimate stabilityai/stable-diffusion-2-1"),
        ("estimate sdxl --pipeline txt2img", "estimate stabilityai/stable-diffusion-xl-base-1.0 --pipeline txt2img"),
        ("estimate refiner", "estimate stabilityai/stable-diffusion-xl-refiner-1.0 --size 1024"),
        ("estimate sd2.1 --width 512", "estimate stabilityai/stable-diffusion-2-1 --size 768x512"),
        ("estimate sd15 --dtype bf16", f"estimate {SD15} --dtype bfloat16"),
        ("estimate sd15 --dtype FP16 --attention SDPA", f"estimate {SD15} --dtype float16 --attention sdpa"),
        ("estimate sd15 --scheduler ddimscheduler", f"estimate {SD15} --scheduler DDIMScheduler"),
        ("fit sd15 --memory 8", f"fit {SD15} --memory 8GiB"),
        ("fit sd15 --memory 8G --size 512", f"fit {SD15} --vram 8192MiB --height 512 --width 512"),
        (f"export {VAE} --to js", f"export {VAE} --to javascript"),
    ],
)
def test_what_people_type_means_what_is_written_out(
    typed: str, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for text in (typed, written):
        assert run([*text.split(), *["--json"] * (not text.startswith("export"))]) == 0
        printed = capsys.readouterr().out
        answers.append(printed if text.startswith("export") else {**json.loads(printed), "counted": ""})
    assert answers[0] == answers[1]


def test_a_bare_number_of_memory_is_said_to_be_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "sd15", "--memory", "12", "--size", "512"]) == 0
    assert "memory 12 is 12.00 GiB (12,884,901,888 bytes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("estimte sd15", "estimate"),
        ("estimate sd15 --heigth 512", "--height"),
        ("estimate sd15 --attention flahs", "flash"),
        ("estimate sd15 --dtype floatt16", "float16"),
        ("export sd15 --to pyton", "python"),
        ("estimate sd15 --scheduler DDIM", "ddimscheduler"),
        ("estimate sd15 --scheduler euler", "eulerancestraldiscretescheduler or eulerdiscretescheduler"),
        ("fit sd15 --memory 12288", "12288mib or 12288gib"),
        ("fit sd15 --vram 12288", "12288mib or 12288gib"),
        ("estimate sd15 --gpu t4 --memory 15360", "15360mib or 15360gib"),
        ("estimate sd15 512x768", "--size 512x768"),
        ("estimate stable-difusion-v1-5", "stable-diffusion-v1-5"),
        ("estimate sd3.5", "stabilityai/stable-diffusion-3.5-large or stabilityai/stable-diffusion-3.5-medium"),
    ],
)
def test_an_unknown_word_is_answered_with_the_one_that_was_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failing(typed.split(), capsys)
    assert meant in line.lower().partition("did you mean")[2]


def test_models_lists_every_bundled_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 0
    assert SD15 in json.loads(capsys.readouterr().out)


def test_fit_recommend_and_compare_print_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    requests = {
        ("fit", SD15, "--vram", "8GiB", "--aspect", "16:9"): ("image", "aligned", "budget_bytes"),
        ("fit", SD15, "--gpu", "t4", "--num-inference-steps", "5"): ("image", "aligned", "sure"),
        ("fit", SD15, "--vram", "8GiB", "--height", "512", "--width", "512"): ("largest_batch",),
        ("recommend", SD15, "--vram", "4GiB", "--attention", "eager", "--height", "768"): ("steps", "fits"),
        ("compare", SD15, "--with", "attention=eager", "--size", "512x768"): (
            "weights_bytes",
            "stages",
            "numbers_bytes",
        ),
    }
    for arguments, keys in requests.items():
        assert run([*arguments, "--json"]) == 0
        assert set(keys) <= json.loads(capsys.readouterr().out).keys()
        assert run(list(arguments)) == 0
        assert len(capsys.readouterr().out.splitlines()) > 3


BAD = {
    "--height 0": "height = 0",
    "--height -512": "height = -512",
    "--height 4": "height = 4",
    "--height 514 --pipeline txt2img": "height = 514",
    "--width 99999999": "width = 99999999",
    "--width 1e3": "width = '1e3'",
    f"--width {'9' * 5000}": "width = '99",
    f"--width {'9' * 4000}": "width = ",
    "--batch-size -1": "batch_size = -1",
    "--batch-size 0": "batch_size = 0",
    f"--batch-size {10**40}": "batch_size = ",
    "--prompt-length 0": "prompt_length = 0",
    "--guidance-scale nan": "guidance_scale = nan",
    "--guidance-scale inf": "guidance_scale = inf",
    "--guidance-scale x": "guidance_scale = 'x' is not supported (supported: a valid number)",
    "--batch-size four": "batch_size = 'four' is not supported (supported: a valid integer)",
    "--strength nan": "strength = nan",
    "--strength 2": "strength = 2",
    "--num-inference-steps 0": "num_inference_steps = 0",
    "--num-images-per-prompt -3": "num_images_per_prompt = -3",
    "--attention fast": "attention = 'fast'",
    "--dtype int8": "dtype = 'int8'",
    "--pipeline img3img": "pipeline = 'img3img'",
    "--alloc-conf foo": "alloc_conf = 'foo' is not supported: ",
    "--gpu t4 --snapshot no/such/folder": "snapshot = 'no/such/folder' cannot be written (no/such is not a folder)",
    "--snapshot replay.pickle": "snapshot = 'replay.pickle' needs --gpu",
    "--no-such-option": "--no-such-option",
    "extra": "extra",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_bad_value_is_one_line_that_names_the_key_and_the_value(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert BAD[arguments] in failing(["estimate", SD15, *arguments.split()], capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("no-such-command", "no-such-command"),
        ("estimate", "model"),
        ("estimate no/such-model", "no/such-model"),
        (f"estimate {SD15} --gpu gtx-nothing", "gtx-nothing"),
        (f"fit {SD15}", "memory"),
        (f"fit {SD15} --vram 8B", "nothing"),
        (f"fit {SD15} --memory 8X", "8X"),
        (f"fit {SD15} --vram 8 --memory 12", "one of vram and memory"),
        (f"fit {SD15} --memory 8 --size 512 --height 512", "size"),
        (f"fit {SD15} --memory 8 --size 512y512", "512y512"),
        ("estimate xl", "several"),
        (f"fit {SD15} --vram -8GiB", "-8GiB"),
        (f"fit {SD15} --vram 1e400GiB", "1e400GiB"),
        (f"fit {SD15} --vram 8GiB --aspect 0:1", "0:1"),
        (f"fit {SD15} --vram 8GiB --aspect 16", "16"),
        (f"fit {SD15} --gpu sm89", "sm89"),
        (f"recommend {SD15} --gpu gtx-nothing", "gtx-nothing"),
        (f"compare {SD15} --with attention", "attention"),
        (f"compare {SD15} --with speed=3", "speed"),
        (f"compare {SD15} --with atention=eager", "did you mean attention?"),
        (f"export {SD15} --to tx", "did you mean tex?"),
        (f"compare {SD15} --with safety_checker=maybe", "maybe"),
        (f"export {SD15} --to cobol", "to = 'cobol'"),
        (f"fit {SD15} --vram 8X", "vram = '8X'"),
        (
            f"fit {SD15} --gpu rtx-3060 --vram 24GiB",
            "vram = '24GiB' is not supported (supported: up to 11.66 GiB on rtx-3060)",
        ),
        ("calibrate /no/such/file.json", "/no/such/file.json"),
        ("calibrate /dev/zero", "/dev/zero"),
        (f"measure {SD15} --output x.json --grid 0x0", "0x0"),
        (f"measure {SD15} --output x.json --batch-sizes 1,,2", "1,,2"),
    ],
)
def test_a_bad_request_is_one_line(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    if named == "nothing":
        assert run(arguments.split()) == 1
        assert "nothing fits" in capsys.readouterr().out
    else:
        assert named in failing(arguments.split(), capsys)


def corrupted(folder: Path, name: str, content: bytes) -> str:
    source = BUNDLED / SD15
    for path in source.rglob("*.json"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if str(path.relative_to(source)) == name else path.read_bytes())
    return str(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"block_out_channels": [320, "<script>alert(1)</script>\\u001b[31m\\n", null, 1e999]}',
        b'{"in_channels": -4}',
        b'{"in_channels": 1' + b"0" * 4000 + b"}",
        b'{"__class__": "os.system", "layers_per_block": "$(rm -rf /)"}',
    ],
)
def test_a_corrupt_config_is_one_line_that_names_the_file(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = corrupted(tmp_path / "model", "unet/config.json", content)
    assert "config.json" in failing(["estimate", model], capsys)


def test_missing_huge_looping_and_unreadable_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    failing(["estimate", str(loop)], capsys)
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in failing(["estimate", str(tmp_path / "empty")], capsys)
    model = Path(corrupted(tmp_path / "huge", "none", b""))
    with (model / "vae" / "config.json").open("wb") as stream:
        stream.truncate(100 << 20)
    start = time.perf_counter()
    assert "vae" in failing(["estimate", str(model)], capsys)
    assert time.perf_counter() - start < 2
    (model / "vae" / "config.json").unlink()
    (model / "vae" / "config.json").symlink_to("config.json")
    assert "vae" in failing(["estimate", str(model)], capsys)
    failing(["calibrate", str(loop)], capsys)
    failing(["estimate", "a\0b"], capsys)


@pytest.mark.parametrize("target", ["/dev/null/folder", "/proc/folder"])
def test_an_output_that_cannot_be_written_is_one_line_before_the_work(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("derivation.cli.parameters.derive", None)
    monkeypatch.setattr("derivation.report.files.contents", None)
    for asked in (["export", VAE, "--to", "json"], ["report", VAE]):
        assert f"output = '{target}' cannot be written" in failing([*asked, "--output", target], capsys)
    assert f"snapshot = '{target}'" in failing(["estimate", SD15, "--gpu", "t4", "--snapshot", target], capsys)


def test_a_file_beside_the_answer_is_said_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "snapshot.pickle"
    assert run(["estimate", SD15, "--gpu", "t4", "--json", "--snapshot", str(path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["fits"] and said.err == f"wrote {path}\n" and path.is_file()
    assert run(["calibrate", "--json", "--output", str(tmp_path / "profile.json")]) == 0
    assert capsys.readouterr().err == f"wrote {tmp_path / 'profile.json'}\n"


def test_export_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", VAE, "--to", "python"]) == 0
    printed = capsys.readouterr().out
    assert run(["export", VAE, "--to", "python", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "peak_vram.py").read_text() == printed


def test_an_unexpected_error_is_one_line_and_debug_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("some\nbug")

    monkeypatch.setattr("derivation.cli.derived.derivation_of", broken)
    assert run(["estimate", SD15]) == 70
    assert capsys.readouterr().err.startswith("error: unexpected KeyError")
    monkeypatch.setenv("DERIVATION_DEBUG", "1")
    with pytest.raises(KeyError):
        run(["estimate", SD15])


@pytest.mark.parametrize("form", ["--json", ""])
def test_a_closed_pipe_is_quiet_and_no_verdict(form: str) -> None:
    # the reader is gone before anything is written; 141 is bash's 128 + SIGPIPE, 1 would be "does not fit"
    script = f"{sys.executable} -m derivation estimate {SD15} {form} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 141)


def test_interrupting_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("derivation.cli.derived.derivation_of", interrupted)
    assert run(["estimate", SD15]) == 130
    assert capsys.readouterr().err in ("", "error: interrupted\n")


TYPICAL = (
    "estimate fit recommend compare export verify models measure calibrate report --help --json --height --width "
    "--batch-size --prompt-length --guidance-scale --dtype --attention --pipeline --gpu --memory --aspect --with --to "
    "--size --output --grid --scratch --no-safety-checker --version --debug -- - = : 8GiB 0 -1 512 77 1e9 nan inf -inf "
    "9999999999999999999999 float16 eager 16:9 t4 sm89 [red]x[/red] ../.. /dev/null /proc/self/mem \x1b[31m \u202e é"
)
WORDS = [*TYPICAL.split(), "", " ", "\n", SD15, "stable-diffusion-v1-5"]


@pytest.mark.parametrize("seed", range(150))
def test_random_arguments_never_print_a_traceback(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("derivation.measure.runner.PROBE", ("false",))
    chosen = random.Random(seed)
    words = [word for word in WORDS if word not in ("verify", "report", "--debug")]
    arguments = chosen.choices(words, k=chosen.randint(0, 7))
    code = run(arguments)
    captured = capfd.readouterr()
    reproduce = f"seed {seed}: python -m derivation {' '.join(map(repr, arguments))}"
    assert code in (0, 2), f"{reproduce}\n{captured.err}"
    assert "Traceback" not in captured.err, reproduce
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == (code != 0), reproduce


@pytest.mark.parametrize("name", ["estimate", "export", "fit", "recommend", "compare", "verify", "report"])
def test_help_cuts_no_option_off(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert [flag for flag in ("--num-inference-steps", "--no-negative-prompt", "--ip-adapter-tokens") if flag in out]
    assert "…" not in out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("derivation export m --to ja", ["javascript"]),
        ("derivation fit m --gpu rtx-30", ["rtx-3060"]),
        ("derivation fit m --offload s", ["sequential"]),
        ("derivation estimate m --scheduler UniPC", ["UniPCMultistepScheduler"]),
        ("derivation estimate stable-diffusion-v1-5/", [SD15]),
        ("derivation rec", ["recommend"]),
    ],
)
def test_the_shell_completes_values(words: str, wanted: list[str]) -> None:
    given = {"_DERIVATION_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert set(wanted) <= set(command("", **given).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--nope", "--nope"),
        ("--attention fast", "attention = 'fast'"),
        ("--lora-rank x", "lora_rank = 'x'"),
        ("--lora-rank 0", "lora_rank = 0"),
        ("--offload disk", "offload = 'disk'"),
        ("--strength nan", "strength = nan"),
        ("--scheduler Nope", "scheduler = 'Nope'"),
        ("--num-images-per-prompt 9999999999999999999999", "num_images_per_prompt"),
        ("--gpu gtx-nothing", "gtx-nothing"),
        ("./no-such-folder", "no-such-folder"),
        ("--output /dev/null/folder", "/dev/null"),
    ],
)
def test_build_report_says_one_line_and_writes_nothing(
    arguments: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments.split() if "--output" in arguments else [*arguments.split(), "--output", str(tmp_path / "out")]
    job = runpy.run_path(str(Path(__file__).parent.parent / "build_report.py"))
    try:
        code = job["main"](given)
    except SystemExit as stop:
        code = stop.code
    captured = capfd.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("build_report.py: ") and captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_does_not_fit_says_so_first_and_last_and_exits_with_one(capsys):
    card = ["--pipeline", "img2img", "--gpu", "rtx-3060"]
    asked = ["estimate", SD15, *card, "--attention", "eager", "--height", "2048", "--width", "2048"]
    assert run(asked) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == lines[-1] and "needs more than" in lines[0] and "out of memory at vae.encoder." in lines[0]
    assert "short" in lines[0] and " of 11.66 GiB: " in lines[0]
    assert run([*asked[:8], "--height", "512", "--width", "512"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == lines[-1] and lines[0].startswith("needs ") and lines[0].endswith(": fits")


def test_a_card_that_the_weights_do_not_fit_is_no_traceback(capsys):
    asked = ["estimate", SDXL, "--gpu", "rtx-3060", "--dtype", "float32", "--json"]
    assert run(asked) == 1
    found = json.loads(capsys.readouterr().out)
    assert "while they are loaded" in found["failed"]["module"] and not found["fits"]


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("> /dev/full", 2, "error: the output cannot be written (No space left on device)\n"),
        (">&-", 0, ""),
        ("2>&- | cat > /dev/null", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_at_most_one_line(shell, code, said):
    command_line = f"{sys.executable} -m derivation estimate sd15 {shell}"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"LC_ALL": "C"}
    done = subprocess.run(["bash", "-c", command_line], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (code, said)


def test_long_work_writes_a_line_a_step_to_a_pipe_and_short_work_none(capsys, monkeypatch):
    assert list(output.track(range(25), 25, "counting")) == list(range(25))
    with output.telling("work") as step:
        step("first")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(output, "QUIET_S", 0)
    list(output.track(range(25), 25, "counting"))
    with output.telling("work") as step:
        step("two\nlines")
    said = capsys.readouterr()
    assert said.out == ""
    counted = [f"counting: {n} of 25" for n in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)]
    assert said.err.splitlines() == [*counted, r"work: two\nlines"]


def test_a_report_says_its_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build(models: list[str], folder: Path, command: str, progress: Callable[[str], None], **_: object) -> list[str]:
        progress(f"deriving {models[0]}")
        return []

    monkeypatch.setattr(output, "QUIET_S", 0)
    monkeypatch.setattr("derivation.report.build", build)
    assert run(["report", SD15]) == 0
    assert capsys.readouterr().err == f"report: deriving {SD15}\n"


def test_recommend_ends_with_what_is_left_against_the_margin(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [SD15, "--size", "1024", "--batch-size", "2", "--gpu", "rtx-3060"]
    assert run(["recommend", *asked]) == 0
    verdict, trust = capsys.readouterr().out.splitlines()[-2:]
    assert verdict.startswith("needs ") and verdict.endswith("GiB: fits")
    assert trust.startswith("left: ") and " the margin of " in trust


def test_a_report_of_no_model_is_the_one_of_build_report(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("derivation.report.build", lambda models, *_, **options: asked.append((models, options)) or [])
    monkeypatch.setattr(
        "derivation.report.job.build_all", lambda models, *_, **options: asked.append((models, options)) or []
    )
    job = runpy.run_path(str(Path(__file__).parent.parent / "build_report.py"))
    for arguments in ([], ["--dtype", "float32"], ["--pipeline", "txt2img"], [SDXL]):
        assert run(["report", *arguments]) == job["main"](arguments) == 0
        (models, options), again = asked[-2:]
        assert again == (models, {name: value for name, value in options.items() if name != "revision"})
    assert asked[0] == ([SD15], {"pipeline": "img2img", "revision": None}) and asked[-1] == ([SDXL], {})
    capsys.readouterr()
    monkeypatch.setattr("derivation.report.job.build_all", lambda *_, **options: derive("sd15", **options) and [])
    assert job["main"](["sd15", "--gpu", "A100"]) == 0
    assert capsys.readouterr().err.startswith("warning: gpu = 'A100' is taken as a100-80gb, ")
    assert job["main"]([]) == 0
    # in a pipe, too
    assert capsys.readouterr().err.startswith("wrote ")


def test_what_people_cannot_know_is_said_where_it_is_shown(capsys):
    assert run(["compare", VAE, "--with", "dtype=float32"]) == 0
    assert "H, W: the image's height and width in pixels" in capsys.readouterr().out
    assert run(["fit", "sd15", "--memory", "8", "--size", "512"]) == 0
    assert "not counted: what cuDNN, cuBLAS and attention kernels take for themselves" in capsys.readouterr().out
