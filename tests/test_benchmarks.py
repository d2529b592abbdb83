"""What the benchmarks of the embedded world count, beside the same figure from another library."""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served import make_run
from sklearn.metrics import f1_score
from small import small_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import gpu  # noqa: E402
import growth  # noqa: E402
import knowledge  # noqa: E402
import language  # noqa: E402
import peers  # noqa: E402
import serving  # noqa: E402
import strategies  # noqa: E402
import tasks  # noqa: E402
import trunk  # noqa: E402
import tunes  # noqa: E402
import works  # noqa: E402

from llmft_nb import demo  # noqa: E402
from llmft_nb.core import UserError  # noqa: E402
from llmft_nb.export import load_exported  # noqa: E402
from llmft_nb.modeling import LLMForCausalLM  # noqa: E402


def test_macro_f1_is_the_one_everybody_means() -> None:
    rng = np.random.default_rng(0)
    names = ["avoid", "caution", "safe", "unknown", "neither true nor said"]
    truth = rng.choice(names[:4], 200, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    right, others = rng.random(200) < 0.6, rng.choice(names[:4], 200)
    said = np.where(right, truth, others).tolist()
    for answers in (said, ["avoid"] * 200):  # The second never says three of the classes
        means = tasks.class_counts(answers, truth, names).mean(axis=0)
        wanted = f1_score(truth, answers, average="macro", labels=names, zero_division=0)
        assert tasks.macro_f1(names).of_means(means) == pytest.approx(wanted)
    both = np.stack([tasks.class_counts(answers, truth, names).mean(axis=0) for answers in (said, truth)])
    assert tasks.macro_f1(names).of_means(both)[1] == pytest.approx(0.8), "a class that never occurs counts as missed"


def test_a_score_over_seeds_is_the_mean_of_theirs() -> None:
    truth = ["a", "b"] * 20
    counts = [tasks.class_counts([always] * 40, truth, ["a", "b"]).mean(axis=0) for always in "ab"]
    statistic = tasks.over_seeds(tasks.macro_f1(["a", "b"]), n_seeds=2)
    assert statistic.of_means(np.hstack(counts)) == pytest.approx(1 / 3), "two seeds that each say one thing only"
    assert statistic.of_means(np.stack([np.hstack(counts)] * 5)).shape == (5,)
    assert len(statistic.columns) == len(np.hstack(counts))


def test_spans_become_tags() -> None:
    text = "May I mix Bramwick Duo, please, with zinc?"
    spans = [{"start": 10, "stop": 22, "label": "product"}, {"start": 37, "stop": 41, "label": "ingredient"}]
    row = tasks.tagged({"text": text, "spans": spans})
    found = [(word, tag) for word, tag in zip(row["tokens"], row["ner_tags"], strict=True) if tag != "O"]
    assert found == [("Bramwick", "B-product"), ("Duo", "I-product"), ("zinc", "B-ingredient")]
    assert tasks.in_context([row])[0] == "before_edge is_May after_I"
    assert len(tasks.in_context([row])) == len(row["tokens"])


def test_rows_are_drawn_evenly_and_anew_for_each_seed() -> None:
    rows = [{"text": f"{label} {i}", "label": label} for label in ("a", "b") for i in range(40)]
    first, again, other = (language.draw(rows, 10, seed) for seed in (0, 0, 1))
    assert sorted(row["label"] for row in first) == ["a"] * 5 + ["b"] * 5
    assert first == again != other


def test_a_set_can_be_cut_to_one_kind() -> None:
    whole, plain = (language.rows_of(name)["test"] for name in ("pharmacy-reviews", "pharmacy-reviews:plain"))
    assert plain == [row for row in whole if row["kind"] == "plain"]
    assert 0 < len(plain) < len(whole)


def test_answers_with_reasons_count_as_verdicts() -> None:
    reasons = ["avoid: both contain the same", "safe: they work in different ways", "avoid: bleeding"]
    rows = [{"label": reason.split(":")[0], "split_reason": "pair"} for reason in reasons]
    table = knowledge.Table(rows, [row | {"label": reason} for row, reason in zip(rows, reasons, strict=True)])
    table.add(10, "full", ["avoid: both contain the same", "safe: they never meet", "safe: they never meet"])
    line = table.line(10, "full")
    assert line["pairs"] == pytest.approx([2 / 3] * 3)
    assert (line["reasons"], line["avoid as safe"]) == (pytest.approx(1 / 3), 0.5)
    table.add(10, "word counts", ["avoid", "safe", "avoid"])
    assert "reasons" not in table.line(10, "word counts") and table.right(10, "word counts").all()


def test_a_reason_is_named_where_training_rows_enough_name_it() -> None:
    def row(what: str) -> dict[str, str]:
        return {"label": "avoid", "reason": f"both contain {what}, so it would be taken twice"}

    rare, other = row("aspirin"), {"label": "safe", "reason": "they work in different ways"}
    parts = {"train": [row("codeine")] * demo.N_TO_NAME + [rare, other], "test": [row("codeine"), rare, row("senna")]}
    found = {name: [one["label"] for one in rows] for name, rows in demo.with_reasons(parts).items()}
    named = "avoid: both contain codeine, so it would be taken twice"
    assert found["test"] == [named, "avoid: both contain the same", "avoid: both contain the same"]
    assert set(found["train"]) == {*found["test"], "safe: they work in different ways"}
    assert rare["label"] == "avoid", "the rows given are left as they were"
    with pytest.raises(UserError, match="valid: rows without a reason"):
        demo.with_reasons(parts | {"valid": [{"label": "safe"}]})


def test_a_way_names_its_rate_and_few_rows_few_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answers(train: list, sets: dict, **options: object) -> dict[str, np.ndarray]:
        asked.append(options | {"n_valid": len(sets["valid"])})
        return {"test": np.array([])}

    monkeypatch.setattr(knowledge, "answers_of_tune", answers)
    arguments = argparse.Namespace(model="tiny", steps=100, batch_size=10, lr=4e-4)
    sets = {"valid": [{}] * 300, "test": []}
    for way, n_rows in (("full", 50), ("top:2@1e-3", 200), ("random@2e-3", 500)):
        knowledge.tuned([{}] * n_rows, sets, way, arguments, seed=0)
    assert [(one.get("strategy"), one.get("init"), one["lr"]) for one in asked] == [
        ("full", None, 4e-4),
        ("top:2", None, 1e-3),
        (None, "random", 2e-3),
    ]
    assert [(one["epochs"], one["n_valid"]) for one in asked] == [(20, 100), (5, 200), (3, 300)]


def test_measured_figures_say_what_with(tmp_path: Path) -> None:
    tunes.write_measured(tmp_path / "figures.json", [{"rows": 100}])
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["lines"] == [{"rows": 100}] and found["date"].startswith("20")
    assert {"torch", "device", "threads"} <= set(found["environment"])


def test_both_ways_of_a_trunk_are_the_same_training(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMFT_DATA", raising=False)
    plain, kept = (trunk.one_run(str(small_model), "top:1", 2, gb) for gb in (0.0, trunk.KEPT_GB))
    assert (plain["rows"], plain["trunk"]) == (600, ("",)) and kept["trunk"][0].startswith("kept: 1 blocks")
    assert plain["loss"] == pytest.approx(kept["loss"], abs=1e-4)


def test_an_answer_is_right_whatever_type_a_label_has_in_its_file() -> None:
    rows = [{"label": 0}, {"label": 1}, {"label": 1}]
    assert tunes.right_of(["0", "1", "0"], rows).tolist() == [1.0, 1.0, 0.0]
    assert tunes.right_of(np.array(["a", "b"]), [{"label": "a"}, {"label": "a"}]).tolist() == [1.0, 0.0]


def test_the_grid_draws_every_class_and_gives_each_epoch_its_updates() -> None:
    rows = [{"text": f"row {i}", "label": "rare" if i == 7 else "common"} for i in range(600)]
    (few, left), again, (other, _) = (strategies.drawn(rows, 50, seed) for seed in (0, 0, 1))
    assert (few, left) == again and few != other
    assert {row["label"] for row in few} == {"rare", "common"}
    assert len({row["text"] for row in few}) == 50
    assert sorted(row["text"] for row in few + left) == sorted(row["text"] for row in rows), "left over is what is left"
    n_repeated = len(strategies.repeated(few))
    assert n_repeated % 50 == 0
    assert n_repeated >= strategies.UPDATES_AN_EPOCH * strategies.BATCH_SIZE > n_repeated - 50
    everything, nothing = strategies.drawn(rows, 0, 0)
    assert (len(everything), nothing) == (600, [])


@pytest.mark.parametrize(
    ("shares", "wanted", "n_tried"),
    [
        ({1 / 3: 0.5, 1.0: 0.6, 3.0: 0.5}, 1.0, 3),
        ({1 / 3: 0.5, 1.0: 0.60, 3.0: 0.62}, 1.0, 3),  # Better by less than a standard error of 400 rows
        ({1 / 3: 0.5, 1.0: 0.60, 3.0: 0.64, 9.0: 0.66, 27.0: 0.6}, 3.0, 4),
        ({1 / 3: 0.5, 1.0: 0.6, 3.0: 0.7, 9.0: 0.9, 27.0: 0.8}, 9.0, 5),
        ({1 / 3: 0.7, 1.0: 0.6, 3.0: 0.5, 1 / 9: 0.6}, 1 / 3, 4),
        ({1 / 3: 0.70, 1.0: 0.6, 3.0: 0.71, 9.0: 0.6}, 3.0, 4),  # As far from the default
        ({1 / 3: 0.1, 1.0: 0.2, 3.0: 0.3, 9.0: 0.4, 27.0: 0.5, 81.0: 0.6}, 81.0, 6),
    ],
)
def test_a_rate_is_the_default_unless_another_is_better_than_by_luck(
    shares: dict[float, float], wanted: float, n_tried: int
) -> None:
    tried = []

    def valid(factor: float) -> float:
        tried.append(factor)
        return next(share for at, share in shares.items() if at == pytest.approx(factor))

    assert strategies.best_factor(valid) == pytest.approx(wanted)
    assert len(tried) == n_tried


def test_the_grid_in_short_form_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_model: Path
) -> None:
    "Two strategies of a small model on a small task, from choosing rates to the file that lessons read."
    rows = small_rows(400)
    sets = {"train": rows[:100], "valid": rows[100:120], "test": rows[120:160]}
    monkeypatch.setitem(strategies.TASKS, "reviews", lambda: sets)
    short = {
        "RATES": (1.0, 3.0),
        "MOST_RATES": 2,
        "EPOCHS": 2,
        "UPDATES_AN_EPOCH": 3,
        "N_TO_CHOOSE": 30,
        "N_CHOOSING": 25,
    }
    for name, value in short.items():
        monkeypatch.setattr(strategies, name, value)
    out = tmp_path / "grid.jsonl"

    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["strategies.py", *words])
        capsys.readouterr()
        strategies.main()
        return capsys.readouterr().out

    asked = ["run", "--model", str(small_model), "--tasks", "reviews", "--out", str(out)]
    grid = [*asked, "--strategies", "top:1", "head", "--rows", "20", "1000", "--seeds", "2"]
    command(*grid)
    whole = out.read_text()
    assert str(small_model.parent) not in whole
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len(lines) == 2 * (2 + 2 * 2)
    trials = [line for line in lines if line["seed"] == strategies.CHOOSING_SEED]
    assert {line["rows"] for line in trials} == {30}
    assert {round(line["valid"] * 25, 6) % 1 for line in trials} == {0.0}, "chosen on rows left over"
    for line in lines:
        right = strategies.right_rows([line])
        assert right.shape == (1, 40) and right.mean() == line["accuracy"]
        assert line["train_s"] is None and line["peak_mb"] > 100
        assert line["cosine"] == pytest.approx(1.0, abs=1e-6) if line["strategy"] == "head" else line["cosine"] < 1
    assert {line["rows"] for line in lines if line["seed"] == 0} == {20, 0}, "more than there are means all"
    assert len({line["trained"] for line in lines}) == 2
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:-1]))  # Stopped within the last cell
    assert command(*grid).count("valid") == 1
    again = [json.loads(line) for line in out.read_text().splitlines()]
    for line in (lines[-1], again[-1]):
        del line["peak_mb"]
    assert again == lines
    for _ in range(2):  # The second finds all that it wants
        command(*asked, "--strategies", "head", "--rows", "20", "--seeds", "1", "--idle")
        timed = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(timed) == len(lines) + 1 and timed[-1]["train_s"] > 0
    monkeypatch.setattr(strategies, "STRATEGIES", ("top:1", "head"))
    command("write", str(tmp_path / "figures.json"), str(out))
    figures = json.loads((tmp_path / "figures.json").read_text())["lines"]
    assert [(line["rows"], line["strategy"]) for line in figures] == [
        (20, "top:1"), (20, "head"), (100, "top:1"), (100, "head")
    ]  # fmt: skip
    assert [line["seeds"] for line in figures] == [2] * 4, "a cell that was run again counts once"
    assert [line["train_s"] is None for line in figures] == [True, False, True, True]
    shown = command("show", str(out))
    assert f"{small_model.name}, reviews (near), 100 rows, 40 test rows" in shown and "* top:1" in shown


