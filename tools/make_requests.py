"""Make the three language sets of the house pharmacy: reviews, intents, kinds.

    python tools/make_requests.py

reads the texts in `tools/world`, each written by itself and labelled twice, and writes three JSONL files and a card to
`llmft_nb/assets/data/pharmacy-<set>`, byte for byte the same at every run. Texts of the first hand are for training
and validation, those of the second hand for the test: what is asked of a model is to read another writer. A text whose
two labels differ is left out. `{product}` becomes one of the house pharmacy's products, drawn for each text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "tools" / "world"
VALID_FRAC = 0.1  # Of the first hand's texts, label by label
NOTICE = "Fictional products, for teaching, not reviewed by a pharmacist, not medical advice."


@dataclass(frozen=True)
class LanguageSet:
    "What is asked of a text."

    name: str  # Of the file in `tools/world`, and behind "pharmacy-" of the folder made
    title: str  # Of its card
    about: str  # What the texts are, and what the labels mean


SETS = (
    LanguageSet(
        "reviews",
        "Reviews",
        """What customers of the house pharmacy say of its medicines, its people and its parcels: `positive` or
`negative`. Of the two kinds, `plain` reviews name a feeling or a judgement, nearly each another word; `indirect` ones
tell what happened, deny, understate or turn round, and single words do not give them away.""",
    ),
    LanguageSet(
        "intents",
        "Intents",
        """What customers of the house pharmacy want when they write or speak to it, one of twelve: `interaction` (may
two things be taken together), `dosage`, `side_effect`, `recommend` (something for a trouble), `stock`, `price`,
`order_status`, `return`, `prescription`, `opening`, `storage`, `complaint` (to be heard rather than paid).""",
    ),
    LanguageSet(
        "kinds",
        "Kinds",
        """Vague descriptions of a product by people who have forgotten its name: by a trouble, a time of the year, the
look of a box, somebody who takes it. The label is the kind of product that is meant, one of twelve; no text names its
own. The test is written in another manner: letters, diaries, small stories.""",
    ),
)

CARD = """# {title}

{about}

{table}

## How it was made
Every text was written for this project by itself, without templates, and is quoted from nowhere. Training and
validation come from one hand, the test from another. Each label was given twice, the second time by a reader who saw
the texts alone: the two agree on {n_agreed:,} of {n_written:,} ({agreement:.1%}), and only those are kept.
`{{product}}` was replaced by the name of a product from `tools/world/products.json`. Made by `tools/make_requests.py`
from a fixed seed, without any person's data. Apache-2.0, like the package.

## What it is not for
The texts are few, in one language, and about one invented shop. {notice}
"""


def read_rows(name: str) -> list[dict]:
    "The written texts of a set."
    return [json.loads(line) for line in (WORLD / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def number_of(*parts: object) -> int:
    "A number that depends on the parts alone."
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def fill(text: str, products: list[str], seed: int) -> str:
    "Put a product where the text leaves room for one; the same for the same text."
    return text.replace("{product}", products[number_of(seed, "product", text) % len(products)])


def make_splits(rows: list[dict], products: list[str], seed: int) -> dict[str, list[dict]]:
    "Rows of the three splits, in an order that tells nothing."
    kept = [row for row in rows if row["relabelled"] == row["label"]]
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": [row for row in kept if row["hand"] == 2]}
    for label in sorted({row["label"] for row in kept}):
        own = [row for row in kept if row["hand"] == 1 and row["label"] == label]
        own.sort(key=lambda row: number_of(seed, "valid", row["text"]))
        n_valid = round(VALID_FRAC * len(own))
        splits["valid"] += own[:n_valid]
        splits["train"] += own[n_valid:]
    return {
        split: [
            {name: value for name, value in row.items() if name not in {"relabelled", "hand"}}
            | {"text": fill(row["text"], products, seed)}
            for row in sorted(part, key=lambda row: number_of(seed, "order", row["text"]))
        ]
        for split, part in splits.items()
    }


def data_card(chosen: LanguageSet, rows: list[dict], splits: dict[str, list[dict]]) -> str:
    "The README of a set's folder."
    labels = sorted({row["label"] for part in splits.values() for row in part})
    lines = ["| split | rows | " + " | ".join(labels) + " |", "| --- " * (len(labels) + 2) + "|"]
    for split, part in splits.items():
        counts = Counter(row["label"] for row in part)
        lines.append(f"| {split} | {len(part):,} | " + " | ".join(str(counts[label]) for label in labels) + " |")
    n_agreed = sum(row["relabelled"] == row["label"] for row in rows)
    return CARD.format(
        title=chosen.title,
        about=chosen.about,
        table="\n".join(lines),
        n_agreed=n_agreed,
        n_written=len(rows),
        agreement=n_agreed / len(rows),
        notice=NOTICE,
    )


def main() -> None:
    "Three folders of assets."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "llmft_nb" / "assets" / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    products = json.loads((WORLD / "products.json").read_text(encoding="utf-8"))
    names = [product["name"] for product in products if not product.get("leaflet_only")]
    for chosen in SETS:
        rows = read_rows(chosen.name)
        splits = make_splits(rows, names, arguments.seed)
        texts = {"README.md": data_card(chosen, rows, splits)}
        for split, part in splits.items():
            texts[f"{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in part)
        folder = arguments.out / f"pharmacy-{chosen.name}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode("utf-8"))
            print(f"{folder.name}/{name}: {len(text.encode('utf-8'))} bytes")


if __name__ == "__main__":
    main()
