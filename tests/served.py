"""A server of a small run in a process of its own, and what is done to it by tests and by torture."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEY = "0123456789abcdef-Key"
NOTICE = "fictional, not medical advice"
LOOK = """
import http.client, json, sys, time
line, delays = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
ended_s = time.monotonic() + float(sys.argv[2])
while time.monotonic() < ended_s:
    started_s = time.monotonic()
    line.request("GET", "/health")
    line.getresponse().read()
    delays.append(time.monotonic() - started_s)
    time.sleep(0.02)
print(json.dumps(delays))
"""  # In a process of its own: the crowd must not delay who measures
ROUTES = [
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/run"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/classify"),
    ("POST", "/v1/tag"),
    ("HEAD", "/v1/models"),
    ("POST", "/health"),
    ("POST", "/"),
    ("DELETE", "/"),
    ("OPTIONS", "/page.js"),
    ("GET", "//"),
    ("GET", "/page.js/"),
    ("GET", "/page.html"),
    ("GET", "/nowhere"),
]
OPEN_ROUTES = [  # All that need no key: how the server is, and the page that asks for the key
    ("GET", "/health"),
    *((method, path) for path in ("/", "/page.css", "/page.js") for method in ("GET", "HEAD")),
]


def make_run(folder: Path, task: str, model: Any = "tiny", **settings: Any) -> Path:
    "A finished run's folder, of a model that nobody has tuned."
    from llmft_nb.core import RunRecord, write_record
    from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, LLMForTokenClassification, size_head

    kinds = {"classify": LLMForSequenceClassification, "tag": LLMForTokenClassification}
    made = kinds.get(task, LLMForCausalLM).from_pretrained(model)
    if task in kinds:
        size_head(made, ["no", "yes"] if task == "classify" else ["O", "B-drug", "I-drug"])
    made.save_pretrained(folder / "model")
    write_record(folder, RunRecord(task, "finished", {}, {"notice": NOTICE}, settings, {}, {}))
    return folder


@dataclass
class Served:
    "A server that runs."

    process: subprocess.Popen[str]
    port: int

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str
    ) -> tuple[int, Any, Any]:
        "Status, headers, and the body, parsed where it is JSON."
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        line.request(method, path, sent, {name: value for name, value in given.items() if value})
        answer = line.getresponse()
        text = answer.read().decode()
        line.close()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, answer.headers, json.loads(text) if is_json and text else text

    def raw(self, data: bytes, ends: bool, timeout: float = 20) -> bytes:
        "Send bytes, say perhaps that there are no more, and hear all that comes until the connection is closed."
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as line:
            with contextlib.suppress(ConnectionError):
                line.sendall(data)
                if ends:
                    line.shutdown(socket.SHUT_WR)
            return drain(line)

    def active(self) -> int:
        "Answers that are being written."
        text = self.ask("GET", "/metrics")[2]
        return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith("llmft_active "))))

    def memory(self) -> int:
        "Resident bytes."
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss


def drain(line: socket.socket) -> bytes:
    "All that comes until the connection is closed."
    heard = b""
    with contextlib.suppress(ConnectionError):
        while part := line.recv(65536):
            heard += part
    return heard


@contextlib.contextmanager
def serving(run: Path, folder: Path, *words: str, first: str = "") -> Iterator[Served]:
    "Start `llmft serve` on any free port, perhaps after some other code, and end it afterwards."
    key = folder / f"{run.name}.key"
    key.write_text(KEY)
    key.chmod(0o600)
    code = "from llmft_nb.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        f"{first}\n{code}",
        "serve",
        str(run),
        "--port",
        "0",
        "--json",
        "--api-key-file",
        str(key),
        *words,
    ]
    with (folder / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line, (folder / f"{run.name}.log").read_text()
        yield Served(process, int(json.loads(line)["address"].rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()


# --- what is done to a server; each says what is wrong, or nothing ---


def malformed_bytes(seed: int) -> tuple[bytes, bool]:
    "A request with something wrong in it, and whether it is whole HTTP."
    chosen = random.Random(seed)
    good = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    wrong_values = [None, [], {}, "x", -1, 1e308, 2**63, [[]], "\ud800", True, 0.5, "x" * 5000]
    name = chosen.choice(
        ["messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "top_logprobs", "n"]
        + ["chat_template", "tools", "stream_options", "user", "model", "\n", ""]
    )
    value = chosen.choice(wrong_values)
    body = json.dumps(good | {name: value}).encode()
    way = chosen.randrange(8)
    if way == 1:
        body = body[: chosen.randrange(len(body))]
    elif way == 2:
        place = chosen.randrange(len(body))
        body = body[:place] + chosen.randbytes(3) + body[place:]
    elif way == 3:
        body = chosen.choice(
            [b"[" * 50_000, b'{"messages": NaN}', b'{"seed": ' + b"9" * 6000 + b"}", b"\x00", b"\xff\xfe"]
        )
    path = chosen.choice(["/v1/chat/completions", "/v1/completions", "/v1/classify", "/v1/tag"])
    head = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
    ]
    head += [f"Content-Length: {len(body)}", "Connection: close"]
    if way == 4:
        extra = [
            "Content-Length: -1",
            "Content-Length: 9",
            "X\x00: y",
            "Transfer-Encoding: nonsense",
            " folded",
            "Host: b",
        ]
        head.insert(chosen.randrange(1, len(head)), chosen.choice(extra))
    elif way == 5:
        head[0] = chosen.choice(
            ["POST", "GET / HTTP/9.9", "POST  /v1 HTTP/1.1", "\x16\x03\x01", "A" * 100_000, "GET /%zz%00 HTTP/1.1"]
        )
    elif way == 6:
        head[3] = chosen.choice(["Content-Type: text/plain", "Content-Type:", "Content-Encoding: gzip"])
    elif way == 7:
        return chosen.randbytes(chosen.randrange(1, 400)), False
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body, way < 4 or way == 6


def check_malformed(served: Served, seeds: range) -> str:
    "V1: no 5xx, no hang, and errors in one form; the next good request is answered right."
    for seed in seeds:
        data, is_http = malformed_bytes(seed)
        started_s = time.monotonic()
        heard = served.raw(data, ends=not is_http)
        if time.monotonic() - started_s > 12:
            return f"request {seed} hung"
        status = heard.split(b" ", 2)[1][:3] if heard.startswith(b"HTTP/1.1 ") else b"none"
        if status.startswith(b"5") or (is_http and status == b"none"):
            return f"request {seed}: {heard[:200]!r}"
        if status.startswith(b"4") and b"HEAD" not in data[:5]:
            error = json.loads(heard.partition(b"\r\n\r\n")[2])["error"]
            if set(error) != {"message", "type", "param", "code"} or not error["message"]:
                return f"request {seed}: {error}"
    good = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    status, _, answer = served.ask("POST", "/v1/chat/completions", good)
    return "" if status == 200 and answer["usage"]["completion_tokens"] == 2 else f"a good request: {status} {answer}"


def check_stalled(served: Served, n_lines: int) -> str:
    "V3: connections that send half a request, or do not read, are closed within 15 seconds."
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    starts = ["", "GET /hea", "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"]
    starts.append(head + "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    starts.append(head + "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    lines = []
    for k in range(n_lines):
        lines.append(socket.create_connection(("127.0.0.1", served.port)))
        lines[-1].sendall(starts[k % len(starts)].encode())
    ended_s, still = time.monotonic() + 15, list(enumerate(lines))
    while still and time.monotonic() < ended_s:
        time.sleep(0.5)
        if served.ask("GET", "/health", timeout=5)[0] != 200:
            return "no health meanwhile"
        left = []
        for k, line in still:
            line.setblocking(False)
            try:
                if k % len(starts) in (1, 2) and line.recv(100) == b"":  # Trickles on: that is no reason to wait longer
                    continue
                if k % len(starts) not in (1, 2) and line.recv(100) == b"":
                    continue
            except BlockingIOError:
                if k % 5 == 2:
                    with contextlib.suppress(OSError):
                        line.sendall(b"X-A: b\r\n")
            except ConnectionError:
                continue
            left.append((k, line))
        still = left
    for line in lines:
        line.close()
    return f"{len(still)} of {n_lines} still open, e.g. {still[0][0]}" if still else ""


def check_gone(served: Served, n_clients: int) -> str:
    "V4: a client that leaves in the middle of its answer frees its slot within half a second."
    slowest_s = 0.0
    for k in range(n_clients):
        body = {"messages": [{"role": "user", "content": f"Tell me of {k}"}], "max_tokens": 480, "stream": k % 2 == 0}
        body |= {"temperature": 1.5, "seed": k}
        sent = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        line = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        line.sendall(head.encode() + sent)
        if k % 2 == 0:
            line.recv(64)
        waited_s = time.monotonic() + 10
        while served.active() != 1:
            if time.monotonic() > waited_s:
                return f"client {k} was not served"
        line.close()
        left_s = time.monotonic()
        while served.active():
            if time.monotonic() > left_s + 5:
                return f"the slot of client {k} is not free after 5 s"
        slowest_s = max(slowest_s, time.monotonic() - left_s)
    return f"a slot was free after {slowest_s:.2f} s only" if slowest_s > 0.5 else ""


def check_crowd(served: Served, n_open: int, rate: float, seconds: float, health_s: float = 0.25) -> str:
    "V2: many connections, and more requests than can be answered: health soon, 429 alone, no stream lost."
    idle, wrong, counts, lock = [], [], {}, threading.Lock()
    for _ in range(n_open):
        idle.append(socket.create_connection(("127.0.0.1", served.port)))

    def one(k: int) -> None:
        body = {"messages": [{"role": "user", "content": f"Who is {k}?"}], "max_tokens": 16, "stream": k % 2 == 0}
        try:
            status, headers, answer = served.ask("POST", "/v1/chat/completions", body, timeout=90)
        except (OSError, http.client.HTTPException) as error:
            status, headers, answer = 0, {}, repr(error)
        with lock:
            counts[status] = counts.get(status, 0) + 1
            if status == 429 and not headers.get("retry-after"):
                wrong.append("429 without Retry-After")
            elif status == 200 and k % 2 == 0 and not answer.endswith("data: [DONE]\n\n"):
                wrong.append(f"a stream was lost: {answer[-100:]}")
            elif status not in (200, 429):
                wrong.append(f"{status} {answer}")

    looking = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(served.port), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    threads: list[threading.Thread] = []
    started_s = time.monotonic()
    for k in range(int(rate * seconds)):
        time.sleep(max(0.0, started_s + k / rate - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(k,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for line in idle:
        line.close()
    delays = json.loads(looking.communicate()[0])
    p99_s = sorted(delays)[int(0.99 * len(delays))]
    if p99_s > health_s:
        wrong.append(f"/health took {p99_s:.3f} s in the 99th percentile of {len(delays)}")
    if not counts.get(200):
        wrong.append("nobody was answered")
    print(f"/health p99 {p99_s:.3f} s of {len(delays)}; {counts}")
    return "; ".join(dict.fromkeys(wrong[:5]))


def check_keys(served: Served) -> str:
    "V5: every route with no key, a wrong one, the right one, another case, and in the query."
    wrong = []
    for method, path in [*ROUTES, *OPEN_ROUTES]:
        is_open = (method, path) in OPEN_ROUTES
        tries = {
            "none": (path, ""),
            "wrong": (path, f"Bearer {KEY[:-1]}"),
            "longer": (path, f"Bearer {KEY}x"),
            "other case": (path, f"Bearer {KEY.swapcase()}"),
            "in the query": (f"{path}?api_key={KEY}&key={KEY}&Authorization=Bearer%20{KEY}", ""),
            "basic": (path, f"Basic {KEY}"),
            "right": (path, f"bearer {KEY}"),
        }
        for name, (asked, header) in tries.items():
            status, _, _ = served.ask(method, asked, b"{}" if method == "POST" else None, Authorization=header)
            if (status == 401) != (name != "right" and not is_open) or (is_open and status != 200):
                wrong.append(f"{method} {path}, {name}: {status}")
        for strange in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            if served.ask(method, path, **strange)[0] not in (400, 403):
                wrong.append(f"{method} {path}, {strange}")
    return "; ".join(wrong)


def end(served: Served) -> int:
    "Send SIGTERM, and say with what status it ended."
    os.kill(served.process.pid, signal.SIGTERM)
    return served.process.wait(timeout=60)


# --- in full: `make torture` ---


def tortured(number: int, folder: Path, check: Any, *words: str) -> str:
    "A server for some cases of a figure."
    run = make_run(folder / "run", "instruct", max_new_tokens=24, max_length=256)
    with serving(run, folder, *words) as served:
        return check(served, number)


def malformed(number: int, shared: Path, folder: Path) -> str:
    "V1: five hundred malformed requests each; memory stays as it was after the first hundred."

    def check(served: Served, number: int) -> str:
        seeds = range(500 * number, 500 * number + 500)
        first = check_malformed(served, seeds[:100])
        before = served.memory()
        wrong = first or check_malformed(served, seeds[100:])
        grown = served.memory() - before
        return wrong or (f"memory grew by {grown:,} bytes" if grown > 60 * 2**20 else "")

    return tortured(number, folder, check)


def crowd(number: int, shared: Path, folder: Path) -> str:
    "V2: 500 connections and 200 requests a second for 30 seconds."
    return tortured(number, folder, lambda served, number: check_crowd(served, 500, 200, 30))


def stalled(number: int, shared: Path, folder: Path) -> str:
    "V3: 300 stalled connections."
    return tortured(number, folder, lambda served, number: check_stalled(served, 300))


def gone(number: int, shared: Path, folder: Path) -> str:
    "V4: 100 clients gone in the middle of an answer."
    return tortured(number, folder, lambda served, number: check_gone(served, 100))


def keys(number: int, shared: Path, folder: Path) -> str:
    "V5: every route with every key."
    return tortured(number, folder, lambda served, number: check_keys(served))


def tune_run(folder: Path) -> Path:
    "A run that has learnt to answer the house pharmacy's questions, three epochs of 2,400; two minutes."
    from llmft_nb.finetune import finetune
    from llmft_nb.rows import read_rows

    rows = list(read_rows("pharmacy", split="train"))[:2400]
    asked = [{"prompt": row["text"], "completion": f"{row['label']}: {row['reason']}."} for row in rows]
    finetune(asked, task="instruct", out=folder, epochs=3, callbacks=(), n_written=8, max_new_tokens=48)
    return folder


def equal(number: int, shared: Path, folder: Path) -> str:
    "Served answers are those of `predict`, for 300 questions, by a model as it came and by one that was tuned."
    import openai
    import test_serving

    from llmft_nb.predict import load_predictor

    run = make_run(folder / "run", "instruct", max_new_tokens=24, max_length=256)
    if number:
        run = tune_run(folder / "tuned" / "run")
    with serving(run, folder) as served:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key=KEY, max_retries=0, timeout=60)
        answers = test_serving.check_equal(client, load_predictor(run), 300)
    print(f"{len(answers)} answers, {len(set(answers))} of them different")
    return "" if len(answers) == 300 and len(set(answers)) > 20 else f"{len(set(answers))} different answers"
