"""The house pharmacy: made again byte for byte, every label derived a second way, nothing held out leaks."""

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest

from llmft_nb.cleaning import find_copies
from llmft_nb.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "llmft_nb" / "assets" / "data"
FOLDER, LEAFLETS = ASSETS / "pharmacy", ASSETS / "pharmacy-leaflets"
QUESTION_SETS = ["pharmacy", "pharmacy-unread", "pharmacy-chinese"]


def stored(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def path_of(split: str, assets: Path = ASSETS) -> Path:
    "The file of a split: `train` of the data set `pharmacy`, `unread/test` of the data set `pharmacy-unread`."
    more, _, word = split.rpartition("/")
    return assets / (f"pharmacy-{more}" if more else "pharmacy") / f"{word}.jsonl"


def written(name: str) -> dict:
    return json.loads((ROOT / "tools" / "world" / f"{name}.json").read_text(encoding="utf-8"))


WORLD = json.loads((FOLDER / "world.json").read_text(encoding="utf-8"))
SIZES = {"train": 3000, "valid": 300, "test": 500, "unread/valid": 60, "unread/test": 250, "chinese/test": 100}
SPLITS = {split: stored(path_of(split)) for split in SIZES}
ENGLISH = [split for split in SIZES if split != "chinese/test"]
UNREAD = ["unread/valid", "unread/test"]
TOLD = {split: stored(LEAFLETS / f"{split}.jsonl") for split in ("train", "valid", "test")}
NOTICE = "Fictional products, for teaching, not reviewed by a pharmacist, not medical advice."
CLASS_OF = {row["name"]: row["class"] for row in WORLD["ingredients"]}
PRODUCTS = {row["name"]: row["ingredients"] for row in WORLD["products"]}
KINDS = {row["kind"] for row in WORLD["products"]}
LEAFLET_ONLY = {row["name"] for row in WORLD["products"] if row.get("leaflet_only")}
OPENINGS = {"safe": "Yes, ", "caution": "Take care: ", "avoid": "No, ", "unknown": "Ask a pharmacist: "}
OPENINGS["depends"] = "It depends: "
IN_CHINESE = {"safe": "可以，", "caution": "要小心：", "avoid": "不可以，", "unknown": "请咨询药剂师："}
IN_CHINESE["depends"] = "要看情况："


def contents(item: str) -> list[list[str]]:
    "What an item may be made of: one list, or one for each product of a kind."
    if item in PRODUCTS:
        return [PRODUCTS[item]]
    return [row["ingredients"] for row in WORLD["products"] if row["kind"] == item] or [[item]]


def verdict_of(one: str, other: str) -> str:
    "The label of two items, written without the generator: sets of verdicts instead of a strictest-wins order."
    answers = set()
    for ones, others in product(contents(one), contents(other)):
        verdicts = set()
        for a, b in product(ones, others):
            pair = sorted([CLASS_OF[a], CLASS_OF[b]])
            spoken = [rule["verdict"] for rule in WORLD["rules"] for two in rule["class_pairs"] if sorted(two) == pair]
            verdicts.add("avoid" if a == b else spoken[0] if spoken else "unknown")
        answers.add(next(verdict for verdict in ("avoid", "caution", "unknown", "safe") if verdict in verdicts))
    return answers.pop() if len(answers) == 1 else "depends"


def pairs_of(rows: list[dict]) -> set[frozenset]:
    return {frozenset((row["first"], row["second"])) for row in rows}


def named_in(text: str, names: list[str] | dict | set) -> set[str]:
    "The names that occur in a text as whole words."
    return {name for name in names if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)}


def made(script: str, out: Path, *more: str, hash_seed: str = "1") -> None:
    command = [sys.executable, str(ROOT / "tools" / f"make_{script}.py"), "--out", str(out), *more]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": hash_seed, "PATH": ""})


def files_in(assets: Path, sets: list[str]) -> dict[str, bytes]:
    "The files of some data sets by name, and what is in them."
    return {f"{name}/{path.name}": path.read_bytes() for name in sets for path in (assets / name).iterdir()}


# --- how it is made ---


@pytest.mark.parametrize(
    ("script", "out", "sets"),
    [("pharmacy", ".", QUESTION_SETS), ("leaflets", "pharmacy-leaflets", ["pharmacy-leaflets"])],
)
def test_made_again_byte_for_byte(script: str, out: str, sets: list[str], tmp_path: Path) -> None:
    wanted = files_in(ASSETS, sets)
    for hash_seed in ("1", "2"):
        assets = tmp_path / hash_seed
        made(script, assets / out, hash_seed=hash_seed)
        assert sorted(path.name for path in assets.iterdir()) == sorted(sets)
        files = files_in(assets, sets)
        assert files.keys() == wanted.keys()
        assert [name for name, content in files.items() if content != wanted[name]] == []