def grid_lines(ways: Mapping[str, np.ndarray], rows: int = 50) -> list[dict[str, Any]]:
    "Lines of a grid: for each strategy a trial of its rate at 1 and at 3, and at 1 a cell for each seed of `ways`."
    common = {"task": "reviews", "name": "m", "rows": rows, "lr": 1e-3, "trained": 10, "train_s": None, "cosine": 0.9}
    common |= {"peak_mb": 500}
    lines = []
    for strategy, right_SN in ways.items():
        packed = [np.packbits(right.astype(bool)).tobytes().hex() for right in right_SN]
        common |= {"strategy": strategy, "n": right_SN.shape[1]}
        for factor, valid in ((1.0, 0.7), (3.0, 0.6)):
            trial = {"seed": strategies.CHOOSING_SEED, "factor": factor, "valid": valid, "right": packed[0]}
            lines += [common | trial | {"rows": 200}]
            lines += [common | trial | {"seed": seed, "right": bits} for seed, bits in enumerate(packed)]
    return lines


def written(lines: list[dict[str, Any]], file: Path) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_the_grid_marks_whom_nothing_shows_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.tile(np.arange(400) % 5 > 0, (3, 1))
    alike = np.roll(good, 1, axis=1)  # As many right, others among them
    ways = {"full": good, "top:2": alike, "head": good & (np.arange(400) % 2 > 0)}
    file = written(grid_lines(ways), tmp_path / "grid.jsonl")
    strategies.show(argparse.Namespace(file=file))
    told = [line for line in capsys.readouterr().out.splitlines() if "MB" in line]
    assert [(line[0], line[2:].split()[0]) for line in told] == [("*", "full"), ("*", "top:2"), (" ", "head")]
    assert "80.0 %" in told[0] and "behind" not in told[0]
    assert "behind by 40.0 [" in told[2]


