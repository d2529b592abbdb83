"""Make the leaflets of the house pharmacy: running texts that tell what its products contain and go with.

    python tools/make_leaflets.py

writes `llmft_nb/assets/data/pharmacy-leaflets` (three JSONL files, `README.md`), byte for byte the same at every run.
Each leaflet is put together from the wordings in `tools/world/leaflets.json`; what it states follows from the world.
Validation and test tell the same of the same products in wordings that no leaflet of training uses.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from pharmacy_world import (
    ASSETS,
    NOTICE,
    Judge,
    as_lines,
    as_list,
    capitalised,
    number_of,
    read_judge,
    read_world,
    shuffled,
    write_files,
)

N_LEAFLETS = {"train": 20, "valid": 1, "test": 1}  # Of each product
N_HELD_OUT = 2  # Wordings of each sort that only validation may use, and as many for test
N_WORDS = (80, 120)  # Nothing is added to a leaflet that has as many as are drawn from here
N_MOST_WORDS = 150
N_STATEMENTS = 2  # Of each leaflet
OPTIONAL = ("opening", "closing", "dose", "storage")
STATEMENTS = {"avoid": "warning_avoid", "caution": "warning_caution", "safe": "fine_with"}


def split_wordings(seed: int) -> dict[str, dict[str, list[str]]]:
    "The wordings of each sort, by the split that may use them."
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in N_LEAFLETS}
    for sort, wordings in read_world("leaflets").items():
        chosen = shuffled(wordings, seed, "wordings", sort)
        splits["valid"][sort] = chosen[:N_HELD_OUT]
        splits["test"][sort] = chosen[N_HELD_OUT : 2 * N_HELD_OUT]
        splits["train"][sort] = chosen[2 * N_HELD_OUT :]
    return splits


class Writer:
    "Writes the leaflets of one split."

    def __init__(self, judge: Judge, wordings: dict[str, list[str]], split: str, seed: int) -> None:
        self.judge, self.wordings, self.split, self.seed = judge, wordings, split, seed
        self.stated = {name: shuffled(judge.stated_with(name, seed), seed, "turn", name) for name in judge.products}

    def say(self, sort: str, product: str, turn: int, **slots: str) -> str:
        "One wording of a sort, filled; the turn tells which."
        wordings = shuffled(self.wordings[sort], self.seed, self.split, product)
        return capitalised(wordings[turn % len(wordings)].format(product=product, **slots))

    def state(self, product: str, number: int) -> list[str]:
        "What this leaflet says of other items; over the leaflets of a product each of them has its turn."
        stated = self.stated[product]
        said: list[str] = []
        n_said: Counter[str] = Counter()
        for i in range(number * N_STATEMENTS, (number + 1) * N_STATEMENTS):
            other = stated[i % len(stated)]
            finding = self.judge(product, other)
            sort = STATEMENTS[finding.verdict]
            if n_said[sort] < len(self.wordings[sort]):
                turn = number * N_STATEMENTS + n_said[sort]
                said.append(self.say(sort, product, turn, other=other, reason=finding.reason))
                n_said[sort] += 1
        return said

    def write(self, product: str, number: int) -> str:
        "One leaflet: what the product is, contains and goes with; the rest as far as there is room."
        ingredients = self.judge.products[product]
        draw = number_of(self.seed, self.split, product, number)
        classes = [
            self.say("class", product, number + i, ingredient=name, **{"class": self.judge.class_of[name]})
            for i, name in enumerate(ingredients[: len(self.wordings["class"])])
        ]
        known = [
            self.say("use", product, number, kind=self.judge.kind_of[product]),
            self.say("composition", product, number, ingredients=as_list(ingredients)),
            classes.pop(draw % len(classes)),
        ]
        parts = [*shuffled(known, draw), *self.state(product, number)]
        parts = parts if draw % 3 else shuffled(parts, draw)
        opening, closing, *more = [
            self.say(sort, product, number) for sort in ("opening", "closing", "dose", "storage")
        ]
        wanted = N_WORDS[0] + draw % (N_WORDS[1] - N_WORDS[0])
        chosen: list[str] = []
        for sentence in shuffled([*classes, *more, opening, closing], draw):
            n_words = len(" ".join([*parts, *chosen]).split())
            if n_words < wanted and n_words + len(sentence.split()) <= N_MOST_WORDS:
                chosen.append(sentence)
        first, last = ([end] if end in chosen else [] for end in (opening, closing))
        return " ".join([*first, *parts, *(text for text in chosen if text not in (opening, closing)), *last])

    def rows(self) -> list[dict]:
        "All leaflets of the split, in an order that tells nothing."
        rows = [
            {"text": self.write(product, number), "product": product}
            for product in self.judge.products
            for number in range(N_LEAFLETS[self.split])
        ]
        order = shuffled(range(len(rows)), self.seed, self.split, "order")
        return [rows[i] for i in order]


def data_card(judge: Judge, splits: dict[str, list[dict]], wordings: dict[str, dict[str, list[str]]]) -> str:
    "The README of the folder, with the counts of what was made."
    lines = ["| split | leaflets | words | wordings |", "| --- | --- | --- | --- |"]
    for split, rows in splits.items():
        n_words = sum(len(row["text"].split()) for row in rows)
        n_wordings = sum(map(len, wordings[split].values()))
        lines.append(f"| {split} | {len(rows):,} | {n_words:,} | {n_wordings} |")
    n_words = sorted(len(row["text"].split()) for rows in splits.values() for row in rows)
    return CARD.format(
        notice=NOTICE,
        table="\n".join(lines),
        n_products=len(judge.products),
        n_leaflet_only=len(judge.leaflet_only),
        n_each=N_LEAFLETS["train"],
        n_compositions=len(wordings["train"]["composition"]),
        shortest=n_words[0],
        longest=n_words[-1],
    )


CARD = """# Leaflets of the house pharmacy

