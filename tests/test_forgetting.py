"""What a tune costs: against transformers' own loss, sums over the vocabulary, and identities that must be exact."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_network, write_jsonl

from llmft_nb.core import UserError, assets_folder
from llmft_nb.forgetting import (
    MASK_EVERY,
    causal_windows,
    feature_drift,
    general_texts,
    lm_perplexity,
    load_lm,
    masked_windows,
    measure_forgetting,
    perplexity_ratio,
    reattach_head,
    sample_texts,
    self_drift,
    trunk_of,
)
from llmft_nb.modeling import find_model, load_tokenizer, quiet_loading

TEXTS = ["The bus came late.", "Nobody has ever asked him to change it, and he does not mind.", "家 🙂 é", "x"]


@pytest.fixture(scope="module")
def tokenizer(one_thread: None) -> Any:
    return load_tokenizer(find_model("tiny"))[0]


@pytest.fixture(scope="module")
def tiny(one_thread: None) -> Any:
    return load_lm("tiny")[0]


@pytest.fixture(scope="module")
def save_lm(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    "Gives the folder of a small random model with a language-model head, and the embedded tokenizer."
    import transformers

    saved: dict[str, Path] = {}

    def folder_of(kind: str, head: str, **changes: Any) -> Path:
        key = json.dumps([kind, head, changes])
        if key not in saved:
            config = small_network(kind, len(tokenizer), **changes).config
            saved[key] = tmp_path_factory.mktemp("lm")
            with torch.random.fork_rng(devices=[]), quiet_loading():
                torch.manual_seed(1)
                getattr(transformers, f"{kind}{head}")(config).save_pretrained(saved[key])
                tokenizer.save_pretrained(saved[key])
        return saved[key]

    return folder_of


def classifier_of(folder: Path | str, kind: str = "SequenceClassification") -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(2)
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, dtype=torch.float32)


def shaken(model: Any, size: float) -> Any:
    "A copy whose weights have all moved a little."
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std().nan_to_num(0), alpha=size)
    return moved


# Texts


def test_the_shipped_texts_are_plain_rows_of_the_stated_size() -> None:
    path = assets_folder() / "data" / "general" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"text"} for row in rows)
    assert general_texts() == [row["text"] for row in rows]
    assert 55 <= len(rows) <= 70 and 12_000 <= path.stat().st_size <= 16_000
    assert len(set(general_texts())) == len(rows)
    assert "Apache-2.0" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_texts_of_ones_own(tmp_path: Path) -> None:
    mixed = write_jsonl(tmp_path / "a.jsonl", [{"text": "One.", "label": 3}, "", {"text": "  "}, {"text": "二"}])
    assert general_texts(mixed) == general_texts(str(mixed)) == ["One.", "二"]
    assert general_texts(["One.", {"text": "Two."}]) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["{"], "a.jsonl:1: no text"), ([{"text": "a"}, {"label": 1}], "a.jsonl:2: no text"), ([""], "no text in it")],
)
def test_files_without_texts(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=message):
        general_texts(path)
    with pytest.raises(UserError, match="no such file"):
        general_texts(tmp_path / "b.jsonl")


# Losses


@pytest.mark.parametrize("length", [3, 4, 7, 50, 510])
def test_every_token_is_scored_once_with_its_left_context(tokenizer: Any, length: int) -> None:
    for text in [*TEXTS, general_texts()[0], ""]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        windows = causal_windows(tokenizer, text, length)
        assert [token for window in windows for token in window[1:]] == ids
        assert all(len(window) <= length for window in windows)
        assert windows[0][0] == tokenizer.eos_token_id
        assert [window[0] for window in windows[1:]] == [window[-1] for window in windows[:-1]]


def test_losses_equal_transformers_own(tiny: Any, tokenizer: Any) -> None:
    "One text at a time, without padding, by the network's own loss."
    texts = [*TEXTS, *general_texts()[:9]]
    ours = lm_perplexity(tiny, tokenizer, texts)
    for i, text in enumerate(texts):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            loss = tiny(input_ids=ids, labels=ids).loss.item()
        assert ours.n_tokens[i] == ids.shape[1] - 1
        assert ours.loss_sums[i] / ours.n_tokens[i] == pytest.approx(loss, rel=1e-5)
        assert ours.n_bytes[i] == len(text.encode("utf-8"))
    nats = ours.loss_sums.sum()
    assert ours.perplexity().value == pytest.approx(math.exp(nats / ours.n_tokens.sum()))
    assert ours.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts))


def test_long_texts_are_read_whole(tiny: Any, tokenizer: Any) -> None:
    long = " ".join(general_texts())
    n_tokens = len(tokenizer(long).input_ids)
    assert n_tokens > 2000
    losses = {size: lm_perplexity(tiny, tokenizer, [long], max_length=size) for size in (64, 256, 10**9)}
    assert {int(one.n_tokens[0]) for one in losses.values()} == {n_tokens}
    # More context, less surprise
    assert losses[64].loss_sums[0] > losses[256].loss_sums[0]


@pytest.mark.parametrize(("kind", "head"), [("Llama", "ForCausalLM"), ("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM")])
def test_uniform_logits_give_the_vocabulary(save_lm: Callable[..., Path], tokenizer: Any, kind: str, head: str) -> None:
    network, _ = load_lm(save_lm(kind, head))
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert lm_perplexity(network, tokenizer, TEXTS).perplexity().value == pytest.approx(len(tokenizer), rel=1e-4)


def test_a_masked_model_is_asked_at_fixed_places(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    network, _ = load_lm(save_lm("Bert", "ForMaskedLM"))
    network.train()
    texts = [*TEXTS, *general_texts()[:6]]
    one, other = (lm_perplexity(network, tokenizer, texts) for _ in range(2))
    assert network.training
    assert one.loss_sums.tolist() == other.loss_sums.tolist()
    assert one.perplexity().name == "pseudo-perplexity" and one.bits_per_byte is None
    assert all(one.n_tokens >= 1)
    n_all = sum(len(tokenizer(text).input_ids) for text in texts[4:])
    assert one.n_tokens[4:].sum() / n_all == pytest.approx(1 / MASK_EVERY, abs=0.02)
    [(ids, targets)] = masked_windows(tokenizer, texts[4], 500, 3)
    with torch.no_grad():
        logits = network.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    by_hand = -sum(logits[i, target].item() for i, target in enumerate(targets) if target != -100)
    several = [lm_perplexity(network, tokenizer, [texts[4]], seed=seed).loss_sums[0] for seed in range(40)]
    assert min(abs(value - by_hand) for value in several) < 1e-3
    assert len({round(float(value), 4) for value in several}) == MASK_EVERY


@pytest.mark.parametrize(("kind", "head"), [("Bert", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_other_texts_in_a_batch_change_nothing(
    save_lm: Callable[..., Path], tokenizer: Any, kind: str, head: str
) -> None:
    network, _ = load_lm(save_lm(kind, head, initializer_range=0.3))
    texts = [general_texts()[0] * 3, "", *TEXTS]
    together = lm_perplexity(network, tokenizer, texts)
    for i, text in enumerate(texts[:1]):  # Number 0 stays number 0, so the same places are hidden
        assert lm_perplexity(network, tokenizer, [text]).loss_sums[0] == pytest.approx(together.loss_sums[i], rel=1e-5)
    shortest_first = [*TEXTS[3:], general_texts()[0] * 3]
    short = lm_perplexity(network, tokenizer, shortest_first).loss_sums[0]
    assert lm_perplexity(network, tokenizer, TEXTS[3:]).loss_sums[0] == pytest.approx(short, rel=1e-5)
    assert (together.n_tokens[1], together.loss_sums[1]) == (0, 0.0)


@pytest.mark.parametrize("length", [5, 20, 300])
def test_hidden_places_do_not_depend_on_windows(tokenizer: Any, length: int) -> None:
    text, whole = general_texts()[1], tokenizer(general_texts()[1]).input_ids
    windows = masked_windows(tokenizer, text, length, 4)
    targets = [target for _, part in windows for target in part]
    hidden = [i for i, target in enumerate(targets) if target != -100]
    assert hidden == list(range(4, len(whole), MASK_EVERY))
    assert [targets[i] for i in hidden] == [whole[i] for i in hidden]
    assert sum(len(ids) for ids, _ in windows) == len(whole)


# Heads


LMS = [
    ("Llama", "ForCausalLM", {}),
    ("Llama", "ForCausalLM", {"tie_word_embeddings": True}),
    ("Qwen3", "ForCausalLM", {}),
    ("GPT2", "LMHeadModel", {}),
    ("Bert", "ForMaskedLM", {}),
    ("Roberta", "ForMaskedLM", {}),
    ("DistilBert", "ForMaskedLM", {}),
]


@pytest.mark.parametrize(("kind", "head", "changes"), LMS, ids=str)
def test_an_untuned_classifier_is_its_base(
    save_lm: Callable[..., Path], tokenizer: Any, kind: str, head: str, changes: dict[str, Any]
) -> None:
    folder = save_lm(kind, head, **changes)
    bill = measure_forgetting(folder, classifier_of(folder), tokenizer, TEXTS, n_samples=4)
    assert bill.ratio is not None and bill.features is not None
    assert (bill.ratio.value, bill.ratio.low, bill.ratio.high) == (1.0, 1.0, 1.0)
    assert bill.features.value == pytest.approx(1, abs=1e-9)
    assert (bill.drift is None) == (head == "ForMaskedLM")
    assert bill.drift is None or (bill.drift.kl, bill.drift.standard_error) == (0.0, 0.0)
    tied = bool(changes) or kind not in ("Llama", "Qwen3")
    assert bill.note == (
        "the tuned embeddings serve as the head, which is tied to them" if tied else "the base's own head"
    )
    assert bill.verdict() == "no difference shown"
    json.dumps(bill.as_record())


@pytest.mark.parametrize(("kind", "head", "changes"), LMS, ids=str)
def test_a_moved_trunk_is_measured(
    save_lm: Callable[..., Path], tokenizer: Any, kind: str, head: str, changes: dict[str, Any]
) -> None:
    "The reattached model is the language model whose trunk was moved in the same way."
    folder = save_lm(kind, head, **changes)
    base, _ = load_lm(folder)
    moved = shaken(classifier_of(folder, "TokenClassification"), 0.3)
    again, _ = reattach_head(folder, moved)
    learnt = trunk_of(moved).state_dict()
    for name, values in trunk_of(again).state_dict().items():
        assert torch.equal(values, learnt[name]), name
    for name, values in again.state_dict().items():
        inside = name.startswith(f"{again.base_model_prefix}.")
        if not inside and values.shape != again.get_input_embeddings().weight.shape:
            assert torch.equal(values, base.state_dict()[name]), name
    bill = measure_forgetting(folder, moved, tokenizer, TEXTS, n_samples=4)
    assert bill.ratio is not None and bill.ratio.value != 1 and bill.features is not None
    assert bill.features.value < 0.9999


def test_a_language_model_is_measured_with_its_own_head(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    folder = save_lm("Llama", "ForCausalLM")
    base, _ = load_lm(folder)
    tuned = shaken(base, 0.2)
    network, note = reattach_head(folder, tuned)
    assert network is tuned and "own" in note
    before, after = (lm_perplexity(model, tokenizer, TEXTS) for model in (base, tuned))
    ratio = perplexity_ratio(before, after)
    assert ratio.value == pytest.approx(after.perplexity().value / before.perplexity().value)
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Llama"])
def test_a_checkpoint_without_a_head_is_said_to_have_none(
    save_small: Callable[..., Path], tokenizer: Any, kind: str
) -> None:
    folder = save_small(kind)
    bill = measure_forgetting(folder, shaken(classifier_of(folder), 0.5), tokenizer, TEXTS)
    assert (bill.verdict(), bill.ratio, bill.drift) == ("not measured", None, None)
    assert bill.describe().startswith("not measured: the checkpoint has no language-model head; feature cosine")
    assert bill.features is not None and bill.features.value < 0.9999
    assert bill.as_record()["verdict"] == "not measured"


def test_other_shapes_are_told(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    folder = save_lm("Llama", "ForCausalLM")
    grown = classifier_of(folder)
    with quiet_loading():
        grown.resize_token_embeddings(len(tokenizer) + 8)
    bill = measure_forgetting(folder, grown, tokenizer, TEXTS, n_samples=0)
    assert bill.ratio is not None and bill.ratio.value == 1.0, "tokens that were added are not asked about"
    wider = classifier_of(save_lm("Llama", "ForCausalLM", hidden_size=64, intermediate_size=32))
    network, note = reattach_head(folder, wider)
    assert network is None and note.startswith("not measured: ") and "no counterpart" in note


def test_adapters_are_merged_into_a_copy(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save_lm("Llama", "ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        tuned = get_peft_model(classifier_of(folder), LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    unmoved = measure_forgetting(folder, tuned, tokenizer, TEXTS, n_samples=0)
    assert unmoved.ratio is not None and unmoved.ratio.value == 1.0
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    with torch.random.fork_rng(devices=[]):
        writer = get_peft_model(load_lm(folder)[0], LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    own = measure_forgetting(folder, writer, tokenizer, TEXTS, n_samples=4)
    assert own.ratio is not None and own.ratio.value == 1.0 and "own" in own.note
    before = {name: values.clone() for name, values in tuned.state_dict().items()}
    bill = measure_forgetting(folder, tuned, tokenizer, TEXTS, n_samples=0)
    assert bill.ratio is not None and bill.ratio.value != 1.0
    assert all(torch.equal(values, before[name]) for name, values in tuned.state_dict().items())


# Divergence


def test_divergence_equals_a_sum_over_the_vocabulary(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    base, _ = load_lm(save_lm("Llama", "ForCausalLM", initializer_range=0.3))
    tuned = shaken(base, 0.3)
    found = self_drift(base, tuned, tokenizer, n_samples=6, length=10, seed=5)
    from llmft_nb.core import stream_seed

    ids = sample_texts(base, tokenizer.eos_token_id, 6, 10, stream_seed(5, 0))[:, :-1]
    with torch.no_grad():
        p, q = (torch.softmax(network(input_ids=ids).logits.double(), dim=-1) for network in (base, tuned))
    by_hand = (p * (p / q).log()).sum(dim=-1).mean(dim=1)
    assert found.kl == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert found.standard_error == pytest.approx(by_hand.std().item() / math.sqrt(6), rel=1e-3)
    assert found == self_drift(base, tuned, tokenizer, n_samples=6, length=10, seed=5)
    assert found.kl != self_drift(base, tuned, tokenizer, n_samples=6, length=10, seed=6).kl


def test_more_change_is_more_divergence(tiny: Any, tokenizer: Any) -> None:
    drifts = [
        self_drift(tiny, shaken(tiny, size), tokenizer, n_samples=8, length=16).kl for size in (0, 0.03, 0.1, 0.3)
    ]
    assert drifts[0] == 0.0
    assert drifts == sorted(drifts) and drifts[-1] > 10 * drifts[1] > 0


def test_own_texts_follow_the_models_distribution(save_lm: Callable[..., Path], tokenizer: Any) -> None:
    "First tokens of 4,000 texts against the probabilities; and the cache changes nothing."
    network, _ = load_lm(save_lm("Llama", "ForCausalLM", initializer_range=1.0))
    ids = sample_texts(network, tokenizer.eos_token_id, 4000, 2, seed=0)
    assert ids.shape == (4000, 3) and torch.all(ids[:, 0] == tokenizer.eos_token_id)
    with torch.no_grad():
        shares = torch.softmax(network(input_ids=ids[:1, :1]).logits[0, -1], dim=-1).numpy()
        likeliest = int(shares.argmax())
        seconds = ids[ids[:, 1] == likeliest][:, 2]
        after = torch.softmax(network(input_ids=torch.tensor([[tokenizer.eos_token_id, likeliest]])).logits[0, -1], -1)
    for counts, expected in ((ids[:, 1], shares), (seconds, after.numpy())):
        seen = np.bincount(counts.numpy(), minlength=len(expected)) / len(counts)
        top = np.argsort(-expected)[:5]
        assert seen[top] == pytest.approx(expected[top], abs=4 * math.sqrt(0.25 / len(counts)))


def test_feature_drift_is_blind_to_length_and_sees_direction(tiny: Any, tokenizer: Any) -> None:
    trunk = trunk_of(tiny)
    longer = copy.deepcopy(trunk)
    with torch.no_grad():
        longer.norm.weight *= 3
    assert feature_drift(trunk, longer, tokenizer, TEXTS).value == pytest.approx(1)
    with torch.no_grad():
        longer.norm.weight *= -1
    assert feature_drift(trunk, longer, tokenizer, TEXTS).value == pytest.approx(-1)


def test_a_bad_tune_costs_and_a_gentle_one_does_not(tiny: Any, tokenizer: Any) -> None:
    classifier = classifier_of(find_model("tiny").location)
    bills = [
        measure_forgetting("tiny", shaken(classifier, size), tokenizer, general_texts()[:12], n_samples=4)
        for size in (0.001, 0.5)
    ]
    assert [bill.verdict() for bill in bills][1] == "worse"
    first, second = (bill.ratio for bill in bills)
    assert first is not None and second is not None and first.value < 1.02 < second.low
    assert "times" in bills[1].describe() and "bits per byte" in bills[1].describe()
