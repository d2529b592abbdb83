"""The data cards of the house pharmacy's questions: what is in each set, with the counts of what was made."""

from __future__ import annotations

from collections import Counter

from pharmacy_world import LABELS, NOTICE

PHARMACY = """# The house pharmacy

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
- `spans`: where the two items stand in `text`, in characters from `start` up to but without `stop`, each with the
  label ingredient, product or kind; the article of a kind is no part of it

## Splits
The questions are phrased by two hands. Of the first hand's phrasings {n_train} are for training and {n_valid} only for
validation; the {n_test} of the second hand are only for test. Half of validation and test asks about pairs of train in
phrasings held out (`split_reason` is `phrasing`), half about pairs held out, in either order, in phrasings of train
(`pair`). No text occurs twice. Two questions of the test, `tour` and `tour_product` in `world.json`, are asked
throughout the course; their pairs are held out and their phrasings occur nowhere else.

{n_leaflet_only} of the products are in no question here. What they contain is told only in the leaflets of the data
set `pharmacy-leaflets`, and the questions about them are the data set `pharmacy-unread`. `pharmacy-chinese` asks about
pairs of train in Chinese.

## What it is not for
The rules are few, written for a course, and know nothing of doses, ages, illnesses or pregnancy. A model trained on
these rows must not advise anybody.

## Origin and licence
Made by `tools/make_pharmacy.py` from `tools/world` and a fixed seed, without any person's data. `--train` makes more
rows for training; the other files stay as they are. Apache-2.0, like the package.
"""

UNREAD = """# The house pharmacy: products that no question has named

**{notice}**

Questions about {n_leaflet_only} products of the house pharmacy that no question of the data set `pharmacy` names. What
they contain is told only in the leaflets of the data set `pharmacy-leaflets`: who answers has read it there, or
guesses. There is nothing to train on; the questions are for a model that has read the leaflets and was tuned on
`pharmacy`, and for the same model without the leaflets beside it.

{table}

## Columns
As in `pharmacy`, whose `world.json` the rows follow from. `kind` is always product, `split_reason` always `leaflet`,
and `phrasing` names one of train. One column more:
- `stated`: whether a leaflet says in so many words what holds for this pair

## Splits
Validation asks about {n_valid_products} of the products, the test about the other {n_test_products}, each with an
ingredient or a product that train asks about, in phrasings of train. Of the {n_valid} questions of validation
{n_valid_stated} are about pairs that a leaflet states, of the {n_test} of the test {n_test_stated}; the rest has to be
put together from what the leaflets tell. No text is one of `pharmacy`, and no label is `depends`, for no kind is named.

## What it is not for
As `pharmacy`: the rules are few, and a model that answers these questions must not advise anybody.

## Origin and licence
Made by `tools/make_pharmacy.py` from `tools/world` and a fixed seed, without any person's data. Apache-2.0, like the
package.
"""

CHINESE = """# The house pharmacy in Chinese

**{notice}**

Questions of the house pharmacy in Chinese, for base models that have read Chinese: a model tuned on the English
questions of the data set `pharmacy` is asked what it was shown, in another language.

{table}

## Columns
As in `pharmacy`, whose `world.json` the rows follow from. `text`, `contents` and `answer` are in Chinese, and `spans`
counts the characters of this text; products keep their names. `first`, `second`, `products` and `reason` stay in
English, `split_reason` is always `chinese`, and `phrasing` names one of the Chinese ones. One column more:
- `english`: the same question in English, in a phrasing of the second hand; `pharmacy` has none of these texts

## Splits
There is only a test. Its {n_test} questions, in {n_phrasings} phrasings, are about pairs that train asks about.

## What it is not for
As `pharmacy`: the rules are few, and a model that answers these questions must not advise anybody.

## Origin and licence
Made by `tools/make_pharmacy.py` from `tools/world` and a fixed seed, without any person's data. Apache-2.0, like the
package.
"""


def write_table(splits: dict[str, list[dict]]) -> str:
    "The labels counted, a line a file."
    lines = ["| file | rows | " + " | ".join(LABELS) + " |", "| --- " * (len(LABELS) + 2) + "|"]
    for split, rows in splits.items():
        counts = Counter(row["label"] for row in rows)
        lines.append(f"| {split}.jsonl | {len(rows):,} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    return "\n".join(lines)


def write_cards(world: dict, sets: dict[str, dict[str, list[dict]]]) -> dict[str, str]:
    "The README of each set's folder."
    leaflet_only = {row["name"] for row in world["products"] if row.get("leaflet_only")}
    unread, chinese = sets["pharmacy-unread"], sets["pharmacy-chinese"]
    about: dict[str, dict[str, int]] = {
        "pharmacy": {
            "n_classes": len({row["class"] for row in world["ingredients"]}),
            **{f"n_{part}": len(world[part]) for part in ("ingredients", "rules", "products")},
            **{f"n_{split}": len(phrasings) for split, phrasings in world["phrasings"].items()},
        },
        "pharmacy-unread": {},
        "pharmacy-chinese": {
            "n_test": len(chinese["test"]),
            "n_phrasings": len({row["phrasing"] for row in chinese["test"]}),
        },
    }
    for split, rows in unread.items():
        about["pharmacy-unread"] |= {
            f"n_{split}": len(rows),
            f"n_{split}_stated": sum(row["stated"] for row in rows),
            f"n_{split}_products": len(leaflet_only & {name for row in rows for name in row["products"]}),
        }
    cards = {"pharmacy": PHARMACY, "pharmacy-unread": UNREAD, "pharmacy-chinese": CHINESE}
    return {
        name: card.format(notice=NOTICE, table=write_table(sets[name]), n_leaflet_only=len(leaflet_only), **about[name])
        for name, card in cards.items()
    }
