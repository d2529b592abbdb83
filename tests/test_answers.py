"""Scores of written answers against another program (rouge_score), brute force, and exact fractions."""

from __future__ import annotations

import json
import os
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from llmft_nb.answers import (
    ExactMatch,
    NumericMatch,
    RougeL,
    TokenF1,
    answer_columns,
    answer_scores,
    answer_tokens,
    common_length,
    exact_match,
    final_number,
    is_number,
    numeric_match,
    rouge_l,
    token_f1,
)
from llmft_nb.core import UserError

WORDS = [
    "the",
    "A",
    "an",
    "cat",
    "Cat's",
    "sat",
    "on",
    "mat.",
    "mat",
    "—",
    "don’t",
    "«ja»",
    "3,5",
    "U.S.",
    "über",
    "$5",
    "(the)",
    "an-other",
    "x_y",
    "^",
    "a.",
]
UNSPACED = ["北京", "中国，", "每天", "ひらがな", "カタカナ", "手机B型"]


def random_text(chosen: random.Random, words: list[str], most: int = 9) -> str:
    return "".join(chosen.choice(words) + chosen.choice([" ", " ", "  ", "\n"]) for _ in range(chosen.randint(0, most)))


# Exact match and F1


def slow_tokens(text: str) -> list[str]:
    "The rules once more, a character at a time: blanks part words, CJK characters stand alone, punctuation is nothing."
    words, word = [], ""
    for c in text.lower() + " ":
        if c.isspace() or re.match(r"[\u3040-\u30ff\u4e00-\u9fff]", c):
            words += [word, c]
            word = ""
        elif c.isalnum():
            word += c
    return [word for word in words if word.strip() and word not in ("a", "an", "the")]


def slow_f1(said: list[str], wanted: list[str]) -> Fraction:
    if not said or not wanted:
        return Fraction(said == wanted)
    left, n_common = list(wanted), 0
    for token in said:
        if token in left:
            left.remove(token)
            n_common += 1
    if n_common == 0:
        return Fraction(0)
    precision, recall = Fraction(n_common, len(said)), Fraction(n_common, len(wanted))
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("words", [WORDS, UNSPACED, [*WORDS, *UNSPACED]], ids=["spaced", "unspaced", "mixed"])
def test_exact_match_and_f1_equal_brute_force(words: list[str]) -> None:
    chosen = random.Random(1)
    n_partial = 0
    for _ in range(200):
        prediction = random_text(chosen, words)
        references = [random_text(chosen, words) for _ in range(chosen.randint(1, 3))]
        if chosen.random() < 0.3:
            references[-1] = prediction.upper() + "!"
        said, wanted = slow_tokens(prediction), [slow_tokens(reference) for reference in references]
        assert exact_match(prediction, references) == any(said == tokens for tokens in wanted)
        best = max(slow_f1(said, tokens) for tokens in wanted)
        assert token_f1(prediction, references) == pytest.approx(float(best), abs=1e-12)
        n_partial += 0 < best < 1
    assert n_partial > 50


def test_no_answer_is_right_only_where_none_is_wanted() -> None:
    for nothing in ("", "  ", "the", "?!", "。"):
        assert (exact_match(nothing, ""), token_f1(nothing, "")) == (1.0, 1.0)
        assert (exact_match(nothing, "Paris"), token_f1(nothing, "Paris"), rouge_l(nothing, "Paris")) == (0, 0, 0)


def test_f1_is_symmetric_and_blind_to_order_within_bounds() -> None:
    chosen = random.Random(3)
    for _ in range(200):
        left, right = random_text(chosen, WORDS), random_text(chosen, WORDS)
        assert token_f1(left, right) == token_f1(right, left)
        assert 0 <= token_f1(left, right) <= 1
        shuffled = left.split()
        chosen.shuffle(shuffled)
        assert token_f1(" ".join(shuffled), right) == token_f1(left, right)
        assert exact_match(left, right) <= token_f1(left, right)


