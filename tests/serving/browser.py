"""A Chromium without a window, steered over two pipes by its own protocol, so that tests need no package for it."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
]


class Browser:
    """A page of a browser, until the end of the block.

    Args:
        folder: for the browser's profile.

    Attributes:
        complaints: errors that the page's console showed.
        requests: addresses that the page asked for.
    """

    def __init__(self, folder):
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        # The browser reads from 3 and writes to 4.
        line = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
        command = ["bash", "-c", line, CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self._rest, self._numbers, self._session = b"", itertools.count(1), None
        self.complaints, self.requests = [], []
        (target,) = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._session = None
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self.send("Browser.close")  # its helpers end, too
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method, **parameters):
        """What a command of the protocol gives."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            reply = self._read()
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def _read(self, seconds=60):
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            more = os.read(self._in, 1 << 20)
            if not more:
                raise EOFError("the browser has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(told["entry"]["text"])
        return message

    def run(self, script):
        """The value of an expression in the page, a promise's included."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, script, seconds=60):
        """The value of an expression, as soon as it is true."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # the page is not there yet
                if value := self.run(script):
                    return value
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {script}; the page shows: {self.run('document.body.innerText')}")
            time.sleep(0.05)

    def open(self, url):
        """Load a page."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def screen(self, width, height=900, dark=False):
        """Size and colours of the screen."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, control=False, shift=False):
        """A key, as from a keyboard."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40, "ArrowUp": 38, "a": 65, "Delete": 46}
        told = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 * control + 8 * shift}
        text = {"text": {"Enter": "\r", " ": " "}.get(key, "")} if key in ("Enter", " ") else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **told, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def write(self, text):
        """Text into what has the focus, instead of what is there."""
        self.run("document.activeElement.select()")
        self.send("Input.insertText", text=text)

    def picture(self, path):
        """The whole page as a PNG file."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
