"""Every task from rows to a finished run that answers: trained, interrupted and resumed, scored, asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_config, small_rows, write_jsonl

from llmft_nb.classify import ClassifyTask
from llmft_nb.core import UserError
from llmft_nb.finetune import FinishedRun, evaluate_predictor, finetune
from llmft_nb.hparams import TrainSettings, head_lr, resolve_settings
from llmft_nb.inference import head_inputs
from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.predict import answer_words, load_predictor, open_chat
from llmft_nb.strategy import parse_strategy
from llmft_nb.tasks import TASKS, make_task

PLACES = ["Kiel", "Norden", "Old Harbour", "New Mill", "Sandwick"]


def tag_rows(n_rows: int) -> list[dict[str, Any]]:
    "Orders with a place in them; two places have two words."
    rows = []
    for i in range(n_rows):
        place = PLACES[i % 5].split()
        words = [f"{i})", "Send", "it", "to", *place, "at", "noon", "."]
        tags = ["O"] * 4 + ["B-place"] + ["I-place"] * (len(place) - 1) + ["O"] * 3
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def instruct_rows(n_rows: int) -> list[dict[str, Any]]:
    "Questions of which the answer repeats a word."
    things = ["the cat", "a small boat", "his old hat", "the red door"]
    return [
        {"prompt": f"{i}: who has {things[i % 4]}?", "completion": f"I have {things[i % 4]}."} for i in range(n_rows)
    ]


def text_rows(n_rows: int) -> list[dict[str, Any]]:
    "Sentences of a small world, in documents of unequal length."
    line = "The boat went over the water to the small house by the sea. "
    return [{"text": f"Day {i}. " + line * (1 + i % 4)} for i in range(n_rows)]


ROWS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "classify": small_rows,
    "tag": tag_rows,
    "instruct": instruct_rows,
    "text": text_rows,
}
HEADLINES = {"classify": "accuracy", "tag": "span_f1", "instruct": "token_f1", "text": "perplexity"}
CASES = [
    *(("Llama", task) for task in ROWS),
    *(("Bert", task) for task in ("classify", "tag", "text")),
    ("Roberta", "text"),
]
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "max_length": 48, "precision": "f32"}
OPTIONS |= {"max_new_tokens": 6, "n_written": 3, "evals_per_epoch": 2, "save_every": 2}


class Crash(BaseException):
    "Stands for the end of the process."


class CrashAt:
    "A callback that ends the run after a step."

    def __init__(self, step: int) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def listen(state: Any, *_: Any) -> None:
            if name == "on_step" and state.step == self.step:
                raise Crash

        return listen


def general(_: Path) -> list[str]:
    "Two short texts, so that forgetting costs nothing here."
    return ["The old man went to the door.", "It was a fine day by the sea."]


def train(folder: Path, base: Path, task: str, **changes: Any) -> FinishedRun:
    data = write_jsonl(folder.parent / f"{task}.jsonl", ROWS[task](48))
    return finetune(
        data, task=task, model=base, out=folder, general=general(folder), callbacks=(), **(OPTIONS | changes)
    )


def outcome(run: FinishedRun) -> dict[str, str]:
    "All that must not depend on interruptions."
    names = ("model/model.safetensors", "metrics.jsonl", "test_predictions.jsonl")
    found = {name: hashlib.sha256((run.folder / name).read_bytes()).hexdigest() for name in names}
    return found | {"scores": json.dumps(run.record.scores, sort_keys=True)}


@pytest.fixture(scope="module")
def bases(save_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    "Small random models of each family with the embedded tokenizer, whose masks and ends are its own."
    from llmft_nb.bases import find_model, load_tokenizer

    saved: dict[str, Path] = {}

    def base_of(kind: str) -> Path:
        if kind not in saved:
            import transformers

            tokenizer, _ = load_tokenizer(find_model("tiny"))
            if kind == "Llama":
                head = "ForCausalLM"
            else:
                head = "ForMaskedLM"
            config = small_config(kind, len(tokenizer))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = getattr(transformers, f"{kind}{head}")(config)
            saved[kind] = tmp_path_factory.mktemp(kind.lower())
            network.save_pretrained(saved[kind])
            tokenizer.save_pretrained(saved[kind])
        return saved[kind]

    return base_of


@pytest.fixture(scope="module")
def finished(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedRun]:
    "Runs that were left alone."
    done: dict[tuple[str, str], FinishedRun] = {}

    def run_of(kind: str, task: str) -> FinishedRun:
        if (kind, task) not in done:
            folder = tmp_path_factory.mktemp(f"{kind}-{task}") / "alone"
            done[kind, task] = train(folder, bases(kind), task)
        return done[kind, task]

    return run_of


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_run_from_rows_to_answers(kind, task, finished, one_thread):
    run = finished(kind, task)
    test = run.record.scores["test"]
    assert test["headline"] == HEADLINES[task]
    score = test[test["headline"]]
    assert score["low"] <= score["value"] <= score["high"]
    assert test["baselines"][0]["name"] == "untuned base"
    assert "ratio" in run.record.scores["forgetting"]
    assert {"report.html", "README.md", "model"} <= {path.name for path in run.folder.iterdir()}
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0]
    monitored = f"valid_{TASKS[task].monitor}"
    chosen = max((line for line in logged if monitored in line), key=lambda line: line[monitored])
    kept = run.record.scores["validation"]
    assert (kept["step"], run.record.test_looks) == (chosen["step"], 1)
    assert kept[TASKS[task].monitor] == pytest.approx(chosen[monitored])


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_resumed_runs_end_with_the_same_bits(kind, task, finished, bases, tmp_path, one_thread):
    alone = outcome(finished(kind, task))
    n_steps = 2 * max(1, len((finished(kind, task).folder / "metrics.jsonl").read_text().splitlines()) // 6)
    for step in (1, 3, n_steps):
        folder = tmp_path / f"killed-{step}"
        data = write_jsonl(tmp_path / f"{task}.jsonl", ROWS[task](48))
        options = OPTIONS | {"task": task, "model": bases(kind), "out": folder, "general": general(tmp_path)}
        try:
            finetune(data, callbacks=(CrashAt(step),), **options)
        except Crash:
            resumed = finetune(data, callbacks=(), resume=True, **options)
            assert outcome(resumed) == alone


@pytest.mark.parametrize(
    ("kind", "task"), [("Bert", "classify"), ("Bert", "tag"), ("Llama", "instruct"), ("Llama", "text")]
)
def test_a_frozen_trunk_computed_once_survives_a_crash(kind, task, bases, tmp_path, one_thread):
    "States that are computed again have the same bits, whatever the run had done before."
    data = write_jsonl(tmp_path / f"{task}.jsonl", ROWS[task](48))
    options = OPTIONS | {"task": task, "model": bases(kind), "strategy": "top:1", "general": general(tmp_path)}
    whole = finetune(data, out=tmp_path / "whole", callbacks=(), **options)
    assert whole.record.model["trunk"].startswith("kept: 1 blocks")
    with pytest.raises(Crash):
        finetune(data, out=tmp_path / "run", callbacks=(CrashAt(3),), **options)
    assert outcome(finetune(data, out=tmp_path / "run", callbacks=(), resume=True, **options)) == outcome(whole)
    computed = finetune(data, out=tmp_path / "computed", callbacks=(), trunk_gb=0, **options)
    assert "trunk" not in computed.record.model
    ours, plain = (run.record.scores["validation"]["loss"] for run in (whole, computed))
    assert ours == pytest.approx(plain, abs=1e-4)


def test_words_masked_anew_are_computed_anew(bases, tmp_path):
    options = OPTIONS | {"task": "text", "model": bases("Bert"), "strategy": "top:1", "general": general(tmp_path)}
    run = finetune(ROWS["text"](48), out=tmp_path / "run", callbacks=(), **options)
    assert run.record.model["trunk"] == "computed each time: words are masked anew for each epoch"


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_served_as_trained(kind, task, finished, one_thread):
    run = finished(kind, task)
    lines = [json.loads(line) for line in (run.folder / "test_predictions.jsonl").read_text().splitlines()]
    predictor = load_predictor(run.folder)
    if task == "classify":
        answers = [answer["label"] for answer in predictor.predict([line["text"] for line in lines])]
        assert answers == [line["predicted"] for line in lines]
    elif task == "tag":
        answers = predictor.predict([{"tokens": line["tokens"]} for line in lines])
        assert [answer["tags"] for answer in answers] == [line["tags"] for line in lines]
    elif task == "instruct":
        written = [line for line in lines if line["predicted"] is not None]
        answers = predictor.predict([{"prompt": line["prompt"]} for line in written])
        assert [answer["completion"] for answer in answers] == [line["predicted"] for line in written]
        assert len(written) == 3
    else:
        mask = predictor.model.tokenizer.mask_token
        answer = predictor.predict([f"The boat went {mask} the sea" if kind != "Llama" else "The boat"])[0]
        assert len(answer["fills"][0]) == 5 if kind != "Llama" else answer["completion"]


@pytest.mark.parametrize("task", list(ROWS))
def test_scored_again_on_other_rows(task, finished, one_thread):
    predictor = load_predictor(finished("Llama", task).folder)
    scores = evaluate_predictor(predictor, ROWS[task](60)[48:])
    assert scores["headline"] == HEADLINES[task]
    assert scores[scores["headline"]]["n"] == (3 if task == "instruct" else 12)


def test_rows_of_another_task_are_refused(bases, tmp_path):
    for task, wrong in (("tag", "classify"), ("instruct", "tag"), ("classify", "instruct"), ("text", "tag")):
        with pytest.raises(UserError) as caught:
            train_on = ROWS[wrong](48)
            finetune(train_on, task=task, model=bases("Llama"), out=tmp_path / f"{task}-{wrong}", **OPTIONS)
        assert "columns" in str(caught.value) or "there is" in str(caught.value), caught.value
        assert not (tmp_path / f"{task}-{wrong}").exists()


@pytest.mark.parametrize("strategy", ["head", "head-then-full"])
def test_a_tied_head_alone_cannot_be_trained(strategy, tmp_path):
    with pytest.raises(UserError, match="used twice"):
        finetune(instruct_rows(40), task="instruct", model="tiny", strategy=strategy, out=tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "task", "strategy"),
    [
        *(("Bert", task, "head") for task in ("classify", "tag", "text")),
        ("Llama", "instruct", "head"),
        ("Bert", "classify", "head-then-full"),
        ("Llama", "instruct", "head-then-full"),
    ],
)
def test_a_head_alone_has_a_rate_that_suits_what_it_reads(kind, task, strategy, bases, finished, tmp_path, one_thread):
    "Measured before the first step, kept by a run that goes on, and never in place of a rate that somebody named."
    rate = {"head": "lr", "head-then-full": "head_first_lr"}[strategy]
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[task](48))
    options = OPTIONS | {"task": task, "model": bases(kind), "strategy": strategy, "general": general(tmp_path)}
    named = finetune(data, out=tmp_path / "named", callbacks=(), **(options | {rate: 0.004}))
    assert (named.record.settings[rate], named.record.origins[rate]) == (0.004, "argument")
    if strategy == "head":
        del options["lr"]
    with pytest.raises(Crash):
        finetune(data, out=tmp_path / "run", callbacks=(CrashAt(3),), **options)
    resumed = finetune(data, out=tmp_path / "run", resume=True, callbacks=(), **options)
    whole = finetune(data, out=tmp_path / "whole", callbacks=(), **options)
    assert outcome(resumed) == outcome(whole)
    assert resumed.record.origins[rate] == whole.record.origins[rate] == "features"
    assert resumed.record.settings[rate] == whole.record.settings[rate]
    learnt = make_task(task, TrainSettings(max_length=OPTIONS["max_length"]))
    splits = learnt.prepare(data, None, None, columns=None, leaks="drop")
    model = learnt.build(bases(kind), splits, strategy=strategy, init="pretrained")
    train = learnt.dataset(splits.train, model, splits.label_names)
    steps = range(0, len(train), 2 if len(train) > 32 else 1)
    assert whole.record.settings[rate] == head_lr(head_inputs(model, train, steps))


def test_tasks_are_told_by_name():
    with pytest.raises(UserError, match="choose classify, tag, instruct, text"):
        make_task("translate", TrainSettings())


def test_leaks_between_texts(bases, tmp_path):
    rows = text_rows(40)
    options = OPTIONS | {"task": "text", "model": bases("Llama"), "general": general(tmp_path)}
    run = finetune(rows, test=rows[:3], out=tmp_path / "dropped", callbacks=(), **options)
    assert run.record.data["n_left_out"] == 3
    with pytest.raises(UserError, match="3 training texts are held out too"):
        finetune(rows, test=rows[:3], leaks="error", out=tmp_path / "refused", **options)


# --- asked as trained, refused in time ---


def test_an_encoder_does_not_write(bases, tmp_path):
    with pytest.raises(UserError, match="an encoder cannot write answers"):
        finetune(instruct_rows(40), task="instruct", model=bases("Bert"), out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_what_would_fail_after_training_fails_before_it(bases, tmp_path):
    "A wrong file of general texts, and test rows in which nothing is to be found."
    run = {"model": bases("Llama"), "out": tmp_path / "run"} | OPTIONS
    with pytest.raises(UserError, match="no such file"):
        finetune(small_rows(40), general=tmp_path / "genral.jsonl", **run)
    bare = [{"tokens": ["nothing", "here"], "ner_tags": ["O", "O"]}] * 2
    with pytest.raises(UserError, match="no test row has a span"):
        finetune(tag_rows(40), task="tag", test=bare, **run)
    assert not (tmp_path / "run").exists()


def test_scoring_rows_without_spans(finished, one_thread):
    bare = [{"tokens": ["nothing", "here"], "ner_tags": ["O", "O"]}]
    with pytest.raises(UserError, match="no test row has a span"):
        evaluate_predictor(load_predictor(finished("Bert", "tag").folder), bare)


def test_a_model_without_its_run(finished, tmp_path):
    "A run's model folder is asked as its run; taken out of it, only a classifier tells how it wants to be asked."
    run = finished("Llama", "tag")
    assert load_predictor(run.folder / "model").task == "tag"
    taken = shutil.copytree(run.folder / "model", tmp_path / "taken")
    with pytest.raises(UserError, match="LlamaForTokenClassification is no classifier"):
        load_predictor(taken)
    classifier = shutil.copytree(finished("Llama", "classify").folder / "model", tmp_path / "classifier")
    assert load_predictor(classifier).task == "classify"
    (tmp_path / "cut").mkdir()
    shutil.copy(run.folder / "run.json", tmp_path / "cut")
    with pytest.raises(UserError, match="the run has no model folder"):
        load_predictor(tmp_path / "cut")


@pytest.fixture(scope="module")
def templated(bases, tmp_path_factory) -> FinishedRun:
    "A run whose prompts were made of a column, after a system message."
    rows = [{"question": row["prompt"], "completion": row["completion"]} for row in instruct_rows(40)]
    folder = tmp_path_factory.mktemp("templated")
    options = OPTIONS | {"epochs": 1, "max_length": 96, "general": general(folder), "callbacks": ()}
    options |= {"prompt_template": "Question of a guest: {question}", "system": "Be brief.", "strategy": "top:1"}
    options |= {"question": "who has the cat?"}
    return finetune(rows, task="instruct", model=bases("Llama"), out=folder / "run", **options)


def test_plain_texts_fill_the_template(templated, one_thread, monkeypatch):
    import llmft_nb.predict as predict

    asked: list[str] = []

    def note(predictor, prompts):
        asked.extend(predictor.model.tokenizer.decode(ids) for ids in prompts)
        return [{"completion": "", "finished": True} for _ in prompts]

    predictor = templated.predictor()
    monkeypatch.setattr(predict, "write_on", note)
    predictor.predict([{"question": "who has the cat?"}, "who has the cat?"])
    assert asked[0] == asked[1]
    assert "Question of a guest: who has the cat?" in asked[0] and "Be brief." in asked[0]
    several = dataclasses.replace(predictor, settings=predictor.settings | {"prompt_template": "{a} {b}"})
    with pytest.raises(UserError, match="it asks for the columns a, b"):
        several.predict(["who has the cat?"])
    with pytest.raises(UserError, match="it asks for the columns a, b"):
        open_chat(several)


def test_a_question_is_asked_as_later_in_service(templated):
    "Before and after the training a task asks with the same settings that its run will be served with."
    served = templated.predictor()
    settings = TrainSettings(**{name: served.settings[name] for name in vars(TrainSettings())})
    options = {"prompt_template": served.settings["prompt_template"], "system": served.settings["system"]}
    trained = make_task("instruct", settings, options).predictor(served.model)
    assert {**trained.settings, "strategy": "top:1", "init": "pretrained"} == served.settings
    assert (trained.max_length, trained.task) == (served.max_length, served.task)
    assert templated.record.scores["question"]["after"] == answer_words(served.predict(["who has the cat?"])[0])


def test_only_what_the_strategy_opens_moves(templated, bases):
    from llmft_nb.modeling import LLMForCausalLM

    assert templated.record.model["n_trainable"] < templated.record.model["n_weights"]
    was = dict(LLMForCausalLM.from_pretrained(bases("Llama")).network.named_parameters())
    moved = {
        name for name, weight in templated.predictor().model.network.named_parameters() if (weight != was[name]).any()
    }
    assert moved and not any("layers.0" in name for name in moved)


def test_leaking_rows_are_counted(bases, tmp_path, one_thread):
    rows = small_rows(60)
    options = OPTIONS | {"epochs": 1, "model": bases("Llama"), "general": general(tmp_path), "callbacks": ()}
    run = finetune(rows, test=rows[:4], out=tmp_path / "run", **options)
    assert run.record.data["n_left_out"] >= 4 and run.record.data["n_train"] <= 56


def test_a_chat_fills_the_template(templated, one_thread):
    predictor = templated.predictor()
    session = open_chat(predictor)
    assert "".join(session.ask("who has the cat?")).strip() == predictor.predict(["who has the cat?"])[0]["completion"]
    shown = predictor.model.tokenizer.decode(session._render(session.messages[:-1]))
    assert shown.count("Question of a guest: who has the cat?") == 1


def test_examples_stand_behind_one_system_message(templated, one_thread):
    from llmft_nb.dialogues import check_instruct
    from llmft_nb.instruct import few_shot_prompts
    from llmft_nb.rows import read_rows

    rows = check_instruct(read_rows(instruct_rows(20)), system="Be brief.")
    model = templated.predictor().model
    (prompt,) = few_shot_prompts(model, rows, rows.subset([0]), n_examples=2)
    text = model.tokenizer.decode(prompt)
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("who has")
    assert text.count("who has") == 3 and text.count("I have") == 2


def test_the_command_that_makes_a_run_again(templated):
    from llmft_nb.report import repeat_command

    record = json.loads((templated.folder / "run.json").read_text(encoding="utf-8"))
    words = repeat_command("run", record)
    assert "--prompt-template 'Question of a guest: {question}'" in words and "--system 'Be brief.'" in words
    record["data"] |= {"columns": {"answer": "completion"}, "policy": "allow"}
    record["settings"]["packing"], record["origins"]["packing"] = False, "argument"
    words = repeat_command("run", record)
    assert "--columns answer=completion" in words and "--leaks allow" in words
    assert "--no-packing" in words and "False" not in words


def test_one_test_text_leaves_a_record_that_json_can_read(bases, tmp_path, one_thread):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    rows = text_rows(60)
    options = OPTIONS | {"task": "text", "model": bases("Llama"), "general": general(tmp_path), "epochs": 1}
    run = finetune(rows[1:], test=rows[:1], out=tmp_path / "run", callbacks=(), **options)
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["scores"]["test"]["perplexity"]["high"] is None
    assert "∞" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_long_text_leaves_room_for_what_is_written(finished, one_thread):
    predictor = finished("Llama", "text").predictor()
    predictor = dataclasses.replace(predictor, settings=predictor.settings | {"max_new_tokens": 500}, max_length=600)
    (answer,) = predictor.predict(["The boat went over the water. " * 200])
    assert set(answer) == {"completion", "finished"}


def test_gaps_are_filled_or_refused(finished, one_thread):
    predictor = finished("Roberta", "text").predictor()
    mask = predictor.model.tokenizer.mask_token
    two = predictor.predict([f"The {mask} went over the {mask}."])[0]["fills"]
    assert [len(fill) for fill in two] == [5, 5]
    chances = [[token["probability"] for token in fill] for fill in two]
    assert all(fill == sorted(fill, reverse=True) and fill[0] > 1 / 6144 for fill in chances)
    with pytest.raises(UserError, match="a gap stands beyond"):
        predictor.predict(["The boat went over the water. " * 50 + mask])


def test_one_label_a_row_for_a_model_of_several(bases, tmp_path, one_thread):
    rows = [row | {"label": [row["label"]] if i % 2 else [row["label"], "new"]} for i, row in enumerate(small_rows(48))]
    options = OPTIONS | {"epochs": 1, "model": bases("Llama"), "general": general(tmp_path), "callbacks": ()}
    predictor = finetune(rows, out=tmp_path / "run", **options).predictor()
    plain, listed = ([{"text": "a wave", "label": label}] * 4 for label in ("sea", ["sea"]))
    assert evaluate_predictor(predictor, plain) == evaluate_predictor(predictor, listed)
    with pytest.raises(UserError, match="'zebra' is unknown"):
        evaluate_predictor(predictor, [{"text": "a wave", "label": "zebra"}])


def test_texts_for_a_tagger_from_a_file(finished, one_thread):
    from llmft_nb.rows import read_rows

    predictor = finished("Bert", "tag").predictor()
    texts = ["Send it to Kiel at noon .", "Send it to New Mill ."]
    assert predictor.predict(read_rows([{"text": text} for text in texts])) == predictor.predict(texts)


def test_rare_tags_can_be_balanced(bases, tmp_path, one_thread):
    "A kind of which no span has two words needs an `I-` all the same, and that tag has no training row."
    rows = [{"tokens": ["Send", "it", place], "ner_tags": ["O", "O", "B-place"]} for place in PLACES * 8]
    options = OPTIONS | {"epochs": 1, "model": bases("Bert"), "general": general(tmp_path), "callbacks": ()}
    rows = [row | {"tokens": [f"{i}", *row["tokens"][1:]]} for i, row in enumerate(rows)]
    run = finetune(rows, task="tag", class_weights="balanced", out=tmp_path / "run", **options)
    assert run.record.data["label_names"] == ["O", "B-place", "I-place"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_length": "128"}, "max_length 128"),
        ({"micro_batch_size": "8"}, "micro_batch_size 8"),
        ({"packing": "false"}, "neither true nor false"),
        ({"mask_words": 1}, "neither true nor false"),
        ({"no_repeat_ngram": 1}, "no word could be said twice"),
    ],
)
def test_settings_of_a_file_are_checked_before_they_are_used(values, words):
    with pytest.raises(UserError, match=words):
        resolve_settings(parse_strategy("full"), config=values)


def test_answers_in_other_scripts_are_scored():
    from llmft_nb.instruct import judge_answers

    russian = ["Да, можно принимать.", "Нет, нельзя."]
    assert judge_answers(russian, russian, {})["rouge_l"]["value"] == 1
    assert judge_answers(russian, ["Нет", "Нет"], {})["rouge_l"]["value"] < 0.5


def test_kept_leaks_are_told_as_kept(bases, tmp_path, one_thread):
    rows = text_rows(40)
    options = OPTIONS | {"task": "text", "model": bases("Llama"), "general": general(tmp_path), "epochs": 1}
    kept, dropped = (
        finetune(rows, test=rows[:3], leaks=policy, out=tmp_path / policy, callbacks=(), **options).record.data
        for policy in ("allow", "drop")
    )
    assert kept["leaks"].endswith("were kept") and kept["policy"] == "allow"
    assert dropped["n_train"] < kept["n_train"] <= dropped["n_train"] + 3


def test_validation_counts_a_stray_tag_as_the_test_does(monkeypatch):
    "An `I-` that goes on with nothing begins a span, in every score."
    import numpy as np

    from llmft_nb import tag
    from llmft_nb.bases import find_model, load_tokenizer
    from llmft_nb.tagging import TagDataset

    rows = [
        {"tokens": ["to", "Kiel"], "ner_tags": ["O", "B-place"]},
        {"tokens": ["Old", "Mill"], "ner_tags": ["B-place", "I-place"]},
    ]
    dataset = TagDataset(rows, load_tokenizer(find_model("tiny"))[0])
    assert list(dataset.label_names) == ["O", "B-place", "I-place"]
    stray = [np.eye(3)[[0, 2]], np.eye(3)[[2, 2]]]
    monkeypatch.setattr(tag, "predict_positions", lambda *_: stray)
    scores = tag.make_tag_evaluate(dataset)(None)
    assert (scores["span_f1"], scores["word_accuracy"]) == (1.0, 1.0)
    assert scores["loss"] == pytest.approx(np.log(np.exp([1, 0, 0]).sum()) - np.mean([1, 0, 0, 1]))


def test_words_are_tagged_as_most_often():
    from llmft_nb.rows import read_rows
    from llmft_nb.tag import dictionary_baseline

    rows = [{"tokens": ["Kiel"], "ner_tags": [tag]} for tag in ("B-place", "B-place", "O")]
    assert dictionary_baseline(read_rows(rows), read_rows([{"tokens": ["Kiel", "Bonn"]}])) == [["B-place", "O"]]


def test_settings_reach_the_rows(bases, monkeypatch):
    "What a data set is made with is what was asked for, task by task."
    from llmft_nb import instruct, tag, text
    from llmft_nb.modeling import LLMForMaskedLM

    numbers = {"max_length": 24, "overlap": 5, "train_on": "all", "too_long": "drop", "packing": False, "seed": 7}
    settings = TrainSettings(**numbers, mask_frac=0.4, mask_words=True)
    made: dict[str, dict[str, Any]] = {}
    for module, name in ((tag, "TagDataset"), (instruct, "InstructDataset"), (text, "build_corpus")):
        monkeypatch.setattr(module, name, lambda *_, key=name, **given: made.setdefault(key, given))
    model = LLMForMaskedLM.from_pretrained(bases("Roberta"))
    for task in ("tag", "instruct", "text"):
        make_task(task, settings).dataset([], model, ["O", "B-place"])
    assert made["TagDataset"] == {"label_names": ["O", "B-place"], "max_length": 24, "overlap": 5}
    assert made["InstructDataset"] == {"max_length": 24, "train_on": "all", "too_long": "drop"}
    corpus = made.pop("build_corpus")
    kept = {
        name: corpus[name]
        for name in ("max_length", "overlap", "packing", "seed", "objective", "mask_frac", "mask_words")
    }
    wanted = {"max_length": 24, "overlap": 5, "packing": False, "seed": 7, "objective": "masked"}
    assert kept == wanted | {"mask_frac": 0.4, "mask_words": True}
    assert corpus["first_position"] == model.network.config.pad_token_id + 1
    make_task("text", dataclasses.replace(settings, packing=True)).dataset([], model, [], held_out=True)
    held_out = made["build_corpus"]
    assert {name: held_out[name] for name in kept} == wanted | {"mask_frac": 0.15, "mask_words": False}, (
        "scores stay comparable"
    )


def test_a_decoder_is_told_to_be_second_best_for_tags(bases, tmp_path, caplog, one_thread):
    options = OPTIONS | {"epochs": 1, "task": "tag", "general": general(tmp_path), "callbacks": ()}
    for kind, n_told in (("Bert", 0), ("Llama", 1)):
        caplog.clear()
        finetune(tag_rows(30), model=bases(kind), out=tmp_path / kind, **options)
        assert sum("an encoder is the better base" in record.getMessage() for record in caplog.records) == n_told


def test_each_document_is_judged_whole(finished, one_thread):
    "The parts of a long document are added up, and documents stay apart in the test whatever the training did."
    from llmft_nb.text import TextTask

    run = finished("Llama", "text")
    predictor = run.predictor()
    settings = TrainSettings(max_length=24, overlap=0)
    rows = [(f"row:{i}", row["text"]) for i, row in enumerate(text_rows(6))]
    task = TextTask(settings)
    together = task.answers(predictor.model, [text for _, text in rows])
    alone = [task.answers(predictor.model, [text])[0] for _, text in rows]
    assert [line["n_targets"] for line in together] == [line["n_targets"] for line in alone]
    for ours, other in zip(together, alone, strict=True):
        assert ours["loss_sum"] == pytest.approx(other["loss_sum"], rel=1e-4)
    assert together[0]["n_bytes_of_all"] == sum(len(text.encode()) for _, text in rows)
    assert max(line["n_targets"] for line in together) > 2 * settings.max_length
    nats, n_bytes = sum(line["loss_sum"] for line in together), together[0]["n_bytes_of_all"]
    assert task.judge(None, together, {})["bits_per_byte"] == pytest.approx(nats / 0.6931472 / n_bytes)


def test_answers_are_judged_row_by_row():
    "How many never end, what the right answers cost before and after, whose answer was nearest."
    from llmft_nb.dialogues import check_instruct
    from llmft_nb.instruct import InstructTask, judge_losses
    from llmft_nb.rows import LeakReport, read_rows
    from llmft_nb.splits import Splits

    train, test = (check_instruct(read_rows(instruct_rows(n))) for n in (40, 8))
    answers = [
        {"loss_sum": 3.0, "n_targets": 6, "completion": row["messages"][-1]["content"], "finished": i > 0}
        for i, row in enumerate(test)
    ]
    splits = Splits(train, test, test, (), LeakReport(0, []))
    scores = InstructTask(TrainSettings()).judge(splits, answers, {})
    assert (scores["exact_match"]["value"], scores["endless"]["value"]) == (1.0, 1 / 8)
    (nearest,) = scores["baselines"]
    assert nearest["token_f1"]["value"] == 1.0  # The same question stands in the training rows
    before = [{"loss_sum": 6.0 + i, "n_targets": 6} for i in range(8)]
    change = judge_losses(answers, before)
    assert change["perplexity_change"]["verdict"] == "better"
    assert change["perplexity_before"]["value"] > change["perplexity"]["value"] == pytest.approx(2.718281828**0.5)


def test_only_the_last_answer_of_a_conversation_is_judged(finished, one_thread):
    from llmft_nb.dialogues import check_instruct
    from llmft_nb.instruct import InstructTask
    from llmft_nb.rows import read_rows

    turn = instruct_rows(1)[0]
    pair = [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": turn["completion"]}]
    rows = check_instruct(read_rows([{"messages": pair}, {"messages": [*pair, *pair]}]))
    task = InstructTask(TrainSettings(max_length=96, n_written=1, max_new_tokens=2, train_on="all"))
    one, two = task.answers(finished("Llama", "instruct").predictor().model, rows)
    assert one["n_targets"] == two["n_targets"] > 2


@pytest.mark.parametrize(("n_most", "n_expected"), [(40, None), (3, 3)])
def test_an_untuned_model_writes_no_longer_than_the_longest_answer(n_most, n_expected, bases, monkeypatch, one_thread):
    from llmft_nb.decoding import generate
    from llmft_nb.instruct import InstructTask, answer_of, longest_answer

    task = InstructTask(TrainSettings(max_length=96, max_new_tokens=n_most, n_written=4))
    splits = task.prepare(instruct_rows(40), None, None, columns=None, leaks="allow")
    model = task.build(bases("Llama"), splits, strategy="full", init="pretrained")
    asked = []

    def noted(*given, max_new_tokens, **others):
        asked.append(max_new_tokens)
        return generate(*given, max_new_tokens=max_new_tokens, **others)

    monkeypatch.setattr("llmft_nb.predict.generate", noted)
    task.before(model, splits)
    longest = longest_answer(model, splits.train)
    answers = [model.tokenizer(answer_of(row), add_special_tokens=False)["input_ids"] for row in splits.train]
    assert longest == max(len(ids) for ids in answers) + 1 < 40
    assert asked == [n_expected or longest] * 2, "bare, and with examples"
    asked.clear()
    task.answers(model, splits.test)
    assert asked == [n_most], "the tuned model has its whole room"


def test_a_run_is_asked_with_its_own_settings(finished, one_thread, monkeypatch):
    "The guard, the stop tokens, the window and the end of a long text are the run's when it serves."
    import numpy as np

    import llmft_nb.predict as predict
    from llmft_nb.decoding import Generated
    from llmft_nb.prompts import stop_ids

    writer = finished("Llama", "instruct").predictor()
    seen: list[dict[str, Any]] = []

    def note(network: Any, tokenizer: Any, prompts: Any, **given: Any) -> list[Generated]:
        seen.append(given | {"prompts": [list(ids) for ids in prompts]})
        return [Generated([], True, 0) for _ in prompts]

    with monkeypatch.context() as patch:
        patch.setattr(predict, "generate", note)
        writer.predict(["who has the cat?"])
        reader = dataclasses.replace(finished("Llama", "text").predictor(), max_length=16)
        reader.predict(["The boat went over the water to the small house by the sea."])
    assert (seen[0]["no_repeat_ngram"], seen[0]["max_new_tokens"]) == (16, 6)
    assert {*stop_ids(writer.model.tokenizer)} <= {*seen[0]["stop_ids"]}
    assert reader.model.tokenizer.decode(seen[1]["prompts"][0]).endswith("house by the sea.")

    tagger = dataclasses.replace(finished("Bert", "tag").predictor(), max_length=12)
    tagger = dataclasses.replace(tagger, settings=tagger.settings | {"overlap": 3})
    row = {"tokens": ["Old"] * 30}
    names = list(tagger.model.label_names)
    windows: list[int] = []

    def always_inside(_: Any, dataset: Any, *__: Any) -> list[Any]:
        windows.extend(len(dataset[i]["input_ids"]) for i in range(len(dataset)))
        return [np.eye(len(names))[[names.index("I-place")] * len(words)] for words in dataset.words_of]

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_positions", always_inside)
        (answer,) = tagger.predict([row])
    assert answer["tags"] == ["B-place"] + ["I-place"] * 29
    assert len(windows) > 1 and max(windows) == 12


def test_a_run_under_way_does_not_answer(templated, tmp_path):
    folder = shutil.copytree(templated.folder, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")
    with pytest.raises(UserError, match="this run is interrupted"):
        load_predictor(folder)


def test_a_chat_begins_as_the_run_was_trained(templated, one_thread):
    session = open_chat(templated.predictor())
    assert session.messages[0] == {"role": "system", "content": "Be brief."}
    assert (session._no_repeat_ngram, session.max_new_tokens) == (16, OPTIONS["max_new_tokens"])
    assert open_chat(templated.predictor(), "Be long.").messages[0]["content"] == "Be long."


def test_checkpoints_belong_to_what_was_chosen(templated):
    kept = templated.record.fingerprint
    assert (kept["strategy"], kept["system"], kept["init"]) == ("top:1", "Be brief.", "pretrained")


def test_a_templated_run_is_scored_on_columns(templated, one_thread):
    rows = [{"question": row["prompt"], "completion": row["completion"]} for row in instruct_rows(44)[40:]]
    scores = evaluate_predictor(templated.predictor(), rows)
    assert scores["token_f1"]["n"] == 3
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Question of a guest: " + rows[0]["question"]},
        {"role": "assistant", "content": rows[0]["completion"]},
    ]
    predictor = templated.predictor()
    settings = TrainSettings(**{name: predictor.settings[name] for name in vars(TrainSettings())})
    whole = make_task("instruct", settings).score(predictor.model, [{"messages": messages}])
    assert whole == evaluate_predictor(predictor, rows[:1])


def test_a_folder_of_texts_brings_its_own_test(bases, tmp_path, one_thread):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", text_rows(40))
    write_jsonl(folder / "test.jsonl", [{"text": "A text that only the test has. " * 3}])
    options = OPTIONS | {"task": "text", "model": bases("Llama"), "general": general(tmp_path), "epochs": 1}
    run = finetune(folder, out=tmp_path / "run", callbacks=(), **options)
    assert run.record.data["n_test"] == 1 and run.record.data["carved"] == ["valid"]
    scores = evaluate_predictor(run.predictor(), folder, split="test")
    assert scores["perplexity"] == run.record.scores["test"]["perplexity"]


@pytest.mark.parametrize("strategy", ["full", "lora:2"])
def test_what_was_before_is_asked_of_the_model_as_it_was(
    strategy: str, small_model: Path, small_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Though it is asked when training is done."
    seen = dict[str, list[torch.Tensor]]()

    def weights_of(model: Any) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in model.network.base_model.parameters()]

    for name in ("before", "ask"):
        own = getattr(ClassifyTask, name)

        def noted(self: Any, model: Any, asked: Any, name: str = name, own: Any = own) -> Any:
            seen[f"{name} {len(seen)}"] = weights_of(model)
            return own(self, model, asked)

        monkeypatch.setattr(ClassifyTask, name, noted)
    options = {"epochs": 1, "batch_size": 8, "lr": 3e-3, "precision": "f32", "strategy": strategy}
    held_out = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    question = "I saw the apple"
    run = finetune(
        small_files / "train.jsonl", model=small_model, out=tmp_path, question=question, **held_out, **options
    )
    assert list(seen) == ["before 0", "ask 1", "ask 2"]
    before, asked, after = seen.values()
    base = weights_of(LLMForSequenceClassification.from_pretrained(small_model))

    def is_base(found: list[torch.Tensor]) -> bool:  # Adapters may lie between
        return all(any(torch.equal(one, other) for other in found if one.shape == other.shape) for one in base)

    assert is_base(before) and is_base(asked) and not is_base(after)
    assert run.record.scores["question"]["text"] == question
