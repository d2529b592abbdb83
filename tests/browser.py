"""A headless browser, spoken to over its own protocol: what a page asks for, runs, logs, shows and looks like."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no chromium here; Debian's package is called chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
CANARY = "canary"  # A script that runs calls it; what it was given is noted


class Browser:
    "One page of a headless Chromium; a context manager."

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM, MISSING
        self.events, self.number = list[dict[str, Any]](), 0
        command = [CHROMIUM, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.socket = websocket.create_connection(
                f"ws://127.0.0.1:{self.port(folder)}", timeout=60, suppress_origin=True, enable_multithread=False
            )
        except BaseException:
            self.close()
            raise
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Runtime.addBinding", name=f"{CANARY}_told")
        told = f"window.{CANARY} = () => {CANARY}_told('a script')"
        self.call("Page.addScriptToEvaluateOnNewDocument", source=told)

    session: str = ""

    def port(self, folder: Path) -> str:
        "Port and path that the browser listens at, which it writes down."
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s and self.process.poll() is None:
            file = folder / "DevToolsActivePort"
            lines = file.read_text().split() if file.exists() else []
            if len(lines) == 2:
                return "".join(lines)
            time.sleep(0.05)
        raise RuntimeError("chromium did not start")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        "End the browser, and wait for it."
        if hasattr(self, "socket"):
            self.session = ""
            try:
                self.call("Browser.close")
            except (websocket.WebSocketException, OSError, AssertionError):
                pass
            self.socket.close()
        else:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        "Have the browser do something; events that come meanwhile are kept."
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.note(answer)

    def note(self, event: dict[str, Any]) -> None:
        "Keep an event; a dialog would hold the page up."
        self.events.append(event)
        if event.get("method") == "Page.javascriptDialogOpening":
            message = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            self.socket.send(json.dumps(message | {"sessionId": self.session}))

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        "What came of some kinds of events since the page was opened."
        return [event["params"] for event in self.events if event.get("method") in methods]

    def open(self, page: Path | str, rest_s: float = 0.1) -> None:
        "Load a file or an address, and give what might be delayed some time."
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        until_s = time.monotonic() + 60
        while not self.seen("Page.loadEventFired"):
            assert time.monotonic() < until_s, f"{page} does not load"
            self.note(json.loads(self.socket.recv()))
        time.sleep(rest_s)
        self.run("0")

    def until(self, script: str, seconds: float = 30) -> Any:
        "Wait until a script's value is true, and give it."
        until_s = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until_s, f"never: {script}; the page says {self.run('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def click(self, selector: str) -> None:
        "Press the mouse in the middle of an element."
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"JSON.parse(JSON.stringify({place}.getBoundingClientRect()))")
        assert box["width"], f"{selector} cannot be seen"
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def type(self, text: str) -> None:
        "Write where the focus is."
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        "Press a key: Enter, Escape, Tab, or a blank."
        code = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        given = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        given |= {"modifiers": 8 if shift else 0}
        down = given | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def controls(self) -> list[tuple[str, str]]:
        "Role and name of whatever can be used, as assistive technology has them."
        nodes = [node for node in self.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
        found = []
        for node in nodes:
            properties = {one["name"]: one["value"].get("value") for one in node.get("properties", [])}
            if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
                found.append((node["role"]["value"], node.get("name", {}).get("value", "")))
        return found

    def run(self, script: str) -> Any:
        "The value of a script in the page; the page's policy does not hold for it."
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def look(self, width: int, scheme: str = "light", media: str = "") -> None:
        "A window so wide, in the light or in the dark, on a screen or in print."
        options = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        self.call("Emulation.setDeviceMetricsOverride", **options)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def picture(self) -> bytes:
        "All of the page as PNG."
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip, format="png")["data"]
        )

    def pdf(self) -> bytes:
        "The page as it is printed."
        printed = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=False)
        return base64.b64decode(printed["data"])

    def addresses(self) -> list[str]:
        "Whatever was asked for, the page among them; data that a page carries in an address is no request."
        asked = [event["request"]["url"] for event in self.seen("Network.requestWillBeSent")]
        asked += [event["url"] for event in self.seen("Network.webSocketCreated")]
        return [address for address in asked if not address.startswith("data:")]

    def blocked(self) -> list[str]:
        "Addresses of those that the page's policy did not let out."
        failed = {event["requestId"]: event.get("blockedReason") for event in self.seen("Network.loadingFailed")}
        asked = self.seen("Network.requestWillBeSent")
        return [event["request"]["url"] for event in asked if failed.get(event["requestId"]) == "csp"]

    def complaints(self) -> list[str]:
        "Scripts that ran, dialogs, and what the console says."
        ran = [f"ran: {event['payload']}" for event in self.seen("Runtime.bindingCalled")]
        ran += [f"dialog: {event['message']}" for event in self.seen("Page.javascriptDialogOpening")]
        ran += [f"console: {event['args']}" for event in self.seen("Runtime.consoleAPICalled")]
        ran += [f"exception: {event['exceptionDetails']['text']}" for event in self.seen("Runtime.exceptionThrown")]
        return ran + [f"log: {event['entry']['text']}" for event in self.seen("Log.entryAdded")]
