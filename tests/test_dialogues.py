"""Conversations as data: any shape read alike, wrong rows named, every answer learnt to its end, shown as it is."""

from __future__ import annotations

import copy
import csv
import html
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from small import write_jsonl

from llmft_nb.audit import PARTING, audit_checks, audit_view, readable_piece
from llmft_nb.core import UserError, assets_folder
from llmft_nb.dialogues import InstructDataset, check_instruct, fill_template, template_columns
from llmft_nb.rows import find_leaks, read_rows, split_rows
from llmft_nb.tokens import NO_TARGET

ASKED, SAID = {"role": "user", "content": "Is it safe?"}, {"role": "assistant", "content": "Ask a pharmacist."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")


def data_file(name: str) -> Path:
    path = Path(os.environ.get("LLMFT_DATA", "../shared/data")) / name
    if not path.is_file():
        pytest.skip(f"no {name} in LLMFT_DATA")
    return path


# Shapes


def test_all_shapes_give_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    prompt, answer, both = ASKED["content"], SAID["content"], [ASKED, SAID]
    shapes: dict[str, list[dict[str, Any]]] = {
        "columns": [{"prompt": prompt, "completion": answer}],
        "messages": [{"messages": both}],
        "share": [{"messages": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}],
    }
    found = [InstructDataset(write_jsonl(tmp_path / f"{k}.jsonl", rows), tokenizer) for k, rows in shapes.items()]
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(both)]])
    found.append(InstructDataset(tmp_path / "cells.csv", tokenizer))
    rows = [{"q": prompt, "a": answer}]
    found.append(InstructDataset(rows, tokenizer, columns={"q": "prompt", "a": "completion"}))
    found.append(InstructDataset(rows, tokenizer, prompt_template="{q}", columns={"a": "completion"}))
    assert len({data.fingerprint for data in found}) == 1
    assert found[0].prompts() == found[3].prompts()
    assert {tuple(data.answers()) for data in found} == {(answer,)}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "empty completion": ({"prompt": "a", "completion": " "}, "t.jsonl:2:completion: completion is empty"),
    "missing completion": ({"prompt": "a"}, "t.jsonl:2:completion: completion is missing"),
    "number prompt": ({"prompt": 3, "completion": "b"}, "t.jsonl:2:prompt: prompt is of type int, not a text"),
    "messages a number": ({"messages": 3}, "t.jsonl:2:messages: is of type int, not a list"),
    "messages no JSON": ({"messages": "hello"}, "t.jsonl:2:messages: is a text, but not JSON"),
    "no messages": ({"messages": []}, "t.jsonl:2:messages: is empty"),
    "message a text": ({"messages": ["hi", SAID]}, "messages[0]: message 1 is of type str, not an object"),
    "unknown role": ({"messages": [ASKED, {**SAID, "role": "asistant"}]}, "did you mean 'assistant'?"),
    "no role": ({"messages": [{"content": "a"}, SAID]}, "message 1 has no role"),
    "role a list": ({"messages": [{"role": ["user"], "content": "a"}, SAID]}, "unknown role"),
    "no content": ({"messages": [ASKED, {"role": "assistant"}]}, "message 2 has no content"),
    "content of parts": ({"messages": [{**ASKED, "content": [{"type": "text"}]}, SAID]}, "a content of type list"),
    "empty answer": ({"messages": [ASKED, {**SAID, "content": "\n"}]}, "messages[1]: message 2 is empty"),
    "two questions": ({"messages": [ASKED, ASKED, SAID]}, "messages 1 and 2 are both the user's: join them"),
    "two answers": ({"messages": [ASKED, SAID, SAID]}, "messages 2 and 3 are both the assistant's"),
    "late system": ({"messages": [ASKED, SAID, SYSTEM, ASKED, SAID]}, "message 3 is a second or late system message"),
    "answer first": ({"messages": [SAID, ASKED, SAID]}, "message 1 is the assistant's, and nobody has asked"),
    "answer after system": ({"messages": [SYSTEM, SAID]}, "message 2 is the assistant's, and nobody has asked"),
    "no answer": ({"messages": [SYSTEM, ASKED]}, "no message is the assistant's"),
    "question last": ({"messages": [ASKED, SAID, ASKED]}, "the last message is the user's"),
    "system only": ({"messages": [SYSTEM]}, "no message is the assistant's"),
    "tool calls": ({"messages": [ASKED, {**SAID, "tool_calls": [{}]}]}, "has tool_calls, which is not rendered"),
    "train a word": ({"messages": [ASKED, {**SAID, "train": "yes"}]}, "'train' of type str"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_wrong_rows_are_named_by_file_line_and_field(kind: str, tmp_path: Path) -> None:
    row, words = WRONG[kind]
    good = {"messages": [ASKED, SAID]} if "messages" in row else {"prompt": "a", "completion": "b"}
    path = write_jsonl(tmp_path / "t.jsonl", [good, row, good])
    with pytest.raises(UserError) as caught:
        check_instruct(read_rows(path))
    assert words in str(caught.value)
    assert "t.jsonl:2:" in str(caught.value)
    assert "t.jsonl:1" not in str(caught.value)


def test_all_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [row for row, _ in WRONG.values()])
    with pytest.raises(UserError) as caught:
        check_instruct(read_rows(path))
    assert len(re.findall(r"t\.jsonl:\d+:", str(caught.value))) == 20
    assert re.search(r"\d+ fields are wrong \(.*messages: \d+", str(caught.value))


