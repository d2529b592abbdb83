"A served model watched: its access log, its canaries, and what the monitor makes of a log."

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import socket
import stat
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import served
from served import KEY, make_run
from starlette.testclient import TestClient
from typer.testing import CliRunner

from llmft_nb import access_log, canaries
from llmft_nb.access_log import AccessLog, LogFile
from llmft_nb.canaries import Canaries, CanaryFailed, asked_often, own_canaries, read_canaries
from llmft_nb.cli import app
from llmft_nb.core import read_record, write_record
from llmft_nb.drift import compare_tallies, parse_line, read_logs
from llmft_nb.gate import Doors
from llmft_nb.predict import Predictor, load_predictor
from llmft_nb.profiles import Profile, Tally, bin_ends, bin_of, line_facts, read_profile, short_fingerprint
from llmft_nb.server import make_app
from llmft_nb.serving import ServedModel, Serving
from llmft_nb.wire import WriteRequest

CHAT = "/v1/chat/completions"
WORDS = {"time", "id", "path", "status", "model", "fingerprint", "seconds", "first_token_s", "prompt_tokens"} | {
    "written_tokens",
    "finish",
    "texts",
}


def talk(text: str) -> list[dict[str, str]]:
    "A conversation of one question."
    return [{"role": "user", "content": text}]


def lines_of(path: Path, n_lines: int = 0) -> list[dict[str, Any]]:
    "Lines of a log, once there are so many; others than whole lines are an error."
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s and len(path.read_bytes().splitlines()) < n_lines:
        time.sleep(0.05)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def llmft(*words: Any) -> tuple[int, str, str]:
    "Status, output and errors of a command; none of these may begin to serve."
    with mock.patch("llmft_nb.server.serve", side_effect=AssertionError("it was served")):
        done = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in done.stderr
    return done.exit_code, done.stdout, done.stderr


@contextlib.contextmanager
def asked_here(run: Path, log: AccessLog | None = None, **options: Any) -> Iterator[tuple[Serving, TestClient]]:
    "A run served in this process, without a network."
    serving = Serving([ServedModel(load_predictor(run), "run", **options)], log=log)
    try:
        yield serving, TestClient(make_app(serving, Doors()), base_url="http://127.0.0.1")
    finally:
        serving.stop()
        if log is not None:
            log.close()


def keep_answers(run: Path, rows: list[dict[str, Any]]) -> Predictor:
    "Have a made-up run keep the model's answers, as a trained one does."
    predictor = load_predictor(run)
    asked = [{name: row[name] for name in ("text", "tokens", "messages") if name in row} for row in rows]
    lines = []
    for row, said in zip(rows, predictor.predict(asked), strict=True):
        answer = {name: value for name, value in said.items() if name != "label"}
        answer["predicted"] = said.get("label", said.get("completion"))
        if "probabilities" in answer:
            answer["probabilities"] = {name: float(name == answer["predicted"]) for name in answer["probabilities"]}
        for span in answer.get("spans", []):
            span["score"] = 0.9
        lines.append(row | answer)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "test_predictions.jsonl").write_text(text, encoding="utf-8")
    return predictor


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    settings = {"max_new_tokens": 24, "max_length": 256, "system": "You know the pharmacy.", "no_repeat_ngram": 4}
    run = make_run(tmp_path_factory.mktemp("watched") / "run", "instruct", **settings)
    system = [{"role": "system", "content": settings["system"]}]
    keep_answers(run, [{"messages": system + talk(text)} for text in ("May I take both?", "Who?", "When is it safe?")])
    return run


