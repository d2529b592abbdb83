"""The language sets: made again byte for byte, labelled twice alike, written by two hands, and nothing leaks."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llmft_nb.cleaning import near_leaks
from llmft_nb.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "llmft_nb" / "assets" / "data"
WORLD = ROOT / "tools" / "world"
SETS = {"reviews": 2, "intents": 12, "kinds": 12}


def written(name: str) -> list[dict]:
    return [json.loads(line) for line in (WORLD / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_made_again_byte_for_byte(tmp_path: Path) -> None:
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        command = [sys.executable, str(ROOT / "tools" / "make_requests.py"), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": hash_seed, "PATH": ""})
        for name in SETS:
            made, kept = out / f"pharmacy-{name}", ASSETS / f"pharmacy-{name}"
            files = sorted(path.name for path in made.iterdir())
            assert files == sorted(path.name for path in kept.iterdir())
            for file in files:
                assert (made / file).read_bytes() == (kept / file).read_bytes(), (name, file)


@pytest.mark.parametrize("name", list(SETS))
def test_two_readers_agree(name: str) -> None:
    rows = written(name)
    assert sum(row["label"] == row["relabelled"] for row in rows) >= 0.97 * len(rows)
    assert len({row["text"].casefold() for row in rows}) == len(rows)
    assert all(row["text"].isascii() and 3 <= len(row["text"].split()) <= 50 for row in rows)


@pytest.mark.parametrize(("name", "n_labels"), list(SETS.items()))
def test_rows_as_they_are_read(name: str, n_labels: int) -> None:
    splits = {split: read_rows(f"pharmacy-{name}", split=split) for split in ("train", "valid", "test")}
    counts = {split: Counter(row["label"] for row in rows) for split, rows in splits.items()}
    assert len(counts["train"]) == n_labels
    for split in splits:
        assert max(counts[split].values()) <= 1.1 * min(counts[split].values()) + 1
        assert not any("{" in row["text"] for row in splits[split])
    assert not near_leaks(splits["train"], {"test": splits["test"]}), "a text of the test is nearly one of training"


def test_no_text_names_its_kind() -> None:
    for row in written("kinds"):
        assert row["label"] not in row["text"].casefold(), row


# --- the pieces of the world ---

RULES = json.loads((WORLD / "rules.json").read_text(encoding="utf-8"))
PRODUCTS = json.loads((WORLD / "products.json").read_text(encoding="utf-8"))


def test_each_pair_of_classes_has_one_rule_with_a_public_source() -> None:
    spoken = Counter(frozenset(pair) for rule in RULES for pair in rule["class_pairs"])
    assert max(spoken.values()) == 1
    for rule in RULES:
        assert rule["verdict"] in {"safe", "caution", "avoid"}
        assert rule["source"]["address"].startswith("https://") and rule["source"]["statement"].endswith(".")
        assert rule["reason"][0].islower() and rule["reason"][-1] != "." and ":" not in rule["reason"]


def test_names_of_products_tell_nothing() -> None:
    names = [product["name"] for product in PRODUCTS]
    ingredients = {ingredient for product in PRODUCTS for ingredient in product["ingredients"]}
    known = ingredients | {name for rule in RULES for pair in rule["class_pairs"] for name in pair}
    assert len(PRODUCTS) == len(set(names)) == 60 and len(ingredients) == 25
    assert sum(product.get("leaflet_only", False) for product in PRODUCTS) == 12
    parts = {word[i : i + 4] for word in " ".join(known).split() for i in range(len(word) - 3)}
    for name in names:
        assert not any(name.casefold()[i : i + 4] in parts for i in range(len(name) - 3)), name


def test_wordings_have_their_slots() -> None:
    leaflets = json.loads((WORLD / "leaflets.json").read_text(encoding="utf-8"))
    slots = {
        "composition": {"product", "ingredients"},
        "use": {"product", "kind"},
        "class": {"product", "ingredient", "class"},
        **{name: {"product", "other", "reason"} for name in ("warning_avoid", "warning_caution", "fine_with")},
        "dose": {"product"},
        "storage": {"product"},
    }
    for name, wanted in slots.items():
        assert len(set(leaflets[name])) == len(leaflets[name]) >= 10
        assert all(f"{{{slot}}}" in text for slot in wanted for text in leaflets[name]), name
    phrasings = json.loads((WORLD / "phrasings.json").read_text(encoding="utf-8"))
    assert len(phrasings["train"]) >= 60 and not set(phrasings["train"]) & set(phrasings["test"])
    assert all(text.count("{x}") == text.count("{y}") == 1 for part in phrasings.values() for text in part)