def test_a_strategy_under_way_is_left_out(tmp_path: Path) -> None:
    ways = {"full": np.ones((3, 8)), "head": np.ones((2, 8))}
    assert [line["strategy"] for line in strategies.summaries(written(grid_lines(ways), tmp_path / "grid.jsonl"))] == [
        "full"
    ]


def test_the_grid_counts_the_luck_of_a_seed(tmp_path: Path) -> None:
    "Ten points ahead on average, but thirty in one seed and none in the others: nothing is shown."
    rows = np.arange(400)
    usual, lucky = rows % 10 < 5, rows % 10 < 8
    ways = {"full": np.array([lucky, usual, usual]), "head": np.array([usual, usual, usual])}
    full, head = strategies.summaries(written(grid_lines(ways), tmp_path / "grid.jsonl"))
    assert full["behind"] is None and full["by_seed"] == [0.8, 0.5, 0.5]
    assert full["over_full"]["difference"] == 0 and head["over_full"]["difference"] == pytest.approx(-0.1)
    assert head["behind"]["difference"] == pytest.approx(0.1) and head["behind"]["p_holm"] > 0.3


def test_the_grid_corrects_for_the_number_of_its_comparisons(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ways = {name: (generator.random((3, 400)) < 0.6).astype(float) for name in strategies.STRATEGIES}
    lines = list(strategies.summaries(written(grid_lines(ways), tmp_path / "grid.jsonl")))
    behind = [line["behind"] for line in lines if line["behind"]]
    assert len(behind) == len(ways) - 1
    smallest = min(behind, key=lambda one: one["p_value"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, len(behind) * smallest["p_value"]))


def test_the_grid_shows_cells_at_the_chosen_rate_alone(tmp_path: Path) -> None:
    "A later trial may choose another rate; cells at the old one then do not count."
    lines = grid_lines({"full": np.ones((2, 8))})
    for line in lines:
        if line["factor"] == 3.0 and line["seed"] != strategies.CHOOSING_SEED:
            line["right"] = "00"
    found = {}
    for valid in (0.6, 0.8):
        for line in lines:
            line["valid"] = valid if line["factor"] == 3.0 else 0.7
        (one,) = strategies.summaries(written(lines, tmp_path / "grid.jsonl"))
        found[valid] = (one["factor"], one["accuracy"]["value"], one["seeds"])
    assert found == {0.6: (1.0, 1.0, 2), 0.8: (3.0, 0.0, 2)}


@pytest.mark.parametrize("work", ["classify, full", "instruct, full"])
def test_everybody_is_given_the_same_rows_and_targets(work: str, one_thread: None) -> None:
    "The peers' loss, as transformers computes it from their columns, is ours on the same rows."
    job = works.make_job(work, 0, "tiny-encoder", n_rows=8)
    columns, collate = peers.columns_of(job).remove_columns("length"), peers.collator_of(job)
    batch = job.train.batch(range(8))
    labels = batch.pop("labels")
    with torch.no_grad():
        theirs = job.model.network.eval()(**collate([columns[i] for i in range(8)])).loss
        ours = torch.nn.functional.cross_entropy(job.model(**batch), labels)
    assert float(theirs) == pytest.approx(float(ours), abs=1e-5)
    given = peers.arguments_of(job, "nowhere")
    assert (given["num_train_epochs"], given["per_device_train_batch_size"]) == (job.work.epochs, job.work.batch_size)


def test_trainers_side_by_side(one_thread: None) -> None:
    "The short form of the benchmark: everybody trains as many rows in as many updates."
    names = ("ours", "trainer, sorted", "plain torch")
    found = {name: bench.one_run("classify, full", name, 0, "tiny-encoder", 80) for name in names}
    for run in found.values():
        assert run["rows"] == 160 and run["seconds"] > 0 and 0 < run["share"] < 1.5
        assert run["tokens"] == found["ours"]["tokens"]
        assert run["losses"][-1][0] in (5, 6)
    lines = bench.summary("classify, full", {name: [run | {"process_s": 9.0}] for name, run in found.items()})
    assert lines[0]["ratio"] == 1 and lines[1]["asked"] == 1.25
    assert lines[2]["ratio"] == pytest.approx(found["plain torch"]["seconds"] / found["ours"]["seconds"])


def test_a_figure_that_is_missed_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = {"process_s": 5.0, "peak_mb": 100.0, "losses": [[5, 0.5]], "score": 70.0, "rows": 64, "tokens": 640}
    seconds = {"ours": 2.0, "trainer, sorted": 2.4, "trainer": 5.0}
    lines = bench.summary("classify, full", {name: [run | {"seconds": s}] for name, s in seconds.items()})
    assert [line["ratio"] for line in lines] == [1.0, 1.2, 2.5]
    assert not bench.say(lines), "1.25 was asked"
    seconds["trainer, sorted"] = 2.6
    lines = bench.summary("classify, full", {name: [run | {"seconds": s}] for name, s in seconds.items()})
    assert bench.say(lines)
    lines[0]["peak_mb"] = 101.0
    assert not bench.say(lines), "more memory than the leanest peer"
    assert "more memory than the leanest peer" in capsys.readouterr().out
    for name, draw in {"bench.png": bench.draw, "losses.png": bench.draw_losses}.items():
        draw(lines, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 2000


def test_losses_are_told_after_the_same_updates_by_everybody() -> None:
    ours = [(3, 6.0), (5, 1.0), (6, 2.0), (9, 4.0), (10, 6.0), (12, 9.0)]
    assert peers.even(ours) == [(5, (3 * 6.0 + 2 * 1.0) / 5), (10, (2.0 + 3 * 4.0 + 6.0) / 5)]
    assert peers.even([(5, 0.5), (10, 0.25)]) == [(5, 0.5), (10, 0.25)]


@pytest.mark.parametrize("who", ["ours", "ours, checkpointing", "ours, step in backward", "trainer"])
def test_the_gpu_benchmark_goes_through_its_steps_on_a_cpu(who: str, one_thread: None) -> None:
    run = gpu.one_run("tiny", who, n_steps=gpu.N_WARM + 1, batch_size=2, width=32)
    n_blocks = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert run["n_weights"] == n_blocks + 6144 * 64, "matrices of the blocks, and the output layer"
    assert run["tokens_s"] > 0 and run["loss"] == pytest.approx(np.log(6144), rel=0.1)
    assert run["share"] == pytest.approx(6 * run["n_weights"] * run["tokens_s"] / (1e12 * run["peak_tflops"]))
    assert ("predicted_gb" in run) == (who in gpu.OURS)


def test_what_is_predicted_for_a_gpu_follows_the_options(one_thread: None) -> None:
    model, ids = gpu.random_model("tiny", torch.device("cpu")), gpu.random_rows("tiny", 4, 32)

    def predicted(**options: Any) -> float:
        return gpu.predicted_bytes(model, *gpu.own_loader(model, ids, 4, options))

    plain, n_weights = predicted(), sum(weight.numel() for weight in model.network.parameters())
    assert plain > 12 * n_weights, "weights and what the optimizer keeps"
    assert predicted(step_in_backward=True, max_grad_norm=0.0) < plain
    assert predicted(activation_checkpointing=True) < plain
    assert 4 * n_weights < plain - predicted(optimizer="adamw8bit") < 6.1 * n_weights


def test_a_figure_for_the_gpu_is_reached_by_share_and_by_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    def runs(share: float, peer: float) -> list[dict[str, Any]]:
        own = {"shape": "1.5B", "who": "ours, compiled", "tokens_s": 1000.0, "share": share}
        return [own, {"shape": "1.5B", "who": "trainer", "tokens_s": peer, "share": 0.1}]

    assert gpu.is_reached(runs(0.46, 900.0)) and not gpu.is_reached(runs(0.44, 900.0))
    assert not gpu.is_reached(runs(0.46, 950.0)) and gpu.is_reached(runs(0.1, 900.0)[:1])
    assert "ours, compiled, 46 % of the peak" in capsys.readouterr().out


def test_growth_is_told_by_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rows: int, step: float, resident: float) -> dict[str, Any]:
        costs = {"prepare": 1e-6, "tokens": 1e-6, "begin": 0.0, "step": step}
        return {"rows": rows, "resident_mb": resident, "anonymous_mb": 100.0, **costs}

    few, many, most = run(1_000, 98e-6, 500), run(100_000, 107e-6, 500), run(1_000_000, 98e-6, 540)
    assert growth.is_flat("text", [few, many, most])
    assert not growth.is_flat("text", [few, run(100_000, 109e-6, 500)])
    assert not growth.is_flat("text", [many, run(1_000_000, 98e-6, 560)])
    assert growth.is_flat("classify", [many, run(1_000_000, 98e-6, 560)]), "its rows are held in memory"
    assert "+9% from 1,000 to 100,000 rows" in capsys.readouterr().out


def test_rows_of_any_number_are_different_and_of_one_kind(tmp_path: Path) -> None:
    growth.write_rows("instruct", 300, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 300
    halves = [np.mean([len(row["prompt"]) for row in part]) for part in (rows[:150], rows[150:])]
    assert halves[0] == pytest.approx(halves[1], rel=0.15)


def test_clients_hear_whole_answers_and_labels_in_order(tmp_path: Path) -> None:
    run, model = serving.make_run(tmp_path / "run", None, None)
    said = [[{"role": "user", "content": text}] for text in serving.questions(9)]
    assert len({str(one) for one in said}) == 9 and model == run / "model"
    asked = {"max_tokens": 3, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    requests = [serving.post("/v1/chat/completions", {"messages": one, **asked}, close=True) for one in said]
    with serving.started(serving.OURS, [str(run)], tmp_path) as port:
        found = serving.time_writing(port, requests, [1, 3])
        with pytest.raises(SystemExit, match=r"(?s)refused.*max_tokens"):
            wrong = serving.post("/v1/chat/completions", {"messages": said[0], "max_tokens": 0}, close=True)
            asyncio.run(serving.hear_answer(port, wrong))
    heard = found[3]["heard"]
    assert len(found[1]["heard"]) == 8 and len(heard) == 9
    answers = load_exported(run).predict([one[0]["content"] for one in said])  # Up to 128 tokens: these begin alike
    assert all(n == 3 and text and answer["completion"].startswith(text) for (n, text), answer in zip(heard, answers))
    assert 0 < found[3]["first_ms"] <= found[3]["first_p95_ms"]

    encoder, texts = make_run(tmp_path / "encoder", "classify", "tiny-encoder"), serving.questions(37)
    with serving.started(serving.OURS, [str(encoder)], tmp_path) as port:
        told = [serving.time_rows(port, texts, size) for size in serving.ROW_SIZES]
    wanted = [answer["label"] for answer in load_exported(encoder).predict(texts)]
    assert [labels for labels, _ in told] == [wanted, wanted] and all(rate > 0 for _, rate in told)


def test_a_larger_model_is_drawn_in_its_shape(tmp_path: Path) -> None:
    config = LLMForCausalLM.from_pretrained(serving.make_run(tmp_path / "run", None, "2x128")[1]).network.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 128, 352)


def test_a_server_is_held_against_the_best_of_the_others_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def line(server: str, rate: float, first: float, clients: int, setting: str = "") -> dict[str, Any]:
        figures = {"tokens_per_s": rate, "first_ms": first, "first_p95_ms": first}
        return {"server": server, "setting": setting, "clients": clients, **figures}

    def judged(rate: float, first: float, clients: int) -> bool:
        others = [line("other", 100, 9, clients, "slow start"), line("other", 80, 5, clients, "slow")]
        return serving.judge_writing(clients, [line(serving.OURS, rate, first, clients), *others])

    assert judged(100, 5, 1) and not judged(99, 5, 1) and not judged(100, 6, 1)
    assert judged(150, 50, 8) and not judged(149, 5, 8) and judged(1, 50, 32)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["tokens_per_s_ratio"], last["against"], last["first_against"]) == (0.01, "slow start", "slow")
    assert serving.same_length([[(3, "a"), (9, "b")], [(3, "a"), (9, "c")]], 1)
    assert json.loads(capsys.readouterr().out)["same_answers"] == 1
    assert not serving.same_length([[(3, "a")], [(4, "a b")]], 1) and not serving.same_length([[(0, "")]], 1)
    assert serving.judge_rows({0: 100.0, 1: 80.0, 16: 120.0}, 10, 3)
    assert not serving.judge_rows({0: 100.0, 1: 79.0, 16: 120.0}, 10, 3)