def test_more_rows_to_train_on_change_nothing_else(tmp_path: Path) -> None:
    made("pharmacy", tmp_path, "--train", "3300")
    more = {row["text"] for row in stored(path_of("train", tmp_path))}
    assert len(more) == 3300 and {row["text"] for row in SPLITS["train"]} <= more
    for split in SIZES.keys() - {"train"}:
        assert path_of(split, tmp_path).read_bytes() == path_of(split).read_bytes(), split


# --- the world ---


def test_rules_speak_once_of_a_pair_and_name_their_source() -> None:
    spoken = [frozenset(pair) for rule in WORLD["rules"] for pair in rule["class_pairs"]]
    assert len(spoken) == len(set(spoken))
    assert {name for pair in spoken for name in pair} == set(CLASS_OF.values())
    for rule in WORLD["rules"]:
        assert rule["verdict"] in {"safe", "caution", "avoid"} and rule["reason"]
        assert all(rule["source"][field] for field in ("title", "organisation", "address", "statement")), rule["id"]


def test_products_are_composed_of_known_ingredients_which_do_not_clash() -> None:
    assert {name for ingredients in PRODUCTS.values() for name in ingredients} == set(CLASS_OF)
    for name, ingredients in PRODUCTS.items():
        assert all(verdict_of(a, b) != "avoid" for a, b in combinations(ingredients, 2)), name


def test_product_names_give_no_hint() -> None:
    words = {word.lower() for text in [*CLASS_OF, *CLASS_OF.values()] for word in re.findall(r"\w{4,}", text)}
    fragments = {word[i : i + 4] for word in words for i in range(len(word) - 3)}
    for name in PRODUCTS:
        assert not [fragment for fragment in fragments if fragment in name.lower()], name
        assert not [word[:3] for word in words if name.lower().startswith(word[:3])], name


def test_the_order_of_two_items_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from pharmacy_world import read_judge

    judge = read_judge()
    for one, other in combinations([*CLASS_OF, *PRODUCTS, *sorted(KINDS)], 2):
        there, back = judge(one, other), judge(other, one)
        assert (there.verdict, there.reason) == (back.verdict, back.reason), (one, other)


def test_a_product_is_as_strict_as_the_strictest_of_its_ingredients() -> None:
    order = ["safe", "unknown", "caution", "avoid"]
    rows = [row for split in ENGLISH for row in SPLITS[split] if row["kind"] == "product"]
    assert any(len(PRODUCTS[name]) == 3 for row in rows for name in row["products"])
    for row in rows:
        apart = [verdict_of(a, b) for a, b in product(*(contents(row[side])[0] for side in ("first", "second")))]
        assert order.index(row["label"]) == max(map(order.index, apart)), row


def test_the_notice_is_there() -> None:
    assert WORLD["notice"] == NOTICE
    for name in (*QUESTION_SETS, "pharmacy-leaflets"):
        assert NOTICE in (ASSETS / name / "README.md").read_text(encoding="utf-8"), name


# --- the rows ---


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_follows_from_the_world(split: str) -> None:
    wrong = [row["text"] for row in SPLITS[split] if row["label"] != verdict_of(row["first"], row["second"])]
    assert wrong == []


@pytest.mark.parametrize("split", ENGLISH)
def test_text_and_metadata_agree(split: str) -> None:
    for row in SPLITS[split]:
        hand, _, number = row["phrasing"].partition("-")
        slots = {"x": row["first"].lower(), "y": row["second"].lower()}
        asked = WORLD["phrasings"][hand][int(number)].removeprefix("lower:").format(**slots).lower()
        for article in ("a ", "an "):
            for word in (" my ", "my own ", " the "):
                asked = asked.replace(word + article, word)
        assert row["text"].lower() == asked
        assert row["products"] == [item for item in (row["first"], row["second"]) if item in PRODUCTS]
        assert row["first"] != row["second"]


