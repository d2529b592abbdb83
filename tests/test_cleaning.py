"""Near copies against brute force, leaks and conflicts against counting, label errors against planted ones."""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from llmft_nb import near, suspects
from llmft_nb.cleaning import (
    clean,
    find_copies,
    message_text,
    near_leaks,
    plain_row,
    question_text,
    without_leaks,
)
from llmft_nb.core import UserError
from llmft_nb.near import NearPair, bare_text, near_duplicates
from llmft_nb.rows import Rows, drop_leaks, read_rows
from llmft_nb.suspects import fold_numbers, label_errors

# A reference of its own: strings and sets, all pairs


def pieces_of(text: str) -> set[str]:
    bare = " ".join(re.findall(r"[^\W_]+", text.lower()))
    length = 3 if re.search("[\u4e00-\u9fff]", bare) else 5
    padded = f" {bare} "
    return {padded[i : i + length] for i in range(len(padded) - length + 1)}


def similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def brute_force(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    pieces = [pieces_of(text) for text in texts]
    pairs = {(i, j): similarity(pieces[i], pieces[j]) for i, j in combinations(range(len(texts)), 2)}
    return {pair: share for pair, share in pairs.items() if share >= threshold}


def vocabulary(generator: random.Random, n: int) -> list[str]:
    return ["".join(generator.choices("abcdefghijklmnoprstuvwz", k=generator.randint(2, 9))) for _ in range(n)]


def sentences(generator: random.Random, n: int, words: list[str], low: int = 12, high: int = 40) -> list[str]:
    weights = [1 / (rank + 10) for rank in range(len(words))]
    return [" ".join(generator.choices(words, weights, k=generator.randint(low, high))) for _ in range(n)]


def damaged(text: str, generator: random.Random, words: list[str]) -> str:
    parts = text.split()
    kind = generator.choice(["substitute", "delete", "insert", "twice", "swap", "case", "marks", "typing error"])
    if kind in ("substitute", "twice"):
        for _ in range(2 if kind == "twice" else 1):
            parts[generator.randrange(len(parts))] = generator.choice(words)
    elif kind == "delete":
        del parts[generator.randrange(len(parts))]
    elif kind == "insert":
        parts.insert(generator.randrange(len(parts)), generator.choice(words))
    elif kind == "swap" and len(parts) > 7:
        cut = generator.randrange(3, len(parts) - 3)
        parts = parts[cut:] + parts[:cut]
    elif kind == "typing error":
        spot = generator.randrange(len(parts))
        parts[spot] = parts[spot][1:] + parts[spot][:1]
    text = " ".join(parts)
    return {"case": text.title(), "marks": text.replace(" ", ", ", 2) + " ..."}.get(kind, text)


def crowded_corpus(seed: int) -> list[str]:
    "Sixty sentences and many damaged copies of them, so that similarities of every size occur."
    generator = random.Random(seed)
    words = vocabulary(generator, 200)
    texts = sentences(generator, 60, words, low=8, high=20)
    for _ in range(140):
        text = generator.choice(texts)
        for _ in range(generator.randint(1, 3)):
            text = damaged(text, generator, words)
        texts.append(text)
    generator.shuffle(texts)
    return list({bare_text(text): text for text in texts}.values())


def found_against_brute_force(threshold: float) -> tuple[int, int, int]:
    "Pairs that are there, pairs of them found, and pairs found in excess or with another similarity."
    n_there, n_found, n_wrong = 0, 0, 0
    for seed in range(6):
        texts = crowded_corpus(seed)
        there = brute_force(texts, threshold)
        found = {(pair.i, pair.j): pair.similarity for pair in near_duplicates(texts, threshold=threshold)}
        n_there += len(there)
        n_found += len(set(there) & set(found))
        n_wrong += sum(abs(there.get(pair, -1.0) - share) > 1e-12 for pair, share in found.items())
    return n_there, n_found, n_wrong


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8])
def test_near_copies_against_all_pairs(threshold):
    n_there, n_found, n_wrong = found_against_brute_force(threshold)
    assert n_there > 200
    assert n_wrong == 0, "a reported pair is as similar as it says"
    assert n_found >= 0.98 * n_there


