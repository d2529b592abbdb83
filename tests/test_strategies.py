"""Every strategy on every shape of model: what moves is what was asked, and nothing else, from first step to last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import small_rows
from transformers import AutoTokenizer

from llmft_nb import adapters
from llmft_nb.adapters import adapter_targets, apply_strategy, merge_adapters, save_adapters
from llmft_nb.bases import find_model, load_tokenizer
from llmft_nb.core import UserError, get_logger
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.finetune import finetune
from llmft_nb.hparams import TrainSettings, parameter_groups
from llmft_nb.inference import head_inputs, pooled_features, predict_logits
from llmft_nb.modeling import (
    LLMForCausalLM,
    LLMForMaskedLM,
    LLMForSequenceClassification,
    TunableModel,
    output_layer,
    size_head,
)
from llmft_nb.movement import compare_models, fingerprint
from llmft_nb.phases import plan_phases
from llmft_nb.strategy import count_parts, match_weights, model_parts, open_parts, parse_strategy, set_modes
from llmft_nb.training import LLMTrainer
from llmft_nb.weights import initialise, parse_init

ENCODERS = ("Bert", "Roberta", "DistilBert")
DECODERS = ("GPT2", "Llama", "Qwen3", "Gemma", "Mistral", "Phi", "Phi3")
KINDS = (*ENCODERS, *DECODERS)
LABELS = ["fruit", "sea", "tool"]
EVERYTHING = {"embeddings", "block 0", "block 1", "after blocks", "head"}
MOVES = {  # Parts of which some weight may move; "after blocks" is empty in some shapes
    "full": EVERYTHING,
    "top:1": {"block 1", "after blocks", "head"},
    "head": {"head"},
    "layers:block 0": {"block 0", "head"},
    "layers:embeddings": {"embeddings", "head"},
    "gradual": EVERYTHING,
    "head-then-full": EVERYTHING,
    "lora:2": {"block 0", "block 1", "head"},
    "dora:2@top:1": {"block 1", "head"},
}


def labelled(folder: Path, seed: int = 0) -> LLMForSequenceClassification:
    "A classifier with its head sized."
    model = LLMForSequenceClassification.from_pretrained(folder, seed=seed)
    size_head(model, LABELS, seed=seed)
    return model


def train(model: TunableModel, strategy: str, **changes: Any) -> Any:
    "Six steps on twelve rows."
    dataset = TextDataset(small_rows(12), model.tokenizer)
    plain: dict[str, Any] = {"epochs": 2, "batch_size": 4, "micro_batch_size": 4, "lr": 1e-3, "warmup_frac": 0.0}
    settings = TrainSettings(**(plain | {"precision": "f32"} | changes))
    loader = TextDataLoader(dataset, batch_size=4)
    return LLMTrainer(model, settings=settings, strategy=strategy, callbacks=[], log_every=1).train(loader)


@pytest.mark.parametrize("strategy", MOVES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_is_what_was_asked(kind: str, strategy: str, save_small: Callable[..., Path]) -> None:
    folder = save_small(kind)
    model, before = labelled(folder), labelled(folder)
    for one in (model, before):
        apply_strategy(one, parse_strategy(strategy))
    result = train(model, strategy)
    lines = compare_models(model.network, before.network)  # Raises where a frozen weight moved
    there = {part.name for part in model_parts(before.network) if list(part.parameters())}
    moves = MOVES[strategy] | ({"after blocks"} if kind == "Bert" and "ora:2" in strategy else set())  # Its pooler
    assert {line.name for line in lines if line.n_moved} == moves & there
    assert all(line.change is None or line.change > 0 for line in lines if line.n_moved)
    moved_first = {part["name"] for part in result.moved[0]["parts"] if part["n_moved"]}
    first = {"gradual": {"after blocks", "head"}, "head-then-full": {"head"}}.get(strategy, moves)
    assert moved_first == first & there
    names = {name for name, _ in before.named_parameters()}
    assert not model.random_names & {name.removeprefix("network.") for name in names if "head" in name}


@pytest.mark.parametrize("strategy", ["lora:2", "dora:2", "lora:2@top:1"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_answer_the_same(
    kind: str, strategy: str, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder, ids = save_small(kind), torch.tensor([[5, 6, 7, 8]])
    model = labelled(folder)
    at_first = model(ids).detach()
    apply_strategy(model, parse_strategy(strategy))
    assert torch.allclose(model(ids), at_first, atol=1e-6), "adapters begin where the base is"
    train(model, strategy, lr=1e-2)
    with_adapters = model(ids).detach()
    assert (with_adapters - at_first).abs().max() > 1e-3
    save_adapters(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="merge_adapters"):
        model.save_pretrained(tmp_path / "model")
    merge_adapters(model)
    model.save_pretrained(tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = model.tokenizer.pad_token_id
    others = {
        "merged": model.eval(),
        "saved": LLMForSequenceClassification.from_pretrained(tmp_path / "model"),
        "through PEFT": PeftModel.from_pretrained(base, tmp_path / "adapter").eval(),
    }
    for name, other in others.items():
        answer = other(ids)
        logits = answer if isinstance(answer, torch.Tensor) else answer.logits
        assert torch.allclose(logits, with_adapters, atol=1e-5), name


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama", "Gemma"])
def test_tied_embeddings_stay_with_the_embeddings(kind: str, save_small: Callable[..., Path]) -> None:
    "A language model whose output matrix is its embeddings, and one with a matrix of its own."
    head_of = LLMForMaskedLM if kind in ENCODERS else LLMForCausalLM
    model = head_of.from_pretrained(save_small(kind))
    network, embeddings = model.network, model.network.get_input_embeddings().weight
    is_tied = network.get_output_embeddings().weight is embeddings
    assert is_tied == (kind != "Llama")
    open_parts(network, parse_strategy("top:1"))
    assert not embeddings.requires_grad
    assert network.get_output_embeddings().weight.requires_grad == (not is_tied)
    phases = plan_phases(network, parse_strategy("gradual"), n_steps=100)
    assert not any(weight is embeddings for weight in phases[0].weights)
    apply_strategy(model, parse_strategy("lora:2"))
    moving = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert moving and all("lora_" in name for name in moving), "a language model's head is no new one"


def test_parts_of_a_tied_model_are_counted_once(save_small: Callable[..., Path]) -> None:
    network = LLMForCausalLM.from_pretrained(save_small("GPT2")).network
    counts = {count.name: count.n_weights for count in count_parts(network)}
    assert sum(counts.values()) == sum(weight.numel() for weight in network.parameters())
    assert counts["head"] == 0
    with pytest.raises(UserError, match="head has no weights of its own"):
        open_parts(network, parse_strategy("layers:head"))


def test_two_stacks_have_no_top(save_small: Callable[..., Path]) -> None:
    from transformers import BartConfig, BartForSequenceClassification

    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60}
    network = BartForSequenceClassification(BartConfig(**shape, **heads))
    with pytest.raises(UserError, match="no single list"):
        open_parts(network, parse_strategy("top:1"))


def test_what_is_frozen_is_still(save_small: Callable[..., Path]) -> None:
    "Also where the container of the blocks drops by itself, as BioGPT's does with its embeddings."
    from transformers import BioGptConfig, BioGptForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = BioGptForSequenceClassification(BioGptConfig(vocab_size=60, hidden_dropout_prob=0.5, **shape))
    open_parts(network, parse_strategy("top:1"))
    set_modes(network)
    seen: list[torch.Tensor] = []
    network.base_model.layers[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    for _ in range(2):
        network(torch.tensor([[5, 6, 7]]))
    assert torch.equal(*seen)


def test_a_weight_that_is_left_behind_is_told(
    save_small: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    "An optimizer that holds all but the classifier trains, and the run says what it does not move."
    model = labelled(save_small("Llama"))
    body = [weight for name, weight in model.named_parameters() if "score" not in name]
    loader = TextDataLoader(TextDataset(small_rows(12), model.tokenizer), batch_size=4)
    settings = TrainSettings(epochs=1, batch_size=4, warmup_frac=0.0, precision="f32")
    LLMTrainer(model, torch.optim.AdamW(body, lr=1e-3), settings, callbacks=[]).train(loader)
    assert "1 of" in caplog.text and "score.weight" in caplog.text


@pytest.mark.parametrize(("n_steps", "frac"), [(10, 1.0), (7, 0.97), (2, 1.0)])
def test_everything_opens_before_the_end(n_steps: int, frac: float, save_small: Callable[..., Path]) -> None:
    network = labelled(save_small("Llama")).network
    open_parts(network, parse_strategy("gradual"))
    phases = plan_phases(network, parse_strategy("gradual"), n_steps, frac)
    assert phases[-1].first_step < n_steps and len(phases[-1].weights) == len(list(network.parameters()))


def test_a_run_goes_on_under_its_own_strategy_only(save_small: Callable[..., Path], tmp_path: Path) -> None:
    for strategy, resume in (("gradual", False), ("full", True)):
        model = labelled(save_small("Llama"))
        apply_strategy(model, parse_strategy(strategy))
        loader = TextDataLoader(TextDataset(small_rows(12), model.tokenizer), batch_size=4)
        settings = TrainSettings(epochs=1, batch_size=4, precision="f32")
        trainer = LLMTrainer(model, settings=settings, strategy=strategy, folder=tmp_path / "run", callbacks=[])
        if resume:
            with pytest.raises(UserError, match="strategy: was gradual, now full"):
                trainer.train(loader, resume=True)
        else:
            trainer.train(loader)


def test_phases_open_at_their_steps(save_small: Callable[..., Path]) -> None:
    model = labelled(save_small("Llama"))
    apply_strategy(model, parse_strategy("gradual"))
    result = train(model, "gradual", epochs=4, unfreeze_frac=0.75)  # 12 steps, four stages, nine of them to open
    moved = [{part["name"] for part in line["parts"] if part["n_moved"]} for line in result.moved]
    assert [line["step"] for line in result.moved] == [1, 4, 7, 10]
    assert moved == [
        {"after blocks", "head"},
        {"block 1", "after blocks", "head"},
        {"block 0", "block 1", "after blocks", "head"},
        EVERYTHING,
    ]


@pytest.mark.parametrize("head_first_lr", [0.0, 2e-2])
def test_the_rate_begins_anew_when_the_body_opens(head_first_lr: float, save_small: Callable[..., Path]) -> None:
    rates: list[float] = []

    class Note:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda state, *values: rates.append(values[0]["lr"]) if name == "on_step" else None

    model = labelled(save_small("Llama"))
    apply_strategy(model, parse_strategy("head-then-full"))
    settings = TrainSettings(epochs=4, batch_size=4, lr=1e-3, warmup_frac=0.0, precision="f32", head_lr_factor=1.0)
    settings = replace(settings, head_first_lr=head_first_lr)
    loader = TextDataLoader(TextDataset(small_rows(12), model.tokenizer), batch_size=4)
    LLMTrainer(model, settings=settings, strategy="head-then-full", callbacks=[Note()], log_every=1).train(loader)
    falling = [1 - step / 6 for step in range(6)]
    assert rates == pytest.approx(
        [(head_first_lr or 1e-3) * part for part in falling] + [1e-3 * part for part in falling]
    )


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_layer_wise_rates(kind: str, save_small: Callable[..., Path]) -> None:
    model = labelled(save_small(kind))
    groups = parameter_groups(model.network, TrainSettings(lr=1e-3, head_lr_factor=2.0, layer_decay=0.5))
    rate_of = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    wanted = {"embeddings": 1.25e-4, "block 0": 2.5e-4, "block 1": 5e-4, "head": 2e-3}
    for part in model_parts(model.network):
        for weight in part.parameters() if part.name in wanted else ():
            assert rate_of[id(weight)] == pytest.approx(wanted[part.name])
    assert len(rate_of) == len(list(model.parameters()))


def test_an_adapter_is_drawn_by_the_seed_alone(save_small: Callable[..., Path]) -> None:
    def drawn(seed: int) -> dict[str, int]:
        model = labelled(save_small("Llama"))
        torch.rand(seed + 1)  # Wherever the global stream stands
        apply_strategy(model, parse_strategy("lora:2"), seed)
        return {name: fingerprint(weight) for name, weight in model.named_parameters() if "lora_A" in name}

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(("found", "device", "what"), [(None, "cuda", "not installed"), (object(), "cpu", "CUDA")])
def test_four_bits_are_refused_without_library_or_device(
    found: Any, device: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(adapters, "probe_device", lambda: SimpleNamespace(kind=device))
    with pytest.raises(UserError, match=what) as told:
        adapters.check_four_bit(parse_strategy("qlora:4@top:1"))
    assert "choose lora:4@top:1" in told.value.mend


def test_a_layer_that_shares_its_weights_has_no_depth(save_small: Callable[..., Path]) -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "embedding_size": 16}
    network = AlbertForSequenceClassification(AlbertConfig(vocab_size=50, num_hidden_layers=3, **shape))
    with pytest.raises(UserError, match="layer_decay"):
        parameter_groups(network, TrainSettings(layer_decay=0.5))
    assert open_parts(network, parse_strategy("layers:attention")) == ["base", "head"]


def test_best_weights_from_before_the_body_opened(save_small: Callable[..., Path]) -> None:
    "The best step is the last of the head's own phase, so the body has to come back to where it began."
    falling = iter([0.9, 0.5, 0.4, 0.3])
    model, before = (labelled(save_small("Llama")) for _ in range(2))
    settings = TrainSettings(epochs=4, batch_size=4, lr=1e-2, warmup_frac=0.0, precision="f32")
    loader = TextDataLoader(TextDataset(small_rows(12), model.tokenizer), batch_size=4)
    trainer = LLMTrainer(
        model,
        settings=settings,
        strategy="head-then-full",
        callbacks=[],
        evaluate=lambda _: {"accuracy": next(falling)},
    )
    result = trainer.train(loader)
    assert (result.best_step, len(result.moved)) == (3, 2)
    apply_strategy(before, parse_strategy("head"))
    lines = compare_models(model.network, before.network)  # Raises where the body is not what it was
    assert {line.name for line in lines if line.n_moved} == {"head"}


@pytest.mark.parametrize(("strategy", "init"), [("lora:2", "random"), ("lora:2@top:1", "top:1"), ("gradual", "random")])
def test_any_start_goes_with_any_strategy(
    strategy: str, init: str, small_model: Path, small_files: Path, tmp_path: Path
) -> None:
    "Through the one call: what was drawn is the seed's, what is frozen stays as it was drawn."

    options: dict[str, Any] = {"model": small_model, "epochs": 1, "batch_size": 16, "lr": 1e-3, "callbacks": []}
    held_out = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    run = finetune(
        small_files / "train.jsonl", strategy=strategy, init=init, out=tmp_path / "run", **held_out, **options
    )
    drawn = labelled(small_model)
    initialise(drawn, parse_init(init), seed=0)
    tuned = LLMForSequenceClassification.from_pretrained(run.folder / "model")
    moved = {line["name"] for line in run.record.model["moved"]["whole"] if line["n_moved"]}
    assert moved == MOVES[strategy.replace("lora:2@", "dora:2@")]
    if "embeddings" not in moved:
        kept, was = (one.network.get_input_embeddings().weight for one in (tuned, drawn))
        assert torch.equal(kept, was)
    assert not (run.folder / "adapter").exists(), "no base has what was drawn and stood still"
    assert not any("lora" in name for name, _ in tuned.named_parameters())


# --- shapes that are built otherwise ---


def unusual(kind: str, head: str = "SequenceClassification", **changes: Any) -> Any:
    "A random transformers model of two blocks, 32 wide, of a family with a build of its own."
    import transformers

    plain = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
    own: dict[str, dict[str, Any]] = {
        "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16},
        "DebertaV2": {"relative_attention": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
        "MPNet": {},
        "Albert": {"embedding_size": 16, "inner_group_num": 2},
        "Bart": {"d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        "SqueezeBert": {"embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1}
        | {"post_attention_groups": 1, "intermediate_groups": 1, "output_groups": 1},
        "Falcon": {"new_decoder_architecture": False, "alibi": False},
        "FNet": {},
        "ConvBert": {"embedding_size": 32},
        "Funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
        "Mamba": {"state_size": 4},
        "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 4},
        "Rwkv": {},
        "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
        "Bloom": {"n_layer": 2, "n_head": 2},
    }
    shape = plain | own[kind] | changes
    if kind == "XLNet":
        del shape["max_position_embeddings"]  # It has no limit
    if kind == "Funnel":
        del shape["num_hidden_layers"]  # The sizes of its blocks say how many
    config = getattr(transformers, f"{kind}Config")(**shape)
    return getattr(transformers, f"{kind}{head if head == 'LMHeadModel' else f'For{head}'}")(config)


def part_of(network: Any, name: str) -> str:
    "The part that a weight belongs to."
    weight = dict(network.named_parameters())[name]
    return next(part.name for part in model_parts(network) if any(one is weight for one in part.parameters()))


def test_what_stands_out_of_place_belongs_where_it_is_used() -> None:
    opt = unusual("OPT")
    assert part_of(opt, "model.decoder.final_layer_norm.weight") == "after blocks"
    assert part_of(opt, "model.decoder.project_out.weight") == "after blocks"
    assert part_of(opt, "model.decoder.project_in.weight") == "embeddings"
    deberta = unusual("DebertaV2")
    for name in ("rel_embeddings.weight", "LayerNorm.weight", "conv.conv.weight"):
        assert part_of(deberta, f"deberta.encoder.{name}") == "embeddings", name
    assert part_of(deberta, "deberta.encoder.layer.1.output.LayerNorm.weight") == "block 1"
    assert part_of(unusual("MPNet"), "mpnet.encoder.relative_attention_bias.weight") == "embeddings"
    for network in (opt, deberta):
        opened = open_parts(network, parse_strategy("top:1"))
        assert opened == [name for name in ("block 1", "after blocks", "head") if name in opened]


def test_a_weight_outside_all_modules_is_in_a_part_too() -> None:
    network = unusual("XLNet")
    assert part_of(network, "transformer.mask_emb") == "embeddings"
    assert sum(count.n_weights for count in count_parts(network)) == network.num_parameters()
    assert open_parts(network, parse_strategy("top:1")) == ["block 1", "head"]
    assert not network.transformer.mask_emb.requires_grad


def test_a_base_that_shortens_rows_has_features_all_the_same(tmp_path: Path) -> None:
    folder = saved_unusual("Funnel", "SequenceClassification", tmp_path / "model")
    run = finetune(small_rows(60), model=folder, out=tmp_path / "run", callbacks=(), epochs=1, max_length=32)
    assert 0.5 < run.record.scores["forgetting"]["features"]["value"] < 1.0
    model = LLMForSequenceClassification.from_pretrained(folder)
    rows = [{"text": text} for text in ("the same words", "the same words", "and others on the table")]
    one, again, other = pooled_features(model, TextDataset(rows, model.tokenizer, need_labels=False))
    assert one == pytest.approx(again, abs=1e-5) and one != pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("kind", ["Bart", "Albert"])
def test_two_stacks_and_shared_layers_have_no_top(kind: str) -> None:
    with pytest.raises(UserError, match=r"two stacks.*layers:PATTERN"):
        open_parts(unusual(kind), parse_strategy("top:1"))
    assert open_parts(unusual(kind), parse_strategy("full")) == ["all"]


def with_ends(folder: Path, there: Path, pad: str | None = None) -> Path:
    "A copy of a model whose tokenizer puts the end token behind each text."
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(folder, there))
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.pad_token = pad or tokenizer.pad_token
    tokenizer.save_pretrained(there)
    return there


@pytest.mark.parametrize("strategy", ["full", "head", "gradual", "lora:2"])
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_two_stacks_are_tuned_from_rows_to_answers(
    kind: str, strategy: str, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_ends(save_small(kind), tmp_path / "model")
    rows = small_rows(60)
    rows[3]["text"] += " <|end|> more"  # Typed by somebody: no second end
    options: dict[str, Any] = {"model": folder, "strategy": strategy, "epochs": 1, "max_length": 16}
    run = finetune(rows, out=tmp_path / "run", callbacks=(), **options)
    kept = run.record.scores["forgetting"]["features"]["value"]
    assert kept == pytest.approx(1.0, abs=1e-6) if strategy == "head" else 0.5 < kept < 1.0
    (answer,) = run.predictor().predict([rows[0]["text"]])
    assert answer["label"] in LABELS


@pytest.mark.parametrize(("pad", "told"), [(None, "puts none behind a text"), ("<|end|>", "fills rows up with it")])
def test_a_head_that_reads_at_the_end_needs_one(
    pad: str | None, told: str, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_ends(save_small("T5"), tmp_path / "model", pad) if pad else save_small("T5")
    with pytest.raises(UserError, match=rf"reads at the end token .number 1., and the tokenizer {told}"):
        LLMForSequenceClassification.from_pretrained(folder)


def saved_unusual(kind: str, head: str, folder: Path) -> Path:
    "The folder of such a model with the embedded tokenizer for its head."
    source = find_model("tiny-encoder" if head == "MaskedLM" else "tiny")
    tokenizer, _ = load_tokenizer(source)
    unusual(kind, head, vocab_size=len(tokenizer), max_position_embeddings=300).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "head"), [("Rwkv", "CausalLM"), ("Mamba", "CausalLM"), ("Bloom", "CausalLM"), ("DebertaV2", "MaskedLM")]
)
def test_documents_that_would_mix_have_rows_of_their_own(
    kind: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_unusual(kind, head, tmp_path / "model")
    options: dict[str, Any] = {"task": "text", "model": folder, "epochs": 1, "max_length": 40, "precision": "f32"}
    run = finetune(small_rows(40), out=tmp_path / "run", callbacks=(), **options)
    assert caplog.text.count("would read from one document into the next") == 1
    assert run.record.data["packing"].startswith("off: ")
    assert run.record.scores["forgetting"]["ratio"]["value"] > 0


@pytest.mark.parametrize(("kind", "said"), [("FNet", 1), ("ConvBert", 1), ("DebertaV2", 0)])
def test_a_base_that_reads_what_fills_rows_up_is_told_of(
    kind: str, said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_unusual(kind, "MaskedLM", tmp_path / "model")
    finetune(small_rows(60), model=folder, out=tmp_path / "run", epochs=1, callbacks=(), precision="f32")
    assert caplog.text.count("reads what fills rows up") == said


def test_a_model_that_keeps_documents_apart_packs(small_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "text", "model": small_model, "epochs": 1, "max_length": 40}
    run = finetune(small_rows(40), out=tmp_path / "run", callbacks=(), **options)
    assert "packing" not in run.record.data


@pytest.mark.parametrize("task", ["text", "instruct"])
def test_what_sees_both_sides_learns_no_writing(task: str, tmp_path: Path) -> None:
    folder = saved_unusual("XLNet", "LMHeadModel", tmp_path / "model")
    rows = [{"text": row["text"], "prompt": row["text"], "completion": row["label"]} for row in small_rows(40)]
    with pytest.raises(UserError, match="XLNetLMHeadModel sees both sides of a word") as caught:
        finetune(rows, task=task, model=folder, out=tmp_path / "run", callbacks=())
    assert "classify" in str(caught.value) and not (tmp_path / "run").exists()


def test_what_sees_both_sides_has_no_perplexity(tmp_path: Path) -> None:
    folder = saved_unusual("XLNet", "LMHeadModel", tmp_path / "model")
    run = finetune(small_rows(60), model=folder, out=tmp_path / "run", epochs=1, callbacks=())
    assert "not measured: XLNetLMHeadModel sees both sides" in run.record.scores["forgetting"]["words"]


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2", "Llama"])
def test_rows_longer_than_the_positions_are_refused_before_the_first_step(
    kind: str, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    "The tokenizer was saved without the number."
    folder = save_small(kind, max_position_embeddings=14)
    n_positions = 13 if kind == "Roberta" else 14
    options: dict[str, Any] = {"model": folder, "epochs": 1, "callbacks": ()}
    with pytest.raises(UserError, match=f"max_length 256: the model reads at most {n_positions} tokens"):
        finetune(small_rows(60), out=tmp_path / "no", **options)
    run = finetune(small_rows(60), out=tmp_path / "run", max_length=n_positions, **options)
    assert AutoTokenizer.from_pretrained(run.folder / "model").model_max_length == n_positions
    if kind in DECODERS:
        options["task"] = "text"  # Tried with shared rows, too
        assert finetune(small_rows(60), out=tmp_path / "packed", max_length=n_positions, **options).record.scores


@pytest.mark.parametrize("text", ["lora:4", "lora:4@top:1"])
def test_adapters_that_would_stand_beside_no_block_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"block . has no linear layer .adapters go beside linear layers"):
        adapter_targets(unusual("SqueezeBert"), parse_strategy(text))


def test_experts_in_one_piece_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    "As Mixtral keeps them: no linear layers, so no adapters go beside most of its weights."
    network = unusual("Mixtral")
    found = adapter_targets(network, parse_strategy("lora:4"))
    assert not any("experts" in name for name in found)
    assert (
        "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight, 89 % of the blocks' weights, have none"
        in caplog.text
    )
    caplog.clear()
    adapter_targets(unusual("DebertaV2"), parse_strategy("lora:4"))
    assert not caplog.text


def test_what_building_a_model_says_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    "A run builds it twice: to be tuned, and to be compared with."
    folder = saved_unusual("Mixtral", "CausalLM", tmp_path / "model")
    finetune(small_rows(60), model=folder, strategy="lora:4", out=tmp_path / "run", epochs=1, callbacks=())
    assert caplog.text.count("adapters stand beside linear layers only") == 1
    assert get_logger().level == logging.NOTSET


def test_a_part_without_weights_of_its_own_is_not_misspelt() -> None:
    network = unusual("OPT", "CausalLM", word_embed_proj_dim=32)
    with pytest.raises(UserError, match=r"head has no weights of its own .*used twice") as caught:
        match_weights(network, "head", "layers:head")
    assert "head," not in str(caught.value).partition("mend")[2]
    with pytest.raises(UserError) as caught:
        match_weights(network, "haed", "layers:haed")
    assert "near to it: head" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora:4@top:0", ["strategy lora:4@top:0", "lora:4@top:K"]),
        ("lora:4@top:x", ["strategy lora:4@top:x", "lora:4@top:K"]),
        ("lora:4@", ["strategy lora:4@", "lora:4@attention"]),
    ],
)
def test_a_mistake_behind_the_at_is_told_as_it_was_typed(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_strategy(text)
    assert all(word in str(caught.value) for word in words)


def test_a_rank_beyond_the_layers_is_refused_before_memory_is_asked_for(small_model: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    with pytest.raises(UserError, match="rank 99999999999 in layers 64 wide at most") as caught:
        apply_strategy(model, parse_strategy("lora:99999999999"))
    assert "choose R up to 64" in str(caught.value)
    apply_strategy(model, parse_strategy("lora:64"))


def test_layers_that_peft_refuses_are_told(save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def refuse(*given: Any) -> None:
        raise ValueError("Module 'out_proj' is incompatible")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    with pytest.raises(UserError, match=r"out_proj.*lora:4@PATTERN"):
        apply_strategy(LLMForSequenceClassification.from_pretrained(save_small("Bert")), parse_strategy("lora:4"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_head_reads_is_what_its_output_layer_multiplies(kind: str, save_small: Callable[..., Path]) -> None:
    model = labelled(save_small(kind))
    dataset = TextDataset(small_rows(12), model.tokenizer)
    _, _, layer = output_layer(model.network)
    read = torch.from_numpy(head_inputs(model, dataset, range(12)))
    assert read.shape == (12, layer.in_features)
    torch.testing.assert_close(layer(read).detach(), torch.from_numpy(predict_logits(model, dataset)))
