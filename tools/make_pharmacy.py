"""Make the house pharmacy: questions about taking two medicines together, with a verdict right by construction.

    python tools/make_pharmacy.py

writes three folders to `llmft_nb/assets/data`, byte for byte the same at every run: `pharmacy` with `world.json`,
`pharmacy-unread` with questions about products that only leaflets tell of, and `pharmacy-chinese`. The pieces lie in
`tools/world`, what follows from them in `tools/pharmacy_world.py`; the questions are phrased by two hands, one for
training and validation, the other for the test. `tools/make_leaflets.py` makes the leaflets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pharmacy_cards import write_cards
from pharmacy_world import (
    ASSETS,
    LABELS,
    Finding,
    Judge,
    Part,
    as_lines,
    as_list,
    capitalised,
    number_of,
    read_judge,
    read_world,
    shuffled,
    write_files,
)

TOUR = ("ibuprofen", "a cold medicine")  # Asked before and after fine-tuning; in no other split than test
TOUR_PRODUCT = ("ibuprofen", "Ellorquay")  # The same shelf, and now the composition decides
TOUR_PHRASINGS = ["Can {x} be taken together with {y}?", "Can I take {x} with {y}?"]
N_ROWS = {"train": 3000, "valid": 300, "test": 500}
N_UNREAD = {"valid": 60, "test": 250}
N_CHINESE = 100
SHARES = {"safe": 0.20, "caution": 0.18, "avoid": 0.27, "unknown": 0.20, "depends": 0.15}
HELD_OUT = {"valid": 0.10, "test": 0.16}  # Share of each label's pairs that only this split may ask about
VALID_EVERY, VALID_FIRST = 6, 3  # Which phrasings of the first hand are kept for validation
LEAFLET_VALID = ["Cavenoth", "Bickerlow", "Dovremont"]  # The other nine leaflet-only products are for the test
LEAFLET_SHARES = {(label, stated): (1 + stated) / 12 for label in ("safe", "caution", "avoid") for stated in (0, 1)}
Pair = tuple[str, str]


class Phrasing(NamedTuple):
    "A way to ask about {x} and {y}."

    name: str  # The split that first sees it, and its number in `world.json`
    text: str


# --- one row ---


def write_question(phrasing: str, x: str, y: str) -> str:
    "The question: a capital at its start unless it is one in lower case, no article behind another."
    text = phrasing.removeprefix("lower:").format(x=x, y=y)
    text = re.sub(r"\b(my|my own|the) an? ", r"\1 ", text)
    return text.lower() if phrasing.startswith("lower:") else capitalised(text)


def kind_of_item(judge: Judge, item: str) -> str:
    "What an item is: ingredient, product or kind."
    return "product" if item in judge.products else "kind" if item in judge.shelf else "ingredient"


def find_spans(text: str, items: dict[str, str]) -> list[dict]:
    "Where the items, given as they are written and with their labels, stand in the text; each must stand there once."
    spans = []
    for item, label in items.items():
        (found,) = re.finditer(re.escape(item), text, re.IGNORECASE)
        spans.append({"start": found.start(), "stop": found.end(), "label": label})
    return sorted(spans, key=lambda span: span["start"])


def listed(items: list[str], words: dict, names: dict[str, str], last: str = "and") -> str:
    "Several items by their names in this language."
    return as_list([names[item] for item in items], words["comma"], words[last])


def write_contents(judge: Judge, pair: Pair, words: dict, names: dict[str, str]) -> str:
    "What the products of a pair contain, in one sentence; nothing where no product is named."
    told = [
        words["contains"].format(product=item, ingredients=listed(judge.products[item], words, names))
        for item in pair
        if item in judge.products
    ]
    return words["also"].join(told) + words["stop"] if told else ""


def write_reason(judge: Judge, pair: Pair, finding: Finding, reason: str, words: dict, names: dict[str, str]) -> str:
    "The second sentence of an answer: the parts that the verdict rests on, and the reason."
    if finding.rule == "kind":
        shelves = [judge.shelf[item] for item in pair if item in judge.shelf]
        differ = [shelf for shelf in shelves if len({tuple(judge.products[name]) for name in shelf}) > 1]
        kinds = [judge.kind_of[shelf[0]] for shelf in differ]
        return capitalised(words["kind"].format(kinds=listed(kinds, words, names, "or")))

    def name_part(part: Part) -> str:
        name = names[part.ingredient]
        return name if part.item == part.ingredient else words["inside"].format(ingredient=name, product=part.item)

    products = [part.item for part in finding.parts if part.item in judge.products]
    if finding.rule == "same_ingredient":
        slots = dict(zip(("first", "second"), products)) | {"ingredient": names[finding.parts[0].ingredient]}
        text = words["same_ingredient"][len(products) - 1].format(**slots)
    else:
        one, other = map(name_part, finding.parts)
        text = words["no_rule" if finding.rule == "no_rule" else "rule"].format(one=one, other=other, reason=reason)
    text = words["example"] + text if any(item in judge.shelf for item in pair) else text
    return capitalised(text)


def write_answer(judge: Judge, pair: Pair, reasons: dict[str, str], words: dict, names: dict[str, str]) -> str:
    "Two sentences: the verdict, and why."
    finding = judge(*pair)
    verdict = words["verdict"][finding.verdict].format(x=names[pair[0]], y=names[pair[1]])
    reason = reasons.get(finding.rule, finding.reason)
    return verdict + words["blank"] + write_reason(judge, pair, finding, reason, words, names)


def make_row(judge: Judge, pair: Pair, phrasing: Phrasing, split_reason: str) -> dict:
    "One labelled question with its metadata."
    finding, text, words = judge(*pair), write_question(phrasing.text, *pair), read_world("answers")
    names = {item: item for item in (*judge.made_of, *judge.shelf)}
    kinds = {item: kind_of_item(judge, item) for item in pair}
    return {
        "text": text,
        "label": finding.verdict,
        "kind": next(kind for kind in ("kind", "product", "ingredient") if kind in kinds.values()),
        "first": pair[0],
        "second": pair[1],
        "products": [item for item in pair if item in judge.products],
        "phrasing": phrasing.name,
        "split_reason": split_reason,
        "reason": finding.reason,
        "contents": write_contents(judge, pair, words, names),
        "answer": write_answer(judge, pair, {}, words, names),
        "spans": find_spans(text, {re.sub(r"^an? ", "", item): kind for item, kind in kinds.items()}),
    }


def in_chinese(judge: Judge, row: dict, phrasing: Phrasing) -> dict:
    "The same question in Chinese; products keep their names."
    chinese = read_world("chinese")
    names = {item: chinese["names"].get(item, item) for item in (*judge.made_of, *judge.shelf)}
    pair = row["first"], row["second"]
    text = phrasing.text.format(x=names[pair[0]], y=names[pair[1]])
    return row | {
        "text": text,
        "english": row["text"],
        "phrasing": phrasing.name,
        "contents": write_contents(judge, pair, chinese["words"], names),
        "answer": write_answer(judge, pair, chinese["reasons"], chinese["words"], names),
        "spans": find_spans(text, {names[item]: kind_of_item(judge, item) for item in pair}),
    }


# --- splits ---


def split_phrasings() -> dict[str, list[Phrasing]]:
    "The phrasings by the split that first sees them, each with a name."
    written = read_world("phrasings")
    valid = written["train"][VALID_FIRST::VALID_EVERY]
    train = [text for text in written["train"] if text not in valid]
    texts = {"train": train, "valid": valid, "test": written["test"], "tour": TOUR_PHRASINGS}
    texts["chinese"] = read_world("chinese")["phrasings"]
    return {split: [Phrasing(f"{split}-{i}", text) for i, text in enumerate(part)] for split, part in texts.items()}


def split_pairs(judge: Judge, seed: int) -> dict[str, dict[str, list[Pair]]]:
    "Pairs of two items, each in one split only, by label; not the tour's, and no product with its own kind."
    items = [item for item in (*judge.made_of, *judge.shelf) if item not in judge.leaflet_only]
    by_label: dict[str, list[Pair]] = defaultdict(list)
    for pair in itertools.combinations(items, 2):
        if judge.kind_of.get(pair[0]) != pair[1] and set(pair) not in (set(TOUR), set(TOUR_PRODUCT)):
            by_label[judge(*pair).verdict].append(pair)
    splits: dict[str, dict[str, list[Pair]]] = {split: {} for split in ("train", "valid", "test")}
    for label in LABELS:
        pairs = shuffled(by_label[label], seed, "pairs")
        n_test, n_valid = (round(HELD_OUT[split] * len(pairs)) for split in ("test", "valid"))
        splits["test"][label] = pairs[:n_test]
        splits["valid"][label] = pairs[n_test : n_test + n_valid]
        splits["train"][label] = pairs[n_test + n_valid :]
    return splits


class Questioner:
    "Asks about pairs, never twice in the same words."

    def __init__(self, judge: Judge, seed: int) -> None:
        self.judge, self.seed, self.taken = judge, seed, set[str]()

    def ask(self, pair: Pair, phrasing: Phrasing, split_reason: str) -> list[dict]:
        "One row, or none where the text is taken."
        row = make_row(self.judge, pair, phrasing, split_reason)
        is_new = row["text"].lower() not in self.taken
        self.taken.add(row["text"].lower())
        return [row] if is_new else []

    def ask_about(
        self,
        pools: dict,  # Name of a pool and its pairs
        shares: dict,  # Name of a pool and its share of the rows
        phrasings: list[Phrasing],
        n_rows: int,
        split_reason: str,
    ) -> list[dict]:
        "`n_rows` new questions: pairs of each pool in turn, phrasing and order by chance, the same for more rows."
        rows: list[dict] = []
        share = 0.0
        for name, pairs in pools.items():
            share += shares[name]
            for i, pair in enumerate(itertools.cycle(pairs)):
                if len(rows) >= round(share * n_rows):
                    break
                number = number_of(self.seed, split_reason, name, pair, i)
                ordered = pair if number % 2 else pair[::-1]
                rows += self.ask(ordered, phrasings[number // 2 % len(phrasings)], split_reason)
        return rows


def leaflet_pools(judge: Judge, products: list[str], seed: int) -> dict:
    "Pairs of leaflet-only products with ingredients or other products, by label and by whether leaflets state them."
    pools: dict = {(label, stated): [] for label in ("safe", "caution", "avoid", "unknown") for stated in (0, 1)}
    for product in products:
        stated = judge.stated_with(product, seed)
        for other in judge.made_of:
            if other not in judge.leaflet_only:
                pools[judge(product, other).verdict, int(other in stated)].append((product, other))
    return {name: shuffled(pairs, seed, "leaflet") for name, pairs in pools.items() if pairs}


def make_leaflet_rows(ask: Questioner, products: list[str], phrasings: list[Phrasing], n_rows: int) -> list[dict]:
    "Questions that only the leaflets can answer, half of them about pairs that they state."
    pools = leaflet_pools(ask.judge, products, ask.seed)
    rows = ask.ask_about(pools, LEAFLET_SHARES | {("unknown", 0): 0.25}, phrasings, n_rows, "leaflet")
    for row in rows:
        pair = row["first"], row["second"]
        product, other = pair if pair[0] in products else pair[::-1]
        row["stated"] = other in ask.judge.stated_with(product, ask.seed)
    return rows


def in_order(rows: list[dict], seed: int) -> list[dict]:
    "Rows in an order that depends on their texts alone, whatever else is told of them."
    return sorted(rows, key=lambda row: number_of(seed, "order", row["text"]))


def make_sets(judge: Judge, phrasings: dict[str, list[Phrasing]], n_train: int, seed: int) -> dict[str, dict]:
    "Rows by set and split; valid and test ask half of old pairs in new phrasings, half of new pairs in old phrasings."
    pairs, ask = split_pairs(judge, seed), Questioner(judge, seed)
    first_hand = phrasings["train"]
    tours = [row for two in zip((TOUR, TOUR_PRODUCT), phrasings["tour"]) for row in ask.ask(*two, "pair")]
    splits = {"train": ask.ask_about(pairs["train"], SHARES, first_hand, n_train, "train")}
    seen: dict[str, dict[str, list[Pair]]] = {split: {} for split in ("valid", "test", "chinese")}
    for label in LABELS:  # What even the smallest train asks about
        asked = pairs["train"][label][: round(0.9 * SHARES[label] * N_ROWS["train"])]
        seen |= {split: seen[split] | {label: shuffled(asked, seed, split)} for split in seen}
    for split in ("valid", "test"):
        n_half = N_ROWS[split] // 2
        splits[split] = ask.ask_about(seen[split], SHARES, phrasings[split], n_half, "phrasing")
        rows = ask.ask_about(pairs[split], SHARES, first_hand, n_half, "pair")
        for tour in tours if split == "test" else ():  # In place of the last one with its label
            rows[max(i for i, row in enumerate(rows) if row["label"] == tour["label"])] = tour
        splits[split] += rows
    others = [name for name in judge.leaflet_only if name not in LEAFLET_VALID]
    unread = {
        split: make_leaflet_rows(ask, products, first_hand, N_UNREAD[split])
        for split, products in (("valid", LEAFLET_VALID), ("test", others))
    }
    even = dict.fromkeys(LABELS, 1 / len(LABELS))
    rows = ask.ask_about(seen["chinese"], even, phrasings["test"], N_CHINESE, "chinese")
    chinese = {"test": [in_chinese(judge, *two) for two in zip(rows, itertools.cycle(phrasings["chinese"]))]}
    sets = {"pharmacy": splits, "pharmacy-unread": unread, "pharmacy-chinese": chinese}
    return {name: {split: in_order(rows, seed) for split, rows in parts.items()} for name, parts in sets.items()}


# --- files ---


def main() -> None:
    "World, rows and data cards, written to the folder of assets."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="parent folder of the three sets")
    parser.add_argument("--train", type=int, default=N_ROWS["train"], metavar="N", help="rows for training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.train < N_ROWS["train"]:
        parser.error(f"--train must be at least {N_ROWS['train']}, for valid and test rest on these rows")
    judge, phrasings = read_judge(), split_phrasings()
    sets = make_sets(judge, phrasings, arguments.train, arguments.seed)
    tours = [write_question(*two) for two in ((TOUR_PHRASINGS[0], *TOUR), (TOUR_PHRASINGS[1], *TOUR_PRODUCT))]
    texts = {split: [phrasing.text for phrasing in part] for split, part in phrasings.items()}
    world = judge.world | {"phrasings": texts, "tour": tours[0], "tour_product": tours[1]}
    cards = write_cards(world, sets)
    for name, splits in sets.items():
        files = {"world.json": json.dumps(world, indent=1, ensure_ascii=False) + "\n"} if name == "pharmacy" else {}
        files |= {f"{split}.jsonl": as_lines(rows) for split, rows in splits.items()}
        write_files(arguments.out / name, files | {"README.md": cards[name]})


if __name__ == "__main__":
    main()