@pytest.mark.parametrize("mutant", ["few bands", "no prefix", "wrong pieces", "strict filter"])
def test_a_broken_search_is_noticed(monkeypatch, mutant):
    "The comparison above is worth something only if faults turn it red."
    if mutant == "few bands":
        monkeypatch.setattr(near, "band_width", lambda threshold, n_hashes: 24)
    elif mutant == "no prefix":
        whole = near.band_pairs
        monkeypatch.setattr(
            near, "band_pairs", lambda keys, other=None: tuple(part[::2] for part in whole(keys, other))
        )
        monkeypatch.setattr(near, "band_width", lambda threshold, n_hashes: 12)
    elif mutant == "wrong pieces":
        monkeypatch.setattr(near, "shingle_length", lambda text: 3)
    else:
        estimate = near.candidate_pairs
        monkeypatch.setattr(near, "candidate_pairs", lambda a, b, threshold: estimate(a, b, threshold + 0.3))
    n_there, n_found, n_wrong = found_against_brute_force(0.6)
    assert n_wrong > 0 or n_found < 0.98 * n_there


def test_ten_thousand_rows_and_two_hundred_planted():
    check_planted(3)


def check_planted(seed):
    "Leaks into a test set: exact ones, and ones with a word or two changed; under ten seconds on one core."
    generator = random.Random(seed)
    words = vocabulary(generator, 3_000)
    texts = sentences(generator, 11_000, words)
    train, exam = texts[:10_000], texts[10_000:]
    sources = generator.sample(range(10_000), 200)
    planted = {i: (texts[i] if spot < 100 else damaged(texts[i], generator, words)) for spot, i in enumerate(sources)}
    rows = read_rows([{"text": text, "label": "x"} for text in train])
    held_out = read_rows([{"text": text, "label": "x"} for text in [*exam, *planted.values()]])
    started = time.monotonic()
    leaks = find_copies(held_out, rows, split="test")
    seconds = time.monotonic() - started
    partners = {leak.index: leak.other for leak in leaks}
    right = [partners.get(1_000 + spot) == i for spot, i in enumerate(sources)]
    n_near = sum(leak.kind == "near" for leak in leaks)
    assert sum(right[:100]) >= 99, "recall of exact leaks"
    assert sum(right[100:]) >= 95, "recall of near leaks"
    assert sum(right) >= 0.95 * len(leaks), "precision"
    assert n_near > 50
    assert seconds < 10


def test_a_whole_cleaning_of_ten_thousand_rows_takes_seconds():
    generator = random.Random(4)
    words = vocabulary(generator, 3_000)
    texts = sentences(generator, 12_000, words)
    labels = generator.choices("abc", k=12_000)
    rows = read_rows([{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)])
    started = time.monotonic()
    report = clean(rows.subset(range(10_000)), {"test": rows.subset(range(10_000, 12_000))})
    assert time.monotonic() - started < 15
    assert (report.copies, report.leaks, report.conflicts) == ([], [], [])


def test_templates_do_not_explode():
    "Eight thousand rows of one sentence are thirty million near pairs; each row still has a partner."
    texts = [f"please cancel my order number {n:05d} and send the money back to my account" for n in range(8_000)]
    started = time.monotonic()
    pairs = near_duplicates(texts)
    assert time.monotonic() - started < 60
    assert {index for pair in pairs for index in (pair.i, pair.j)} == set(range(8_000))
    assert len(pairs) <= 32 * (near.MAX_BAND_PAIRS + 8_000)


def test_equal_texts_do_not_explode():
    pairs = near_duplicates(["The same question, again?"] * 5_000)
    assert pairs == [NearPair(0, i, 1.0) for i in range(1, 5_000)]


# Small, empty and strange texts


@pytest.mark.parametrize("texts", [[], [""], ["one text"], ["", ""], ["", "one text", "   "]])
def test_nothing_to_compare(texts):
    assert near_duplicates(texts) == []
    assert near_duplicates(texts, []) == []
    assert near_duplicates([], texts) == []


