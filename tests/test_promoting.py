"""Which run is served: the link is moved whole or not at all, whoever dies at it; and a server that follows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served
import torch
from safetensors.torch import save_file
from small import saved_network
from test_comparison import keep_run
from typer.testing import CliRunner

from llmft_nb import cli, promotion
from llmft_nb.bases import weights_fingerprint
from llmft_nb.checkpoint import hold_folder
from llmft_nb.core import UserError, read_record, write_record
from llmft_nb.predict import load_predictor
from llmft_nb.promotion import alone_with, promote, read_journal, rollback, served_state
from llmft_nb.runs import beside_name, list_runs, run_tree

CHAT = "/v1/chat/completions"


def finish(run: Path) -> Path:
    "Have a run's record say which model it saved."
    lineage = {"model_sha256": weights_fingerprint(run / "model")}
    write_record(run, replace(read_record(run), lineage=lineage))
    return run


def small_run_of(folder: Path, right: np.ndarray | None = None, **others: Any) -> Path:
    "A finished run with answers, and a model of some numbers."
    keep_run(folder, np.arange(160) % 3 > 0 if right is None else right, **others)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    marks = torch.tensor([float(ord(letter)) for letter in folder.name])
    save_file({"w": marks}, folder / "model" / "model.safetensors")
    return finish(folder)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    "Five runs, a to e."
    for name in "abcde":
        small_run_of(tmp_path / "runs" / name)
    return tmp_path / "runs"


def llmft(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def now(runs: Path) -> str | None:
    return beside_name(runs / "served")


def hidden(runs: Path) -> list[str]:
    return sorted(path.name for path in runs.glob(".*"))


def lead(runs: Path, name: str) -> None:
    "Move the link by hand."
    (runs / "new").symlink_to(name)
    os.replace(runs / "new", runs / "served")


# --- killed ---


def in_a_child(work: Callable[..., Any], *arguments: Any) -> int:
    "Do something in a process of its own; its status, or minus the signal that ended it."
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work(*arguments)
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(last: int, work: Callable[[], Any]) -> None:
    "Die by SIGKILL instead of the call of number `last` to the system."
    made: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "symlink"):
        setattr(os, name, counting(name, getattr(os, name)))
    work()


@pytest.mark.parametrize("action", ["first", "promote", "rollback"])
def test_every_call_of_a_promotion_as_the_last(action: str, tmp_path: Path) -> None:
    "Killed anywhere, the link leads to the old run or the new one, and going back finds who was before that one."
    for name in "abc":
        small_run_of(tmp_path / "made" / name)
    line = [] if action == "first" else ["a", "b"]
    goal = {"first": ["c"], "promote": ["a", "b", "c"], "rollback": ["a"]}[action]

    def prepare(step: int) -> tuple[Path, Callable[[], Any]]:
        runs = tmp_path / str(step)
        shutil.copytree(tmp_path / "made", runs)
        for name in line:
            promote(runs / name)
        return runs, (lambda: rollback(runs)) if action == "rollback" else (lambda: promote(runs / "c"))

    ended, step, left = 1, 0, set[bool]()
    while ended:
        step += 1
        runs, work = prepare(step)
        ended = in_a_child(killed_at, step, work)
        assert ended in (0, -signal.SIGKILL)
        found = now(runs)
        is_new = found == goal[-1]
        left.add(is_new)
        assert is_new or [found] == (line[-1:] or [None])
        if found is not None:
            state = served_state(runs)
            assert [*state["before"], found] == (goal if is_new else line) and state["since"], step
        assert len(list_runs(runs)) == 3
        assert promote(runs / "c")["before"] == found and now(runs) == "c"
        if found not in (None, "c"):
            assert hidden(runs) == [".served.lock"], "what was left is swept up"
            assert rollback(runs)["served"] == found
    assert step > 7 and left == {False, True}, "fewer calls than a journal and a link need"


def test_what_a_dead_one_left_is_swept_up(runs: Path) -> None:
    (runs / ".served.jsonl.999.tmp").write_text('{"time": "20')
    (runs / ".served.999.tmp").symlink_to("e")
    promote(runs / "a")
    assert hidden(runs) == [".served.lock"] and now(runs) == "a"


def test_promotions_at_once(runs: Path) -> None:
    "One at a time, or refused; the journal has each of them once, and the link always leads to a run."
    ends, seen = time.monotonic() + 1.5, set[str | None]()
    promote(runs / "e")
    reading = os.pipe()

    def often(name: str) -> None:
        n_done, chance = 0, random.Random(name)
        while time.monotonic() < ends:
            with contextlib.suppress(UserError):
                n_done += promote(runs / name)["before"] != name
            time.sleep(0.01 * chance.random())
        os.write(reading[1], f"{n_done} ".encode())

    children = []
    for name in "abcd":
        children.append(os.fork())
        if children[-1] == 0:
            with contextlib.suppress(BaseException):
                often(name)
                os._exit(0)
            os._exit(1)
    while time.monotonic() < ends:
        assert (runs / "served" / "run.json").is_file()
        seen.add(now(runs))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    n_done = sum(int(word) for word in os.read(reading[0], 1000).split())
    switches = read_journal(runs)
    assert len(switches) == n_done + 1 > 10 and len(seen) > 2
    assert [one.before for one in switches[1:]] == [one.run for one in switches[:-1]]
    assert now(runs) == switches[-1].run


def test_going_back_is_undoing(runs: Path) -> None:
    "Held against a list of what was promoted, over many steps; and by hand the link is believed."
    chance, line = random.Random(0), ["a"]
    promote(runs / "a")
    for _ in range(120):
        if chance.random() < 0.45:
            if len(line) == 1:
                with pytest.raises(UserError, match="nothing to go back to"):
                    rollback(runs)
                continue
            assert rollback(runs)["before"] == line.pop()
        elif chance.random() < 0.1 and line[-1] != "e":
            last = read_journal(runs)[-1]
            lead(runs, "e")  # Back to the one before: as if the last line had not been
            line = line[:-1] if last.action == "promote" and last.before == "e" else [*line, "e"]
            promote(runs / "d")
            line.append("d")
        else:
            name = chance.choice("abcd")
            promote(runs / name)
            line += [name] if line[-1] != name else []
        state = served_state(runs)
        assert [*state["before"], state["served"]] == line
        assert state["fingerprint"] == weights_fingerprint(runs / "served" / "model")


# --- refused ---


def refused(*words: Any) -> str:
    "What is said of a mistake, as people read it."
    done = llmft("runs", *words)
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    assert done.stderr.startswith("llmft: ") and "mend: " in done.stderr
    assert json.loads(llmft("runs", *words, "--json").stderr)["error"]["where"]
    return done.stderr


def set_status(run: Path, status: str) -> None:
    write_record(run, replace(read_record(run), status=status))


def turn_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


UNFIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "no run here"),
    "stopped": (lambda run: set_status(run, "running"), "this run is stopped"),
    "interrupted": (lambda run: set_status(run, "interrupted"), "this run is interrupted"),
    "a broken record": (lambda run: (run / "run.json").write_text("{"), "not a run record"),
    "no model": (lambda run: shutil.rmtree(run / "model"), "no model folder"),
    "no weights": (lambda run: (run / "model" / "model.safetensors").unlink(), "no weights"),
    "no settings": (lambda run: (run / "model" / "config.json").unlink(), "no config.json"),
    "a bit turned": (lambda run: turn_bit(run / "model" / "model.safetensors"), "not the weights that were trained"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_run_that_cannot_be_served(name: str, runs: Path) -> None:
    "Neither promoted nor gone back to; what is served stays."
    spoil, said = UNFIT[name]
    promote(runs / "b")
    promote(runs / "a")
    spoil(runs / "b")
    before = (runs / "served.jsonl").read_bytes()
    assert said in refused("promote", runs / "b")
    told = refused("rollback", runs)
    assert (said if name != "not there" else "is gone") in told and str(runs / "b") in told
    assert now(runs) == "a" and (runs / "served.jsonl").read_bytes() == before


def test_a_run_that_goes_on_is_refused(runs: Path) -> None:
    with hold_folder(runs / "a"):
        assert "this run is going on" in refused("promote", runs / "a")
    assert llmft("runs", "promote", runs / "a").exit_code == 0


def test_what_is_no_link_of_ours_is_left_alone(runs: Path, tmp_path: Path) -> None:
    elsewhere = small_run_of(tmp_path / "elsewhere" / "z")
    places: dict[str, Callable[[Path], Any]] = {
        "served is a folder": Path.mkdir,
        "served is a file": lambda path: path.write_text("mine"),
        "served is a link to somewhere else": lambda path: path.symlink_to(elsewhere),
    }
    for said, make in places.items():
        make(runs / "served")
        for words in (("promote", runs / "a"), ("rollback", runs), ("served", runs)):
            told = refused(*words)
            assert said in told and f"mv {runs / 'served'}" in told
        shutil.move(runs / "served", tmp_path / said)
    for target in ("..", ".", "served", "/", "../elsewhere/z", "a/model"):
        (runs / "served").symlink_to(target)
        assert "a link to somewhere else" in refused("promote", runs / "a"), target
        (runs / "served").unlink()
    (runs / "served").symlink_to(runs / "b")  # By hand, and absolute: ours
    assert promote(runs / "a")["before"] == "b" and os.readlink(runs / "served") == "a"


def test_nothing_to_go_back_to(runs: Path, tmp_path: Path) -> None:
    assert "nothing is served here" in refused("rollback", runs)
    assert "nothing is served here" in refused("served", runs)
    assert "no such folder" in refused("rollback", tmp_path / "none")
    promote(runs / "a")
    assert "there is nothing to go back to" in refused("rollback", runs)


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"run": "a"}', b'{"time": "", "run": "../x"}', b"[" * 5000])
def test_a_damaged_journal_is_named_by_its_line(line: bytes, runs: Path) -> None:
    promote(runs / "a")
    promote(runs / "b")
    if b"../x" in line:
        whole = {"time": "", "action": "promote", "run": "../x", "fingerprint": "", "before": None, "note": ""}
        line = json.dumps(whole).encode()
    with (runs / "served.jsonl").open("ab") as journal:
        journal.write(line + b"\n")
    for words in (("promote", runs / "c"), ("rollback", runs), ("served", runs)):
        assert f"{runs / 'served.jsonl'}:3: not a line of the journal" in refused(*words)
    assert now(runs) == "b" and llmft("runs", runs).exit_code == 0
    (runs / "served.jsonl").rename(runs / "old.jsonl")
    assert promote(runs / "c")["before"] == "b" and rollback(runs)["served"] == "b"


def test_two_at_once_and_places_without_links(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone_with(runs):
        assert "somebody else is promoting" in refused("promote", runs / "a")
    promote(runs / "a")

    def no_links(*arguments: Any, **options: Any) -> None:
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", no_links)
        told = refused("promote", runs / "b")
        assert "the link cannot be made" in told and f"llmft serve {runs / 'b'}" in told
    assert now(runs) == "a" and served_state(runs)["before"] == []
    assert promote(runs / "b")["before"] == "a"
    monkeypatch.setattr(promotion, "write_atomic", lambda *_: no_links())
    with pytest.raises(OSError):
        promote(runs / "c")
    assert now(runs) == "b"


# --- worse ---


def test_a_worse_run_is_refused(tmp_path: Path) -> None:
    chance, runs = np.random.default_rng(0), tmp_path / "runs"
    good, fair, bad = (chance.random(160) < share for share in (0.9, 0.87, 0.5))
    for name, right in (("good", good), ("fair", fair), ("bad", bad)):
        small_run_of(runs / name, right)
    others = [{"text": f"And no. {i}?", "label": "abc"[i % 3]} for i in range(160)]
    small_run_of(runs / "other", bad, rows=others)
    small_run_of(runs / "tagger", task="tag")
    assert "verdict" not in promote(runs / "bad")
    better = llmft("runs", "promote", runs / "good")
    points = 100 * (good.mean() - bad.mean())
    assert (
        f"better: accuracy +{points:.1f} points [" in better.stdout and "of 160 test rows beside bad" in better.stdout
    )
    assert promote(runs / "fair")["verdict"] == "no difference shown"
    told = refused("promote", runs / "bad")
    assert "worse than what is served" in told and "accuracy −" in told and "--anyway" in told and now(runs) == "fair"
    found = promote(runs / "other")
    assert found["verdict"] == "not comparable" and "another test set" in found["reason"]
    assert "another task than what is served" in refused("promote", runs / "tagger")
    done = llmft("runs", "promote", runs / "tagger", "--anyway", "--note", "a new service", "--json")
    assert json.loads(done.stdout)["before"] == "other"
    assert "a new service" in llmft("runs", "served", runs).stdout
    shutil.rmtree(runs / "tagger")
    assert "but it is gone" in llmft("runs", "served", runs).stdout
    assert promote(runs / "bad")["reason"] == "tagger is gone"
    assert "already" in llmft("runs", "promote", runs / "served").stdout


# --- through the link ---


def test_lists_and_words(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(runs / "b")
    lines = list_runs(runs)
    assert [line["run"] for line in lines] == list("abcde")
    assert [line["run"] for line in lines if line["served"]] == ["b"]
    assert [line["run"] for line in run_tree(lines) if line["status"] == "finished, served"] == ["b"]
    assert llmft("runs", runs).stdout == llmft("runs", "list", runs).stdout
    monkeypatch.chdir(runs.parent)
    assert llmft("runs").stdout == llmft("runs", runs).stdout
    runs.rename("promote")
    assert len(json.loads(llmft("runs", "./promote", "--json").stdout)) == 5
    assert "Missing argument" in llmft("runs", "promote").stderr
    assert "list" in llmft("runs", "--help").stdout


def test_a_run_works_through_the_link(small_run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    runs = tmp_path / "runs"
    shutil.copytree(small_run, runs / "001")
    promote(runs / "001")
    link = runs / "served"
    asked = ["I saw 7 times the boat near the river"]
    expected = load_predictor(small_run).predict(asked)
    for path in (link, link / "model"):
        assert load_predictor(path).predict(asked) == expected
    assert llmft("predict", link, *asked, "--json").exit_code == 0
    report = llmft("report", link)
    assert report.exit_code == 0 and "001" in (runs / "001" / "report.html").read_text(encoding="utf-8")
    assert AutoModelForSequenceClassification.from_pretrained(link / "model").num_labels == 3
    assert llmft("report", link, runs / "001").exit_code == 2, "it is the same run"


# --- a server that follows ---


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    "Two runs that write otherwise, and one that labels."
    folder = tmp_path_factory.mktemp("writers")
    for seed, name in enumerate(("001", "002")):
        base = saved_network("Llama", folder / "bases" / name)
        if seed:
            make_other(base)
        finish(served.make_run(folder / "runs" / name, "instruct", base, max_new_tokens=24, max_length=256))
    finish(served.make_run(folder / "runs" / "labels", "classify", folder / "bases" / "001", max_length=64))
    return folder / "runs"


def make_other(base: Path) -> None:
    from safetensors.torch import load_file

    (file,) = base.glob("*.safetensors")
    weights, chance = load_file(file), torch.Generator().manual_seed(1)
    weights = {name: one + 0.05 * torch.randn(one.shape, generator=chance) for name, one in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def linked(writers: Path, tmp_path: Path) -> Path:
    "A copy of them, the first of which is served."
    shutil.copytree(writers, tmp_path / "runs")
    promote(tmp_path / "runs" / "001")
    return tmp_path / "runs"


def asked_of(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "served", "messages": [{"role": "user", "content": text}], **options}


def heard_of(answer: Any) -> str:
    "The text of an answer, whole or as a stream."
    if isinstance(answer, dict):
        return answer["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in answer.split("\n\n") if line]
    assert lines[-1] == "[DONE]", answer[-200:]
    return "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1])


def served_run(server: served.Served) -> dict[str, Any]:
    (model,) = server.ask("GET", "/v1/models")[2]["data"]
    assert model["id"] == "served"
    return model["metadata"]


def wait_for(found: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends, what
        time.sleep(0.02)
    return value


def metric(server: served.Served, name: str) -> float:
    lines = server.ask("GET", "/metrics")[2].splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def test_clients_across_switches(linked: Path, tmp_path: Path) -> None:
    "Every answer is the old model's or the new one's, whole; none is refused or lost; afterwards only the new one's."
    texts = [f"May I take no. {k}?" for k in range(5)]
    said = {
        name: {text: one["completion"] for text, one in zip(texts, load_predictor(linked / name).predict(texts))}
        for name in ("001", "002")
    }
    assert all(said["001"][text] != said["002"][text] for text in texts)
    heard, wrong, ending = list[tuple[float, str, str]](), list[Any](), threading.Event()

    def ask_on(k: int) -> None:
        while not ending.is_set():
            text, begun = texts[k % len(texts)], time.monotonic()
            status, _, answer = server.ask("POST", CHAT, asked_of(text, stream=k % 2 == 0))
            if status != 200 or heard_of(answer) not in (said["001"][text], said["002"][text]):
                wrong.append((status, answer))
            else:
                heard.append((begun, text, heard_of(answer)))
            k += 1

    with served.serving(linked / "served", tmp_path, "--slots", "4", "--log-level", "info") as server:
        first = served_run(server)
        assert first["run"] == "001" and first["fingerprint"] == weights_fingerprint(linked / "001" / "model")[:8]
        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask_on, k) for k in range(6)]
            wait_for(lambda: len(heard) > 12, "nobody is answered")
            for switch, name in ((lambda: promote(linked / "002"), "002"), (lambda: rollback(linked), "001")):
                switch()
                wait_for(lambda name=name: served_run(server)["run"] == name, "the link is not followed")
                moved, n_heard = time.monotonic(), len(heard)
                wait_for(lambda n=n_heard: len(heard) > n + 12, "nobody is answered any more")
                late = {(text, answer) for begun, text, answer in list(heard) if begun > moved}
                assert late and all(answer == said[name][text] for text, answer in late), name
            ending.set()
            for one in asking:
                one.result()
        assert not wrong, wrong[:2]
        assert {answer for _, text, answer in heard if text == texts[0]} == {said[n][texts[0]] for n in said}
        assert 'llmft_model_info{fingerprint="' in server.ask("GET", "/metrics")[2]
        assert metric(server, "llmft_switch_failed_total") == 0 and metric(server, "llmft_active") == 0
        assert served.end(server) == 143
    log = (tmp_path / "served.log").read_text()
    assert "002 is served, before it 001" in log and "001 is served, before it 002" in log and "Traceback" not in log


SLOW = """
import time
from llmft_nb import switching
loaded, load = [], switching.load_exported
def slowly(folder, **options):
    loaded.append(folder)
    if len(loaded) > 1:
        print("loading", flush=True)
        time.sleep(1.5)
    return load(folder, **options)
