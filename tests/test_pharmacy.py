"""The house pharmacy: made again byte for byte, every label derived a second way, nothing held out leaks."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "llmft_nb" / "assets" / "data" / "pharmacy"
WORLD = json.loads((FOLDER / "world.json").read_text(encoding="utf-8"))
SPLITS = {
    split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "valid", "test")
}
NOTICE = "Fictional products, for teaching, not reviewed by a pharmacist, not medical advice."
KIND_OF = {row["name"]: row["class"] for row in WORLD["ingredients"]}
PRODUCTS = {row["name"]: row["ingredients"] for row in WORLD["products"]}


def verdict_of(one: str, other: str) -> str:
    "The label of two items, written without the generator: sets of verdicts instead of a strictest-wins order."

    def contents(item: str) -> list[list[str]]:
        if item in PRODUCTS:
            return [PRODUCTS[item]]
        return [row["ingredients"] for row in WORLD["products"] if row["kind"] == item] or [[item]]

    answers = set()
    for ones, others in product(contents(one), contents(other)):
        verdicts = set()
        for a, b in product(ones, others):
            pair = sorted([KIND_OF[a], KIND_OF[b]])
            spoken = [rule["verdict"] for rule in WORLD["rules"] for two in rule["class_pairs"] if sorted(two) == pair]
            verdicts.add("avoid" if a == b else spoken[0] if spoken else "ask")
        answers.add(next(verdict for verdict in ("avoid", "caution", "ask", "safe") if verdict in verdicts))
    return answers.pop() if len(answers) == 1 else "depends"


def pairs_of(rows: list[dict]) -> set[frozenset]:
    return {frozenset((row["first"], row["second"])) for row in rows}


def test_made_again_byte_for_byte(tmp_path: Path) -> None:
    script = ROOT / "tools" / "make_pharmacy.py"
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        command = [sys.executable, str(script), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        names = sorted(path.name for path in out.iterdir())
        assert names == sorted(path.name for path in FOLDER.iterdir())
        for name in names:
            assert (out / name).read_bytes() == (FOLDER / name).read_bytes(), name


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_follows_from_the_world(split: str) -> None:
    wrong = [row["text"] for row in SPLITS[split] if row["label"] != verdict_of(row["first"], row["second"])]
    assert wrong == []


@pytest.mark.parametrize("split", SPLITS)
def test_text_and_metadata_agree(split: str) -> None:
    for row in SPLITS[split]:
        text, first, second = (row[name].lower() for name in ("text", "first", "second"))
        assert text == row["phrasing"].removeprefix("lower:").format(x=first, y=second).lower()
        assert row["products"] == [item for item in (row["first"], row["second"]) if item in PRODUCTS]
        assert row["first"] != row["second"]


def test_a_safe_answer_always_rests_on_a_rule() -> None:
    for row in (row for rows in SPLITS.values() for row in rows if row["label"] == "safe"):
        assert any(row["reason"] == rule["reason"] and rule["verdict"] == "safe" for rule in WORLD["rules"]), row


def test_rules_speak_once_of_a_pair_and_name_their_source() -> None:
    spoken = [frozenset(pair) for rule in WORLD["rules"] for pair in rule["class_pairs"]]
    assert len(spoken) == len(set(spoken))
    assert {name for pair in spoken for name in pair} == set(KIND_OF.values())
    for rule in WORLD["rules"]:
        assert rule["verdict"] in {"safe", "caution", "avoid"}
        assert rule["reason"]
        assert rule["source"]["title"]
        assert rule["source"]["organisation"]


def test_products_are_composed_of_known_ingredients_which_go_together() -> None:
    for ingredients in PRODUCTS.values():
        assert set(ingredients) <= set(KIND_OF)
        assert all(verdict_of(a, b) == "safe" for a, b in combinations(ingredients, 2)), ingredients


def test_product_names_give_no_hint() -> None:
    words = {word.lower() for text in [*KIND_OF, *KIND_OF.values()] for word in re.findall(r"\w{4,}", text)}
    fragments = {word[i : i + 4] for word in words for i in range(len(word) - 3)}
    for name in PRODUCTS:
        assert not [fragment for fragment in fragments if fragment in name.lower()], name
        assert not [word[:3] for word in words if name.lower().startswith(word[:3])], name


@pytest.mark.parametrize("split", ["valid", "test"])
def test_what_is_held_out_is_not_in_training(split: str) -> None:
    held_out: dict[str, list[dict]] = {"phrasing": [], "pair": []}
    for row in SPLITS[split]:
        held_out[row["split_reason"]].append(row)
    assert not pairs_of(held_out["pair"]) & pairs_of(SPLITS["train"])
    assert pairs_of(held_out["phrasing"]) <= pairs_of(SPLITS["train"])
    known = {row["phrasing"] for row in SPLITS["train"]}
    assert not {row["phrasing"] for row in held_out["phrasing"]} & known
    assert {row["phrasing"] for row in held_out["pair"]} <= known


def test_validation_says_nothing_about_test() -> None:
    pairs = {split: [row for row in SPLITS[split] if row["split_reason"] == "pair"] for split in ("valid", "test")}
    assert not pairs_of(pairs["valid"]) & pairs_of(pairs["test"])
    assert not {row["phrasing"] for row in SPLITS["valid"]} & set(WORLD["phrasings"]["test"])


def test_no_text_occurs_twice() -> None:
    texts = Counter(" ".join(row["text"].lower().split()) for rows in SPLITS.values() for row in rows)
    assert [text for text, n in texts.items() if n > 1] == []


def test_sizes_and_balance() -> None:
    assert [len(SPLITS[split]) for split in ("train", "valid", "test")] == [2800, 300, 500]
    for rows in SPLITS.values():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(WORLD["labels"])
        assert max(counts.values()) <= 0.4 * len(rows)
    assert len(WORLD["phrasings"]["train"]) >= 20
    assert len(WORLD["phrasings"]["test"]) >= 5


def test_the_question_of_the_tour_is_kept_for_the_end() -> None:
    (row,) = [row for row in SPLITS["test"] if row["text"] == WORLD["tour"]]
    assert row["text"] == "Can ibuprofen be taken together with a cold medicine?"
    assert row["label"] == "depends"
    pair = frozenset(("ibuprofen", "a cold medicine"))
    assert pair not in pairs_of(SPLITS["train"] + SPLITS["valid"])
    same_shelf = {row["label"] for row in SPLITS["train"] if "a cold medicine" in (row["first"], row["second"])}
    assert len(same_shelf) > 1, "the words 'a cold medicine' must not give the label away"


def test_the_notice_is_there() -> None:
    assert WORLD["notice"] == NOTICE
    assert NOTICE in (FOLDER / "README.md").read_text(encoding="utf-8")