def test_columns_of_another_name_are_pointed_at() -> None:
    for row, words in (
        ({"question": "a", "answer": "b"}, "--columns question=prompt"),
        ({"prompt": "a", "output": "b"}, "--columns output=completion"),
        ({"conversations": [ASKED, SAID]}, "--columns conversations=messages"),
        ({"promt": "a", "completion": "b"}, "--columns promt=prompt"),
    ):
        with pytest.raises(UserError, match=words):
            check_instruct(read_rows([row]))


def test_questions_without_answers_may_be_predicted(tokenizer: Any) -> None:
    rows = [
        {"prompt": "Is it safe?"},
        {"messages": [ASKED]},
        {"messages": [ASKED, SAID]},
        {"messages": [SYSTEM, ASKED]},
    ]
    data = InstructDataset(rows, tokenizer, need_answers=False)
    assert data.answers() == ["", "", SAID["content"], ""]
    prompts = data.prompts()
    assert prompts[0] == prompts[1] == prompts[2]
    assert [row["input_ids"] for row in data] == prompts
    assert data.audit.n_supervised == 0
    assert tokenizer.decode(prompts[3]) == "<|system|>Be brief.<|end|><|user|>Is it safe?<|end|><|assistant|>"


# Patterns


@pytest.mark.parametrize(
    ("pattern", "row", "expected"),
    [
        ("{a}\n{b}", {"a": "x", "b": ""}, "x"),
        ("{a}\n{b}", {"a": "", "b": "y"}, "y"),
        ("{a}\n\n{b}", {"a": "", "b": "y"}, "y"),
        ("{a}\n\n{b}\n\n{c}", {"a": "x", "b": None, "c": "z"}, "x\n\nz"),
        ("{a}\n\n{b}\n\n{c}", {"a": "x"}, "x"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("Q: {a} ({b})", {"a": "x", "b": ""}, "Q: x ()"),
        ("{a}", {"a": "two\n\nlines {b}"}, "two\n\nlines {b}"),
        ("{my column}", {"my column": 3}, "3"),
    ],
)
def test_patterns(pattern: str, row: dict[str, Any], expected: str) -> None:
    assert fill_template(pattern, row) == expected


@pytest.mark.parametrize("pattern", ["{a", "a}", "{}", "plain", "{a!r}", "{a:>9}", "{0.x}{", ""])
def test_wrong_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="--prompt-template"):
        template_columns(pattern)


def test_patterns_reach_into_no_object() -> None:
    "A pattern is no program: what looks like an attribute is only an odd column name."
    with pytest.raises(UserError, match="no row has a column"):
        check_instruct(read_rows([{"a": "x", "completion": "y"}]), prompt_template="{a.__class__}")


# Limits, splits, training


def test_real_instructions(tokenizer: Any) -> None:
    path = data_file("rasbt_instruct/train.jsonl")
    data = InstructDataset(
        path, tokenizer, prompt_template="{instruction}\n{input}", columns={"output": "completion"}, system="Be brief."
    )
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(data) == len(raw) == data.audit.n_rows
    assert data.audit.n_supervised == len(data.targets(range(len(data))))
    for k in range(0, len(raw), 13):
        expected = raw[k]["instruction"] + (f"\n{raw[k]['input']}" if raw[k]["input"].strip() else "")
        text = f"<|system|>Be brief.<|end|><|user|>{expected}<|end|><|assistant|>{raw[k]['output']}<|end|>"
        assert data[k]["input_ids"] == tokenizer(text)["input_ids"]
        assert tokenizer.decode(data.targets([k])) == raw[k]["output"] + "<|end|>"
    assert {check.verdict for check in audit_checks(data)} == {"good"}