switching.load_exported = slowly
"""


def test_the_end_comes_during_a_switch(linked: Path, tmp_path: Path) -> None:
    with (
        served.serving(linked / "served", tmp_path, "--no-canaries", first=SLOW) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        long = asked_of("Tell me all.", max_tokens=220, temperature=1.2, seed=3, stream=True)
        begun = pool.submit(server.ask, "POST", CHAT, long)
        wait_for(server.active, "it is not begun")
        promote(linked / "002")
        os.kill(server.process.pid, signal.SIGHUP)
        assert server.process.stdout is not None and server.process.stdout.readline() == "loading\n"
        assert served.end(server) == 143
        assert begun.result()[0] == 200 and heard_of(begun.result()[2])
    assert (tmp_path / "served.log").read_text() == ""


def test_a_run_that_fails_its_canaries_does_not_take_over(linked: Path, tmp_path: Path) -> None:
    "It answers otherwise than the file says; the one that is served goes on, and one that answers so takes over."
    answer = load_predictor(linked / "001").predict(["May I?"])[0]["completion"]
    file = tmp_path / "canaries.jsonl"
    file.write_text(json.dumps({"prompt": "May I?", "completion": answer}) + "\n")
    shutil.copytree(linked / "001", linked / "twin")
    words = ("--canaries", str(file), "--canary-every", "0")
    with served.serving(linked / "served", tmp_path, *words) as server:
        promote(linked / "002")
        wait_for(lambda: metric(server, "llmft_switch_failed_total") == 1, "it took over")
        assert heard_of(server.ask("POST", CHAT, asked_of("May I?"))[2]) == answer
        assert served_run(server)["run"] == "001" and server.ask("GET", "/health")[0] == 200
        promote(linked / "twin")
        wait_for(lambda: served_run(server)["run"] == "twin", "it is not let in")
    log = (tmp_path / "served.log").read_text()
    assert "001 stays" in log and "1 of 1 canaries failed" in log and "Traceback" not in log


# --- inside ---


@contextlib.contextmanager
def server_here(run: Path, **options: Any) -> Iterator[tuple[Any, served.Served]]:
    "A server in a thread of this process, whose objects can be looked at."
    from llmft_nb.gate import Doors, bind
    from llmft_nb.server import DrainingServer, make_app
    from llmft_nb.switching import follow_run

    follower, taken = follow_run(run, **options), bind("127.0.0.1", 0)
    follower.every_s = 0.02
    server = DrainingServer(make_app(follower.serving, Doors(served.KEY)), follower.start)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield follower, served.Served(None, taken.getsockname()[1])  # type: ignore[arg-type]
    finally:
        server.handle_exit(15, None)
        thread.join()
        follower.serving.stop()
        follower.stop()
        assert not follower._thread.is_alive()


def test_an_answer_begun_is_finished_by_who_began_it(linked: Path) -> None:
    long = asked_of("Tell me all.", max_tokens=220, temperature=1.2, seed=3)
    with server_here(linked / "served", n_slots=1) as (follower, server), ThreadPoolExecutor(3) as pool:
        alone = server.ask("POST", CHAT, long)[2]["choices"][0]
        assert alone["finish_reason"] == "length", "it has to last"
        begun = [pool.submit(server.ask, "POST", CHAT, long) for _ in range(3)]  # One is written, two wait
        wait_for(lambda: follower.serving.counts() == (1, 2), "they have not come")
        promote(linked / "002")
        wait_for(lambda: served_run(server)["run"] == "002", "the link is not followed")
        assert sum(follower.serving.counts()) and server.active(), "all were answered before: nothing is shown"
        assert [heard_of(one.result()[2]) for one in begun] == [alone["message"]["content"]] * 3
        assert heard_of(server.ask("POST", CHAT, long)[2]) != alone["message"]["content"]


def test_what_cannot_be_served_changes_nothing(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    "The old one stays, the log says why, a number counts it, and nothing is tried twice unless it is asked for."
    shutil.copytree(linked / "002", linked / "torn")
    turn_bit(next((linked / "torn" / "model").glob("*.safetensors")))
    shutil.copytree(linked / "002", linked / "stopped")
    set_status(linked / "stopped", "running")
    cases = {"none": "no run here", "torn": "not the weights that were trained", "labels": "it was tuned to classify"}
    cases |= {"stopped": "this run is stopped"}
    with server_here(linked / "served") as (follower, server):
        before = heard_of(server.ask("POST", CHAT, asked_of("May I?"))[2])
        n_threads = threading.active_count()
        for k, name in enumerate(cases):
            lead(linked, name)
            wait_for(lambda k=k: metric(server, "llmft_switch_failed_total") == k + 1, name)
            assert heard_of(server.ask("POST", CHAT, asked_of("May I?"))[2]) == before
            assert served_run(server)["run"] == "001" and server.ask("GET", "/health")[0] == 200
        assert threading.active_count() == n_threads
        set_status(linked / "stopped", "finished")
        time.sleep(0.3)
        assert served_run(server)["run"] == "001" and metric(server, "llmft_switch_failed_total") == 4
        follower.look()
        wait_for(lambda: served_run(server)["run"] == "stopped", "it is not tried again")
    assert all(said in caplog.text for said in cases.values()) and caplog.text.count("001 stays") == 4


def test_memory_and_threads_of_the_old_one_go(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Also of a new one that was not let in."
    from llmft_nb import switching

    kept = list[weakref.ref]()
    with server_here(linked / "served") as (follower, server):
        n_threads = sum(one.name == "model" for one in threading.enumerate())
        for stream in (True, False):
            assert server.ask("POST", CHAT, asked_of("May I?", stream=stream))[0] == 200
        kept.append(weakref.ref(follower.serving.main.predictor.model.network))

        def refuse(model: Any) -> None:
            kept.append(weakref.ref(model.predictor.model.network))
            raise torch.OutOfMemoryError("out of memory")

        follower.accept = refuse
        promote(linked / "002")
        wait_for(lambda: metric(server, "llmft_switch_failed_total") == 1, "it was let in")
        wait_for(lambda: kept[1]() is None, "who was not let in is kept")
        assert kept[0]() is not None and served_run(server)["run"] == "001"
        follower.accept = lambda model: None
        follower.look()
        wait_for(lambda: served_run(server)["run"] == "002", "it was not let in")
        assert server.ask("POST", CHAT, asked_of("May I?"))[0] == 200
        wait_for(lambda: kept[0]() is None, "the old one is kept")
        assert sum(one.name == "model" for one in threading.enumerate()) == n_threads
        monkeypatch.setattr(switching, "free_bytes", lambda: 1000)
        rollback(linked)
        wait_for(lambda: metric(server, "llmft_switch_failed_total") == 2, "there was room")
        assert served_run(server)["run"] == "002"


def test_only_what_is_followed_is_loaded_again(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(linked)
    for options, path, name in (
        ({}, linked / "001", "001"),
        ({"follow": False}, linked / "served", "served"),
        ({}, tmp_path / "current" / "001", "001"),
    ):
        with server_here(path, **options) as (follower, _):
            assert follower.serving.main.name == name and not follower._thread.is_alive()
    shutil.copytree(linked, tmp_path / "later", symlinks=True)
    (tmp_path / "later" / "001").rename(tmp_path / "later" / "old")
    (tmp_path / "later" / "002").rename(tmp_path / "later" / "001")
    with server_here(tmp_path / "current" / "001", follow=True) as (follower, server):
        before = heard_of(server.ask("POST", CHAT, asked_of("May I?", model="001"))[2])
        (tmp_path / "new").symlink_to(tmp_path / "later")
        os.replace(tmp_path / "new", tmp_path / "current")
        wait_for(lambda: follower.here.parent.name == "later", "the way there changed")
        assert heard_of(server.ask("POST", CHAT, asked_of("May I?", model="001"))[2]) != before


def test_a_question_read_for_the_old_one_is_read_again(linked: Path) -> None:
    "Tokens of one model are not for another: between reading and putting, the model may have changed."
    from starlette.requests import Request

    from llmft_nb.switching import follow_run

    old, new = follow_run(linked / "001", "served").serving, follow_run(linked / "002", "served").serving
    read = list[str]()

    def parse(model: Any, values: dict[str, Any]) -> str:
        read.append(model.run["run"])
        old.models[0] = new.main
        return model.run["run"]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    first = old.main
    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    assert asyncio.run(old.read(request, parse)) == "002" and read == ["001", "002"]
    first.worker.stop()
    new.stop()


def test_labels_that_wait_are_told_before_the_end(linked: Path) -> None:
    from llmft_nb.worker import ModelWorker, Rows

    worker, heard = ModelWorker(load_predictor(linked / "labels"), n_rows=1), list[Any]()
    with worker._changed:
        for k in range(4):
            worker.put(Rows([f"May I take no. {k}?"], heard.append))
    worker.drain()
    assert len(heard) == 4 and None not in heard and not worker.alive
