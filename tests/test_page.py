"""The report's page in a headless browser: its answers are those of ``estimate``, for whoever asks and however."""

from __future__ import annotations

import html
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import warnings
from fractions import Fraction
from functools import cache

import pytest
from conftest import SD15

from derivation import DerivationError, derive
from derivation.gpu.cards import lookup, memory_bytes
from derivation.report import build
from derivation.report.calculator import SWITCHES
from derivation.report.tapes import Tapes

CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SEED = 20261128
CARDS = ("rtx-3060", "RTX 4090", "t4", "Tesla T4", "rtx 2060", "h100", "a100-40gb", "rtx 3070 laptop", "12", "8 GiB")

# Answers of the form to states; what is searched after the answer of the first ones is waited for.
PROBE = """<script>
(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 5));
  while (!document.documentElement.dataset.ready) await pause();
  const text = (id) => document.getElementById(id).textContent;
  const found = [];
  for (const state of STATES) {
    history.replaceState(null, "", `#${new URLSearchParams(state)}`);
    window.dispatchEvent(new Event("hashchange"));
    found.push({
      ...document.getElementById("answer-verdict").dataset, said: text("answer-verdict"),
      total: text("answer-needs"), old: text("answer-box").trim() + text("curve") + text("device-latex"),
      error: document.getElementById("ask-error").hidden ? "" : text("ask-error"),
      gone: document.getElementById("answer-box").hidden, command: text("answer-command"),
      latex: document.getElementById("answer-device").hidden ? "" : text("device-latex"),
      layers: [...document.querySelectorAll("#answer-legend li")].map((li) => Number(li.dataset.bytes)),
    });
    if (found.length > SEARCHED) continue;
    await pause();
    Object.assign(found[found.length - 1], { advice: text("answer-advice"), largest: text("answer-largest") });
  }
  const out = document.createElement("pre");
  out.id = "collected";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
</script></body>"""


def browse(page, tmp_path, *arguments):
    """Return the page's DOM after its scripts ran; nothing may be logged to the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=60000", *arguments, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def shown(page, states, tmp_path, searched=0):
    """Return what a page shows for states of its form."""
    copy = tmp_path / "page.html"
    probe = PROBE.replace("STATES", json.dumps(states)).replace("SEARCHED", str(searched))
    copy.write_text(page.read_text().replace("</body>", probe))
    [text] = re.findall(r'<pre id="collected">(.*?)</pre>', browse(copy, tmp_path), re.S)
    return json.loads(html.unescape(text))


def settings(count):
    """Return random states of the form."""
    chosen = random.Random(SEED)
    found = []
    for _ in range(count):
        state = {name: str(chosen.choice(values)) for name, (_, values) in SWITCHES.items()}
        state |= {"num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True"}
        if not chosen.randrange(4):
            images, tiled = chosen.choice((("1", "True"), ("2", "False"), ("4", "False"), ("1", "False")))
            if tiled == "False":
                state |= {"guidance": str(images != "1"), "pipeline": "txt2img"}
            usual = {"dtype": "float16", "attention": "sdpa", "offload": "None"}
            state |= usual | {"num_images_per_prompt": images, "vae_tiling": tiled}
        sides = [chosen.choice((512, 768, 1024, 8 * chosen.randint(16, 256))) for _ in "hw"]
        state |= {"size": "x".join(map(str, sides)), "batch": str(chosen.choice((1, 1, 2, 3, 7)))}
        card, free = chosen.choice(CARDS), chosen.choice(("", "", "", "6GiB"))
        found.append(state | {"card": card, "free": "" if card[0].isdigit() else free})
    return found


def options(state):
    """Return a state's options as ``derive`` takes them."""
    words = {"True": True, "False": False, "None": None}
    found = {name: words.get(state[name], state[name]) for name in SWITCHES if name != "guidance"}
    return {**found, "num_images_per_prompt": int(state["num_images_per_prompt"])}