@pytest.mark.parametrize("too_long", ["drop", "drop_turns", "cut_prompt", "split"])
def test_counts_of_the_audit_are_those_of_the_rows(tokenizer: Any, too_long: str) -> None:
    chosen = random.Random(1)
    talks = []
    for _ in range(40):
        turns = [[{**ASKED, "content": "why " * chosen.randint(1, 20)}, SAID] for _ in range(chosen.randint(1, 3))]
        talks.append({"messages": [message for turn in turns for message in turn]})
    whole = InstructDataset(talks, tokenizer, train_on="all")
    data = InstructDataset(talks, tokenizer, train_on="all", too_long=too_long, max_length=64)
    over = [k for k in range(40) if whole.lengths[k] > 64]
    assert 5 < len(over) < 35
    assert data.audit.n_over == len(over) == data.audit.n_answers_at_risk
    assert data.audit.n_tokens == sum(data.lengths)
    assert data.audit.n_supervised == sum(label != NO_TARGET for row in data for label in row["labels"])
    assert data.lengths.max() <= 64
    n_per_answer = len(tokenizer(SAID["content"] + "<|end|>")["input_ids"])
    n_answers = whole.audit.n_supervised // n_per_answer
    if too_long == "drop":
        assert data.audit.dropped == [f"row:{k + 1}" for k in over]
        assert data.places == [f"row:{k + 1}" for k in range(40) if k not in over]
    elif too_long == "drop_turns":
        assert data.audit.n_supervised == n_per_answer * (n_answers - data.audit.n_answers_lost)
        assert data.audit.n_turns_dropped == 2 * data.audit.n_answers_lost > 0
    else:
        assert data.audit.n_supervised == whole.audit.n_supervised
        assert data.targets(range(len(data))) == whole.targets(range(40))
    if too_long == "cut_prompt":
        assert data.audit.n_prompt_tokens_cut == sum(whole.lengths) - sum(data.lengths)
    assert all(row["labels"].count(NO_TARGET) < len(row["labels"]) for row in data)


def test_an_answer_alone_over_the_limit_is_refused_by_name(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "long " * 60}]
    for too_long in ("error", "drop_turns", "cut_prompt"):
        with pytest.raises(UserError, match=r"row:2: \d+ tokens, 32 are allowed"):
            InstructDataset(rows, tokenizer, max_length=32, too_long=too_long)
    split = InstructDataset(rows, tokenizer, max_length=32, too_long="split")
    assert tokenizer.decode(split.targets(range(len(split)))) == "b<|end|>" + "long " * 60 + "<|end|>"
    assert set(split.row_numbers) == {0, 1}
    with pytest.raises(UserError, match="every conversation is longer"):
        InstructDataset(rows[1:], tokenizer, max_length=32, too_long="drop")
    with pytest.raises(UserError, match="unknown policy 'cut'"):
        InstructDataset(rows, tokenizer, too_long="cut")
    with pytest.raises(UserError, match="the model reads at most 512"):
        InstructDataset(rows, tokenizer, max_length=4096)


def test_prompts_leave_room(tokenizer: Any) -> None:
    data = InstructDataset(
        [{"prompt": "why " * 50, "completion": "b"}], tokenizer, max_length=64, too_long="cut_prompt"
    )
    assert len(data.prompts(20)[0]) == 44
    assert tokenizer.decode(data.prompts(20)[0]).endswith("<|end|><|assistant|>")
    strict = InstructDataset([{"prompt": "why " * 50, "completion": "b"}], tokenizer, max_length=64)
    with pytest.raises(UserError, match=r"row:1: the prompt has \d+ tokens, 44 are left"):
        strict.prompts(20)


def test_the_same_questions_stay_together_and_leaks_are_found() -> None:
    rows = check_instruct(read_rows([{"prompt": f"q {k // 2}", "completion": f"a {k}"} for k in range(40)]))
    kept, held = split_rows(rows, 0.25, seed=0)
    assert not {row["text"] for row in kept} & {row["text"] for row in held}
    assert len(find_leaks(rows, {"valid": held}).leaks) == len(held)