@pytest.mark.parametrize("split", SPLITS)
def test_spans_say_what_they_cover(split: str) -> None:
    names = written("chinese")["names"] if split == "chinese/test" else {}
    for row in SPLITS[split]:
        wanted = {}
        for item in (row["first"], row["second"]):
            label = "product" if item in PRODUCTS else "kind" if item in KINDS else "ingredient"
            wanted[names.get(item, re.sub("^an? ", "", item)).lower()] = label
        found = {row["text"][span["start"] : span["stop"]].lower(): span["label"] for span in row["spans"]}
        assert found == wanted and len(row["spans"]) == 2, row


@pytest.mark.parametrize("split", ENGLISH)
def test_contents_tell_what_is_in_the_products_named(split: str) -> None:
    for row in SPLITS[split]:
        told = re.findall(r"([A-Z]\w+) contains ([a-z, ]+?)(?=, and [A-Z]|\.$)", row["contents"])
        assert {name: re.split(", | and ", text) for name, text in told} == {n: PRODUCTS[n] for n in row["products"]}
        assert bool(row["contents"]) == bool(row["products"])


@pytest.mark.parametrize("split", ENGLISH)
def test_an_answer_is_a_verdict_and_a_reason_of_its_own(split: str) -> None:
    for row in SPLITS[split]:
        verdict, reason = re.split(r"(?<=\.) ", row["answer"])
        assert [label for label, opening in OPENINGS.items() if verdict.startswith(opening)] == [row["label"]]
        assert row["first"] in verdict and row["second"] in verdict and reason[0].isupper()
        if row["label"] == "depends":
            assert row["reason"] == WORLD["kind"]["reason"] and named_in(reason, KINDS) <= {row["first"], row["second"]}
            continue
        sides = [{i for made_of in contents(row[side]) for i in made_of} for side in ("first", "second")]
        head = reason.removesuffix(f"{row['reason']}.")
        named = named_in(head, CLASS_OF)
        if row["reason"].startswith("both contain"):
            assert len(named) == 1 and named <= sides[0] & sides[1], row
        else:
            one, other = named
            assert verdict_of(one, other) == row["label"] and row["reason"], row
            assert {one, other} <= sides[0] | sides[1] and named & sides[0] and named & sides[1], row


@pytest.mark.parametrize("split", SPLITS)
def test_a_reason_is_that_of_a_rule_with_the_same_verdict(split: str) -> None:
    reasons = {(rule["verdict"], rule["reason"]) for rule in WORLD["rules"]}
    reasons |= {(WORLD[name]["verdict"], WORLD[name]["reason"]) for name in ("no_rule", "kind")}
    reasons |= {("avoid", WORLD["same_ingredient"]["reason"].format(ingredient=name)) for name in CLASS_OF}
    assert {(row["label"], row["reason"]) for row in SPLITS[split]} <= reasons


def test_sizes_and_balance() -> None:
    assert {split: len(rows) for split, rows in SPLITS.items()} == SIZES
    for split, rows in SPLITS.items():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(WORLD["labels"]) - ({"depends"} if split in UNREAD else set())
        assert max(counts.values()) <= 0.3 * len(rows)
    assert [len(WORLD["phrasings"][hand]) for hand in ("train", "valid", "test")] == [63, 12, 30]
    assert {row["phrasing"] for row in SPLITS["train"]} == {f"train-{i}" for i in range(63)}


# --- what is held out ---


