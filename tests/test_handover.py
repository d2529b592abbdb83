"""Handing over to other engines: a real one, in a process of its own, answers from our folders as `predict` does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import make_run

pytest.importorskip("openai", reason="transformers serve needs it")
pytest.importorskip("uvicorn", reason="transformers serve needs it")

from llmft_nb.export import export_run, load_exported
from llmft_nb.handover import BELOW, engine_commands, left_behind, served_template, trained_template
from llmft_nb.modeling import LLMForCausalLM
from llmft_nb.ollama import turn_template
from llmft_nb.predict import load_predictor

QUESTIONS = ["Can I take zinc with milk?", "Is it safe at night?", "What is in it, and why?"]
SETTINGS: dict[str, Any] = {"max_length": 200, "max_new_tokens": 24, "no_repeat_ngram": 3}
TALK = {
    "system": 'Answer in "one" {word}, or {{ two }}.\nBe kind.',
    "prompt_template": "Asked:\n{question}!",
}


@contextlib.contextmanager
def transformers_serve(*folders: Path) -> Iterator[list[int]]:
    "A server for each folder, started by the command on an export's card, all at the same time; their ports."
    words, ports, processes = engine_commands("merged", "run", {}, None)[0][1], [], []
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        for folder in folders:
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                ports.append(taken.getsockname()[1])
            command = ["bash", "-c", f"exec env {words.replace('8000', str(ports[-1]))}"]
            with (folder.parent / f"{folder.name}.log").open("w") as log:
                processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
        for port, folder, process in zip(ports, folders, processes, strict=True):
            ends_s = time.monotonic() + 120
            while not is_up(port):
                ended = process.poll() is not None or time.monotonic() > ends_s
                assert not ended, (folder.parent / f"{folder.name}.log").read_text()
                time.sleep(0.2)
        yield ports
    finally:
        for process in processes:
            process.kill()
            process.wait()


def is_up(port: int) -> bool:
    "Whether it answers."
    with contextlib.suppress(OSError):
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        line.request("GET", "/health")
        return line.getresponse().status == 200
    return False


def asked(port: int, *said: tuple[str, str], **body: Any) -> str:
    "What it answers."
    messages = [{"role": role, "content": content} for role, content in said]
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request(
        "POST", "/v1/chat/completions", json.dumps({"messages": messages, **body}), {"Content-Type": "application/json"}
    )
    answer = line.getresponse()
    told = json.loads(answer.read())
    assert answer.status == 200, told
    return str(told["choices"][0]["message"]["content"])


def test_another_engine_answers_as_predict_does(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run = make_run(tmp_path / "run", "instruct", **SETTINGS, **TALK)
    bare = make_run(tmp_path / "bare", "instruct", max_length=200, max_new_tokens=24)
    told = export_run(run, "merged", data=[{"question": one, "completion": "no"} for one in QUESTIONS])
    merged = Path(told["folder"])
    kept = json.loads((merged / "generation_config.json").read_text())
    assert (kept["max_new_tokens"], kept["no_repeat_ngram_size"], kept["do_sample"]) == (24, 3, False)
    ours, theirs = load_predictor(run), load_exported(merged)
    wanted = [answer["completion"] for answer in ours.predict(QUESTIONS)]
    assert [answer["completion"] for answer in theirs.predict(QUESTIONS)] == wanted, (
        "loaded by us nothing is said twice"
    )
    without = ours.__class__(ours.model, 200, "", 64, {**SETTINGS, **TALK, "no_repeat_ngram": 0}, "instruct")
    assert [one["completion"] for one in without.predict(QUESTIONS)] != wanted, "else the guard is not seen here"
    plain = [answer["completion"] for answer in load_predictor(bare).predict(QUESTIONS)]
    assert plain != wanted
    card = (merged / "README.md").read_text()
    assert engine_commands("merged", "run", SETTINGS, 512)[0][1] in card and "fictional, not medical advice" in card
    with transformers_serve(merged, bare / "model") as (port, other):
        assert [asked(port, ("user", one), max_tokens=24) for one in QUESTIONS] == wanted
        assert [asked(other, ("user", one), max_tokens=24, temperature=0) for one in QUESTIONS] == plain
        own = asked(port, ("system", "Be brief."), ("user", QUESTIONS[0]), max_tokens=24)
    row = {"messages": [{"role": "system", "content": "Be brief."}]}
    filled = f"Asked:\n{QUESTIONS[0]}!"
    row["messages"].append({"role": "user", "content": filled})
    assert own == ours.predict([row])[0]["completion"], "a client's own system message takes the place of the run's"


def test_a_gguf_file_says_what_the_run_says(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run = make_run(tmp_path / "run", "instruct", **SETTINGS, **TALK)
    told = export_run(run, "gguf", data=[{"question": one, "completion": "no"} for one in QUESTIONS])
    folder = Path(told["folder"])
    template = gguf.GGUFReader(folder / "model.gguf").fields["tokenizer.chat_template"].contents()
    plain = load_predictor(run).model.tokenizer.chat_template
    assert template == served_template(plain, TALK) and trained_template(template) == plain
    assert BELOW not in (folder / "Modelfile").read_text(), (
        "there the pattern and the system message have their own lines"
    )
    card = (folder / "README.md").read_text()
    assert "llama-server -m model.gguf" in card and "Nothing stops a run of 3 tokens" in card
    assert card.count("not tried here") == 2


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  \n", "{#- a comment -#}\n"])
def test_a_template_renders_as_before_whatever_it_begins_with(start: str) -> None:
    tokenizer = LLMForCausalLM.from_pretrained("tiny").tokenizer
    inner = start + "{% for message in messages %}\n[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}\nA:"
    said = [
        {"role": "system", "content": "Be\tkind \\ of \u2028 it \U0001f600 %} }} {{"},
        {"role": "user", "content": "Why"},
    ]
    texts = []
    for template in (inner, served_template(inner, {"system": said[0]["content"]})):
        tokenizer.chat_template = template
        texts.append(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    texts.append(tokenizer.apply_chat_template(said[1:], tokenize=False, add_generation_prompt=True))
    assert texts[0] == texts[1] == texts[2] and trained_template(tokenizer.chat_template) == inner


def test_a_pattern_that_says_its_column_twice_is_left_to_clients() -> None:
    model, twice = LLMForCausalLM.from_pretrained("tiny"), {"prompt_template": "{question}, yes, {question}"}
    assert served_template("as it was", twice) == "as it was"
    lines = left_behind("merged", twice, "", has_template=True)
    assert any("{question}, yes, {question}" in line for line in lines)
    assert turn_template(model.tokenizer, twice["prompt_template"]) == ""