@cache
def derived(key):
    return derive(SD15, **dict(key))


def expected(state):
    """Return the verdict of a state in Python."""
    height, width = map(int, state["size"].split("x"))
    gpu = None if state["card"][0].isdigit() else state["card"]
    room = state["free"] if gpu else state["card"]
    free = memory_bytes(room) if room else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = derived(tuple({**options(state), "gpu": gpu}.items()))
        return d.verdict(height, width, int(state["batch"]), guidance=state["guidance"] == "True", free_bytes=free)


@pytest.mark.parametrize(
    "drawn",
    [
        18,
        pytest.param(
            80,
            marks=pytest.mark.skipif(
                "FULL_PAGE" not in os.environ, reason="FULL_PAGE is not set: 50 settings take a minute"
            ),
        ),
    ],
)
def test_random_settings_are_the_estimate_s_to_the_byte_and_in_verdict(page, tmp_path, drawn):
    states = settings(drawn)
    found = shown(page, states, tmp_path)
    assert {each["error"] for each in found} == {""}
    held = [(state, each) for state, each in zip(states, found, strict=True) if each["verdict"] != "none"]
    assert len(held) >= drawn * 5 / 8
    for state, each in held:
        verdict = expected(state)
        sentence = f"{each['total']}: {each['said'].partition(';')[0]}"
        assert sentence.replace("Needs", "needs").replace(" for tensors alone", "") == str(verdict), state
        assert (int(each["needs"]), each["verdict"] != "no") == (verdict.needs_bytes, verdict.fits), state
        if not state["card"][0].isdigit():
            assert not verdict.fits or each["said"].endswith(verdict.trust), state
            assert not verdict.fits or sum(each["layers"]) == verdict.needs_bytes, state


def test_images_a_prompt_tiles_and_no_guidance_are_the_estimate_s(page, tmp_path):
    usual = {"dtype": "float16", "attention": "sdpa", "offload": "None", "vae_slicing": "False", "free": ""}
    tiled = {
        "vae_tiling": "True",
        "num_images_per_prompt": "1",
        "card": "12",
        "safety_checker": "True",
        "guidance": "True",
    }
    unguided = {"num_images_per_prompt": "1", "guidance": "False"}
    several = {"guidance": "True", "vae_tiling": "False", "safety_checker": "False"}
    states = [
        *(
            {**usual, **tiled, "pipeline": pipeline, "size": size, "batch": batch}
            for pipeline, size, batch in (
                ("txt2img", "512x512", "1"),
                ("img2img", "1024x1024", "2"),
                ("inpaint", "1536x520", "1"),
                ("txt2img", "2048x1800", "3"),
            )
        ),
        *(
            {
                **usual,
                **tiled,
                "pipeline": "txt2img",
                "size": size,
                "batch": batch,
                "card": card,
                "safety_checker": checked,
            }
            for size, batch, card, checked in (
                ("1536x784", "1", "t4", "True"),
                ("2048x1352", "2", "h100", "True"),
                ("384x1800", "1", "rtx-4090", "False"),
                ("512x512", "3", "rtx-3060", "True"),
            )
        ),
        *(
            {**usual, **several, "pipeline": "txt2img", "size": "512x768", "batch": batch, "card": card} | images
            for batch, card in (("1", "t4"), ("2", "h100"), ("1", "12"))
            for images in (
                {"num_images_per_prompt": "2"},
                {"num_images_per_prompt": "4", "vae_slicing": "True"},
                unguided,
            )
        ),
    ]
    for state, each in zip(states, shown(page, states, tmp_path), strict=True):
        assert each["verdict"] != "none" and int(each["needs"]) == expected(state).needs_bytes, state


