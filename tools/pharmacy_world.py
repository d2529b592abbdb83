"""The house pharmacy's world: what its products contain, and what its rules say of any two things in it.

The pieces lie in `tools/world`: real ingredients in classes, rules between classes, each with a public source, and
fictional products with a declared composition. Every verdict follows from them alone. Whatever has to be drawn is
drawn by `number_of`, so that it is the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "llmft_nb" / "assets" / "data"
NOTICE = "Fictional products, for teaching, not reviewed by a pharmacist, not medical advice."
STRICTNESS = ["safe", "unknown", "caution", "avoid"]  # The strictest verdict over all ingredient pairs wins
LABELS = ["safe", "caution", "avoid", "unknown", "depends"]
N_STATED_PRODUCTS = 10  # Other products that a product's leaflets speak of, at most
Item = TypeVar("Item")


@functools.cache
def read_world(name: str) -> Any:
    "One of the files in `tools/world`."
    return json.loads((ROOT / "tools" / "world" / f"{name}.json").read_text(encoding="utf-8"))


def number_of(*parts: object) -> int:
    "A number that depends on the parts alone."
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def shuffled(items: Iterable[Item], *parts: object) -> list[Item]:
    "The items in an order that depends on the parts alone."
    return sorted(items, key=lambda item: number_of(*parts, item))


def capitalised(text: str) -> str:
    "The text with a capital at its start, the rest as it is."
    return text[0].upper() + text[1:]


def as_list(names: list[str], comma: str = ", ", last: str = " and ") -> str:
    "Several names as a person lists them."
    return last.join(filter(None, [comma.join(names[:-1]), names[-1]]))


def write_files(folder: Path, texts: dict[str, str]) -> None:
    "Write each text under its name, the same bytes on every system."
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
        print(f"{folder.name}/{name}: {len(text.encode('utf-8')):,} bytes")


def as_lines(rows: Iterable[dict]) -> str:
    "Rows as JSONL, without blanks between the fields."
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


@dataclass(frozen=True)
class Part:
    "An ingredient, and the item it is looked at in: a product, or the ingredient itself."

    item: str
    ingredient: str


@dataclass(frozen=True)
class Finding:
    "A verdict and what it rests on."

    verdict: str
    rule: str  # Its id, or "same_ingredient", "no_rule", "kind"
    reason: str  # A clause without a full stop
    parts: tuple[Part, ...] = ()  # The two parts it rests on; none where products of a kind differ


class Judge:
    "The world's verdict on any two items: ingredients, products or kinds."

    def __init__(self, world: dict) -> None:
        self.world = world
        self.class_of = {row["name"]: row["class"] for row in world["ingredients"]}
        self.products = {row["name"]: row["ingredients"] for row in world["products"]}
        self.made_of = {name: [name] for name in self.class_of} | self.products
        self.leaflet_only = [row["name"] for row in world["products"] if row.get("leaflet_only")]
        self.kind_of = {row["name"]: row["kind"] for row in world["products"]}
        self.shelf: dict[str, list[str]] = defaultdict(list)
        for name, kind in self.kind_of.items():
            self.shelf[kind].append(name)
        self.rule = {frozenset(pair): rule for rule in world["rules"] for pair in rule["class_pairs"]}

    def of_parts(self, one: Part, other: Part) -> Finding:
        "What holds for two ingredients; silence is `unknown`, never `safe`."
        if one.ingredient == other.ingredient:
            same = self.world["same_ingredient"]
            reason = same["reason"].format(ingredient=one.ingredient)
            return Finding(same["verdict"], "same_ingredient", reason, (one, other))
        classes = frozenset((self.class_of[one.ingredient], self.class_of[other.ingredient]))
        rule = self.rule.get(classes, self.world["no_rule"])
        return Finding(rule["verdict"], rule.get("id", "no_rule"), rule["reason"], (one, other))

    def of_products(self, one: str, other: str) -> Finding:
        "The strictest finding over all pairs of ingredients; the same in both orders."
        ones, others = ([Part(item, name) for name in self.made_of[item]] for item in (one, other))
        found = [self.of_parts(a, b) for a in ones for b in others]
        return max(found, key=lambda f: (STRICTNESS.index(f.verdict), sorted(part.ingredient for part in f.parts)))

    def __call__(self, one: str, other: str) -> Finding:
        "As `of_products`; for a kind, `depends` unless all its products agree, and then one of them as an example."
        ones, others = (self.shelf.get(item, [item]) for item in (one, other))
        found = [self.of_products(a, b) for a in ones for b in others]
        if len({finding.verdict for finding in found}) > 1:
            return Finding(self.world["kind"]["verdict"], "kind", self.world["kind"]["reason"])
        hidden = set(self.leaflet_only) - {one, other}  # Such a product is no example
        return next(finding for finding in found if not hidden & {part.item for part in finding.parts})

    def stated_with(self, product: str, seed: int) -> list[str]:
        "What this product's leaflets speak of: half of the ingredients that a rule covers, and some products."

        def is_covered(item: str) -> bool:
            finding = self(product, item)
            named = [name for name in self.class_of if name in finding.reason]
            return finding.rule not in {"same_ingredient", "no_rule"} and (item in self.class_of or not named)

        own = {product, *self.made_of[product], *self.leaflet_only}
        ingredients = [item for item in self.class_of if item not in own and is_covered(item)]
        products = [item for item in self.products if item not in own and is_covered(item)]
        stated = shuffled(ingredients, seed, "stated", product)[: (len(ingredients) + 1) // 2]
        return stated + shuffled(products, seed, "stated", product)[:N_STATED_PRODUCTS]


def read_judge() -> Judge:
    "The world of the files, ready to be asked."
    return Judge({
        "notice": NOTICE,
        "labels": LABELS,
        "strictness": STRICTNESS,
        "same_ingredient": {"verdict": "avoid", "reason": "both contain {ingredient}, so it would be taken twice"},
        "no_rule": {"verdict": "unknown", "reason": "no rule speaks of this pair, so ask a pharmacist"},
        "kind": {"verdict": "depends", "reason": "products of this kind differ, so it depends on what is in it"},
        **{name: read_world(name) for name in ("ingredients", "rules", "products")},
    })  # fmt: skip