def test_very_short_texts_are_near_only_if_equal():
    texts = ["ok", "OK!", "okay", "no", "yes", "the pill", "the pills", "a", "ab", "?!", "?", "💊", "💊💊"]
    assert near_duplicates(texts) == [NearPair(0, 1, 1.0)]


def test_a_short_text_is_not_near_a_long_one_that_holds_it():
    long = "can i take both of these syrups together before i go to bed at night"
    assert near_duplicates(["can i take both", long]) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("这家酒店的房间很大服务也非常周到", "这家酒店的房间很小服务也非常周到"),  # Chinese, one character
        ("このホテルの部屋はとても広くて快適でした", "このホテルの部屋はとても狭くて快適でした"),  # Japanese
        ("ฉันต้องการยกเลิกคำสั่งซื้อของฉันวันนี้", "ฉันต้องการยกเลิกคำสั่งซื้อของฉันพรุ่งนี้"),  # Thai
        ("Сколько стоит доставка заказа в другой город", "сколько стоит доставка заказа в другой город?!"),
        ("क्या मैं ये दोनों दवाएँ एक साथ ले सकता हूँ", "क्या मैं ये दोनों दवाएँ एक साथ ले सकती हूँ"),  # Hindi
        ("Ｃａｎ　Ｉ　ｔａｋｅ　ｂｏｔｈ　ｏｆ　ｔｈｅｍ", "can i take both of them"),  # Full width
        ("café crème, s'il vous plaît, à emporter", "cafe\u0301 cre\u0300me s'il vous plai\u0302t a\u0300 emporter"),
    ],
)
def test_scripts_of_the_world(one, other):
    pairs = near_duplicates([one, "etwas ganz anderes, das hier nur im Wege steht", other])
    assert [(pair.i, pair.j) for pair in pairs] == [(0, 2)]


def test_chinese_against_all_pairs():
    generator = random.Random(5)
    characters = [chr(0x4E00 + n) for n in range(400)]
    texts = ["".join(generator.choices(characters, k=generator.randint(15, 60))) for _ in range(100)]
    for text in texts[:60]:
        spot = generator.randrange(len(text))
        texts.append(text[:spot] + generator.choice(characters) + text[spot + 1 :])
    there = brute_force(texts, 0.6)
    found = {(pair.i, pair.j): pair.similarity for pair in near_duplicates(texts)}
    assert len(there) > 50
    assert all(abs(there[pair] - share) < 1e-12 for pair, share in found.items())
    assert len(found) >= 0.98 * len(there)


def test_a_huge_text_and_half_a_surrogate():
    huge = " ".join(str(n) for n in range(200_000))
    assert near_duplicates([huge, "a\ud800 lone half of a pair in a text", huge + " 7"])[0].j == 2


def test_threshold_one_finds_equal_pieces_only():
    texts = ["one two three four five", "one two three four five!", "one two three four six"]
    assert near_duplicates(texts, threshold=1.0) == [NearPair(0, 1, 1.0)]
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UserError):
            near_duplicates(texts, threshold=wrong)


def test_two_lists_find_what_one_list_finds():
    for seed in range(4):
        texts = crowded_corpus(seed)
        half = len(texts) // 2
        within = {(p.i, p.j - half): p.similarity for p in near_duplicates(texts) if p.i < half <= p.j}
        between = {(p.i, p.j): p.similarity for p in near_duplicates(texts[:half], texts[half:])}
        assert between == within
        turned = {(p.j, p.i): p.similarity for p in near_duplicates(texts[half:], texts[:half])}
        assert turned == between


def test_every_copy_appears_between_two_lists():
    text = "please cancel my order and send the money back"
    found = near_duplicates([text, "other", text.upper()], [text + " now", text + "!", "?", text + " now"])
    assert {pair.i for pair in found} == {0, 2}
    assert {pair.j for pair in found} == {0, 1, 3}


