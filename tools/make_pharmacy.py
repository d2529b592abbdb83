"""Make the house pharmacy: questions about taking two medicines together, with a verdict right by construction.

    python tools/make_pharmacy.py

writes `llmft_nb/assets/data/pharmacy` (`world.json`, six JSONL files, `README.md`), byte for byte the same at every
run. The pieces lie in `tools/world`, what follows from them in `tools/pharmacy_world.py`; the questions are phrased by
two hands, one for training and validation, the other for the test. `tools/make_leaflets.py` makes the leaflets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from pharmacy_world import (
    ASSETS,
    LABELS,
    NOTICE,
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
N_ROWS = {"train": 3000, "valid": 300, "test": 500, "leaflet_valid": 60, "leaflet_test": 250, "chinese": 100}
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
        spans.append({"start": found.start(), "end": found.end(), "label": label})
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


def make_splits(judge: Judge, phrasings: dict[str, list[Phrasing]], n_train: int, seed: int) -> dict[str, list[dict]]:
    "All rows; valid and test ask half of old pairs in new phrasings, half of new pairs in old phrasings."
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
    for split, products in (("leaflet_valid", LEAFLET_VALID), ("leaflet_test", others)):
        splits[split] = make_leaflet_rows(ask, products, first_hand, N_ROWS[split])
    even = dict.fromkeys(LABELS, 1 / len(LABELS))
    rows = ask.ask_about(seen["chinese"], even, phrasings["test"], N_ROWS["chinese"], "chinese")
    splits["chinese"] = [in_chinese(judge, *two) for two in zip(rows, itertools.cycle(phrasings["chinese"]))]
    return {split: shuffled(rows, seed, "order") for split, rows in splits.items()}


# --- files ---


def data_card(world: dict, splits: dict[str, list[dict]]) -> str:
    "The README of the folder, with the counts of what was made."
    lines = ["| file | rows | " + " | ".join(LABELS) + " |", "| --- " * (len(LABELS) + 2) + "|"]
    for split, rows in splits.items():
        counts = Counter(row["label"] for row in rows)
        lines.append(f"| {split}.jsonl | {len(rows):,} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    return CARD.format(
        notice=NOTICE,
        table="\n".join(lines),
        n_classes=len({row["class"] for row in world["ingredients"]}),
        n_leaflet_only=sum(row.get("leaflet_only", False) for row in world["products"]),
        n_stated=sum(row["stated"] for row in splits["leaflet_test"]),
        n_leaflet_test=len(splits["leaflet_test"]),
        **{f"n_{part}": len(world[part]) for part in ("ingredients", "rules", "products")},
        **{f"n_{split}": len(phrasings) for split, phrasings in world["phrasings"].items()},
    )


CARD = """# The house pharmacy

**{notice}**

Questions about taking X together with Y, each with a verdict and an answer. X and Y are an active ingredient, a
product of a fictional pharmacy, or only a kind of medicine ("a cold medicine").

{table}

## The world
`world.json` holds {n_ingredients} real active ingredients in {n_classes} classes, {n_rules} rules between classes
and {n_products} fictional products, each with a declared composition. Every rule has a plain reason and a public
source: title, organisation, address, and what it says, in our own words (`checked` where that was compared with the
page itself). No product is a real brand, as far as we know, and no name hints at what is in it.

- `safe`: a rule says so for every pair of ingredients. Usual adult doses, no other illness, no pregnancy.
- `caution`: allowed under conditions (checks, hours apart, short use).
- `avoid`: a rule forbids it, or both contain the same ingredient, which would be taken twice.
- `unknown`: no rule speaks, so ask a pharmacist. Absence of a rule is never `safe`.
- `depends`: only a kind was named, and its products would get different verdicts.

The strictest verdict over all pairs of ingredients wins: avoid, then caution, then unknown, then safe.

## Columns
- `text`, `label`
- `kind` of the items asked about (ingredient, product, kind); `first` and `second`, the items in the places of x and
  y; `products`, those among them
- `phrasing`: its name; `train-7` is number 7, from 0, of the phrasings of train in `world.json`
- `split_reason`: why the row is where it is, see below; `reason`: what the verdict rests on, in a clause
- `contents`: what the products named contain, in one sentence; empty where none is named
- `answer`: two sentences, the verdict and the reason. The first words tell the verdict: "Yes", "Take care", "No",
  "Ask a pharmacist", "It depends"
- `spans`: where the two items stand in `text`, in characters, each with the label ingredient, product or kind; the
  article of a kind is no part of it
- `stated` (leaflet files only): whether a leaflet says in so many words what holds for this pair
- `english` (`chinese.jsonl` only): the same question in English

## Splits
The questions are phrased by two hands. Of the first hand's phrasings {n_train} are for training and {n_valid} only for
validation; the {n_test} of the second hand are only for test. Half of validation and test asks about pairs of train in
phrasings held out (`split_reason` is `phrasing`), half about pairs held out, in either order, in phrasings of train
(`pair`). No text occurs twice. Two questions of the test, `tour` and `tour_product` in `world.json`, are asked
throughout the course; their pairs are held out and their phrasings occur nowhere else.

{n_leaflet_only} products occur in no question of train, valid and test: what they contain is told only in the leaflets
of the data set `pharmacy-leaflets`. `leaflet_valid.jsonl` asks about three of them, `leaflet_test.jsonl` about the
others, each with an ingredient or a product of train, in phrasings of train. Of the {n_leaflet_test} questions of the
latter {n_stated} are about pairs that a leaflet states; the rest has to be put together from what it tells.

`chinese.jsonl` asks in Chinese, in {n_chinese} phrasings, about pairs of train; products keep their names. It is for
base models that have read Chinese.

## What it is not for
The rules are few, written for a course, and know nothing of doses, ages, illnesses or pregnancy. A model trained on
these rows must not advise anybody.

## Origin and licence
Made by `tools/make_pharmacy.py` from `tools/world` and a fixed seed, without any person's data. `--train` makes more
rows for training; the other files stay as they are. Apache-2.0, like the package.
"""


def main() -> None:
    "World, rows and data card, written to the folder of assets."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "pharmacy")
    parser.add_argument("--train", type=int, default=N_ROWS["train"], metavar="N", help="rows for training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.train < N_ROWS["train"]:
        parser.error(f"--train must be at least {N_ROWS['train']}, for valid and test rest on these rows")
    judge, phrasings = read_judge(), split_phrasings()
    splits = make_splits(judge, phrasings, arguments.train, arguments.seed)
    tours = [write_question(*two) for two in ((TOUR_PHRASINGS[0], *TOUR), (TOUR_PHRASINGS[1], *TOUR_PRODUCT))]
    texts = {split: [phrasing.text for phrasing in part] for split, part in phrasings.items()}
    world = judge.world | {"phrasings": texts, "tour": tours[0], "tour_product": tours[1]}
    files = {"world.json": json.dumps(world, indent=1, ensure_ascii=False) + "\n"}
    files |= {f"{split}.jsonl": as_lines(rows) for split, rows in splits.items()}
    write_files(arguments.out, files | {"README.md": data_card(world, splits)})


if __name__ == "__main__":
    main()