def test_a_vae_tile_of_one_line_on_a_card_is_left_to_the_command(page, tmp_path):
    state = {**settings(1)[0], "dtype": "float16", "attention": "sdpa", "offload": "None", "vae_slicing": "False"}
    state |= {
        "pipeline": "txt2img",
        "vae_tiling": "True",
        "num_images_per_prompt": "1",
        "guidance": "True",
        "batch": "1",
    }
    cards = [{**state, "card": card, "free": "", "size": "776x1024"} for card in ("t4", "12")]
    assert [each["verdict"] == "none" for each in shown(page, cards, tmp_path)] == [True, False]


def read_back(latex, height, width, batch):
    """Return the bytes that an equation of nvidia-smi says at a size."""
    context = re.search(r"underbrace\{([\d{,}]+)\}_", latex)[1]
    body = latex[latex.index("&N =") : latex.index(r"\end{aligned}")].replace("{,}", "")
    values = {"B": batch, "H": height, "W": width}
    for letter, side in (("h", height), ("w", width)):
        level = -(-side // 8)
        for k in range(4):
            values[f"{letter}{k}"], level = level, -(-level // 2)
    values |= {f"{kind}{axis}": int(side) for kind, axis, side in re.findall(r"\$([TRQC])_\{([hw])\} = (\d+)\$", latex)}
    count = int(re.search(r"N = (\d+)", body)[1])
    for times, inside in re.findall(r"\+ (?:(\d+)\\,)?s\((.*?)\)", body):
        nbytes = 0
        for sign, top, bottom, letters in re.findall(
            r"([+-]?) ?(?:\\tfrac\{)?(\d+)\}?(?:\{(\d+)\})?(?:\\,([A-Zhw_{}0-9^ ]*))?", inside
        ):
            part = Fraction(int(f"{sign}{top}"), int(bottom or 1))
            for name, power in re.findall(r"([BHW]|[hw]_\{\d\}|[TRQC]_\{[hw]\})(?:\^\{(\d)\})?", letters):
                part *= values[re.sub("[_{}]", "", name)] ** int(power or 1)
            nbytes += part
        count += int(times or 1) * -(-nbytes // (2 << 20))
    return int(context.replace("{,}", "")) + count * (2 << 20)


def test_the_latex_of_nvidia_smi_on_the_chosen_card_reads_back_to_what_is_needed(page, tmp_path):
    usual = {**settings(1)[0], "num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True", "free": ""}
    usual |= {"dtype": "float16", "attention": "sdpa", "vae_slicing": "False", "safety_checker": "True"}
    states = [
        {
            **usual,
            "card": card,
            "size": size,
            "batch": batch,
            "offload": offload,
            "pipeline": pipeline,
            "vae_tiling": tiled,
        }
        for card, size, batch, offload, pipeline, tiled in (
            ("rtx-3060", "512x512", "1", "None", "txt2img", "False"),
            ("t4", "1024x768", "2", "None", "img2img", "False"),
            ("h100", "1000x776", "3", "None", "inpaint", "False"),
            ("rtx-4090", "2048x1536", "1", "model", "txt2img", "False"),
            ("rtx-3060", "1536x784", "2", "None", "txt2img", "True"),
        )
    ]
    for state, each in zip(states, shown(page, states, tmp_path), strict=True):
        size = map(int, state["size"].split("x"))
        assert each["latex"].count("s(") > 2
        assert read_back(each["latex"], *size, int(state["batch"])) == int(each["needs"]) == expected(state).needs_bytes


def test_what_does_not_fit_has_a_remedy_that_does_and_a_largest_size(page, tmp_path):
    asked = {**settings(1)[0], "pipeline": "txt2img", "dtype": "float16", "attention": "eager", "offload": "None"}
    asked |= {"card": "rtx-3060", "size": "1024x1024", "batch": "1", "free": "", "safety_checker": "True"}
    asked |= {"num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True"}
    [found] = shown(page, [asked], tmp_path, searched=1)
    assert found["verdict"] == "no" and not expected(asked).fits
    assert (
        found["advice"].startswith("It fits with fused attention (") and expected({**asked, "attention": "sdpa"}).fits
    )
    side = int(re.search(r"Squares up to (\d+) .", found["largest"])[1])
    assert expected({**asked, "size": f"{side}x{side}"}).fits
    assert not expected({**asked, "size": f"{side + 64}x{side + 64}"}).fits


def test_a_remedy_that_the_page_holds_alone_is_found(page, tmp_path):
    asked = {**settings(1)[0], "pipeline": "txt2img", "dtype": "float16", "attention": "sdpa", "offload": "None"}
    asked |= {"card": "rtx-3060", "size": "2048x2048", "batch": "2", "free": "", "safety_checker": "True"}
    asked |= {"num_images_per_prompt": "1", "vae_tiling": "False", "vae_slicing": "False", "guidance": "True"}
    [found] = shown(page, [asked], tmp_path, searched=1)
    assert not expected(asked).fits and expected({**asked, "vae_tiling": "True"}).fits
    assert found["advice"].startswith("It fits with VAE tiling (")


def test_the_command_below_an_answer_asks_the_same(page, tmp_path):
    asked = {**settings(1)[0], "pipeline": "txt2img", "dtype": "float16", "attention": "sdpa", "offload": "None"}
    asked |= {"card": "rtx-3060", "size": "1024x1024", "batch": "1", "free": "6", "safety_checker": "True"}
    asked |= {"num_images_per_prompt": "1", "vae_tiling": "False", "vae_slicing": "False", "guidance": "True"}
    [found] = shown(page, [asked], tmp_path)
    words = shlex.split(found["command"])
    gpu = words[words.index("--gpu") + 1]
    assert words[:2] == ["derivation", "estimate"] and gpu == "rtx-3060 6442450944B free"
    verdict = derive(SD15, attention="sdpa", gpu=gpu).verdict(1024, 1024, 1)
    assert (int(found["needs"]), int(found["of"])) == (verdict.needs_bytes, verdict.of_bytes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": "513x512"}, "multiples of 8"),
        ({"size": "wide"}, "HEIGHTxWIDTH"),
        ({"card": "no such card"}, "a card"),
        ({"batch": "0"}, "an integer from 1"),
        ({"free": "much"}, "free memory"),
        ({"card": "12", "free": "2GiB"}, "free memory “2GiB”: a card is needed"),
        ({"card": "constructor"}, "a card"),
        ({"card": "__proto__"}, "a card"),
        ({"card": "12288"}, "did you mean 12288MiB"),
        ({"card": "gtx 1080 ti"}, "is not supported"),
        ({"card": "999999999999999999T"}, "memory “999999999999999999T” is not supported"),
        ({"free": "999999999999999999T"}, "free memory “999999999999999999T” is not supported"),
        ({"vae_slicing": "perhaps"}, "vae_slicing “perhaps” in the address: True or False is needed"),
        ({"dtype": "constructor"}, "dtype “constructor” in the address: float16 or "),
    ],
)
def test_the_old_answer_goes_on_bad_input(page, tmp_path, change, said):
    good = {**settings(1)[0], "size": "512x512", "num_images_per_prompt": "1", "vae_tiling": "False"}
    first, bad = shown(page, [good, {**good, **change}], tmp_path)
    assert not first["gone"] and first["old"] and bad["gone"] and said in bad["error"]
    assert (bad["old"], bad["verdict"], bad["needs"]) == ("", "", "")


def test_an_address_is_read_in_any_case(page, tmp_path):
    asked = {**settings(1)[0], "pipeline": "txt2img", "dtype": "float16", "attention": "sdpa", "offload": "None"}
    asked |= {"card": "rtx-3060", "size": "512x512", "batch": "3", "free": "", "vae_tiling": "False"}
    asked |= {"num_images_per_prompt": "1", "guidance": "True", "safety_checker": "True", "vae_slicing": "True"}
    lower = {name: value.lower() for name, value in asked.items()}
    for state, each in zip((asked, lower), shown(page, [asked, lower], tmp_path), strict=True):
        assert each["error"] == "" and int(each["needs"]) == expected(asked).needs_bytes, state
    assert expected(asked).needs_bytes != expected({**asked, "vae_slicing": "False"}).needs_bytes


def test_bytes_of_a_memory_are_read_exactly(page, tmp_path):
    usual = {**settings(1)[0], "num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True", "free": ""}
    usual |= {"dtype": "float16", "attention": "sdpa", "offload": "None", "size": "512x512", "batch": "1"}
    texts = ("1.001GB", "8.000000001 TiB", "8191.999999999TiB", "2.3 gib")
    found = shown(page, [{**usual, "card": text} for text in texts], tmp_path)
    for text, each in zip(texts, found, strict=True):
        assert int(each["of"]) == memory_bytes(text), text
        if each["verdict"] == "no":
            assert f"{each['total']}: does not fit" == f"N{str(expected({**usual, 'card': text}))[1:]}"
    assert "no" in {each["verdict"] for each in found}


COPY = """<script>
(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 5));
  while (!document.documentElement.dataset.ready) await pause();
  const refused = { writeText: () => Promise.reject(new Error("refused")) };
  const button = document.querySelector("button[data-latex]");
  const found = [];
  for (const clipboard of [undefined, refused]) for (const done of [true, false]) {
    let taken = "";
    Object.defineProperty(navigator, "clipboard", { value: clipboard, configurable: true });
    document.execCommand = () => { taken = getSelection().toString() || document.activeElement.value; return done; };
    button.click();
    await pause();
    const left = document.querySelector("textarea")?.value ?? "";
    found.push({ taken, left, label: button.textContent });
  }
  const out = document.createElement("pre");
  out.id = "collected";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
</script></body>"""


def test_latex_is_copied_without_a_clipboard_or_left_selected(page, tmp_path):
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", COPY))
    [text] = re.findall(r'<pre id="collected">(.*?)</pre>', browse(copy, tmp_path), re.S)
    found = json.loads(html.unescape(text))
    assert [each["label"] for each in found] == ["Copied", "Copy failed: select it below"] * 2
    for each in found:
        assert r"\begin{" in each["taken"]
        assert each["left"] == (each["taken"] if each["label"].startswith("Copy failed") else "")


LARGEST = (
    r"(?:Every square|Squares) up to (\d+) . \d+ at batch 1(?: \(the largest: (.*?)\))?; "
    r"at 512 . 512 a batch up to (\d+)( and more)?(?: \(the largest: (.*?)\))?\."
)


def test_the_largest_that_fits_is_named_with_its_trouble(page, tmp_path):
    usual = {**settings(1)[0], "pipeline": "txt2img", "dtype": "float16", "attention": "sdpa", "offload": "None"}
    usual |= {"size": "512x512", "batch": "1", "free": "", "vae_slicing": "False", "safety_checker": "True"}
    usual |= {"num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True"}
    states = [{**usual, "card": card} for card in ("rtx 2060", "h100", "4")]
    for state, each in zip(states, shown(page, states, tmp_path, searched=len(states)), strict=True):
        side, of_side, batch, _, of_batch = re.fullmatch(LARGEST, each["largest"]).groups()
        for change, said in (({"size": f"{side}x{side}"}, of_side), ({"batch": batch}, of_batch)):
            verdict = expected(state | change)
            spare = "" if verdict.sure else verdict.trust.partition(" (")[0]
            words = ["" if verdict.verdict == "fits" else verdict.verdict, spare]
            assert (said or "") == "; ".join(filter(None, words)), (state, change)


@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_a_tape_without_the_safety_checker_is_that_of_a_call_without_it(offload):
    held, gpu = Tapes(), "t4"
    on = derive(SD15, gpu=gpu, offload=offload, attention="sdpa").subject
    off = on.changed(safety_checker=False)
    numbers = [held.add(s.program(True, {"L": 77}).generic.tape, held.weights(s.resident)) for s in (on, off)]
    assert held.without(numbers[0], "safety_checker", held.weights(off.resident)) == numbers[1] != numbers[0]


def test_a_traced_pipeline_has_a_page_with_the_estimate_s_answers(tmp_path):
    [page] = build(["black-forest-labs/FLUX.1-dev"], tmp_path / "out")
    states = [
        {"card": card, "size": size, "batch": batch, "free": "", "offload": offload}
        for card, size, batch, offload in (
            ("h100", "1024x1024", "1", "None"),
            ("rtx-4090", "1024x768", "1", "model"),
            ("rtx-4090", "512x512", "1", "None"),
            ("h100", "768x1360", "3", "model"),
        )
    ]
    for state, found in zip(states, shown(page, states, tmp_path), strict=True):
        d = derive("black-forest-labs/FLUX.1-dev", gpu=state["card"], offload=options_word(state["offload"]))
        verdict = d.verdict(*map(int, state["size"].split("x")), int(state["batch"]))
        assert (int(found["needs"]), found["verdict"] != "no") == (verdict.needs_bytes, verdict.fits), state


def options_word(text):
    return None if text == "None" else text


CARD_TEXTS = (
    "A100 40 GB", "rtx 4090", "NVIDIA GeForce RTX 3060", "rtx 3060 12gb", "RTX 3060 (12 GB)", "rtx 3060 12", "T4 15G",
    "rtx 3060 8 GiB free", "t4 6000MiB free", "24", "24G", "24GB", "1.5 TiB", "8192MiB", "rtx 9999", "24X", "0",
    "radeon rx 7900", "rtx 4090 zero", "", "rtx 9999 12gb", "-3", "12 GiB free", "12288", "rtx 306", "RTX4900",
    "gforce 2080", "rtx 3070 lptop", "H10", "a6000 adaa", "v10", "rtx 306 8 GiB free", "t44", "40900", "12288.5",
)  # fmt: skip


def test_a_card_is_read_as_the_command_line_reads_it(page, tmp_path):
    usual = {**settings(1)[0], "num_images_per_prompt": "1", "vae_tiling": "False", "guidance": "True", "free": ""}
    usual |= {"dtype": "float16", "attention": "sdpa", "offload": "None", "size": "512x512", "batch": "1"}
    states = [{**usual, "card": text} for text in CARD_TEXTS]
    for state, each in zip(states, shown(page, states, tmp_path), strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = of_text(state)
        except DerivationError as error:
            assert each["gone"], state["card"]
            advice = re.findall(r"did you mean [^?]*\?|NVIDIA cards: .*modelled", str(error))
            assert all(words in each["error"] for words in advice or ["card"]), (state["card"], each["error"], advice)
        else:
            assert not each["gone"], (state["card"], each["error"])
            assert (int(each["needs"]), int(each["of"])) == (wanted.needs_bytes, wanted.of_bytes), state["card"]


def of_text(state):
    """Return the verdict on what a text names: a card, else a memory."""
    text, free = state["card"], None
    if re.fullmatch(r"[0-9.]+ *([KMGT]i?B?)?", text):
        free = memory_bytes(text)
    else:
        lookup(text)
    chosen = {**options(state), "gpu": None if free else text}
    return derived(tuple(chosen.items())).verdict(512, 512, free_bytes=free)


def test_a_card_of_another_memory_is_left_to_the_command_that_is_named(page, tmp_path):
    asked = {**settings(1)[0], "card": "rtx 3060 8GiB", "size": "512x512"}
    [found] = shown(page, [asked], tmp_path)
    assert found["gone"] and '--gpu "rtx 3060 8GiB"' in found["error"]