def test_a_crowd_in_one_list_loses_nobody(monkeypatch):
    "Where a band stops early, every row of either list that has a partner still appears."
    monkeypatch.setattr(near, "MAX_BAND_PAIRS", 0)
    texts = [f"please cancel my order number {n:03d} and send the money back to my account" for n in range(310)]
    for one, other in ((texts[:300], texts[300:]), (texts[:10], texts[10:])):
        pairs = near_duplicates(one, other)
        assert {pair.i for pair in pairs} == set(range(len(one)))
        assert {pair.j for pair in pairs} == set(range(len(other)))


def test_near_copies_are_deterministic_and_do_not_depend_on_the_order():
    texts = crowded_corpus(7)
    first = near_duplicates(texts)
    assert near_duplicates(texts) == first
    order = random.Random(0).sample(range(len(texts)), len(texts))
    again = near_duplicates([texts[i] for i in order])
    assert {frozenset((order[p.i], order[p.j])) for p in again} == {frozenset((p.i, p.j)) for p in first}


# Rows of every task


def test_the_question_of_every_kind_of_row():
    parts = [{"type": "text", "text": "Look"}, {"type": "image"}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text": "a", "label": "x"}, "a"),
        ({"text": "a", "text_pair": "b", "label": "x"}, "a\nb"),
        ({"text": "a", "text_pair": None}, "a"),
        ({"text": "a", "prompt": "elsewhere", "label": "x"}, "a"),
        ({"tokens": ["a", "b"], "ner_tags": ["O", "O"]}, "a b"),
        ({"prompt": "p", "completion": "c"}, "p"),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}, "p"),
        ({"messages": [{"role": "user", "content": parts}]}, "Look\n"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "c"}]}, "s"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, "q"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}, "q"),
        ({"messages": []}, ""),
    ]
    for row, text in cases:
        assert question_text(row) == text, row
    assert message_text("as it is", answers=True) == "as it is"
    for wrong in ({}, {"question": "a"}, {"text": 3}, {"text": None}, {"messages": ["a"]}):
        with pytest.raises(UserError):
            plain_row(wrong)


def test_a_pair_is_not_its_concatenation():
    rows = read_rows([{"text": "a b", "text_pair": "c"}, {"text": "a", "text_pair": "b c"}, {"text": "a b c"}])
    assert find_copies(rows, threshold=None) == []


def rows_of(texts: list[str]) -> Rows:
    return read_rows([{"text": text, "label": "x"} for text in texts])


def test_copies_against_counting():
    for seed in range(5):
        generator = random.Random(seed)
        texts = [generator.choice(["ab", "AB", "a b", "a  b", "c", "ｃ"]) for _ in range(60)]
        copies = {copy.index: copy for copy in find_copies(rows_of(texts), threshold=None)}
        for i, text in enumerate(texts):
            keys = [other.lower().replace("ｃ", "c").split() for other in texts]
            if text in texts[:i]:
                assert (copies[i].kind, copies[i].other) == ("exact", texts.index(text))
            elif keys[i] in keys[:i]:
                assert (copies[i].kind, copies[i].other) == ("normalised", keys.index(keys[i]))
            else:
                assert i not in copies


def test_conflicts_of_every_task():
    tags = [{"tokens": ["a", "b"], "ner_tags": ["O", tag]} for tag in ("O", "B-x", "O")]
    assert clean(read_rows(tags), task="tag").conflicts == [("row:1", "row:2")]
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": word}]} for word in "abb"
    ]
    report = clean(read_rows(chats), task="instruct")
    assert report.conflicts == [("row:1", "row:2")]
    assert "no error" in report.describe() and "contradiction" not in report.describe()
    plain = clean(read_rows([{"text": "a"}, {"text": "a"}]), task="text")
    assert plain.conflicts == [] and "two labels" not in plain.describe()


def test_an_unknown_task_or_row_is_told():
    with pytest.raises(UserError, match="choose classify"):
        clean(rows_of(["a"]), task="translate")
    with pytest.raises(UserError, match="row:2"):
        clean(read_rows([{"text": "a", "label": "x"}, {"question": "b"}]))
    with pytest.raises(UserError, match="row:2"):
        clean(read_rows([{"text": "a", "label": "x"}, {"text": "b"}]), suspects=True)


