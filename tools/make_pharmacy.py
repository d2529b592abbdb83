"""Make the house pharmacy: questions about taking two medicines together, with a verdict right by construction.

    python tools/make_pharmacy.py

writes `llmft_nb/assets/data/pharmacy` (`world.json`, three JSONL files, `README.md`), byte for byte the same at
every run. The world comes first: real ingredients in classes, rules between classes, each with a public source,
and fictional products with a declared composition. Every question's verdict follows from the world alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "Fictional products, for teaching, not reviewed by a pharmacist, not medical advice."
STRICTNESS = ["safe", "ask", "caution", "avoid"]  # the strictest verdict over all ingredient pairs wins
LABELS = ["safe", "caution", "avoid", "ask", "depends"]

CLASSES = {  # class: its ingredients, all real
    "paracetamol": ["paracetamol"],
    "anti-inflammatory painkiller": ["ibuprofen", "naproxen", "aspirin", "diclofenac"],
    "non-drowsy antihistamine": ["cetirizine", "loratadine", "fexofenadine"],
    "drowsy antihistamine": ["chlorphenamine", "diphenhydramine"],
    "decongestant": ["pseudoephedrine", "phenylephrine"],
    "cough suppressant": ["dextromethorphan"],
    "opioid": ["codeine"],
    "SSRI antidepressant": ["sertraline", "fluoxetine"],
    "MAOI antidepressant": ["phenelzine"],
    "vitamin K antagonist": ["warfarin"],
    "antacid": ["calcium carbonate", "magnesium hydroxide"],
    "proton pump inhibitor": ["omeprazole"],
    "mineral-binding antibiotic": ["doxycycline", "ciprofloxacin"],
    "iron": ["ferrous sulfate"],
    "thyroid hormone": ["levothyroxine"],
}
P, N, H, S, D, X, OP, SS, M, W, A, R, B, FE, T = CLASSES
NHS, EMC = "NHS (United Kingdom)", "Electronic medicines compendium (United Kingdom)"
FDA = "Food and Drug Administration (United States)"

RULES = [  # id, verdict, the pairs of classes it speaks of, plain reason, title and organisation of the source
    ("two-nsaids", "avoid", [(N, N)], "two anti-inflammatory painkillers together raise the risk of stomach bleeding",
     "Medicines A to Z: Ibuprofen for adults", NHS),
    ("nsaid-warfarin", "avoid", [(N, W)], "an anti-inflammatory painkiller with warfarin can cause serious bleeding",
     "Medicines A to Z: Warfarin", NHS),
    ("two-antihistamines", "avoid", [(H, H), (H, S), (S, S)], "two antihistamines do the same job: side effects add up",
     "Medicines A to Z: Antihistamines", NHS),
    ("two-decongestants", "avoid", [(D, D)], "two decongestants together can raise the blood pressure and the pulse",
     "Medicines A to Z: Decongestants", NHS),
    ("maoi-ssri", "avoid", [(M, SS)], "the two antidepressants can cause a life-threatening excess of serotonin",
     "Prescribing information: sertraline hydrochloride tablets", FDA),
    ("maoi-cough", "avoid", [(M, X)], "a cough suppressant with an MAOI can cause a dangerous excess of serotonin",
     "21 CFR 341.74, Labeling of antitussive drug products", FDA),
    ("maoi-decongestant", "avoid", [(M, D)], "a decongestant with an MAOI can raise the blood pressure dangerously",
     "21 CFR 341.80, Labeling of nasal decongestant drug products", FDA),
    ("maoi-opioid", "avoid", [(M, OP)], "an opioid with an MAOI can slow the breathing and cause severe reactions",
     "Prescribing information: codeine sulfate tablets", FDA),
    ("maoi-drowsy", "avoid", [(M, S)], "an MAOI makes the side effects of a drowsy antihistamine stronger and longer",
     "Summary of product characteristics: chlorphenamine maleate tablets", EMC),
    ("nsaid-ssri", "caution", [(N, SS)], "both make bleeding more likely, most of all in the stomach",
     "Prescribing information: sertraline hydrochloride tablets", FDA),
    ("ssri-warfarin", "caution", [(SS, W)], "both make bleeding more likely: closer checks",
     "Prescribing information: sertraline hydrochloride tablets", FDA),
    ("ssri-cough", "caution", [(SS, X)], "both act on serotonin, and too much of it is harmful",
     "Prescribing information: sertraline hydrochloride tablets", FDA),
    ("drowsy-opioid", "caution", [(S, OP)], "both cause drowsiness and can slow the breathing",
     "Prescribing information: codeine sulfate tablets", FDA),
    ("antibiotic-minerals", "caution", [(B, A), (B, FE)], "minerals bind the antibiotic in the gut: hours apart",
     "Prescribing information: ciprofloxacin tablets; doxycycline hyclate tablets", FDA),
    ("thyroid-binding", "caution", [(T, A), (T, FE), (T, R)], "less of the thyroid hormone is taken up: hours apart",
     "Prescribing information: levothyroxine sodium tablets", FDA),
    ("iron-antacid", "caution", [(FE, A)], "an antacid lowers the uptake of iron: hours apart",
     "Medicines A to Z: Ferrous sulfate", NHS),
    ("antibiotic-warfarin", "caution", [(B, W)], "the antibiotic can strengthen warfarin: closer checks",
     "Prescribing information: warfarin sodium tablets", FDA),
    ("paracetamol-warfarin", "caution", [(P, W)], "paracetamol taken regularly can strengthen warfarin",
     "Medicines A to Z: Paracetamol for adults", NHS),
    ("paracetamol-nsaid", "safe", [(P, N)], "they work in different ways and may be taken together at the usual doses",
     "Medicines A to Z: Ibuprofen for adults", NHS),
    ("painkiller-antihistamine", "safe", [(P, H), (N, H), (P, S)], "they do not disturb each other at the usual doses",
     "Medicines A to Z: Cetirizine; Chlorphenamine", NHS),
    ("painkiller-opioid", "safe", [(P, OP), (N, OP)], "everyday painkillers may be added to codeine at the usual doses",
     "Medicines A to Z: Codeine", NHS),
    ("paracetamol-ssri", "safe", [(P, SS)], "paracetamol is the painkiller of choice beside an SSRI",
     "Medicines A to Z: Sertraline", NHS),
    ("painkiller-ppi", "safe", [(P, R), (N, R)], "the stomach protector does not disturb these painkillers",
     "Medicines A to Z: Omeprazole", NHS),
    ("paracetamol-antibiotic", "safe", [(P, B)], "paracetamol does not disturb these antibiotics",
     "Medicines A to Z: Doxycycline; Ciprofloxacin", NHS),
    ("cold-combinations", "safe", [(P, D), (P, X), (S, D), (S, X), (D, X)], "approved cold medicines hold both",
     "21 CFR 341.40, Permitted combinations of active ingredients", FDA),
    ("decongestant-combinations", "safe", [(H, D), (N, D)], "approved tablets hold both at the usual doses",
     "Approved labels: cetirizine with pseudoephedrine; ibuprofen with pseudoephedrine", FDA),
]  # fmt: skip

SHELVES = {  # kind of medicine: product and its composition, all fictional
    "a cold medicine": {
        "Bramwick": ["paracetamol", "phenylephrine"],
        "Corvane": ["ibuprofen", "pseudoephedrine"],
        "Delphory": ["paracetamol", "pseudoephedrine", "dextromethorphan"],
        "Fennimar": ["paracetamol", "chlorphenamine"],
        "Galdry": ["phenylephrine", "chlorphenamine"],
    },
    "a painkiller": {
        "Hollowin": ["paracetamol", "codeine"],
        "Istrane": ["naproxen"],
        "Jorvelle": ["ibuprofen", "codeine"],
        "Kestwyn": ["paracetamol", "aspirin"],
        "Lumbrey": ["diclofenac"],
    },
    "a hay fever tablet": {
        "Marlowen": ["cetirizine", "pseudoephedrine"],
        "Nettaby": ["loratadine"],
        "Orbalan": ["chlorphenamine"],
    },
    "a sleeping aid": {"Pellwick": ["diphenhydramine"], "Quenbury": ["paracetamol", "diphenhydramine"]},
    "a cough medicine": {
        "Rostrel": ["dextromethorphan"],
        "Sundowy": ["codeine"],
        "Tivermore": ["dextromethorphan", "diphenhydramine"],
    },
    "an antidepressant": {"Umberlin": ["sertraline"], "Vexhollow": ["phenelzine"], "Wexcombe": ["fluoxetine"]},
    "an indigestion remedy": {"Yarrell": ["calcium carbonate"], "Zelgrove": ["omeprazole"]},
    "an antibiotic": {"Ashquill": ["doxycycline"], "Ormsby": ["ciprofloxacin"]},
}

PHRASINGS = {  # by the split that first sees them; `lower:` writes the whole question in lower case
    "train": [
        "Can {x} be taken together with {y}?",
        "Can I take {x} with {y}?",
        "Is it safe to take {x} and {y} at the same time?",
        "I am already taking {x}. May I add {y}?",
        "Does {x} go together with {y}?",
        "My mother takes {x} every day. Can she have {y} as well?",
        "Are {x} and {y} all right together?",
        "Would {x} and {y} be a problem on the same day?",
        "I took {x} this morning. Can I take {y} now?",
        "Is there any risk in combining {x} with {y}?",
        "What happens if somebody takes {x} along with {y}?",
        "Please check {x} with {y} for me.",
        "My doctor gave me {x} and I have {y} at home. Can I use both?",
        "Should {x} and {y} be kept apart?",
        "A customer who uses {x} asks for {y}. What do you say?",
        "lower:can you mix {x} and {y}?",
        "lower:is {x} ok with {y}?",
        "lower:i'm on {x}, can i have {y} too?",
        "My husband wants to take {x} on top of {y}. Is that fine?",
        "{x} and {y}: yes or no?",
        "Do {x} and {y} interact?",
        "Before I buy {x}: I already use {y}. Any trouble?",
    ],
    "valid": [
        "Could {x} be combined with {y}?",
        "lower:anything wrong with taking {x} alongside {y}?",
        "My father has been given {x}. Is {y} still allowed?",
    ],
    "test": [
        "Is {x} compatible with {y}?",
        "Having swallowed {x} an hour ago, am I free to use {y}?",
        "lower:thinking of using {x} while on {y}, good idea?",
        "My neighbour uses {x} and has just bought {y}. Should she worry?",
        "Tell me whether {x} can be used next to {y}.",
        "How do {x} and {y} get along?",
        "I need both {x} and {y} today. Will that do any harm?",
    ],
}
TOUR = ("ibuprofen", "a cold medicine")  # asked before and after fine-tuning; in no other split than test
N_ROWS = {"train": 2800, "valid": 300, "test": 500}
SHARES = {"safe": 0.20, "caution": 0.18, "avoid": 0.27, "ask": 0.20, "depends": 0.15}
HELD_OUT = {"valid": 0.10, "test": 0.16}  # share of each label's pairs that only this split may ask about


def make_world() -> dict:
    "The world as it is stored: ingredients, rules, products, kinds."
    rules = [
        {"id": name, "verdict": verdict, "class_pairs": [list(pair) for pair in pairs], "reason": reason,
         "source": {"title": title, "organisation": organisation}}
        for name, verdict, pairs, reason, title, organisation in RULES
    ]  # fmt: skip
    products = [
        {"name": name, "kind": kind, "ingredients": made_of}
        for kind, shelf in SHELVES.items()
        for name, made_of in shelf.items()
    ]
    return {
        "notice": NOTICE,
        "labels": LABELS,
        "strictness": STRICTNESS,
        "same_ingredient": {"verdict": "avoid", "reason": "both contain {ingredient}, so it would be taken twice"},
        "no_rule": {"verdict": "ask", "reason": "no rule speaks of this pair, so ask a pharmacist"},
        "kind": {"verdict": "depends", "reason": "products of this kind differ, so it depends on what is in it"},
        "ingredients": [{"name": name, "class": kind} for kind, names in CLASSES.items() for name in names],
        "rules": rules,
        "products": products,
        "phrasings": PHRASINGS,
        "tour": write_question(PHRASINGS["train"][0], *TOUR),
    }


class Judge:
    "The world's verdict on any two items: ingredients, products or kinds."

    def __init__(self, world: dict) -> None:
        self.world = world
        self.class_of = {row["name"]: row["class"] for row in world["ingredients"]}
        self.made_of = {name: [name] for name in self.class_of}
        self.made_of |= {row["name"]: row["ingredients"] for row in world["products"]}
        self.shelf: dict[str, list[str]] = defaultdict(list)
        for row in world["products"]:
            self.shelf[row["kind"]].append(row["name"])
        self.rule = {frozenset(pair): rule for rule in world["rules"] for pair in rule["class_pairs"]}

    def of_ingredients(self, one: str, other: str) -> tuple[str, str]:
        "Verdict and reason of two ingredients; silence is `ask`, never `safe`."
        if one == other:
            same = self.world["same_ingredient"]
            return same["verdict"], same["reason"].format(ingredient=one)
        found = self.rule.get(frozenset((self.class_of[one], self.class_of[other])), self.world["no_rule"])
        return found["verdict"], found["reason"]

    def of_products(self, one: str, other: str) -> tuple[str, str]:
        "The strictest verdict over all pairs of ingredients, with its reason."
        found = [self.of_ingredients(a, b) for a in self.made_of[one] for b in self.made_of[other]]
        return max(found, key=lambda verdict: STRICTNESS.index(verdict[0]))

    def __call__(self, one: str, other: str) -> tuple[str, str]:
        "As `of_products`; for a kind, `depends` unless all its products agree."
        ones, others = (self.shelf.get(item, [item]) for item in (one, other))
        found = [self.of_products(a, b) for a in ones for b in others]
        if len({verdict for verdict, _ in found}) > 1:
            return self.world["kind"]["verdict"], self.world["kind"]["reason"]
        return found[0]


def split_pairs(judge: Judge, rng: np.random.Generator) -> dict[str, dict[str, list[tuple[str, str]]]]:
    "Every pair of two different items in one split only; within a split, by label."
    by_label: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in itertools.combinations([*judge.made_of, *judge.shelf], 2):
        by_label[judge(*pair)[0]].append(pair)
    splits: dict[str, dict[str, list[tuple[str, str]]]] = {split: {} for split in N_ROWS}
    for label in LABELS:
        pairs = [by_label[label][i] for i in rng.permutation(len(by_label[label]))]
        pairs.sort(key=lambda pair: set(pair) != set(TOUR))
        n_test, n_valid = (round(HELD_OUT[split] * len(pairs)) for split in ("test", "valid"))
        splits["test"][label] = pairs[:n_test]
        splits["valid"][label] = pairs[n_test : n_test + n_valid]
        splits["train"][label] = pairs[n_test + n_valid :]
    return splits


def write_question(phrasing: str, x: str, y: str) -> str:
    "The question in this phrasing, with a capital at its start unless it is one in lower case."
    if phrasing.startswith("lower:"):
        return phrasing.removeprefix("lower:").format(x=x, y=y).lower()
    text = phrasing.format(x=x, y=y)
    return text[0].upper() + text[1:]


def make_row(judge: Judge, pair: tuple[str, str], phrasing: str, split_reason: str) -> dict:
    "One labelled question with its metadata."
    label, reason = judge(*pair)
    products = [item for item in pair if item[0].isupper()]
    kind = "kind" if any(item in judge.shelf for item in pair) else "product" if products else "ingredient"
    text = write_question(phrasing, *pair)
    return {"text": text, "label": label, "kind": kind, "first": pair[0], "second": pair[1], "products": products,
            "phrasing": phrasing, "split_reason": split_reason, "reason": reason}  # fmt: skip


def ask_about(
    judge: Judge,
    pairs: dict[str, list[tuple[str, str]]],
    phrasings: list[str],
    n_rows: int,
    split_reason: str,
    taken: set[str],
    rng: np.random.Generator,
) -> list[dict]:
    "`n_rows` questions not yet in `taken`: labels by `SHARES`, pairs in turn, phrasing and order by chance."
    rows: list[dict] = []
    share = 0.0
    for label in LABELS:
        share += SHARES[label]
        turn = itertools.cycle(pairs[label])
        while len(rows) < round(share * n_rows):
            pair = next(turn)
            pair = pair if rng.random() < 0.5 else pair[::-1]
            row = make_row(judge, pair, phrasings[rng.integers(len(phrasings))], split_reason)
            if row["text"].lower() not in taken:
                taken.add(row["text"].lower())
                rows.append(row)
    return rows


def make_splits(judge: Judge, seed: int) -> dict[str, list[dict]]:
    "Train, valid and test; the last two ask half of old pairs in new phrasings, half of new pairs in old phrasings."
    rng = np.random.default_rng(seed)
    pairs = split_pairs(judge, rng)
    tour = make_row(judge, TOUR, PHRASINGS["train"][0], "pair")
    taken = {tour["text"].lower()}
    splits = {"train": ask_about(judge, pairs["train"], PHRASINGS["train"], N_ROWS["train"], "train", taken, rng)}
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in splits["train"]:
        seen[row["label"]].append((row["first"], row["second"]))
    for label in LABELS:
        seen[label] = [seen[label][i] for i in rng.permutation(len(seen[label]))]
    for split in ("valid", "test"):
        n_half = N_ROWS[split] // 2
        splits[split] = ask_about(judge, seen, PHRASINGS[split], n_half, "phrasing", taken, rng)
        splits[split] += ask_about(judge, pairs[split], PHRASINGS["train"], n_half, "pair", taken, rng)
    splits["test"][-1] = tour  # in place of another `depends`
    return {split: [rows[i] for i in rng.permutation(len(rows))] for split, rows in splits.items()}


def data_card(world: dict, splits: dict[str, list[dict]]) -> str:
    "The README of the folder, with the counts of what was made."
    lines = ["| split | rows | " + " | ".join(LABELS) + " |", "| --- " * (len(LABELS) + 2) + "|"]
    for split, rows in splits.items():
        counts = Counter(row["label"] for row in rows)
        lines.append(f"| {split} | {len(rows)} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
    return CARD.format(
        notice=NOTICE,
        table="\n".join(lines),
        n_classes=len(CLASSES),
        **{f"n_{part}": len(world[part]) for part in ("ingredients", "rules", "products")},
        **{f"n_{split}": len(PHRASINGS[split]) for split in PHRASINGS},
    )


CARD = """# The house pharmacy (first, small set)