def test_published_rules_by_hand() -> None:
    "Rajpurkar et al. (2016): the best reference counts; articles and punctuation do not."
    assert exact_match("the Santa Clara, California", ["Levi's Stadium", "Santa Clara  california."]) == 1
    assert token_f1("in Santa Clara", ["Levi's Stadium", "Santa Clara, California"]) == pytest.approx(2 / 3)
    assert token_f1("yes yes yes", "yes no") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert answer_tokens("手机A型, a phone") == ["手", "机", "a", "型", "phone"]  # that A is no article


def test_characters_beyond_the_basic_plane_are_tokens_and_hangul_is_spaced() -> None:
    assert answer_tokens("\U00020000\U0002a6df") == ["\U00020000", "\U0002a6df"]
    assert answer_tokens("한국어 답") == ["한국어", "답"]


# ROUGE


def slow_common(left: list[str], right: list[str]) -> int:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_common_length_equals_the_table() -> None:
    chosen = random.Random(4)
    for n_kinds in (1, 2, 4, 30):
        for _ in range(100):
            left = [str(chosen.randrange(n_kinds)) for _ in range(chosen.randint(0, 90))]
            right = [str(chosen.randrange(n_kinds)) for _ in range(chosen.randint(0, 90))]
            assert common_length(left, right) == slow_common(left, right) == common_length(right, left)


@pytest.mark.parametrize("words", [WORDS, [*WORDS, *UNSPACED, "İstanbul", "\u212alein", "naïve", "x²", "٣"]])
def test_rouge_equals_the_usual_program(words: list[str]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    chosen = random.Random(5)
    n_partial = 0
    for _ in range(200):
        prediction = random_text(chosen, words, most=30)
        references = [random_text(chosen, words, most=30) for _ in range(chosen.randint(1, 3))]
        usual = scorer.score_multi(references, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, references) == pytest.approx(usual, abs=1e-6)
        n_partial += 0 < usual < 1
    assert n_partial > 100


def test_rouge_of_chinese_needs_other_tokens() -> None:
    assert rouge_l("每天二次饭后", "每天三次饭后") == 0.0
    assert rouge_l("每天二次饭后", "每天三次饭后", answer_tokens) == pytest.approx(5 / 6)
    assert answer_scores(["每天二次饭后"], ["每天三次饭后"], answer_tokens)["rouge_l"] == pytest.approx(5 / 6)


# Numbers


def written(chosen: random.Random) -> tuple[str, Fraction]:
    "A random number, in one of the ways people write it, and its value."
    whole, part = chosen.randrange(10 ** chosen.randint(1, 8)), chosen.randint(1, 99)
    minus = chosen.random() < 0.3
    sign = chosen.choice(["-", "−"]) if minus else ""
    kind = chosen.randrange(7)
    if kind == 0:
        text, value = f"{sign}{whole}", Fraction(whole)
    elif kind == 1:
        text, value = f"{sign}{whole:,}.{part:02d}", whole + Fraction(part, 100)
    elif kind == 2:
        text, value = f"{sign}{chosen.choice('$€£')}{whole:,}", Fraction(whole)
    elif kind == 3:
        text, value = f"{sign}{whole}{chosen.choice(['%', ' %'])}", Fraction(whole)
    elif kind == 4:
        text, value = f"{sign}{whole}/{2 ** (part % 5)}", Fraction(whole, 2 ** (part % 5))
    elif kind == 5:
        text, value = f"{sign}{whole} 3/4", whole + Fraction(3, 4)
    else:
        text, value = f"${sign}{whole}.5", whole + Fraction(1, 2)
    return text, -value if minus else value


def test_numbers_are_read_in_the_ways_people_write_them() -> None:
    chosen = random.Random(6)
    for _ in range(400):
        (first, _), (last, value) = written(chosen), written(chosen)
        before, after = (
            chosen.choice(["so ", "答案是", "= ", "(", "**", "is: "]),
            chosen.choice([".", "", " apples", "!", "元", "**"]),
        )
        found = final_number(f"First {first} and then {before}{last}{after}")
        assert found is not None and Fraction(found) == value, (first, last)
        marked = final_number(f"Not {first}.\n#### {last}\n\nQuestion: 99")
        assert marked is not None and Fraction(marked) == value, last
        assert is_number(last) and is_number(f"Because.\n#### {last}") and not is_number(f"it is {last}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("(2)-3", "3"),
        ("x=-3", "-3"),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("H2O", None),
        ("B2", None),
        ("", None),
        ("twelve", None),
        ("1/0", None),
        ("7 or 1/0", "7"),
        ("#### none, or 4", "4"),
        ("3 #### none", None),
        ("#### 4 #### 5", "4"),
        ("3/4/2020", "2020"),
        ("1/2.5", "2.5"),
        ("6.02e23", "6.02e23"),
        ("1e5.", "1e5"),
        ("1e99999", "1"),
        (".5", "0.5"),
        ("5.", "5"),
        ("12th", "12"),
        ("１２", "12"),
        ("- 5 apples", "5"),
        (r"costs \$7", "7"),
        (r"\boxed{42}", "42"),
    ],
)
def test_odd_numbers(text: str, value: str | None) -> None:
    assert final_number(text) == (None if value is None else Decimal(value))