def test_one_row_is_clean():
    report = clean(rows_of(["a single row"]), {"test": rows_of(["another question altogether"])}, suspects=True)
    assert (report.copies, report.conflicts, report.leaks, report.suspects) == ([], [], [], [])
    assert json.loads(json.dumps(report.as_record()))["counts"]["copies"] == 0


# Leaks


def test_plain_leaks_are_those_of_rows():
    generator = random.Random(0)
    texts = [f"question {n}" for n in range(40)]
    train = rows_of([generator.choice(texts) for _ in range(60)])
    held_out = {"test": rows_of([generator.choice(texts).upper() for _ in range(20)]), "valid": rows_of(["none"])}
    kept, report = drop_leaks(train, held_out)
    ours, findings = without_leaks(train, held_out, near="ignore")
    assert ours.rows == kept.rows and ours.places == kept.places
    assert (findings.leaks, findings.seen, findings.n_left_out) == (report.leaks, report.seen, report.n_left_out)
    assert findings.describe() == report.describe()


NEAR_ONE = "my card was charged twice for the same small order yesterday"
TRAIN = [NEAR_ONE, "where is my parcel", NEAR_ONE, "how do I change my pin"]
TEST = [NEAR_ONE.replace("small", "large"), "Where is my parcel", "something else again"]


@pytest.mark.parametrize(
    ("policy", "near_choice", "kept", "n_left_out"),
    [
        ("drop", "report", [0, 2, 3], 1),
        ("drop", "drop", [3], 3),
        ("drop", "ignore", [0, 2, 3], 1),
        ("allow", "report", [0, 1, 2, 3], 0),
        ("allow", "drop", [0, 1, 2, 3], 0),
    ],
)
def test_what_each_policy_keeps(policy, near_choice, kept, n_left_out):
    train = rows_of(TRAIN)
    rows, findings = without_leaks(train, {"test": rows_of(TEST)}, policy, near_choice)
    assert rows.places == [train.places[i] for i in kept]
    assert findings.n_left_out == n_left_out
    assert findings.seen == {"test": [1]}
    assert {match.index for match in findings.near} == (set() if near_choice == "ignore" else {0})
    assert {match.other for match in findings.near} == (set() if near_choice == "ignore" else {0, 2})


def test_refusing_leaks():
    train, exam = rows_of(TRAIN), {"test": rows_of(TEST)}
    with pytest.raises(UserError, match="the same text as row:2 of test"):
        without_leaks(train, exam, "error")
    near_only = {"test": rows_of(TEST[:1])}
    assert len(without_leaks(train, near_only, "error")[0]) == 4
    with pytest.raises(UserError, match="nearly the same as row:1 of test"):
        without_leaks(train, near_only, "error", "drop")
    with pytest.raises(UserError, match="every training row"):
        without_leaks(train.subset([0, 2]), near_only, "drop", "drop")
    with pytest.raises(UserError, match="unknown policy"):
        without_leaks(train, exam, "maybe")


def test_leaks_of_tags_and_dialogues():
    tags = read_rows([{"tokens": ["A", "b"], "ner_tags": ["O", "O"]}, {"tokens": ["c"], "ner_tags": ["O"]}])
    exam = read_rows([{"tokens": ["a", "b"], "ner_tags": ["B-x", "O"]}])
    assert without_leaks(tags, {"valid": exam})[0].rows == [tags[1]]
    chats = read_rows([{"prompt": "Say hello", "completion": "Hello"}, {"prompt": "Count", "completion": "1"}])
    kept, findings = without_leaks(chats, {"test": read_rows([{"prompt": "say  HELLO", "completion": "Hi"}])})
    assert kept.rows == [chats[1]] and findings.n_left_out == 1


def test_the_nearest_of_several_is_named():
    far = NEAR_ONE.replace("small", "large")
    matches = near_leaks(rows_of([far, NEAR_ONE]), {"test": rows_of([NEAR_ONE + " evening"])})
    best = max(matches, key=lambda match: match.similarity)
    assert (best.index, best.other) == (0, 1)
    assert {match.other for match in matches} == {0, 1}, "each training row that is near must be there to be dropped"