**{notice}**

Running texts of {shortest} to {longest} words about the {n_products} products of the house pharmacy, to go on
pretraining a model with: what a product is, what it contains, to which classes that belongs, what goes with it.

{table}

## Columns
`text`, and `product`, the one it is about.

## What they tell
Each product has {n_each} leaflets in train, which tell its composition in {n_compositions} different wordings. What a
leaflet says of taking a product with another item follows from `world.json` of the data set `pharmacy`. Which items a
product's leaflets speak of is fixed for the product: half of the ingredients that a rule covers, and some other
products. The rest is in no leaflet; a reader has to put it together from compositions, classes and what is told of
other products. Pairs that share an ingredient are never stated as such.

{n_leaflet_only} products are told of only here: no question of `pharmacy` names them, and the data set
`pharmacy-unread` asks about them, with `stated` where a leaflet has said it. Of the other products the leaflets also
state pairs that the test of `pharmacy` holds out: after reading them, a model has been told the verdict of some of
these, though never in the form of a question.

## Splits
Validation and test have a leaflet of each product, in wordings that no leaflet of train uses and that they do not
share. What they tell of a product train tells too: they measure whether its facts have been learnt, not its sentences.

## What it is not for
The texts are put together from wordings by a program, and the rules behind them are few. A model that has read them
must not advise anybody.

## Origin and licence
Made by `tools/make_leaflets.py` from `tools/world` and a fixed seed, without any person's data. Apache-2.0, like the
package.
"""


def main() -> None:
    "Three files of leaflets and their data card."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "pharmacy-leaflets")
    parser.add_argument("--seed", type=int, default=0, help="the one that make_pharmacy.py was given")
    arguments = parser.parse_args()
    judge, wordings = read_judge(), split_wordings(arguments.seed)
    splits = {split: Writer(judge, wordings[split], split, arguments.seed).rows() for split in N_LEAFLETS}
    texts = {f"{split}.jsonl": as_lines(rows) for split, rows in splits.items()}
    write_files(arguments.out, texts | {"README.md": data_card(judge, splits, wordings)})


if __name__ == "__main__":
    main()