@pytest.fixture(scope="module")
def labeller(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    run = make_run(tmp_path_factory.mktemp("watched") / "labels", "classify", max_length=64)
    keep_answers(run, [{"text": f"May I take {k} of them?"} for k in range(20)])
    return run


# --- the access log ---


def test_the_log_of_a_writer(writer: Path, tmp_path: Path) -> None:
    "A whole answer, a stream, one whose client left, one refused, and one that never came in."
    log = tmp_path / "access.jsonl"
    with served.serving(writer, tmp_path, "--access-log", str(log), "--canary-every", "0") as server:
        body: dict[str, Any] = {"messages": talk("swordfish, may I?"), "max_tokens": 5}
        whole = server.ask("POST", CHAT, body)[2]
        server.ask("POST", CHAT, body | {"stream": True})
        sent = json.dumps(body | {"max_tokens": 200, "stream": True, "temperature": 1.5}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
            line.sendall(head.encode() + sent)
            heard = b""
            while b"data:" not in heard:
                heard += line.recv(4096)
        lines_of(log, 3)
        server.ask("POST", CHAT, {"messages": [{"role": "swordfish", "content": "x"}]})
        server.ask("POST", CHAT, body, Authorization="Bearer swordfish")
        server.ask("GET", "/swordfish")
        server.ask("POST", "/v1/completions", {"prompt": "It was", "max_tokens": 1})
        assert served.end(server) == 143
    text, lines = log.read_text(encoding="utf-8"), lines_of(log)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "swordfish" not in text and KEY not in text and "127.0.0.1" not in text and "take" not in text
    assert [line["status"] for line in lines] == [200, 200, 499, 422, 200]
    assert all(set(line) == WORDS for line in lines)
    assert [line["finish"] for line in lines] == ["length", "length", None, None, "length"]
    sha256 = load_predictor(writer).model.source.sha256
    for line in (*lines[:3], lines[4]):
        assert line["model"] == "run" and line["fingerprint"] == short_fingerprint(sha256) == sha256[:16]
        assert 0 < line["first_token_s"] <= line["seconds"] < 60
    assert lines[0]["id"] == whole["id"] and lines[3]["model"] is None and lines[3]["texts"] == []
    assert lines[0]["prompt_tokens"] == whole["usage"]["prompt_tokens"] and lines[0]["written_tokens"] == 5
    assert lines[0]["texts"] == lines[1]["texts"] and lines[4]["written_tokens"] == 1
    assert 0 < lines[2]["written_tokens"] < 200
    facts = lines[0]["texts"][0]
    assert facts["characters"] == len("swordfish, may I?") and 3 < facts["tokens"] < lines[0]["prompt_tokens"]
    assert (facts["written"], facts["finish"]) == (5, "length")
    stamp = parse_line(json.dumps(lines[0]).encode())["when"]
    assert abs(stamp - time.time()) < 600 and lines[0]["time"].endswith("Z")


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_labels_and_tags_in_the_log(task: str, tmp_path: Path, one_thread: None) -> None:
    run, path = make_run(tmp_path / task, task, max_length=64), tmp_path / "log"
    with asked_here(run, AccessLog(path)) as (_, client):
        answer = client.post(f"/v1/{task}", json={"input": ["May I take swordfish?", "So?"]}).json()["data"]
        assert client.post(f"/v1/{task}", json={"input": [1]}).status_code == 422
        assert client.post(f"/v1/{'tag' if task == 'classify' else 'classify'}", json={"input": "a"}).status_code == 400
        assert client.get("/health").status_code == 200
    lines = lines_of(path)
    assert [line["status"] for line in lines] == [200, 422, 400] and "swordfish" not in path.read_text()
    assert lines[0]["prompt_tokens"] is None and len(lines[0]["texts"]) == 2
    for facts, one in zip(lines[0]["texts"], answer, strict=True):
        assert facts["unseen"] is None  # The run has no profile
        if task == "classify":
            best = sorted(one["probabilities"].values(), reverse=True)
            assert facts["label"] == one["label"]
            assert facts["confidence"] == pytest.approx(best[0], abs=1e-6)
            assert facts["margin"] == pytest.approx(best[0] - best[1], abs=2e-6)
        else:
            assert facts["labels"] == dict(Counter(span["label"] for span in one["spans"]))
            assert facts["spans"] == len(one["spans"])
            sure = min((span["score"] for span in one["spans"]), default=None)
            assert facts["confidence"] == (None if sure is None else pytest.approx(sure, abs=1e-6))


def test_texts_are_logged_where_they_are_asked_for(
    writer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    path.touch(0o644)
    path.chmod(0o644)
    with asked_here(writer, AccessLog(path, content=True)) as (_, client):
        answer = client.post(CHAT, json={"messages": talk("swordfish"), "max_tokens": 6}).json()
    assert "--log-content" in caplog.text and stat.S_IMODE(path.stat().st_mode) == 0o600
    (line,) = lines_of(path)
    assert line["content"] == {"asked": talk("swordfish"), "answer": answer["choices"][0]["message"]["content"]}


def test_a_full_disk_costs_no_answer(labeller: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no file that plays a full disk")
    words = ("--access-log", "/dev/full", "--canary-every", "0.005")
    with served.serving(labeller, tmp_path, *words) as server:
        for k in range(3):
            assert server.ask("POST", "/v1/classify", {"input": f"May I, {k}?"})[0] == 200
        until_s, text = time.monotonic() + 10, ""
        while "llmft_access_log_lost_total 3.0" not in text and time.monotonic() < until_s:
            text = server.ask("GET", "/metrics")[2]
        assert "llmft_access_log_lost_total 3.0" in text
        assert "llmft_canaries 8.0" in text and "llmft_canaries_failed 0.0" in text
        assert 'llmft_requests_total{path="/v1/classify",status="200"} 3.0' in text  # Canaries are no clients
        assert server.ask("GET", "/health")[2] == {"status": "ok"}
        assert served.end(server) == 143
    log = (tmp_path / "labels.log").read_text()
    assert log.count("No space left on device") == 1 and "answers go on" in log


def test_a_line_that_was_cut_is_closed_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = LogFile(tmp_path / "log"), os.write
    file.write(b"first")
    monkeypatch.setattr(access_log.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with pytest.raises(OSError) as full:
        file.write(b"second")
    assert full.value.errno == errno.ENOSPC
    monkeypatch.setattr(access_log.os, "write", write)
    file.write(b"third")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsec\nthird\n"
    (tmp_path / "log").write_bytes(b"killed in the mid")
    file = LogFile(tmp_path / "log")
    file.write(b"fourth")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"killed in the mid\nfourth\n"


def test_lines_are_written_whole_by_several_at_once(tmp_path: Path) -> None:
    "And a file that is cut off by size or moved away meanwhile loses none."
    path = tmp_path / "log"

    def write(name: str) -> None:
        file = LogFile(path)
        for k in range(200):
            file.write(json.dumps({"name": name, "k": k, "long": name * 300}).encode())
            if k == 100 and name == "a":
                with contextlib.suppress(FileNotFoundError):
                    path.rename(tmp_path / "moved")
        file.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [line for file in (tmp_path / "moved", path) for line in lines_of(file)]
    assert sorted((line["name"], line["k"]) for line in found) == [(name, k) for name in "abc" for k in range(200)]
    file = LogFile(tmp_path / "small", most_bytes=100)
    for k in range(60):
        file.write(b"%010d" % k)
    file.close()
    kept = sorted(tmp_path.glob("small*"))
    assert len(kept) == 1 + access_log.N_KEPT and all(one.stat().st_size <= 100 for one in kept)
    assert {stat.S_IMODE(one.stat().st_mode) for one in kept} == {0o600}
    file = LogFile(tmp_path / "rotated")
    for k in range(3):
        file.write(b"%d" % k)
        (tmp_path / "rotated").rename(tmp_path / f"rotated.{k}")
    file.close()
    assert [(tmp_path / f"rotated.{k}").read_bytes() for k in range(3)] == [b"0\n", b"1\n", b"2\n"]


def test_nobody_waits_for_a_slow_disk(labeller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, free = AccessLog(tmp_path / "log"), threading.Event()
    monkeypatch.setattr(access_log, "N_WAITING", 2)
    monkeypatch.setattr(log._file, "write", lambda line: free.wait(10))
    with asked_here(labeller, log) as (serving, client):
        started_s = time.monotonic()
        for _ in range(6):
            assert client.post("/v1/classify", json={"input": "May I?"}).status_code == 200
        assert time.monotonic() - started_s < 9
        assert log.n_lost == 3 and "llmft_access_log_lost_total 3.0" in serving.numbers.text()
        free.set()


# --- canaries ---


def changed(run: Path, folder: Path, number: int, **values: Any) -> Path:
    "A run that keeps another answer than its model gives."
    shutil.copytree(run, folder)
    file = folder / "test_predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[number] |= values
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_s_own_answers_are_asked(writer: Path, labeller: Path, tmp_path: Path, one_thread: None) -> None:
    tagger = make_run(tmp_path / "tags", "tag", max_length=64)
    keep_answers(tagger, [{"tokens": f"May I take {k} of them ?".split()} for k in range(9)])
    for run, n_canaries in ((writer, 2), (labeller, 8), (tagger, 8)):
        with asked_here(run) as (serving, _):
            found = own_canaries(serving.main)
            assert len(found) == n_canaries and all(one.place.startswith("test_predictions.jsonl:") for one in found)
            assert Canaries(serving).round() == [] and not serving.canaries_failed
    ghosts = make_run(tmp_path / "ghosts", "classify")
    with asked_here(ghosts) as (serving, _), asked_often(serving) as none:
        assert none.find(serving.main) == []


def test_a_model_that_is_not_the_trained_one_is_not_served(writer: Path, labeller: Path, tmp_path: Path) -> None:
    said = json.loads((labeller / "test_predictions.jsonl").read_text().splitlines()[0])["predicted"]
    other = {"no": "yes", "yes": "no"}[said]
    wrong = changed(labeller, tmp_path / "wrong", 0, predicted=other)
    status, _, told = llmft("serve", wrong, "--port", 0)
    assert status == 1, told
    for words in ("test_predictions.jsonl:1", f"expected '{other}'", f"got '{said}'", "not the trained one", "mend:"):
        assert words in told, told
    text = json.loads((writer / "test_predictions.jsonl").read_text().splitlines()[1])["completion"]
    for k, completion in enumerate((text[:-3], text + " And more.", "Something else.")):
        spoilt = changed(writer, tmp_path / f"spoilt{k}", 1, completion=completion)
        for number in (0, 2):  # Longer ones are not asked
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            spoilt = changed(spoilt, tmp_path / "again", number, completion=None).rename(tmp_path / f"only{k}{number}")
        refused = pytest.raises(CanaryFailed, match="not the trained one")
        with asked_here(spoilt) as (serving, _), refused, asked_often(serving):
            pass


def test_canaries_of_one_s_own(labeller: Path, writer: Path, tmp_path: Path) -> None:
    said = json.loads((labeller / "test_predictions.jsonl").read_text().splitlines()[0])["predicted"]
    other, file = {"no": "yes", "yes": "no"}[said], tmp_path / "mine.jsonl"
    rows = [{"text": "May I take 0 of them?", "label": label} for label in (said, other)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, told = llmft("serve", labeller, "--port", 0, "--canaries", file)
    assert status == 1 and "mine.jsonl:2: 1 of 2 canaries failed" in told and "as the file says" in told
    file.write_text(json.dumps(rows[0] | {"label": said + "t"}) + "\n")
    status, _, told = llmft("serve", labeller, "--port", 0, "--canaries", file)
    assert status == 2 and "mine.jsonl:1:label" in told and f"did you mean '{said}'" in told
    file.write_text('{"text": \n')
    status, _, told = llmft("serve", labeller, "--port", 0, "--canaries", file)
    assert status == 2 and "mine.jsonl:1" in told
    answer = json.loads((writer / "test_predictions.jsonl").read_text().splitlines()[0])["completion"]
    middle, part = " ".join(answer.split()[1:3]), max(answer.split(), key=len)[1:]  # Part of a word is no word
    for completion, n_failed in ((middle.upper(), 0), (part, 1), ("zebra", 1)):
        file.write_text(json.dumps({"prompt": "May I take both?", "completion": completion}) + "\n")
        with asked_here(writer) as (serving, _):
            assert len(Canaries(serving, read_canaries(file)).round()) == n_failed, completion


def test_the_template_of_training_is_filled_in_once(tmp_path: Path, one_thread: None) -> None:
    settings = {"max_new_tokens": 8, "max_length": 256, "prompt_template": "Question: {question}"}
    run = make_run(tmp_path / "run", "instruct", **settings)
    answer = load_predictor(run).predict(["May I?"])[0]["completion"]
    file, path = tmp_path / "mine.jsonl", tmp_path / "log"
    file.write_text(json.dumps({"question": "May I?", "completion": answer.strip()}) + "\n")
    with asked_here(run, AccessLog(path)) as (serving, client):
        assert Canaries(serving, read_canaries(file)).round() == []
        said = client.post(CHAT, json={"messages": talk("May I?")}).json()["choices"][0]["message"]["content"]
    assert said == answer and lines_of(path)[0]["texts"][0]["characters"] == len("Question: May I?")


def test_health_follows_the_canaries(labeller: Path, caplog: pytest.LogCaptureFixture) -> None:
    def waits_for(status: int) -> dict[str, Any]:
        until_s = time.monotonic() + 20
        while (answer := client.get("/health")).status_code != status:
            assert time.monotonic() < until_s, answer.text
            time.sleep(0.05)
        return dict(answer.json())

    def gauge(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    def failed() -> float:
        return gauge("llmft_canaries_failed")

    with asked_here(labeller) as (serving, client), asked_often(serving, every_s=0.05):
        assert waits_for(200) == {"status": "ok"} and failed() == 0
        head = serving.main.predictor.model.network.score.weight
        head.data.neg_()
        assert waits_for(503) == {"status": "canary_failed"} and failed() == 8
        assert client.post("/v1/classify", json={"input": "May I?"}).status_code == 200
        head.data.neg_()
        assert waits_for(200) == {"status": "ok"} and failed() == 0
        until_s = time.monotonic() + 5
        while "pass again" not in caplog.text and time.monotonic() < until_s:
            time.sleep(0.05)
        assert gauge("llmft_canaries_last_timestamp_seconds") > 1e9
    assert "canary test_predictions.jsonl:1 failed" in caplog.text and "pass again" in caplog.text
    assert "expected" not in caplog.text


def test_the_run_that_is_served_now_is_asked(writer: Path, labeller: Path) -> None:
    with asked_here(labeller) as (serving, _):
        watched = Canaries(serving)
        assert watched.round() == []
        first, second = serving.main, ServedModel(load_predictor(writer), "second")
        assert watched.check(second) == []
        serving.models[0] = second
        assert watched.round() == [] and isinstance(watched.find(second)[0].asked, list)
        first.worker.stop()


def test_a_full_line_is_no_failure_and_no_client_is_refused(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "RETRY_S", 0.1)
    with asked_here(writer, n_slots=1, n_waiting=2) as (serving, _):
        watched, model = Canaries(serving), serving.main
        assert watched.round() == []
        last = watched.ended._value.get()
        step, free = model.worker.engine.step, threading.Event()
        monkeypatch.setattr(model.worker.engine, "step", lambda joining: (free.wait(30), step(joining)))
        wanted = WriteRequest(talk("Who is it?"), max_tokens=20)
        asked = [model.asker.question(wanted, lambda piece: None) for _ in range(3)]
        for question in asked:
            model.worker.put(question)
            time.sleep(0.1)
        with pytest.raises(canaries.NotAsked, match="too many wait"):
            watched.round()
        watched.start(0.05)
        time.sleep(0.3)
        assert not serving.canaries_failed and watched.ended._value.get() == last
        free.set()
        until_s = time.monotonic() + 30
        while watched.ended._value.get() == last:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert not serving.canaries_failed and all(len(question.ids) for question in asked)
        watched.stop()


def test_a_model_that_hangs_is_not_waited_for(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "PATIENCE_S", 0.2)
    with asked_here(writer) as (serving, _):
        step, free = serving.main.worker.engine.step, threading.Event()
        monkeypatch.setattr(serving.main.worker.engine, "step", lambda joining: (free.wait(1), step(joining)))
        with pytest.raises(CanaryFailed, match="no answer in time"), asked_often(serving):
            pass
        free.set()


# --- drift ---


def made_up(seed: int, n: int, longer: float = 1.0, unseen: float = 0.02, labels: Any = None, sure: float = 8) -> Tally:
    "Texts of a known kind, counted."
    chosen, tally = np.random.default_rng(seed), Tally()
    lengths = np.round(chosen.lognormal(4.0, 0.5, n) * longer)
    names = chosen.choice(["parcel", "refund", "thanks"], n, p=labels or [0.5, 0.3, 0.2])
    for k in range(n):
        n_tokens = max(1, round(lengths[k] / 4))
        facts = {"characters": lengths[k], "tokens": n_tokens, "confidence": chosen.beta(sure, 1.5)}
        facts |= {"unseen": chosen.binomial(n_tokens, unseen) / n_tokens, "label": str(names[k])}
        tally.add(facts)
    return tally


def profile_of(tally: Tally) -> Profile:
    "As a run's."
    return Profile("classify", frozenset(), tally, dict.fromkeys([*tally.numbers, *tally.shares], "train"))


def drifted(reference: Tally, window: Tally, **options: Any) -> set[str]:
    "Features that drifted."
    found = compare_tallies(profile_of(reference), window, n_draws=199, **options)
    return {one.feature for one in found if one.verdict == "drift"}


def test_how_often_it_cries_wolf() -> None:
    "200 windows without drift: at most 5 %, and the noise of 200 tries; whatever the threshold."
    n_wolves, n_small = 0, 0
    for seed in range(200):
        reference, window = made_up(seed, 300), made_up(10_000 + seed, 100)
        found = compare_tallies(profile_of(reference), window, least_effect=0.0, n_draws=199)
        n_wolves += any(one.verdict == "drift" for one in found)
        n_small += min(one.p_value for one in found if one.feature in ("unseen", "labels")) < 0.05
    assert n_wolves <= 18, n_wolves  # 10 are promised; more than 18 come by chance once in 200
    assert n_small >= 4, n_small  # Nor may it sleep


@pytest.mark.parametrize(
    ("kind", "feature"),
    [
        ({"labels": [0.3, 0.3, 0.4]}, "labels"),
        ({"longer": 1.4}, "characters"),
        ({"longer": 0.7}, "tokens"),
        ({"unseen": 0.08}, "unseen"),
        ({"sure": 4}, "confidence"),
    ],
)
def test_drift_of_each_kind_is_seen(kind: dict[str, Any], feature: str) -> None:
    "200 texts against 400, twenty times."
    n_seen = sum(feature in drifted(made_up(seed, 400), made_up(500 + seed, 200, **kind)) for seed in range(20))
    assert n_seen >= 19, n_seen
    few = compare_tallies(profile_of(made_up(0, 400)), made_up(1, 29, **kind))
    assert {one.verdict for one in few} == {"too few to say"} and all(one.p_holm is None for one in few)


def test_a_difference_that_does_not_matter_is_no_drift() -> None:
    reference, window = made_up(0, 20_000), made_up(1, 20_000, labels=[0.46, 0.34, 0.2])
    assert drifted(reference, window) == set() and drifted(reference, window, least_effect=0.02) == {"labels"}


def test_distance_and_p_value_are_those_of_scipy() -> None:
    from scipy.stats import ks_2samp

    chosen = np.random.default_rng(0)
    first, second = chosen.integers(1, 30, 80), chosen.integers(3, 33, 60)  # Each length has a bin of its own
    tallies = [Tally(), Tally()]
    for tally, values in zip(tallies, (first, second), strict=True):
        for value in values:
            tally.add({"characters": int(value)})
    (found,) = compare_tallies(profile_of(tallies[0]), tallies[1], n_draws=9999)
    there = ks_2samp(first, second)
    assert found.distance == pytest.approx(there.statistic, abs=1e-8)
    assert there.pvalue / 3 < found.p_value < there.pvalue * 1.3  # Values repeat: the exact test is less shy


def test_columns_of_rows_are_not_taken_for_answers() -> None:
    "The house pharmacy's rows have spans of their own, and are labelled."
    row = {"text": "a", "label": "no", "spans": [{"label": "drug"}], "completion": "b", "labels": 3, "finished": True}
    answer = {"predicted": "yes", "probabilities": {"no": 0.2, "yes": 0.8}}
    assert line_facts(row | answer, "classify", None) == {"label": "yes", "confidence": 0.8, "margin": 0.6}
    rated = row | {"spans": [{"label": "drug", "score": 0.7}, {"label": "drug", "score": 0.6}], "probabilities": {}}
    assert line_facts(rated, "tag", None) == {"spans": 2, "labels": {"drug": 2}, "confidence": 0.6}
    assert line_facts(row | {"completion": None}, "instruct", None) == {}
    canary = canaries.own_canary(row | answer, "here", "classify")
    assert canary is not None and (canary.asked, canary.expected) == ({"text": "a"}, "yes")


def test_bins_hold_what_they_say() -> None:
    for name in ("characters", "unseen", "confidence"):
        ends = bin_ends({"characters": "length", "unseen": "share", "confidence": "odds"}[name])
        assert ends == sorted(set(ends))
        for k in (0, 1, 7, len(ends) - 1):
            assert bin_of(name, ends[k]) == k and bin_of(name, ends[k] - 1e-9) == k
    assert bin_of("characters", 1e12) == len(bin_ends("length")) - 1


GOOD = {"time": "2026-05-04T10:20:30Z", "path": "/v1/classify", "status": 200, "fingerprint": "ab"}
TEXTS = [{"characters": 20, "tokens": 5, "unseen": 0.0, "label": "no", "confidence": 0.9, "margin": 0.8}]


def test_what_is_no_line_is_counted_and_named(tmp_path: Path) -> None:
    good = json.dumps(GOOD | {"texts": TEXTS}).encode()
    broken = [good[:50], b"\xff\xfe", b"[" * 100_000, b"null", b"7", b'{"texts": []}', good.replace(b"20,", b"-20,")]
    broken += [good.replace(b"20,", b"NaN,"), good.replace(b"20,", b"9" * 500 + b","), good.replace(b'"no"', b"3")]
    broken += [good.replace(b"2026-05-04T10:20:30Z", b"yesterday"), good.replace(b'"2026-05-04T10:20:30Z"', b"1")]
    path = tmp_path / "log"
    path.write_bytes(b"\n".join([good, *broken, b"", good]) + b"\n" + good[:80])
    read = read_logs([path], "classify", "ab")
    assert (read.n_texts, read.n_broken, read.n_lines) == (2, len(broken) + 1, len(broken) + 3)
    assert len(read.broken) == 5 and read.broken[0] == "log:2: not JSON"
    packed = tmp_path / "log.gz"
    packed.write_bytes(gzip.compress((good + b"\n") * 500)[:-40])
    read = read_logs([packed, path], "classify", "ab")
    assert read.n_texts >= 2 and read.broken[0].startswith("log.gz:") and "breaks off" in read.broken[0]


def test_a_large_log_needs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_nb import drift

    monkeypatch.setattr(drift, "LONGEST_LINE", 2**16)
    line = json.dumps(GOOD | {"texts": TEXTS}).encode() + b"\n"
    path = tmp_path / "log"
    path.write_bytes(line * 20_000 + b"x" * 10_000_000 + b"\n" + line)
    tracemalloc.start()
    read = read_logs([path], "classify", "ab")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (read.n_texts, read.n_broken) == (20_001, 1) and peak < 2_000_000, peak


def test_from_training_to_the_monitor(small_run: Path, small_files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    "A trained run is served, asked its test rows, and longer ones; what it remembers can be counted again."
    with asked_here(small_run) as (serving, _), asked_often(serving) as watched:
        assert len(watched.find(serving.main)) == canaries.N_OWN
    logs = [tmp_path / "alike.jsonl", tmp_path / "longer.jsonl"]
    texts = [json.loads(line)["text"] for line in (small_files / "train.jsonl").read_text().splitlines()]
    asked = [texts, [f"{text} and with xylophones, zebras and quite many other words as well" for text in texts]]
    for log, these in zip(logs, asked, strict=True):
        with asked_here(small_run, AccessLog(log)) as (_, client):
            assert client.post("/v1/classify", json={"input": these}).status_code == 200
    status, out, _ = llmft("monitor", logs[0], "--against", small_run, "--json", "--fail-on-drift")
    told = json.loads(out)
    features = {one["feature"]: one for one in told["features"]}
    assert told["lines"]["n_texts"] == len(texts) and features["characters"]["verdict"] == "no drift shown"
    assert features["unseen"]["of"] == "valid and test" and features["labels"]["of"] == "test"
    assert set(features) == {"characters", "tokens", "unseen", "confidence", "labels"}
    n_rows = read_record(small_run).data
    assert features["characters"]["n_reference"] == features["tokens"]["n_reference"] == n_rows["n_train"]
    assert features["unseen"]["n_reference"] == n_rows["n_valid"] + n_rows["n_test"]
    assert features["labels"]["n_reference"] == n_rows["n_test"]
    status, out, _ = llmft("monitor", *logs, "--against", small_run, "--fail-on-drift")
    assert status == 1 and "drift: characters, tokens" in out and f"{2 * len(texts)} texts of 2 lines" in out
    status, out, _ = llmft("monitor", *logs, "--against", small_run, "--window", "1h", "--json")
    told = json.loads(out)
    assert status == 0 and {"characters", "tokens", "unseen"} <= set(told["drift"]) and told["lines"]["n_older"] == 0
    line = json.loads(logs[1].read_text())
    logs[1].write_text(json.dumps(line | {"time": "2020-01-01T00:00:00Z"}) + "\n")
    told = json.loads(llmft("monitor", *logs, "--against", small_run, "--window", "1h", "--json")[1])
    assert told["lines"]["n_older"] == 1 and told["lines"]["n_texts"] == len(texts) and told["since"] > "2025"
    assert llmft("monitor", *logs, "--against", small_run, "--least-effect", 1, "--fail-on-drift")[0] == 0
    old = tmp_path / "old"
    shutil.copytree(small_run, old)
    (old / "profile.json").unlink()
    status, _, err = llmft("monitor", logs[0], "--against", old)
    assert status == 2 and "no profile.json" in err and "--data" in err
    monkeypatch.chdir(small_files)
    assert (
        json.loads(llmft("monitor", *logs, "--against", old, "--json")[1])["features"]
        == json.loads(llmft("monitor", *logs, "--against", small_run, "--json")[1])["features"]
    )
    status, _, err = llmft("monitor", logs[0], "--against", old, "--valid", small_files / "test.jsonl")
    assert status == 2 and "not the run's rows: valid" in err
    text = (small_run / "profile.json").read_text()
    assert not any(word in text for word in ("apple", "hammer", "market")) and read_profile(small_run) is not None


def test_a_user_s_mistakes_are_told(small_run: Path, labeller: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps(GOOD | {"texts": TEXTS}) + "\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 9)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    write_record(unfinished, replace(read_record(small_run), status="running"))
    plain = tmp_path / "plain"
    plain.mkdir()
    write_record(plain, replace(read_record(small_run), task="text"))
    cut = tmp_path / "cut"
    cut.mkdir()
    write_record(cut, read_record(small_run))
    (cut / "profile.json").write_text("{")
    for words, said in (
        (("monitor", tmp_path / "none", "--against", small_run), "no such log"),
        (("monitor", tmp_path, "--against", small_run), "not a file"),
        (("monitor", rows, "--against", small_run), "not an access log"),
        (("monitor", log, rows, "--against", small_run), "rows.jsonl:1: not a line of an access log"),
        (("monitor", log, "--against", tmp_path), "no run here"),
        (("monitor", log, "--against", unfinished), "this run is running"),
        (("monitor", log, "--against", plain), "asked no questions"),
        (("monitor", log, "--against", cut), "not a profile"),
        (("monitor", log, "--against", small_run, "--window", "soon"), "not a time"),
        (("serve", labeller, "--port", 0, "--log-content"), "--access-log FILE"),
        (("serve", labeller, "--port", 0, "--access-log", tmp_path / "no" / "log"), "cannot be opened"),
        (("serve", labeller, "--port", 0, "--access-log", tmp_path), "cannot be opened"),
        (("serve", labeller, "--port", 0, "--canaries", tmp_path / "none"), "no such file of canaries"),
        (("serve", labeller, "--port", 0, "--canaries", rows), "no row has a field 'label'"),
    ):
        status, _, err = llmft(*words)
        assert status == 2 and said in err and "mend:" in err, (words, err)
    status, out, _ = llmft("monitor", log, "--against", small_run)
    assert status == 0 and "too few to say" in out and "other models: ab (--any-model counts them)" in out
    _, out, _ = llmft("monitor", log, "--against", small_run, "--any-model", "--json")
    assert json.loads(out)["lines"]["n_texts"] == 1