def test_a_tiny_model_learns_to_answer_and_to_stop(tokenizer: Any, one_thread: None) -> None:
    "The labels are what a causal model learns from: trained on them it gives the answers, and the end."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    data = InstructDataset(
        [{"prompt": "Is tea safe?", "completion": "Yes."}, {"prompt": "Is Zelgrove safe?", "completion": "No way."}],
        tokenizer,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batch = data.batch([0, 1])
    for _ in range(60):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch["keep"]], batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for prompt, answer in zip(data.prompts(), data.answers(), strict=True):
        given = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        assert tokenizer.decode(given[0, len(prompt) :]) == answer + "<|end|>"


# The audit


def test_views_lose_nothing(tokenizer: Any) -> None:
    from rich.console import Console

    asked = 'a "b" <script>alert(1)</script> & [bold]x[/bold] 💊 \u202e <|end|>\n\t\x07'
    data = InstructDataset([{"prompt": asked, "completion": "Yes</span>"}], tokenizer)
    view = audit_view(data, 0)
    assert view.token_ids == data[0]["input_ids"]
    page = view.as_html()
    assert "<script" not in page and "</span><" in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "".join(view.pieces) in text.replace(view.place, "", 1)
    console = Console(width=1000, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(view.as_text())
    shown = captured.get()
    assert "⟦" in shown and "[bold]" in shown.replace(PARTING, "") and "\x07" not in shown and "\u202e" not in shown
    assert "".join(shown.split()) == "".join(f"{view.place} {view}".split())
    assert json.loads(json.dumps(view.as_record()))["trained"] == view.trained
    assert sum(view.trained) == data.audit.n_supervised


def test_every_token_has_a_readable_piece(tokenizer: Any) -> None:
    for number in range(0, len(tokenizer), 7):
        piece = readable_piece(tokenizer, number)
        assert piece.isprintable() and piece
        text = tokenizer.decode([number])
        if text.isprintable() and "\ufffd" not in text:
            assert piece == text
    assert readable_piece(tokenizer, 10**6) == "⟨no token 1000000⟩"


def test_double_beginning_and_pad_as_end_are_told(tokenizer: Any) -> None:
    form = copy.deepcopy(tokenizer)
    form.bos_token, form.pad_token = "<|mask|>", "<|end|>"
    form.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    checks = {check.name: check for check in audit_checks(InstructDataset([{"messages": [ASKED, SAID]}], form))}
    assert checks["beginning"].verdict == "bad"
    assert checks["padding"].verdict == "note"
    assert checks["served as trained"].verdict == checks["end token"].verdict == "good"


def test_messages_in_a_cell_may_be_hostile() -> None:
    with pytest.raises(UserError, match=r"row:1:messages: is a text, but not JSON"):
        check_instruct(read_rows([{"messages": "[" * 200_000}]))
    twice = '[{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]'
    with pytest.raises(UserError, match=r"the key 'content' occurs twice"):
        check_instruct(read_rows([{"messages": twice}]))
    half = '[{"role": "user", "content": "a\\ud800"}, {"role": "assistant", "content": "c"}]'
    with pytest.raises(UserError, match=r"half of a surrogate pair"):
        check_instruct(read_rows([{"messages": half}]))


@pytest.mark.parametrize("too_long", ["error", "drop", "cut_prompt"])
def test_a_marked_question_is_no_answer_to_learn(tokenizer: Any, too_long: str) -> None:
    "It was once said to be too long, or left out as such."
    talk, good = [{**ASKED, "train": True}, SAID], [ASKED, {**SAID, "train": True}]
    with pytest.raises(UserError, match=r"row:2:messages: no answer is marked"):
        InstructDataset([{"messages": good}, {"messages": talk}], tokenizer, train_on="marked", too_long=too_long)


def test_a_prompt_pattern_may_use_columns_of_other_tasks() -> None:
    rows = check_instruct(
        read_rows([{"label": "safe", "tokens": "3", "completion": "Yes."}]), prompt_template="{label} {tokens}"
    )
    assert rows[0]["text"] == "safe 3"
    assert check_instruct(rows).rows == rows.rows, "checked rows pass again"


def test_no_negative_room_is_spoken_of(tokenizer: Any) -> None:
    dataset = InstructDataset([{"prompt": "Is it safe?", "completion": "Ask."}], tokenizer, max_length=64)
    with pytest.raises(UserError, match=r"tokens, 0 are left for it"):
        dataset.prompts(600)