# Label errors


def topics(generator: random.Random, n: int, n_classes: int) -> tuple[list[str], list[str]]:
    "Rows whose label is in their words, with words in common."
    own = [vocabulary(generator, 40) for _ in range(n_classes)]
    common = vocabulary(generator, 100)
    classes = [generator.randrange(n_classes) for _ in range(n)]
    texts = [" ".join(generator.choices(own[c], k=3) + generator.choices(common, k=6)) for c in classes]
    return texts, [f"topic {c}" for c in classes]


@pytest.mark.parametrize("n_classes", [2, 12])
def test_planted_label_errors_are_found(n_classes):
    generator = random.Random(n_classes)
    texts, true = topics(generator, 1_500, n_classes)
    planted = set(generator.sample(range(1_500), 75))
    names = sorted(set(true))
    labels = [
        generator.choice([name for name in names if name != label]) if i in planted else label
        for i, label in enumerate(true)
    ]
    found = label_errors(texts, labels)
    hits = {suspect.index for suspect in found} & planted
    assert len(hits) >= 0.8 * len(planted), "recall"
    assert len(hits) >= 0.95 * len(found), "precision"
    assert sum(s.index in planted for s in found[:30]) >= 29, "the head of the list"
    assert sum(s.suggested == true[s.index] for s in found if s.index in planted) >= 0.95 * len(hits)
    assert found == label_errors(texts, labels), "the same every time"
    margins = [suspect.confidence_suggested - suspect.confidence_given for suspect in found]
    assert margins == sorted(margins, reverse=True) and margins[-1] > 0


def test_thresholds_against_the_paper_by_loops(monkeypatch):
    "Confident learning written out: a class is possible for a row if at least as probable as for its own rows."
    generator = np.random.default_rng(0)
    given = [int(c) for c in generator.integers(0, 4, 200)]
    probabilities = (generator.dirichlet([0.4] * 4, size=200) + np.eye(4)[given] * generator.random((200, 1))) / 2
    monkeypatch.setattr(suspects, "fold_probabilities", lambda *_: probabilities)
    labels = [f"class {c}" for c in given]
    found = {suspect.index: suspect.suggested for suspect in label_errors([str(n) for n in range(200)], labels)}
    expected = {}
    thresholds = [np.mean([probabilities[i][c] for i in range(200) if given[i] == c]) for c in range(4)]
    for i, row in enumerate(probabilities):
        possible = [c for c in range(4) if row[c] >= thresholds[c]]
        if possible:
            best = max(possible, key=lambda c: row[c])
            if best != given[i] and row[best] > row[given[i]]:
                expected[i] = f"class {best}"
    sure = {i for i, row in enumerate(probabilities) if row.argmax() != given[i]}
    assert found == expected and 10 < len(found) < len(sure)


def test_rare_classes_and_few_rows():
    texts, labels = topics(random.Random(0), 60, 2)
    texts += ["quite alone", "two of them", "two of these"]
    labels += ["single", "double", "double"]
    found = label_errors(texts, labels, n_folds=5)
    assert not {60, 61, 62} & {suspect.index for suspect in found}
    assert label_errors([], []) == []
    assert label_errors(["a", "b"], ["x", "y"]) == []
    assert label_errors(["", "", "", ""], ["x", "x", "y", "y"], n_folds=2) == []
    with pytest.raises(UserError, match="at least two folds"):
        label_errors(["a"], ["x"], n_folds=1)
    with pytest.raises(UserError, match="a label for each text"):
        label_errors(["a", "b"], ["x"])


@pytest.mark.parametrize(("n_rare", "doubted"), [(2, set()), (3, {0, 1})])
def test_a_class_of_two_rows_is_not_doubted(monkeypatch, n_rare, doubted):
    probabilities = np.array([[0.9, 0.1]] * 2 + [[0.2, 0.8]] * (n_rare - 2) + [[0.8, 0.2]] * 4)
    monkeypatch.setattr(suspects, "fold_probabilities", lambda *_: probabilities)
    found = label_errors([str(n) for n in range(n_rare + 4)], ["rare"] * n_rare + ["common"] * 4)
    assert {suspect.index for suspect in found} == doubted