def test_no_text_occurs_twice() -> None:
    texts = [row["text"] for rows in SPLITS.values() for row in rows]
    texts += [row["english"] for row in SPLITS["chinese/test"]]
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    assert [text for text, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("split", ["valid", "test"])
def test_what_is_held_out_is_not_in_training(split: str) -> None:
    by_reason = {why: [row for row in SPLITS[split] if row["split_reason"] == why] for why in ("phrasing", "pair")}
    assert [len(rows) for rows in by_reason.values()] == [SIZES[split] / 2] * 2
    assert not pairs_of(by_reason["pair"]) & pairs_of(SPLITS["train"])
    assert pairs_of(by_reason["phrasing"]) <= pairs_of(SPLITS["train"])
    assert {row["phrasing"].partition("-")[0] for row in by_reason["phrasing"]} == {split}
    assert {row["phrasing"].partition("-")[0] for row in by_reason["pair"]} <= {"train", "tour"}
    texts = [WORLD["phrasings"][hand] for hand in ("train", "valid", "test", "tour")]
    assert sum(map(len, texts)) == len({text for part in texts for text in part})


def test_validation_says_nothing_about_test() -> None:
    pairs = {split: [row for row in SPLITS[split] if row["split_reason"] == "pair"] for split in ("valid", "test")}
    assert not pairs_of(pairs["valid"]) & pairs_of(SPLITS["test"])
    assert not pairs_of(pairs["test"]) & pairs_of(SPLITS["valid"])
    told = {split: {name for row in SPLITS[split] for name in row["products"]} for split in UNREAD}
    assert not told["unread/valid"] & told["unread/test"] & LEAFLET_ONLY


@pytest.mark.parametrize("split", ["valid", "test", *UNREAD])
def test_near_copies_are_those_that_are_meant(split: str) -> None:
    "A pair held out stands in a phrasing of training; no other text of valid and test is near one of training."
    rows = read_rows(path_of(split))
    for match in find_copies(rows, read_rows("pharmacy")):
        row, other = rows[match.index], SPLITS["train"][match.other]
        assert match.kind == "near" and row["split_reason"] in {"pair", "leaflet"}, row["text"]
        assert {row["first"], row["second"]} != {other["first"], other["second"]}


def test_the_questions_of_the_tour_are_kept_for_the_end() -> None:
    assert WORLD["tour"] == "Can ibuprofen be taken together with a cold medicine?"
    for name, label in (("tour", "depends"), ("tour_product", "avoid")):
        (row,) = [row for rows in SPLITS.values() for row in rows if row["text"] == WORLD[name]]
        assert row["label"] == label and row in SPLITS["test"] and row["phrasing"].startswith("tour-")
        others = [other for rows in SPLITS.values() for other in rows if other is not row]
        assert frozenset((row["first"], row["second"])) not in pairs_of(others)
    assert re.fullmatch(rf"Can I take ibuprofen with ({'|'.join(PRODUCTS)})\?", WORLD["tour_product"])
    same_shelf = {row["label"] for row in SPLITS["train"] if "a cold medicine" in (row["first"], row["second"])}
    assert len(same_shelf) > 1, "the words 'a cold medicine' must not give the label away"


# --- leaflets ---


@functools.cache
def slots_of(name: str) -> dict[str, str]:
    "What may stand in the slots of a wording about this product, as patterns."
    (row,) = [row for row in WORLD["products"] if row["name"] == name]
    made_of = row["ingredients"]
    return {
        "product": name,
        "kind": row["kind"],
        "ingredients": " and ".join(filter(None, [", ".join(made_of[:-1]), made_of[-1]])),
        "ingredient": f"({'|'.join(made_of)})",
        "class": f"({'|'.join(CLASS_OF[ingredient] for ingredient in made_of)})",
        "other": f"(?P<other>{'|'.join([*CLASS_OF, *PRODUCTS])})",
        "reason": f"(?P<reason>{'|'.join(rule['reason'] for rule in WORLD['rules'])})",
    }


@functools.cache
def wording_pattern(wording: str, name: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", wording)
    filled = [slots_of(name)[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    return re.compile("(?:^|(?<= ))" + "".join(filled) + "(?= |$)", re.IGNORECASE)


def find_wording(wording: str, row: dict) -> list[re.Match]:
    "The sentences of a leaflet that are written in this wording."
    fixed, lower = re.split(r"\{\w+\}", wording.lower()), row["text"].lower()
    found = all(part in lower for part in fixed)
    return list(wording_pattern(wording, row["product"]).finditer(row["text"])) if found else []


WORDINGS = written("leaflets")


def used_wordings(rows: list[dict], sort: str) -> dict[str, set[str]]:
    "By product the wordings of a sort that its leaflets use."
    used: dict[str, set[str]] = {name: set() for name in PRODUCTS}
    for row in rows:
        used[row["product"]].update(wording for wording in WORDINGS[sort] if find_wording(wording, row))
    return used


def test_leaflet_only_products_are_in_no_question_of_train_valid_and_test() -> None:
    assert len(LEAFLET_ONLY) == 12
    for row in (row for split in ("train", "valid", "test", "chinese/test") for row in SPLITS[split]):
        assert not named_in(f"{row['text']} {row['contents']} {row['answer']}", LEAFLET_ONLY), row
    for row in (row for split in UNREAD for row in SPLITS[split]):
        assert len(set(row["products"]) & LEAFLET_ONLY) == 1 and row["split_reason"] == "leaflet"
        assert row["phrasing"].startswith("train-") and row["kind"] == "product"


def test_stated_is_what_a_leaflet_states() -> None:
    texts: dict[str, str] = dict.fromkeys(PRODUCTS, "")
    for row in (row for rows in TOLD.values() for row in rows):
        texts[row["product"]] += row["text"] + " "
        assert named_in(row["text"], LEAFLET_ONLY) <= {row["product"]}, "no other leaflet tells of it"
    for split in UNREAD:
        for row in SPLITS[split]:
            (name,) = set(row["products"]) & LEAFLET_ONLY
            (other,) = {row["first"], row["second"]} - {name}
            said = other not in PRODUCTS[name] and bool(named_in(texts[name], {other}))
            assert row["stated"] is said, row
        assert 0.4 <= sum(row["stated"] for row in SPLITS[split]) / SIZES[split] <= 0.6


def test_leaflets_state_what_holds() -> None:
    sorts = {"warning_avoid": "avoid", "warning_caution": "caution", "fine_with": "safe"}
    verdict_of_reason = {rule["reason"].lower(): rule["verdict"] for rule in WORLD["rules"]}
    by_lower = {item.lower(): item for item in [*CLASS_OF, *PRODUCTS]}
    for row in (row for rows in TOLD.values() for row in rows):
        said = 0
        for sort, verdict in sorts.items():
            for match in (match for wording in WORDINGS[sort] for match in find_wording(wording, row)):
                assert verdict_of(row["product"], by_lower[match["other"].lower()]) == verdict, row
                assert verdict_of_reason[match["reason"].lower()] == verdict, row
                said += 1
        assert said == 2, row


def test_each_composition_is_told_in_many_wordings() -> None:
    used = used_wordings(TOLD["train"], "composition")
    assert min(map(len, used.values())) >= 10
    for row in (row for rows in TOLD.values() for row in rows):
        assert set(PRODUCTS[row["product"]]) <= named_in(row["text"], CLASS_OF)
        assert any(find_wording(wording, row) for wording in WORDINGS["composition"]), row


def test_leaflets_held_out_are_in_wordings_of_their_own() -> None:
    for sort in WORDINGS:
        used = {split: set().union(*used_wordings(rows, sort).values()) for split, rows in TOLD.items()}
        assert len(used["train"]) >= 10 and used["valid"] and used["test"], sort
        assert not used["train"] & used["valid"] | used["train"] & used["test"] | used["valid"] & used["test"], sort


def test_sizes_of_leaflets() -> None:
    counts = {split: Counter(row["product"] for row in rows) for split, rows in TOLD.items()}
    assert {split: set(count.values()) for split, count in counts.items()} == {"train": {20}, "valid": {1}, "test": {1}}
    assert all(set(count) == set(PRODUCTS) for count in counts.values())
    texts = [row["text"] for rows in TOLD.values() for row in rows]
    assert len(set(texts)) == len(texts) and all(80 <= len(text.split()) <= 150 for text in texts)
    assert not any(re.search(r"[{}]|(^|[.?!] )[a-z]", text) for text in texts)


# --- Chinese ---


def test_chinese_questions_ask_the_same() -> None:
    names, reasons = written("chinese")["names"], written("chinese")["reasons"]
    assert set(names) == {*CLASS_OF, *KINDS} and len(set(names.values())) == len(names)
    assert set(reasons) == {rule["id"] for rule in WORLD["rules"]}
    items = {text: item for item, text in names.items()} | {name: name for name in PRODUCTS}
    longest_first = "|".join(sorted(map(re.escape, items), key=len, reverse=True))
    for row in SPLITS["chinese/test"]:
        one, other = (items[text] for text in re.findall(longest_first, row["text"]))
        assert row["label"] == verdict_of(one, other) and {one, other} == {row["first"], row["second"]}
        kinds = {item: re.sub("^an? ", "", item) for item in (one, other)}
        assert all(item.lower() in row["english"].lower() for item in kinds.values())
        assert frozenset((one, other)) in pairs_of(SPLITS["train"])
    assert len({row["phrasing"] for row in SPLITS["chinese/test"]}) >= 20


def test_chinese_answers_are_a_verdict_and_a_reason() -> None:
    words = written("chinese")
    for row in SPLITS["chinese/test"]:
        verdict, reason, rest = row["answer"].split("。")
        assert not rest and [label for label, o in IN_CHINESE.items() if verdict.startswith(o)] == [row["label"]]
        ids = [rule["id"] for rule in WORLD["rules"] if rule["reason"] == row["reason"]]
        assert not ids or reason.endswith(f"：{words['reasons'][ids[0]]}")
        told = dict(part.split("含有") for part in row["contents"].rstrip("。").split("，") if part)
        assert {name: set(re.split("[、和]", text)) for name, text in told.items()} == {
            name: {words["names"][ingredient] for ingredient in PRODUCTS[name]} for name in row["products"]
        }
