"""Tuned models over HTTP: answers beside those of `transformers serve`, and labels beside a plain loop.

    python benchmarks/serving.py [--model FOLDER | --shape 8x512] [--repeats 3] [--only writing]
    python benchmarks/serving.py --only rows --encoder MINILM

writing: both servers have the same weights, in f32 on the CPU, and are asked the same questions of the house pharmacy
by 1, 8 and 32 clients at once: greedy answers of --tokens tokens at most, streamed. In each repeat every server is
started, warmed up, asked and ended; the order turns around from one repeat to the next. `transformers serve` is tried
in each setting of PEERS, and the best of them, figure by figure, is what counts. Told are the medians over the repeats
of the time to the first text (median and 95th percentile of a repeat's requests) and of the tokens of all clients a
second. Asked: at least as good for 1 client, in both; 1.5 times the tokens a second for 8; and answers as long as the
other's, token for token, for unequal work would be no comparison.
Without --model it is the embedded base, as small as models come: what a server spends around the network shows most.
--shape LAYERSxWIDTH draws a larger one of the same kind at random, whose network is the work.

rows: all-MiniLM-L6-v2 with a head for 77 labels, drawn at random (the work is that of a tuned one), labels the test
rows of banking77: `predict` with all of them at once, then 32 clients of `llmft serve`, each request with one text,
and with 16. Asked: 0.8 times the rows a second of `predict`, in both.

The clients are one process, this one; it runs on the same cores as the servers and costs all of them alike.
A line of JSON for each server and number of clients, and one for each comparison. banking77 is found through
LLMFT_DATA. The exit status is 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIENTS = (1, 8, 32)
TOKENS_ASKED = {1: 1.0, 8: 1.5}  # By clients: times the other's tokens a second
FIRST_ASKED = {1: 1.0}  # By clients: times the other's time to the first text, at most
ROWS_ASKED, ROW_CLIENTS, ROW_SIZES = 0.8, 32, (1, 16)
OURS = "llmft serve"
SMALL = ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]
PEERS = {  # Settings of `transformers serve`
    "one after the other": [],
    "continuous batching": ["--continuous-batching"],
    "continuous batching, small cache": ["--continuous-batching", *SMALL],
}
STARTS = {
    OURS: "from llmft_nb.cli import main; main()",
    "transformers serve": "from transformers.cli.transformers import main; main()",
}


# --- servers ---


@contextlib.contextmanager
def started(
    server: str,  # A key of `STARTS`
    words: Sequence[str],  # Behind `serve`
    folder: Path,  # For what it says
    patience_s: float = 180,  # Until it listens
) -> Iterator[int]:  # Its port
    "A server in a process of its own, from when it answers until it is no longer needed."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", STARTS[server], "serve", *words, "--host", "127.0.0.1", "--port", str(port)]
    said = folder / "server.log"
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    ends_s = time.monotonic() + patience_s
    try:
        while not asyncio.run(is_up(port)):
            if process.poll() is not None or time.monotonic() > ends_s:
                raise SystemExit(f"{server} did not start:\n{said.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def is_up(
    port: int,  # Of a server that may not listen yet
) -> bool:  # Whether it answers
    "Ask for its health."
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return b" 200 " in line


# --- clients ---


@dataclass(frozen=True)
class Heard:
    "What a client heard of one answer."

    text: str  # All of it
    n_tokens: int  # As the server counts them
    first_s: float  # From asking to the first text


def post(
    path: str,  # Of a route
    body: dict[str, Any],  # To be sent as JSON
    close: bool,  # Whether the connection is for this request only
) -> bytes:  # As it goes over the line
    "A request."
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", f"Connection: {'close' if close else 'keep-alive'}", "", ""]
    return "\r\n".join(lines).encode() + data


async def hear_answer(
    port: int,  # Of a server
    request: bytes,  # For a stream of events, over a connection of its own
) -> Heard:  # The answer
    "Ask, and listen to the end."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started_s, first_s, n_tokens = time.perf_counter(), 0.0, 0
    text: list[str] = []
    writer.write(request)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"a question was refused: {(status + await reader.read()).decode(errors='replace')}")
    while line := await reader.readline():  # Lengths of chunks and headers lie between the events
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise SystemExit(f"an answer broke off: {event['error']}")
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece and not text:
            first_s = time.perf_counter() - started_s
        text += [piece] if piece else []
        n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    writer.close()
    return Heard("".join(text), n_tokens, first_s)


async def hear_labels(
    line: tuple[asyncio.StreamReader, asyncio.StreamWriter],  # Kept open from one request to the next
    request: bytes,  # To be answered whole
) -> list[str]:  # Labels
    "Ask for labels."
    reader, writer = line
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(one.lower().split(b": ", 1) for one in head.split(b"\r\n")[1:] if one)
    body = json.loads(await reader.readexactly(int(fields[b"content-length"])))
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(f"a request was refused: {body}")
    return [row["label"] for row in body["data"]]


async def crowd(
    n_clients: int,  # At once
    n_requests: int,  # Of all clients
    ask: Callable[[int, int], Any],  # A client's number and a request's → a coroutine with its answer
) -> tuple[list[Any], float]:  # Answers in the order of the requests, and the seconds for all
    "Clients that take one request after the other until there is none left."
    waiting, answers = iter(range(n_requests)), [None] * n_requests

    async def client(number: int) -> None:
        for k in waiting:
            answers[k] = await ask(number, k)

    started_s = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(n_clients)))
    return answers, time.perf_counter() - started_s


# --- writing ---


def questions(
    n_questions: int,  # How many, over again where there are not so many
) -> list[str]:  # As customers ask them
    "Questions of the house pharmacy."
    from llmft_nb.rows import read_rows

    texts = [str(row["text"]) for row in read_rows("pharmacy", split="test")]
    step = max(1, len(texts) // n_questions)
    return [texts[k * step % len(texts)] for k in range(n_questions)]


def make_run(
    folder: Path,  # Created here
    model: str | None,  # A folder; None: the embedded base
    shape: str | None,  # "LAYERSxWIDTH": drawn at random instead
) -> tuple[Path, Path]:  # A run's folder for ours, a model's for the other
    "The model that both serve."
    from llmft_nb.core import RunRecord, write_record
    from llmft_nb.modeling import LLMForCausalLM

    if model and (Path(model) / "run.json").is_file():
        return Path(model), Path(model) / "model"
    folder.mkdir()
    if model and not shape:
        (folder / "model").symlink_to(Path(model).resolve(), target_is_directory=True)
    else:
        base = LLMForCausalLM.from_pretrained("tiny")
        if shape:
            base.network = drawn(base.network.config, shape)
        base.save_pretrained(folder / "model")
    write_record(folder, RunRecord("instruct", "finished", {}, {}, {"max_length": 512}, {}, {}))
    return folder, folder / "model"


def drawn(
    config: Any,  # Of the embedded base
    shape: str,  # "LAYERSxWIDTH"
) -> Any:  # A network
    "A larger network of the same kind, drawn at random."
    import copy

    import torch
    from transformers import LlamaForCausalLM

    n_layers, width = (int(word) for word in shape.split("x"))
    larger = copy.deepcopy(config)
    larger.num_hidden_layers, larger.hidden_size, larger.intermediate_size = n_layers, width, width * 11 // 4
    larger.num_attention_heads, larger.num_key_value_heads, larger.head_dim = width // 64, width // 64, 64
    larger.dtype = torch.float32
    torch.manual_seed(0)
    return LlamaForCausalLM(larger)


def time_writing(
    port: int,  # Of a server
    requests: Sequence[bytes],  # Each for a stream
    clients: Sequence[int],  # How many at once, one after the other
) -> dict[int, dict[str, Any]]:  # By clients: figures and answers
    "Ask one server."

    def ask(_: int, k: int) -> Any:
        return hear_answer(port, requests[k])

    asyncio.run(crowd(2, 4, ask))  # Warms up
    found = {}
    for n_clients in clients:
        n_requests = min(len(requests), max(8, 3 * n_clients))
        heard, seconds = asyncio.run(crowd(n_clients, n_requests, ask))
        firsts = sorted(one.first_s for one in heard)
        found[n_clients] = {
            "first_ms": 1000 * statistics.median(firsts),
            "first_p95_ms": 1000 * firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
            "tokens_per_s": sum(one.n_tokens for one in heard) / seconds,
            "heard": [(one.n_tokens, one.text) for one in heard],
        }
    return found


def compare_writing(
    run: Path,  # A finished run, for ours
    model: Path,  # Its model, for the other
    *,
    repeats: int = 3,  # Of everything
    n_tokens: int = 48,  # Of an answer, at most
    clients: Sequence[int] = CLIENTS,  # How many at once
    peers: Sequence[str] = tuple(PEERS),  # Settings of the other to try
    slots: int | None = None,  # Answers that ours writes at once; None: its default
) -> bool:  # Whether all figures are kept
    "Time both servers in turn, and print."
    said = [[{"role": "user", "content": text}] for text in questions(max(8, 3 * max(clients)))]
    asked = {"max_tokens": n_tokens, "temperature": 0, "stream": True}
    counted = {"stream_options": {"include_usage": True}}  # The other counts without being asked
    ours = [post("/v1/chat/completions", {"messages": one, **asked, **counted}, close=True) for one in said]
    other = [post("/v1/chat/completions", {"messages": one, **asked}, close=True) for one in said]
    plain = ["--device", "cpu", "--dtype", "float32"]
    mine = ["--slots", str(slots)] if slots else []
    servers = [(OURS, " ".join(mine), [str(run), *mine], ours)]
    servers += [("transformers serve", name, [str(model), *plain, *PEERS[name]], other) for name in peers]
    found: dict[tuple[str, str], list[dict[int, dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="llmft_serving_") as folder:
        for repeat in range(repeats):
            for server, setting, words, requests in servers[:: -1 if repeat % 2 else 1]:
                with started(server, words, Path(folder)) as port:
                    found.setdefault((server, setting), []).append(time_writing(port, requests, clients))
    lines = [tell_writing(*who, n, [one[n] for one in found[who]]) for n in clients for who in found]
    print("\n".join(json.dumps(line) for line in lines))
    kept = [judge_writing(n, [line for line in lines if line["clients"] == n]) for n in clients]
    same = all(same_length([one[n]["heard"] for runs in found.values() for one in runs], n) for n in clients)
    return all(kept) and same


def tell_writing(
    server: str,  # Its command
    setting: str,  # How it was started
    n_clients: int,  # At once
    figures: Sequence[dict[str, Any]],  # Of each repeat
) -> dict[str, Any]:  # To be printed
    "Medians over the repeats."
    names = ("first_ms", "first_p95_ms", "tokens_per_s")
    medians = {name: round(statistics.median(one[name] for one in figures), 2) for name in names}
    n_tokens = sum(count for count, _ in figures[0]["heard"])
    told = {"server": server, "setting": setting, "clients": n_clients, **medians, "tokens": n_tokens}
    return told | {"requests": len(figures[0]["heard"]), "repeats": len(figures)}


def judge_writing(
    n_clients: int,  # At once
    lines: Sequence[dict[str, Any]],  # Of this number of clients
) -> bool:  # Whether what is asked is kept
    "Hold ours against the best of the other's settings, figure by figure; print."
    mine = next(line for line in lines if line["server"] == OURS)
    others = [line for line in lines if line["server"] != OURS]
    fastest = max(others, key=lambda line: line["tokens_per_s"])
    soonest = min(others, key=lambda line: line["first_ms"])
    tokens = mine["tokens_per_s"] / fastest["tokens_per_s"]
    first = mine["first_ms"] / soonest["first_ms"]
    kept = tokens >= TOKENS_ASKED.get(n_clients, 0.0) and first <= FIRST_ASKED.get(n_clients, float("inf"))
    told = {"clients": n_clients, "tokens_per_s_ratio": round(tokens, 3), "against": fastest["setting"]}
    told |= {"asked": TOKENS_ASKED.get(n_clients), "first_ratio": round(first, 3), "first_against": soonest["setting"]}
    print(json.dumps(told | {"first_asked": FIRST_ASKED.get(n_clients), "kept": kept}))
    return kept


def same_length(
    heard: Sequence[Sequence[tuple[int, str]]],  # Of each server and repeat: tokens and text of each answer
    n_clients: int,  # At once
) -> bool:  # Whether all wrote as much
    "See that the work was the same; two sums in another order may choose another token where two are as likely; print."
    counts = [sum(count for count, _ in one) for one in heard]
    n_same = sum(len({one[k] for one in heard}) == 1 for k in range(len(heard[0])))
    kept = max(counts) <= 1.02 * min(counts) and min(counts) > 0
    told = {"clients": n_clients, "tokens": [min(counts), max(counts)], "same_answers": n_same, "of": len(heard[0])}
    print(json.dumps(told | {"kept": kept}))
    return kept


# --- rows ---


def time_rows(
    port: int,  # Of a server
    texts: Sequence[str],  # To label
    size: int,  # Texts of a request
) -> tuple[list[str], float]:  # Labels, and texts a second
    "Ask for labels, 32 clients at once."
    parts = [list(texts[k : k + size]) for k in range(0, len(texts), size)]
    requests = [post("/v1/classify", {"input": part[0] if size == 1 else part}, close=False) for part in parts]

    async def ask_all() -> tuple[list[Any], float]:
        open_one = asyncio.open_connection
        lines = [await open_one("127.0.0.1", port) for _ in range(min(ROW_CLIENTS, len(parts)))]
        told = await crowd(len(lines), len(requests), lambda number, k: hear_labels(lines[number], requests[k]))
        for _, writer in lines:
            writer.close()
        return told

    answers, seconds = asyncio.run(ask_all())
    return [label for part in answers for label in part], len(texts) / seconds


def compare_rows(
    encoder: str,  # Folder of MiniLM
    *,
    repeats: int = 3,  # Of everything
    n_rows: int | None = None,  # Of banking77; None: all of its test rows
) -> bool:  # Whether both ratios are kept
    "Time the server and a plain loop in turn, and print."
    from scoring import make_predictor, write_test_rows

    from llmft_nb.core import RunRecord, write_record
    from llmft_nb.export import load_exported

    with tempfile.TemporaryDirectory(prefix="llmft_serving_") as parent:
        run, file = Path(parent) / "run", Path(parent) / "test.jsonl"
        run.mkdir()
        write_test_rows(file)
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()][:n_rows]
        make_predictor(encoder, file).model.save_pretrained(run / "model")
        write_record(run, RunRecord("classify", "finished", {}, {}, {"max_length": 128}, {}, {}))
        predictor = load_exported(run)
        wanted = [answer["label"] for answer in predictor.predict(texts)]
        rates: dict[int, list[float]] = {size: [] for size in (0, *ROW_SIZES)}  # 0: the plain loop
        with started(OURS, [str(run)], Path(parent)) as port:
            for repeat in range(repeats + 1):
                for size in list(rates)[:: -1 if repeat % 2 else 1]:
                    started_s = time.perf_counter()
                    labels = [one["label"] for one in predictor.predict(texts)] if not size else []
                    rate = len(texts) / (time.perf_counter() - started_s)
                    if size:
                        labels, rate = time_rows(port, texts, size)
                    if sum(a != b for a, b in zip(labels, wanted, strict=True)) > len(texts) / 1000:
                        raise SystemExit("served labels are not those of predict")
                    rates[size] += [rate] if repeat else []  # The first is for warming up
    return judge_rows({size: statistics.median(kept) for size, kept in rates.items()}, len(texts), repeats)


def judge_rows(
    rates: dict[int, float],  # Texts a second, by texts of a request; 0: the plain loop
    n_rows: int,  # Labelled each time
    repeats: int,  # Whose medians these are
) -> bool:  # Whether all ratios are kept
    "Hold the server's rates against the plain loop's; print."
    counts = {"rows": n_rows, "repeats": repeats}
    print(json.dumps({"server": "predict", "clients": 0, "rows_per_s": round(rates[0], 1), **counts}))
    kept = True
    for size in (size for size in rates if size):
        ratio = rates[size] / rates[0]
        kept &= ratio >= ROWS_ASKED
        told = {"server": OURS, "clients": ROW_CLIENTS, "texts": size, "rows_per_s": round(rates[size], 1), **counts}
        print(json.dumps(told | {"ratio": round(ratio, 3), "asked": ROWS_ASKED, "kept": ratio >= ROWS_ASKED}))
    return kept


def main() -> None:
    "Measure, print, and fail where a figure is missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("writing", "rows"), help="one of the two")
    parser.add_argument("--model", help="folder of a run, or of a model that writes; else the embedded base")
    parser.add_argument("--shape", help="LAYERSxWIDTH of a model drawn at random instead, e.g. 8x512")
    parser.add_argument("--encoder", help="folder of all-MiniLM-L6-v2, for rows")
    parser.add_argument("--repeats", type=int, default=3, help="of everything")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--slots", type=int, help="answers that llmft serve writes at once; else its default")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS), help="at once, for writing")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="settings to try")
    parser.add_argument("--rows", type=int, help="of banking77; else all of its test rows")
    chosen = parser.parse_args()
    if chosen.only != "writing" and not chosen.encoder:
        parser.error("rows need --encoder; --only writing goes without")
    kept = []
    if chosen.only != "rows":
        with tempfile.TemporaryDirectory(prefix="llmft_serving_") as folder:
            run, model = make_run(Path(folder) / "run", chosen.model, chosen.shape)
            options: dict[str, Any] = {"n_tokens": chosen.tokens, "clients": chosen.clients, "peers": chosen.peers}
            options |= {"repeats": chosen.repeats, "slots": chosen.slots}
            kept.append(compare_writing(run, model, **options))
    if chosen.only != "writing":
        kept.append(compare_rows(chosen.encoder, repeats=chosen.repeats, n_rows=chosen.rows))
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
