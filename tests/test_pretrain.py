"""The script that makes the base models: it goes on where it stopped, and its tasks are what they say."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import base_card  # noqa: E402
import books  # noqa: E402
import muon  # noqa: E402
import pretrain  # noqa: E402
import vectors  # noqa: E402

SIZE = {
    "width": 32,
    "inner": 48,
    "n_layers": 1,
    "n_heads": 2,
    "lr": 1e-2,
    "block_lr": 1e-2,
    "n_rows": 4,
    "length": 16,
    "n_neighbour_steps": 2,
}
SHORT = {"mask_frac": 0.3, "passages": (4, 8)}
SMALL = {
    "tiny": replace(pretrain.PLANS["tiny"], n_kv_heads=1, **SIZE),
    "tiny-encoder": replace(pretrain.PLANS["tiny-encoder"], n_kv_heads=2, **SIZE, **SHORT),
}
STORY = "The king had three sons. The sons had a dog. The dog had a house, and the house had a king. "


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder of books of one sentence each, and models to match."
    (tmp_path / "pretrain").mkdir()
    for split in books.FILES:
        row = json.dumps({"text": STORY * 20, "title": "Kings", "author": "Nobody", "source": "here"})
        (tmp_path / "pretrain" / f"{split}.jsonl").write_text(row + "\n")
    monkeypatch.setattr(books, "FILES", {"train": ("train.jsonl",), "valid": ("valid.jsonl",)})
    monkeypatch.setattr(pretrain, "VOCABULARY", 300)
    monkeypatch.setattr(pretrain, "PLANS", SMALL)
    monkeypatch.setenv("LLMFT_DATA", str(tmp_path))
    return tmp_path / "work"


@pytest.mark.parametrize("name", SMALL)
def test_a_run_cut_in_two_equals_the_whole(work: Path, name: str) -> None:
    whole = pretrain.Run(name, work, seed=0)
    losses = [whole.step(1.0) for _ in range(12)]
    first = pretrain.Run(name, work, seed=0)
    parts = [first.step(1.0) for _ in range(7)]
    first.save()
    second = pretrain.Run(name, work, seed=0)
    parts += [second.step(1.0) for _ in range(5)]
    assert parts == losses
    assert losses[-1] < losses[0]
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_another_machine_goes_on_from_what_was_kept(work: Path, tmp_path: Path, name: str) -> None:
    first = pretrain.Run(name, work, seed=0)
    losses = [first.step(1.0) for _ in range(8)]
    first.keep(tmp_path / "kept")
    second = pretrain.Run(name, tmp_path / "elsewhere", seed=0, start=tmp_path / "kept")
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one.half(), other.half())
    loss = second.step(1.0)
    assert loss == pytest.approx(first.step(1.0), rel=1e-2)
    assert loss < losses[0]
    assert second.state["step"] == 9


@pytest.mark.parametrize("name", SMALL)
def test_blocks_add_nothing_before_they_have_learnt(work: Path, name: str) -> None:
    run = pretrain.Run(name, work, seed=0)
    ids = pretrain.rows_of_step(run.streams["valid"], run.plan, 0, 0)
    blocks = [weights for key, weights in run.model.named_parameters() if ".layers." in key and weights.dim() == 2]
    before = run.model(input_ids=ids).logits
    with torch.no_grad():
        for weights in blocks:
            weights.mul_(3)
    assert torch.equal(run.model(input_ids=ids).logits, before)
    run.step(1.0)
    with torch.no_grad():
        after = run.model(input_ids=ids).logits
        for weights in blocks:
            weights.mul_(3)
        assert not torch.allclose(run.model(input_ids=ids).logits, after, atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_an_update_of_muon_has_no_weak_direction(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    grad = size * torch.randn(shape)
    singular = torch.linalg.svdvals(muon.orthogonal(grad))
    assert 0.5 < singular.min() <= singular.max() < 1.3
    weights = torch.nn.Parameter(torch.zeros(shape))
    weights.grad = grad
    muon.Muon([weights], lr=0.1).step()
    per_entry = weights.square().mean().sqrt().item()
    assert per_entry == pytest.approx(0.1 * 0.2, rel=0.3), "as large as AdamW's update times 0.2"
    assert (weights * grad).sum() < 0


def test_every_epoch_reads_everything_once(work: Path) -> None:
    plan = SMALL["tiny"]
    stream = np.arange(16 * 4 * 5 + 16, dtype=np.uint16)
    shifts = set()
    for epoch in (0, 1):
        rows = torch.cat([pretrain.rows_of_step(stream, plan, 5 * epoch + step, seed=0) for step in range(5)])
        starts = sorted(int(row[0]) for row in rows)
        shifts.add(starts[0])
        assert np.diff(starts).tolist() == [16] * 19
        assert all((row == torch.arange(int(row[0]), int(row[0]) + 16)).all() for row in rows)
    assert len(shifts) == 2, "another epoch cuts the stream at other places"


def test_counted_vectors_are_near_where_the_company_is_the_same() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 2, 4000)  # 0 and 1 stand among 4 and 5, 2 and 3 among 6 and 7
    stream = np.stack([2 * pairs + rng.integers(0, 2, 4000), 4 + 2 * pairs + rng.integers(0, 2, 4000)], 1).ravel()
    found = vectors.count_vectors(stream, 8, 4, window=1)
    alike = torch.nn.functional.cosine_similarity
    assert alike(found[0], found[1], dim=0) > alike(found[0], found[2], dim=0) + 0.5


def test_neighbours_are_found_where_there_are_any() -> None:
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.integers(0, 4, 600), 12)  # Twelve tokens in a row are of one topic
    stream = 4 * topics + rng.integers(0, 4, len(topics))
    torch.manual_seed(0)
    start = torch.randn(16, 8)
    found = vectors.neighbour_vectors(stream, start, n_steps=60, n_pairs=32, length=3)
    directions = torch.nn.functional.normalize(found - found.mean(0), dim=1)
    alike = directions @ directions.T
    topic = torch.arange(16) // 4
    together = topic[:, None] == topic
    assert alike[together & ~torch.eye(16, dtype=torch.bool)].mean() > alike[~together].mean() + 0.3
    assert torch.allclose(found.mean(1), torch.zeros(16), atol=1e-5)
    assert torch.equal(found, vectors.neighbour_vectors(stream, start, n_steps=60, n_pairs=32, length=3))


def test_the_loss_of_neighbours_is_of_both_directions() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(8, 16), torch.randn(8, 16)
    torch.testing.assert_close(vectors.neighbour_loss(first, second), vectors.neighbour_loss(second, first))
    torch.testing.assert_close(vectors.neighbour_loss(first, 3 * second), vectors.neighbour_loss(first, second))
    assert vectors.neighbour_loss(first, first) < 0.01 < vectors.neighbour_loss(first, second)
    blind = torch.ones(8, 16)
    assert vectors.neighbour_loss(blind, blind).item() == pytest.approx(np.log(8))


def turning(run: pretrain.Run) -> float:
    "How far the features turn from the token vectors on held-out passages of which nothing is hidden."
    run.model.eval()
    ids = pretrain.rows_of_step(run.streams["valid"], run.plan, 0, 0)
    plan = replace(run.plan, mask_frac=1e-9, passages=(4,))
    with torch.no_grad():
        found = pretrain.passages_loss(run.model, ids, plan, run.mask_id, 0)[1].item()
        passages = ids.view(-1, 4)
        means = run.model.model.embeddings(input_ids=passages).mean(1)
        features = run.model.head(run.model.model(input_ids=passages)[0].mean(1))
        alike = torch.nn.functional.cosine_similarity(features - features.mean(0), means - means.mean(0))
    assert found == pytest.approx(1 - alike.mean().item(), abs=1e-5), "what all passages share does not count"
    run.model.train()
    return found


def test_features_stay_near_the_token_vectors(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert turning(pretrain.Run("tiny-encoder", work, seed=0)) < 0.1, "a straight head passes the token vectors on"
    after = []
    for anchor in (3.0, 0.0):
        plan = replace(SMALL["tiny-encoder"], anchor=anchor)
        monkeypatch.setitem(pretrain.PLANS, "tiny-encoder", plan)
        run = pretrain.Run("tiny-encoder", work, seed=0)
        with torch.no_grad():
            run.model.head.dense.weight.normal_(std=0.1)
        assert turning(run) > 0.5
        for _ in range(60):
            run.step(1.0)
        after.append(turning(run))
    assert after[0] < 0.5 * after[1], "only the second loss brings them back"


def test_a_state_is_asked_for_the_tokens_up_to_it() -> None:
    torch.manual_seed(0)
    table = torch.randn(9, 4)
    ids = torch.randint(9, (2, 7))
    means = torch.stack([table[ids[:, max(0, i - 2) : i + 1]].mean(1) for i in range(7)], dim=1)
    assert pretrain.recall_loss(5 * means, ids, table, 3).item() == pytest.approx(0, abs=1e-5)
    assert pretrain.recall_loss(-means, ids, table, 3).item() == pytest.approx(2, abs=1e-5)
    told = means.clone()
    told[0, 4] *= -1
    assert pretrain.recall_loss(told, ids, table, 3).item() == pytest.approx(2 / 14, abs=1e-5)


@pytest.mark.parametrize("anchor", [1.0, 0.0])
def test_the_states_learn_to_tell_what_was_said(work: Path, monkeypatch: pytest.MonkeyPatch, anchor: float) -> None:
    monkeypatch.setitem(pretrain.PLANS, "tiny", replace(SMALL["tiny"], n_recalled=6, anchor=anchor))
    run = pretrain.Run("tiny", work, seed=0)
    held_out = pretrain.rows_of_step(run.streams["valid"], run.plan, 0, 0)

    def seconds(n_steps: int) -> float:
        for _ in range(n_steps):
            run.step(1.0)
        with torch.no_grad():
            return run.losses(held_out)[1].item()

    before, blocks = seconds(0), [p.clone() for p in run.model.parameters()]
    after = seconds(40)
    assert (after < 0.6 * before) == (anchor > 0)
    assert run.table.shape == (run.model.config.vocab_size, 32)
    share = np.bincount(run.streams["train"], minlength=len(run.table)) / len(run.streams["train"])
    assert torch.allclose(torch.from_numpy(share).float() @ run.table, torch.zeros(32), atol=1e-4)
    assert all(not torch.equal(one, other) for one, other in zip(blocks, run.model.parameters(), strict=True))


def test_a_gap_is_filled_where_it_is() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "llmft_nb" / "assets" / "models" / "tiny-encoder")
    (word,) = tokenizer(" house")["input_ids"]

    class Parrot(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> SimpleNamespace:
            logits = torch.nn.functional.one_hot(input_ids, len(tokenizer)).float()
            logits[input_ids == tokenizer.mask_token_id, word] = 9.0
            return SimpleNamespace(logits=logits)

    lines = base_card.filled(Parrot(), tokenizer)
    assert [line.startswith(f"{gap} house, ") for line, gap in zip(lines, base_card.GAPS, strict=True)] == [True] * 10


def test_the_folder_that_is_written_can_be_tuned(work: Path, tmp_path: Path) -> None:
    from llmft_nb.finetune import finetune

    rows = [{"text": f"{word} {i}", "label": word} for word in ("king", "dog") for i in range(8)]
    held_out = [{"text": f"{word} {i}", "label": word} for word in ("king", "dog") for i in range(8, 16)]
    for name in SMALL:
        run = pretrain.Run(name, work, seed=0)
        run.step(1.0)
        run.finish(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "| Kings | Nobody | here |" in card
        assert ("24 tokens, in counted vectors" in card) == (name == "tiny"), "what the second loss asks"
        figures = json.loads((tmp_path / name / "pretraining.json").read_text())
        assert figures["tokens_seen"] == 64
        assert 1 < figures["heldout"]["bytes_per_token"] < 10
        assert figures["heldout"]["five_gram"] < figures["heldout"]["unigram"]
        sets = {"valid": held_out, "test": held_out, "out": tmp_path / f"{name}-run"}
        tuned = finetune(rows, model=tmp_path / name, epochs=1, leaks="allow", **sets)
        assert tuned.record.scores["test"]["accuracy"]["n"] == 16