**{notice}**

Questions of the form "can X be taken together with Y?", each with a verdict. X and Y are an active ingredient, a
product of a fictional pharmacy, or only a kind of medicine ("a cold medicine").

{table}

## The world
`world.json` holds {n_ingredients} real active ingredients in {n_classes} classes, {n_rules} rules between classes
and {n_products} fictional products, each with a declared composition. Every rule has a plain reason and the title
and organisation of a public source; reasons are our own words, not quotations. No product is a real brand, as far as
we know, and no name hints at what is in it.

- `safe`: a rule says so for every pair of ingredients. Usual adult doses, no other illness, no pregnancy.
- `caution`: allowed under conditions (checks, hours apart, short use).
- `avoid`: a rule forbids it, or both contain the same ingredient, which would be taken twice.
- `ask`: no rule speaks, so ask a pharmacist. Absence of a rule is never `safe`.
- `depends`: only a kind was named, and its products would get different verdicts.

The strictest verdict over all pairs of ingredients wins: avoid, then caution, then ask, then safe.

## Columns
`text`, `label`; `kind` (of the items asked about: ingredient, product, kind), `first` and `second` (the items in the
order of the text), `products` (those named), `phrasing` (the template), `split_reason`, `reason` (one sentence).

## Splits
{n_train} phrasings are for training, {n_valid} only for validation, {n_test} only for test. Half of validation and
test asks about pairs of train in phrasings held out (`split_reason` is `phrasing`), half about pairs held out, in
either order, in phrasings of train (`pair`). No text occurs twice.

## What it is not for
The rules are few, written for a course, and know nothing of doses, ages, illnesses or pregnancy. A model trained on
these rows must not advise anybody.

## Origin and licence
Made by `tools/make_pharmacy.py` from a fixed seed, without any person's data. Apache-2.0, like the package.
"""


def main() -> None:
    "World, splits and data card, written to the folder of assets."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "llmft_nb" / "assets" / "data" / "pharmacy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = make_world()
    splits = make_splits(Judge(world), args.seed)
    texts = {"world.json": json.dumps(world, indent=1) + "\n", "README.md": data_card(world, splits)}
    for split, rows in splits.items():
        texts[f"{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.out / name).write_bytes(text.encode("utf-8"))
        print(f"{name}: {len(text.encode('utf-8'))} bytes")


if __name__ == "__main__":
    main()
