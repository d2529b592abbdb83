"""The server as its users and its enemies meet it: a process of its own, asked by OpenAI's client and by sockets.

The figures in full are V1 to V5 of `make torture`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import served
import torch
from served import KEY, NOTICE, Served, make_run

from llmft_nb.core import assets_folder
from llmft_nb.predict import Predictor, load_predictor

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    settings = {"max_new_tokens": 24, "max_length": 256, "system": "You know the pharmacy.", "no_repeat_ngram": 4}
    return make_run(tmp_path_factory.mktemp("served") / "run", "instruct", **settings)


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load_predictor(run)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served.serving(run, tmp_path_factory.mktemp("keys"), "--slots", "6", "--log-level", "info") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0, timeout=60)


def questions(n_questions: int) -> list[str]:
    "From the house pharmacy."
    lines = (assets_folder() / "data" / "pharmacy" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:n_questions]]


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- answers ---


def check_equal(client: openai.OpenAI, predictor: Predictor, n_questions: int) -> list[str]:
    "Whatever the mix of requests, answers are those of `predict`, whole or as a stream; these are returned."
    texts = questions(n_questions)
    expected = [answer["completion"] for answer in predictor.predict(texts)]

    def ask(k: int) -> str:
        options: dict[str, Any] = {"model": "run", "messages": talk(texts[k])}
        if k % 3 == 0:
            chunks = client.chat.completions.create(**options, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if k % 3 == 1:  # Company that draws
            client.chat.completions.create(**options, temperature=1.0, seed=k, max_tokens=5 + k % 7)
        return client.chat.completions.create(**options).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(len(texts)))) == expected
    return expected


def test_served_answers_are_those_of_predict(client: openai.OpenAI, predictor: Predictor) -> None:
    check_equal(client, predictor, 30)


def test_every_answer_says_what_it_is(client: openai.OpenAI, predictor: Predictor) -> None:
    answer = client.chat.completions.create(model="run", messages=talk("May I?"), max_tokens=3)
    assert answer.metadata == {"notice": NOTICE} and answer.model == "run"
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    chunks = list(
        client.chat.completions.create(
            model="run", messages=talk("May I?"), max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.metadata == {"notice": NOTICE} for chunk in chunks)
    assert chunks[-1].usage == answer.usage and chunks[-1].choices == []
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == answer.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["run"] and client.models.retrieve("run").id == "run"


def test_a_system_message_of_the_client_replaces_that_of_training(client: openai.OpenAI) -> None:
    asked = [{"role": "system", "content": "You know the pharmacy."}, *talk("May I?")]
    usage = [client.chat.completions.create(model="run", messages=m, max_tokens=4) for m in (asked, talk("May I?"))]
    assert usage[0].usage == usage[1].usage and usage[0].choices[0].message == usage[1].choices[0].message


def test_stop_texts_end_an_answer_across_tokens(client: openai.OpenAI, predictor: Predictor) -> None:
    whole = predictor.predict(["May I take both?"])[0]["completion"]
    for start in range(2, len(whole) - 6, 5):
        stop = whole[start : start + 4]
        answer = client.chat.completions.create(
            model="run", messages=talk("May I take both?"), stop=[stop, "\0x"[1:] * 9]
        )
        assert answer.choices[0].message.content == whole[: whole.find(stop)]
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens <= 24


def test_seeds_repeat_whatever_the_company(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": seed, "max_tokens": 16}
        return client.chat.completions.create(model="run", messages=talk("Who?"), **options).choices[0].message.content

    alone = [drawn(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, [0, 1, 2, 3] * 3)) == alone * 3
    assert len(set(alone)) == 4


def test_probabilities_are_those_of_one_forward(client: openai.OpenAI, predictor: Predictor) -> None:
    from llmft_nb.worker import Asker

    with ThreadPoolExecutor(4) as pool:
        texts = ["Who?", "May I take both of them today?", "When?", "Is it safe, and for how long?"]
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 10}
        ask = lambda text: client.chat.completions.create(model="run", messages=talk(text), **options)  # noqa: E731
        answers = list(pool.map(ask, texts))
    for text, answer in zip(texts, answers, strict=True):
        told = answer.choices[0].logprobs.content
        asker = Asker(predictor)
        ids = asker.prompt_ids(talk(text))
        assert len(told) == 10 == answer.usage.completion_tokens and answer.usage.prompt_tokens == len(ids)
        for one in told:
            with torch.no_grad():
                logs = predictor.model.network(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            token = max((abs(logs[k] - one.logprob), k) for k in [int(logs.argmax())])[1]
            near = [k for k in logs.topk(8).indices.tolist() if asker.tokenizer.decode([k]) == one.token]
            assert near and abs(float(logs[near[0]]) - one.logprob) < 1e-4
            best = [float(value) for value in logs.topk(3).values]
            assert [top.logprob for top in one.top_logprobs] == pytest.approx(best, abs=1e-4)
            assert bytes(one.bytes).decode() == one.token and token >= 0
            ids = [*ids, near[0]]


def test_completions_go_on_from_a_text(client: openai.OpenAI, predictor: Predictor) -> None:
    plain = Predictor(predictor.model, 256, settings=dict(predictor.settings), task="text")
    texts = ["Once upon a time", "The door was <|end|> open"]
    expected = [answer["completion"] for answer in plain.predict(texts)]
    answers = [client.completions.create(model="run", prompt=text) for text in texts]
    assert [answer.choices[0].text for answer in answers] == expected
    assert answers[0].metadata == {"notice": NOTICE}
    chunks = client.completions.create(model="run", prompt=[texts[0]], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]


def test_completions_tell_probabilities_in_columns(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "run", "prompt": "Once upon a time", "max_tokens": 12}
    whole = client.completions.create(**options, logprobs=2).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == len(whole.text_offset) == 12
    assert all(one == max(best.values()) for one, best in zip(whole.token_logprobs, whole.top_logprobs, strict=True)), (
        "greedy takes the likeliest"
    )
    assert whole.text_offset == [len("".join(whole.tokens[:k])) for k in range(12)]
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, logprobs=2, stream=True)]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [place for part in parts for place in part.text_offset] == whole.text_offset
    assert client.completions.create(**options).choices[0].logprobs is None


def test_a_prompt_of_columns_is_put_together_as_in_training(tmp_path: Path, one_thread: None) -> None:
    pattern = "{instruction}\n\n{input}"
    run = make_run(tmp_path / "columns", "instruct", prompt_template=pattern, max_new_tokens=8, max_length=128)
    row = {"instruction": "Translate.", "input": "Guten Tag"}
    expected = [answer["completion"] for answer in load_predictor(run).predict([row, {"instruction": "Sing."}])]
    with served.serving(run, tmp_path) as server:

        def ask(**said: Any) -> tuple[int, Any]:
            status, _, answer = server.ask("POST", CHAT, {"messages": [{"role": "user"} | said]})
            return status, answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]["code"]

        assert ask(columns=row) == (200, expected[0])
        assert ask(columns={"instruction": "Sing."}) == (200, expected[1])
        assert ask(content="Translate.\n\nGuten Tag") == (200, expected[0]), "made of columns by the client"
        assert ask(columns={"question": "Why?"}) == (400, "unknown_column")
        assert ask(columns={"instruction": 1}) == (422, "invalid_value")


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"temperature": 2.1}, 422, "temperature"),
        ({"temperature": "1"}, 422, "temperature"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": 10**9}, 422, "max_tokens"),
        ({"top_p": 0}, 422, "top_p"),
        ({"seed": 1.5}, 422, "seed"),
        ({"stop": ["a"] * 5}, 422, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, 422, "top_logprobs"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 422, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, 400, "messages"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"chat_template": "{{ x }}"}, 400, "chat_template"),
        ({"chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
        ({"model": "/etc/passwd"}, 404, "model"),
        ({"model": 7}, 422, "model"),
    ],
)
def test_a_wrong_field_is_named(server: Served, changes: dict[str, Any], status: int, param: str) -> None:
    found, headers, answer = server.ask("POST", CHAT, {"messages": talk("Hi"), "max_tokens": 2} | changes)
    assert (found, answer["error"]["param"]) == (status, param)
    assert (
        set(answer["error"]) == {"message", "type", "param", "code"} and headers["x-content-type-options"] == "nosniff"
    )


def test_the_client_knows_its_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model="run", messages=talk("Hi"), temperature=3)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=talk("Hi"))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).chat.completions.create(model="run", messages=talk("Hi"), max_tokens=200)


def test_bodies_are_json_and_not_too_large(server: Served) -> None:
    assert server.ask("POST", CHAT, b"{}", Content_Type="text/plain")[0] == 415
    assert server.ask("POST", CHAT, b"{}", Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert server.ask("POST", CHAT, b"{}", Content_Encoding="gzip")[0] == 415
    assert server.ask("POST", CHAT, b" " * (2**20 + 1))[0] == 413
    assert server.ask("POST", CHAT, b" " * 2**20)[0] == 400, "the limit itself is read"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
    assert b" 413 " in server.raw(head.encode() + chunk * 17 + b"0\r\n\r\n", ends=False)[:20]


def test_many_slow_bodies_do_not_fill_the_memory(run: Path, tmp_path: Path) -> None:
    "Each within its limit, together beyond theirs: who comes last is refused, and the room is given back."
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {2**20}\r\n\r\n"
    with served.serving(run, tmp_path) as server:
        lines = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(70)]
        for line in lines:
            line.sendall(head.encode() + b" " * (2**20 - 100))
        deadline_s, told = time.monotonic() + 8, list[socket.socket]()
        while len(told) < 6 and time.monotonic() < deadline_s:
            told = select.select(lines, [], [], 0.1)[0]
        assert 6 <= len(told) < 20 and all(b" 429 " in line.recv(20) for line in told)
        for line in lines:
            line.close()
        deadline_s = time.monotonic() + 10
        body = {"messages": talk("Hi"), "max_tokens": 2}
        while server.ask("POST", CHAT, json.dumps(body).encode() + b" " * (2**20 - 200))[0] != 200:
            assert time.monotonic() < deadline_s


def test_pages_of_other_sites_may_not_ask(server: Served) -> None:
    here = f"127.0.0.1:{server.port}"
    for host, origin, status in (
        (here, f"http://{here}", 200),
        (here, "http://evil.example", 403),
        (here, "null", 403),
        (here, f"http://127.0.0.1:{server.port + 1}", 403),
        ("evil.example", "", 400),
        (f"localhost.evil.example:{server.port}", "", 400),
        ("localhost", "", 200),
    ):
        found, headers, _ = server.ask("GET", "/v1/models", Host=host, Origin=origin)
        assert found == status, (host, origin)
        assert not any(name.lower().startswith("access-control") for name in headers)
    assert server.ask("OPTIONS", CHAT, Origin="http://evil.example")[0] == 403
    assert server.ask("GET", "/health", Host="evil.example")[0] == 400


# --- the figures, in short ---


def test_malformed_requests(server: Served) -> None:
    "V1."
    served.check_malformed(server, range(20))
    before = server.memory()
    assert served.check_malformed(server, range(300)) == ""
    assert server.memory() - before < 60 * 2**20


def test_a_crowd(server: Served) -> None:
    "V2, on a machine that also plays the crowd and does other work: fewer, for a shorter time, and less strictly."
    assert served.check_crowd(server, 60, 25, 4, health_s=0.75) == ""


def test_stalled_connections(server: Served) -> None:
    "V3."
    assert served.check_stalled(server, 20) == ""


def test_clients_that_leave(server: Served) -> None:
    "V4."
    assert served.check_gone(server, 10) == ""


def test_a_full_line_is_told(run: Path, tmp_path: Path) -> None:
    "Who comes when the line is full hears 429 and when to come again; who waits is answered."
    with served.serving(run, tmp_path, "--slots", "1", "--queue", "2") as server, ThreadPoolExecutor(12) as pool:
        body = {"messages": talk("Tell me all."), "max_tokens": 150, "temperature": 1.3}
        found = list(pool.map(lambda k: server.ask("POST", CHAT, body | {"seed": k}), range(12)))
        counts = {status: sum(one[0] == status for one in found) for status in (200, 429)}
        assert counts[200] >= 2 and counts[429] >= 6 and sum(counts.values()) == 12, counts
        assert all(1 <= int(headers["retry-after"]) <= 30 for status, headers, _ in found if status == 429)


def test_keys(server: Served) -> None:
    "V5."
    assert served.check_keys(server) == ""


def test_who_does_not_read_is_let_go(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A client that takes nothing of what it is sent holds its place for a while only."
    import asyncio

    import uvicorn

    from llmft_nb import connections

    async def pour(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    monkeypatch.setattr(connections, "TAKE_S", 1.0)
    taken = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(pour, http=connections.TimedProtocol, lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([taken])))
    thread.start()
    with socket.create_connection(taken.getsockname()) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        ended_s = time.monotonic() + 10
        while not server.server_state.connections:
            time.sleep(0.05)
        while server.server_state.connections and time.monotonic() < ended_s:
            time.sleep(0.05)
        left = len(server.server_state.connections)
    server.should_exit = True
    thread.join()
    assert left == 0


# --- labels and tags ---


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_labels_and_tags_come_in_batches(task: str, tmp_path: Path, one_thread: None) -> None:
    run = make_run(tmp_path / task, task, max_length=64)
    texts = questions(12)
    expected = load_predictor(run).predict(texts)
    with served.serving(run, tmp_path) as server:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda k: server.ask("POST", f"/v1/{task}", {"input": texts[k:]}), range(8)))
        for k, (status, _, answer) in enumerate(found):
            assert status == 200 and answer["metadata"] == {"notice": NOTICE} and answer["model"] == task
            assert [one.pop("index") for one in answer["data"]] == list(range(len(texts) - k))
            for one, other in zip(answer["data"], expected[k:], strict=True):
                if task == "classify":
                    assert one["label"] == other["label"]
                    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
                else:
                    assert one["tags"] == other["tags"]
                    assert [span["text"] for span in one["spans"]] == [span["text"] for span in other["spans"]]
        rows: list[Any] = [{"tokens": ["May", "I?"]}, texts[0]]
        if task == "classify":
            rows = [{"text": "May I?", "text_pair": texts[0]}, texts[0]]
        found_rows = server.ask("POST", f"/v1/{task}", {"input": rows})[2]["data"]
        for one, other in zip(found_rows, load_predictor(run).predict(rows), strict=True):
            name = "label" if task == "classify" else "tags"
            assert one[name] == other[name]
            if task == "classify":
                assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert server.ask("POST", f"/v1/{task}", {"input": [""] * 257})[0] == 422
        assert server.ask("POST", f"/v1/{task}", {"input": [{"tokens": ["two words"]}, {"text": "x"}]})[0] == 422
        assert server.ask("POST", f"/v1/{task}", {"input": [1]})[0] == 422
        assert server.ask("POST", f"/v1/{task}", {"input": " "})[0] == (422 if task == "classify" else 200)
        assert server.ask("POST", CHAT, {"messages": talk("Hi")})[2]["error"]["code"] == "wrong_task"


# --- its beginning and its end ---


def test_sigterm_lets_answers_end(run: Path, tmp_path: Path) -> None:
    with served.serving(run, tmp_path, "--slots", "2") as server:
        body = {"messages": talk("Tell me all."), "max_tokens": 300, "temperature": 1.3, "stream": True}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.ask, "POST", CHAT, body | {"seed": k}) for k in range(4)]
            while server.active() < 2:
                time.sleep(0.02)
            time.sleep(0.3)
            assert served.end(server) == 143
            assert all(one.result()[2].endswith("data: [DONE]\n\n") for one in asked)


def llmft(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from llmft_nb.cli import main; main()", "serve", *words]
    return subprocess.run(command, cwd=served.ROOT, capture_output=True, text=True, timeout=120)


def test_a_user_s_mistakes_are_told(run: Path, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600 | stat.S_IROTH)
    short = tmp_path / "short"
    short.write_text("secret")
    short.chmod(0o600)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    for words, said in (
        ((str(run), "--port", port), f"process {os.getpid()}"),
        ((str(run), "--host", "0.0.0.0", "--port", "0"), "--api-key-file"),
        ((str(run), "--api-key-file", str(key)), "everybody"),
        ((str(run), "--api-key-file", str(short)), "16 to 512"),
        ((str(run), "--api-key-file", str(tmp_path / "none")), "cannot be read"),
        ((str(broken), "--port", "0"), "not a run record"),
        ((str(tmp_path), "--port", "0"), "no config.json"),
        ((str(run), "--name", "../x", "--port", "0"), "--name"),
    ):
        done = llmft(*words)
        assert done.returncode == 2 and said in done.stderr and "mend:" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and KEY not in done.stderr
    taken.close()


def test_the_log_holds_no_word_of_what_was_said(run: Path, tmp_path: Path) -> None:
    with served.serving(run, tmp_path, "--log-level", "debug") as server:
        server.ask("POST", CHAT, {"messages": talk("swordfish"), "max_tokens": 2})
        server.ask("POST", CHAT, {"messages": [{"role": "swordfish", "content": "x"}]})
        server.ask("GET", "/swordfish?swordfish=1")
        assert served.end(server) == 143
    log = (tmp_path / "run.log").read_text()
    assert f"{CHAT} 200" in log and "other 404" in log and "swordfish" not in log and KEY not in log


# --- the engine alone ---


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen3", "Mistral", "Phi3", "state"])
def test_any_decoder_is_written_as_alone(kind: str, save_small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    "Mistral has a window of 8, shorter than what is asked and answered. A state is written one beside the other."
    from llmft_nb import slots
    from llmft_nb.decoding import generate
    from llmft_nb.modeling import LLMForCausalLM
    from llmft_nb.slots import Question, SlotEngine

    changes = {"sliding_window": 8} if kind == "Mistral" else {}
    if kind == "state":
        monkeypatch.setattr(slots, "joins", lambda network: False)
    model = LLMForCausalLM.from_pretrained(save_small("Llama" if kind == "state" else kind, **changes)).eval()
    prompts = [[5 + (7 * k * i) % 500 for i in range(1, 3 + 5 * k)] for k in range(6)]
    asked = [Question(ids, lambda piece: None, n_most=3 + 4 * k) for k, ids in enumerate(prompts)]
    engine, waiting = SlotEngine(model.network, model.tokenizer, n_slots=4), list(asked)
    while waiting or engine.questions:
        n_joining = min(2, engine.room_for(waiting))
        engine.step(waiting[:n_joining])
        waiting = waiting[n_joining:]
        assert len(engine.questions) <= 4 and (kind == "state" or len(engine.batches) <= 1)
    for k, question in enumerate(asked):
        alone = generate(model.network, model.tokenizer, [prompts[k]], max_new_tokens=3 + 4 * k, stop_ids=[])[0]
        assert question.ids == alone.token_ids


def test_what_breaks_is_told_and_the_next_is_answered(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    import queue

    from llmft_nb.wire import WriteRequest
    from llmft_nb.worker import Asker, ModelWorker

    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    worker, asker = ModelWorker(predictor), Asker(predictor)
    step, broken = worker.engine.step, []

    def breaks_once(joining: Any) -> None:
        if not broken:
            broken.append(True)
            raise RuntimeError("no memory")
        step(joining)

    monkeypatch.setattr(worker.engine, "step", breaks_once)
    reasons = []
    for _ in range(2):
        worker.put(asker.question(WriteRequest("It was", max_tokens=2), heard.put))
        while (piece := heard.get(timeout=30)).reason is None:
            pass
        reasons.append(piece.reason)
    worker.stop()
    assert reasons == ["error", "length"]
