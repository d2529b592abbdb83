"""What probabilities are worth, and which rows are answered worse: held against the definition, and against chance."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_rows

from llmft_nb.calibration import calibrate, calibration_svg, usual_kinds, worst_slices
from llmft_nb.core import write_record
from llmft_nb.finetune import finetune
from llmft_nb.report import mistake_values, write_report


def by_hand(said: np.ndarray, right: np.ndarray, n_bins: int) -> float:
    "The definition, bin by bin."
    order, total = np.argsort(said, kind="stable"), 0.0
    for part in np.array_split(order, n_bins):
        total += len(part) / len(said) * abs(said[part].mean() - right[part].mean())
    return total


@pytest.mark.parametrize("n", [100, 137, 1000])
def test_the_error_is_that_of_the_definition(n: int) -> None:
    chance = np.random.default_rng(n)
    said = chance.uniform(0.2, 1, n)
    right = chance.random(n) < said**2
    found = calibrate(said, right)
    if n % 10 == 0:
        assert found.error == pytest.approx(by_hand(said, right.astype(float), 10))
    assert sum(one.right.n for one in found.bins) == n and found.n == n
    assert [one.said for one in found.bins] == sorted(one.said for one in found.bins)


def test_true_probabilities_are_blamed_once_in_twenty() -> None:
    chance, n_blamed = np.random.default_rng(0), 0
    for _ in range(200):
        said = chance.uniform(0.5, 1, 300)
        found = calibrate(said, chance.random(300) < said, n_draws=300)
        n_blamed += found.error > found.by_chance
    assert 2 <= n_blamed <= 22


def test_few_rows_have_few_bins() -> None:
    assert len(calibrate([0.5] * 12, [True] * 12).bins) == 1
    assert len(calibrate([0.5] * 45, [True] * 45).bins) == 4
    assert len(calibrate([1.0] * 400, [True] * 400).bins) == 10
    assert calibrate([1.0] * 400, [True] * 400).error == 0


def test_too_sure_and_not_sure_enough_are_told_apart() -> None:
    chance = np.random.default_rng(0)
    right = chance.random(500) < 0.7
    assert "it is too sure" in calibrate([0.95] * 500, right).describe()
    assert "it is not sure enough" in calibrate([0.4] * 500, right).describe()


def test_slices_are_blamed_by_chance_once_in_twenty() -> None:
    rows = [{"text": f"{'word ' * (1 + i % 9)}{i if i % 3 else ''}", "label": "abcd"[i % 4]} for i in range(400)]
    kinds, chance, n_blamed = usual_kinds(rows), np.random.default_rng(0), 0
    for _ in range(100):
        n_blamed += any(one.is_worse for one in worst_slices(chance.random(400) < 0.8, kinds))
    assert n_blamed <= 10
    right = np.array([row["label"] != "c" or chance.random() < 0.5 for row in rows])
    worst = worst_slices(right, kinds)
    assert [one.name for one in worst if one.is_worse] == ["label c"] and worst[0].others == 1.0
    better = worst_slices(~np.array([row["label"] == "c" for row in rows]) | (chance.random(400) < 2), kinds)
    assert not any(one.is_worse for one in better)


class Ids(HTMLParser):
    "Elements of a page."

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_a_report_has_both(small_model: Path, tmp_path: Path) -> None:
    rows = small_rows(260)
    options: dict[str, Any] = {"valid": rows[60:90], "test": rows[90:], "model": small_model, "callbacks": ()}
    run = finetune(rows[:60], out=tmp_path / "run", epochs=1, **options)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "How sure it is" in page and "calibration error, 170 rows" in page
    assert "Kinds of rows" in page and "label " in page and "corrected for the number of kinds" in page
    write_record(run.folder, run.record)
    write_report(run.folder)
    assert (run.folder / "report.html").read_text(encoding="utf-8") == page, "the same bytes again"


def test_names_of_strangers_are_shown_as_they_are(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    lines = [
        {"text": "a b c", "label": evil, "predicted": evil if i % 2 else "b", "probability": 0.7} for i in range(30)
    ]
    lines += [{"text": "d e", "label": "b", "predicted": "b", "probability": 0.9} for _ in range(30)]
    values = mistake_values(lines)
    assert any(evil in one.name for one in values["slices"])
    assert Ids(str(values["calibration"]["picture"])).scripts == 0


def test_rows_without_probabilities_have_no_picture() -> None:
    lines = [{"text": "a", "label": "x", "predicted": "x"} for _ in range(30)]
    values = mistake_values(lines)
    assert values["calibration"] is None and mistake_values([])["slices"] == []
    assert mistake_values(lines, "tag")["calibration"] is None


def test_pictures_are_the_same_each_time() -> None:
    found = calibrate([0.5, 0.9] * 50, [True, True] * 50)
    assert calibration_svg(found) == calibration_svg(found)
