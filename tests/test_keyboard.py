"""The report's page by real keys and in real windows: chromedriver types, turns and measures (W3C WebDriver)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_page import CHROMIUM, expected

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="no Chromium with its chromedriver is installed")
# https://www.w3.org/TR/webdriver2/#keyboard-actions
TAB, ENTER, CONTROL, RIGHT, DOWN = "\ue004", "\ue007", "\ue009", "\ue014", "\ue015"
WINDOWS = ((1280, 800), (768, 1024), (390, 844))
# WCAG 2.1, success criterion 1.4.3
CONTRAST = 4.5


class Browser:
    """A session of chromedriver."""

    def __init__(self, port: int, profile: Path) -> None:
        self.root = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.root += "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def replace(self, text: str) -> None:
        """Type over what a field holds."""
        held = [("keyDown", CONTROL), ("keyDown", "a"), ("keyUp", "a"), ("keyUp", CONTROL)]
        actions = [{"type": kind, "value": key} for kind, key in held]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})
        self.press(*text)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def window(self, width: int, height: int, scheme: str) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, path: Path) -> None:
        self.ask("POST", "/url", {"url": path.as_uri()})
        for _ in range(600):
            if self.run("return document.documentElement.dataset.ready"):
                return
            time.sleep(0.1)
        raise TimeoutError("the page's script does not end")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL) as driver:
        try:
            for _ in range(100):
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            found = Browser(port, tmp_path_factory.mktemp("browser") / "profile")
            yield found
            found.ask("DELETE", "")
        finally:
            driver.terminate()


ACTIVE = """
const now = document.activeElement, style = getComputedStyle(now);
const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
return [now.name || now.id, now.closest("form")?.id ?? "", outlined];
"""
SAID = """
const verdict = document.getElementById("answer-verdict");
const error = document.getElementById("ask-error");
return [verdict.dataset.needs, verdict.dataset.verdict, error.hidden ? "" : error.textContent];
"""


def focused(browser: Browser, name: str) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(120):
        if browser.run(ACTIVE)[0] == name:
            return
        browser.press(TAB)
    raise AssertionError(f"Tab does not reach {name}")


def test_every_control_is_reached_by_tab_and_shows_its_focus(browser: Browser, page: Path) -> None:
    browser.window(1280, 800, "light")
    browser.open(page)
    controls = browser.run("return [...document.getElementById('ask').elements].map((input) => input.name)")
    reached = {}
    for _ in range(len(controls) + 40):
        browser.press(TAB)
        name, form, is_shown = browser.run(ACTIVE)
        if form == "ask":
            reached[name] = is_shown
    assert list(reached) == controls and all(reached.values()), reached


def test_an_answer_is_had_by_keys_alone(browser: Browser, page: Path) -> None:
    browser.window(1280, 800, "light")
    browser.open(page)
    for name, text in (("card", "rtx 4090"), ("size", "768x512"), ("batch", "2")):
        focused(browser, name)
        browser.replace(text)
    focused(browser, "pipeline")
    browser.press(DOWN, DOWN)
    own = browser.run("return Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    usual = {"dtype": "float16", "attention": "sdpa", "offload": "None", "vae_slicing": "False"}
    assert own["pipeline"] == "inpaint" and own.items() >= {"card": "rtx 4090", "size": "768x512", "batch": "2"}.items()
    needs, kind, error = browser.run(SAID)
    assert (int(needs), kind, error) == (expected({**usual, **own}).needs_bytes, "fits", "")
    focused(browser, "size")
    browser.replace("wide")
    assert "HEIGHTxWIDTH" in browser.run(SAID)[2]
    assert browser.run("return document.getElementById('answer-box').hidden")


def test_the_curve_is_walked_by_arrow_keys(browser: Browser, page: Path) -> None:
    browser.window(1280, 800, "light")
    browser.open(page)
    browser.run("document.querySelector('#answer-curve summary').focus()")
    browser.press(ENTER)
    focused(browser, "curve")
    before = browser.run("return document.getElementById('curve').ariaValueNow")
    browser.press(RIGHT, RIGHT)
    assert int(browser.run("return document.getElementById('curve').ariaValueNow")) > int(before)
    assert " alive beyond " in browser.run("return document.getElementById('curve-said').textContent")


def test_every_figure_is_downloaded_as_svg_in_colours_of_its_own(
    browser: Browser,
    page: Path,
    tmp_path: Path,
) -> None:
    browser.window(1280, 800, "dark")
    browser.open(page)
    browser.devtools("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    names = browser.run("return [...document.querySelectorAll('figure')].map(({ id }) => id)")
    assert len(names) > 3
    for name in names:
        browser.run(f"document.querySelector('button[data-figure={name}]').click()")
        found = tmp_path / f"{name}.svg"
        for _ in range(200):
            if found.exists() and found.read_text().rstrip().endswith("</svg>"):  # empty while it is written
                break
            time.sleep(0.1)
        text = found.read_text()
        assert ElementTree.fromstring(text).tag.endswith("}svg") and "var(" not in text, name


MEASURED = """
const luminance = (colour) => {
  const parts = colour.match(/[\\d.]+/g).map((c) => c / 255);
  const [r, g, b] = parts.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (id) => {
  const own = document.getElementById(id);
  const behind = (element) => getComputedStyle(element).backgroundColor;
  let under = own;
  while (/^rgba\\(.*, 0\\)$/.test(behind(under)) && under.parentElement) under = under.parentElement;
  const [a, b] = [getComputedStyle(own).color, behind(under)].map(luminance).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};
return {
  wide: document.documentElement.scrollWidth - innerWidth,
  below: document.getElementById("answer-verdict").getBoundingClientRect().bottom - innerHeight,
  cut: [...document.querySelectorAll(".box.scroll")].map((box) => box.scrollWidth - box.clientWidth),
  contrasts: ["answer-needs", "answer-verdict", "answer-exact"].map(contrast),
};
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_shows_the_answer_first_and_is_not_too_narrow(
    browser: Browser,
    page: Path,
    window: tuple[int, int],
    scheme: str,
) -> None:
    browser.window(*window, scheme)
    browser.open(page)
    found = browser.run(MEASURED)
    assert found["wide"] <= 0 and found["below"] <= 0
    # the tensors' equation and nvidia-smi's
    assert len(found["cut"]) == 2 and max(found["cut"]) <= 0
    assert min(found["contrasts"]) >= CONTRAST, found
    assert [line for line in browser.ask("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"] == []
