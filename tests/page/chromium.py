"""A headless Chromium, told what to do over the DevTools protocol by pipes: real clicks and keys, no dependency."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--window-size=1440,900", "--hide-scrollbars", "--disable-extensions",
)  # fmt: skip
# the protocol is spoken on the descriptors 3 and 4
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for target, end in zip((3, 4), ends):
    os.dup2(end, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find():
    """The browser's path; AssertionError where there is none, as these tests were asked for by name."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found is not None, f"none of {', '.join(NAMES)} is installed: apt-get install chromium"
    return found


class Chromium:
    """One browser with one page.

    Args:
        profile: a folder for it.

    Attributes:
        problems: uncaught errors, errors on the console and what the policy blocked.
        requested: URLs that the page asked for.
    """

    def __init__(self, profile):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), find(), *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"], pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._write = os.fdopen(ours_in, "rb", 0), os.fdopen(ours_out, "wb", 0)
        self._numbers, self._left, self._session = itertools.count(1), b"", None
        self.problems, self.requested = [], []
        (target,) = (one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        """End it."""
        self._session = None
        self.send("Browser.close")
        self._process.wait(20)
        self._read.close()
        self._write.close()

    def send(self, method, **params):
        """One command's result; events that come meanwhile are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told["error"]
                return told["result"]
            self._note(told)

    def _next(self):
        while b"\0" not in self._left:
            data = os.read(self._read.fileno(), 2**20)
            assert data, "the browser ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, told):
        method, params = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description") or str(params))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    # -- the page ------------------------------------------------------------------------------------------

    def open(self, url):
        """Go there."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, expression):
        """A JavaScript expression's value; a promise is waited for."""
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, expression, seconds=30):
        """Until it is true; its value."""
        end = time.monotonic() + seconds
        while (found := self.run(expression)) in (None, False, 0, ""):
            if time.monotonic() > end:
                raise AssertionError(f"never: {expression}; {self.problems}; {self.run('document.body.innerText')}")
            time.sleep(0.05)
        return found

    def text(self, selector):
        """What stands in the first such element."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? null")

    def click(self, selector, x=0.5, y=0.5):
        """Press the mouse on the first such element, at a part of its width and height."""
        place = self.wait(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); if (!one) return null;"
            "one.scrollIntoView({block: 'nearest'}); const box = one.getBoundingClientRect();"
            f"return box.width ? [box.x + {x} * box.width, box.y + {y} * box.height] : null }})()"
        )
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def type(self, selector, text):
        """Write into a field."""
        for _ in range(5):  # what is above it may have grown while the mouse was on its way
            self.click(selector)
            if self.run(f"document.activeElement === document.querySelector({json.dumps(selector)})"):
                break
        self.send("Input.insertText", text=text)

    def press(self, key, code):
        """A key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def drop(self, selector, path):
        """Drag a file onto an element."""
        x, y = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def shade(self, scheme):
        """``light`` or ``dark``."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def size(self, width, height):
        """The window's."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def shoot(self, path):
        """A picture of the window."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
