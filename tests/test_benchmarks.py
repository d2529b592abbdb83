"""What the benchmarks of the embedded world count, beside the same figure from another library."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import language  # noqa: E402
import tasks  # noqa: E402


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
