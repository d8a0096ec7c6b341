"""A tab of a headless Chromium, driven by the DevTools protocol over a pipe: its keys are those of a keyboard."""

from __future__ import annotations

import base64
import json
import os
import subprocess

TAB, ENTER, DOWN, SPACE = ("Tab", 9, ""), ("Enter", 13, "\r"), ("ArrowDown", 40, ""), (" ", 32, " ")
READY = """new Promise((done) => {
  const look = () => (document.documentElement.dataset.ready ? done(true) : setTimeout(look, 20));
  look();
})"""


class Tab:
    """A page that is open; ``logged`` are the console's errors and warnings, and the exceptions of scripts."""

    def __init__(self, chromium, profile):
        (theirs, self._out), (self._in, written) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        redirect = f'exec "$0" "$@" 3<&{theirs} 4>&{written}'
        command = ["bash", "-c", redirect, chromium, *flags, "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(theirs, written), stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(written)
        self._left, self._number, self._session, self.logged = b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)

    def call(self, method, **params):
        """Return what a method of the protocol answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            event = answer.get("method")
            if event == "Runtime.exceptionThrown" or (
                event == "Log.entryAdded" and "level" in answer["params"]["entry"]
            ):
                self.logged.append(answer["params"])
        assert "result" in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._left:
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """Return a script's value, once its promise is kept."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page, width, height, scheme="light"):
        """Open a page on a screen, and wait for its first answer."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not self.value("location.protocol === 'file:'"):
            pass
        assert self.value(READY)

    def press(self, key, modifiers=0, commands=()):
        """Press a key and let it go: its name, its code and what it types."""
        name, code, text = key
        event = {"key": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, commands=list(commands), **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        """Type text over what the field has."""
        self.press(("a", 65, ""), modifiers=2, commands=["selectAll"])
        for letter in text:
            self.press((letter, ord(letter.upper()), letter))

    def picture(self, path):
        """Write a PNG of the screen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