def test_a_very_long_answer_is_read_quickly() -> None:
    for text in ("1" * 20000, "1," * 20000, "- " * 20000, "1/" * 20000, "9 " * 20000, "$" * 20000):
        final_number(text)


def test_numbers_are_compared_exactly() -> None:
    assert numeric_match("12.00", "#### 12") == numeric_match("2/4", ["x", "0.5"]) == 1
    assert numeric_match("1000001", "1000000") == numeric_match("0.333", "1/3") == numeric_match("", "0") == 0


def test_every_answer_of_a_public_set_is_a_number() -> None:
    folder = Path(os.environ.get("LLMFT_DATA", "")) / "gsm8k"
    files = sorted(folder.glob("*.jsonl")) if "LLMFT_DATA" in os.environ else []
    if not files:
        pytest.skip("LLMFT_DATA has no gsm8k")
    answers = [
        str(row["answer"]) for path in files for row in map(json.loads, path.open(encoding="utf-8")) if "answer" in row
    ]
    assert answers
    for answer in answers:
        last = re.search(r"#### (-?[\d.,]+)", answer)
        if last:
            assert final_number(answer) == Decimal(last.group(1).replace(",", "")) and is_number(answer)


# Columns, means and metrics


def test_columns_scores_and_metrics_agree(tmp_path: Path) -> None:
    chosen = random.Random(7)
    predictions = [f"{random_text(chosen, WORDS)} {chosen.randint(0, 3)}" for _ in range(60)]
    references = [[random_text(chosen, WORDS), str(chosen.randint(0, 3))] for _ in range(60)]
    columns, scores = answer_columns(predictions, references), answer_scores(predictions, references)
    assert list(columns) == list(scores) == ["exact_match", "token_f1", "rouge_l", "numeric"]
    for name, column in columns.items():
        assert column.shape == (60,) and column.dtype == np.float64 and column.min() >= 0 and column.max() <= 1
        assert scores[name] == pytest.approx(column.mean())
        assert 0 < scores[name] < 1 or name == "exact_match"
    for kind in (ExactMatch, TokenF1, RougeL, NumericMatch):
        metric = kind(cache_dir=str(tmp_path))
        for start in range(0, 60, 17):
            metric.add_batch(predictions=predictions[start : start + 17], references=references[start : start + 17])
        found = metric.compute()
        assert found == {name: pytest.approx(scores[name]) for name in found} and len(found) == 1


def test_numeric_is_there_only_where_every_row_has_a_number() -> None:
    assert "numeric" in answer_columns(["1", "2"], ["1", ["two", "2"]])
    assert "numeric" not in answer_columns(["1", "2"], ["1", "two"])
    assert answer_columns(["in 1998: 2"], [["since 1998", "3"]])["numeric"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([], [], "no rows"),
        (["a"], ["a", "b"], "1 predictions, 2 references"),
        ([None], ["a"], "row 0: the prediction is not a text but NoneType"),
        (["a", 3], ["a", "b"], "row 1: the prediction is not a text but int"),
        (["a"], [[]], "row 0: a row needs right answers"),
        (["a"], [None], "row 0: a row needs right answers"),
        (["a"], [[None]], "row 0: a row needs right answers"),
        (["a"], [3], "row 0: a row needs right answers"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions: list, references: list, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        answer_scores(predictions, references)