def test_chinese_label_errors():
    generator = random.Random(0)
    good, bad = "房间很大服务周到干净舒适推荐满意", "房间很小态度恶劣又脏又吵失望后悔"
    texts = ["".join(generator.sample(good if n % 2 else bad, 10)) for n in range(300)]
    labels = ["good" if n % 2 else "bad" for n in range(300)]
    planted = set(generator.sample(range(300), 15))
    labels = [("bad" if label == "good" else "good") if i in planted else label for i, label in enumerate(labels)]
    found = {suspect.index for suspect in label_errors(texts, labels)}
    assert len(found & planted) >= 14 and len(found) <= 20


def test_folds_are_even_and_keep_copies_together():
    texts = [f"text {n // 2}" + "!" * (n % 2) for n in range(400)]
    labels = [str(n // 2 % 4) for n in range(400)]
    folds = fold_numbers(texts, labels, 5, seed=0)
    assert all(folds[n] == folds[n + 1] for n in range(0, 400, 2))
    counts = Counter(zip(labels, folds.tolist(), strict=True))
    assert set(counts) == set(product("0123", range(5))) and set(counts.values()) == {20}
    assert not np.array_equal(folds, fold_numbers(texts, labels, 5, seed=1))


# The record


def test_a_record_is_json_and_counts_everything():
    texts = ["the same question again"] * 300 + ["how do I change my pin"]
    report = clean(rows_of(texts), {"test": rows_of(["The same question again"])}, suspects=True)
    record = json.loads(json.dumps(report.as_record(n_most=10)))
    assert record["counts"] == {"copies": 299, "conflicts": 0, "leaks": 1, "suspects": 0}
    assert record["kinds"] == {"train": {"exact": 299}, "test": {"normalised": 1}}
    assert len(record["copies"]) == 10 and record["copies"][0]["place"] == "row:2"
    assert "suspects" not in clean(rows_of(["a"])).as_record()["counts"]


# Memory, and labels as numbers


def test_near_copies_of_long_texts_fit_into_memory():
    "Cutting once held 75 bytes for each character of all texts, and sets of Python numbers for each candidate."
    generator = random.Random(0)
    words = vocabulary(generator, 5_000)
    texts = []
    for _ in range(200):
        base = generator.choices(words, k=1_000)
        texts += [" ".join(base), " ".join(["changed", *base[1:]])]
    near_duplicates(texts[:4])  # Imports what it needs
    tracemalloc.start()
    pairs = near_duplicates(texts)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(pair.i, pair.j) for pair in pairs] == [(2 * i, 2 * i + 1) for i in range(200)]
    assert peak_bytes < 40 * sum(map(len, texts))


def test_shared_pieces_equal_those_of_sets():
    generator = np.random.default_rng(0)
    sets = [set(generator.choice(300, size=int(generator.integers(1, 200))).tolist()) for _ in range(60)]
    arrays = [np.array(sorted(part)) for part in sets]
    for one, array in zip(sets, arrays, strict=True):
        assert near.n_shared(array, arrays).tolist() == [len(one & other) for other in sets]


@pytest.mark.parametrize("n_most", [1, 7, 100])
def test_parts_hold_every_text_once(n_most):
    generator = random.Random(n_most)
    texts = ["x" * generator.choice([0, 1, 5, 30]) for _ in range(50)]
    parts = near.text_parts(texts, n_most)
    assert [i for begin, stop in parts for i in range(begin, stop)] == list(range(50))
    assert all(sum(map(len, texts[a:b])) <= n_most or b == a + 1 for a, b in parts)
    assert near.text_parts([], n_most) == []


def test_labels_may_be_numbers_of_numpy():
    texts, labels = ["a b", "c d", "a e"] * 4, [0, 1, 0] * 4
    assert label_errors(texts, np.array(labels)) == label_errors(texts, labels)
