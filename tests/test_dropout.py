"Dropout by fewer random bits: as random as torch's, and the same run after a crash."

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import small_rows

from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.dropout import open_dropout, quick_dropout
from llmft_nb.hparams import TrainSettings
from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.training import LLMTrainer


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 999), (3, 7, 11), (1,)])
def test_a_share_is_dropped_and_the_mean_stays(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    states = torch.ones(shape, requires_grad=True)
    dropped = quick_dropout(states, p)
    n = states.numel()
    assert dropped.shape == states.shape
    kept = dropped[dropped != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - round(p * 65536) / 65536)))
    share = 1 - len(kept) / n
    if n > 1000:
        assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_precision_keeps_its_own(dtype: torch.dtype) -> None:
    states = torch.ones(50, 50, dtype=dtype)
    assert quick_dropout(states, 0.3).dtype == dtype
    assert quick_dropout(states.t()[::2], 0.3).shape == (25, 50), "wherever its numbers lie"


def test_a_run_draws_from_its_own_seed(save_small: Callable[..., Path], one_thread: None) -> None:
    def losses(seed: int) -> list[float]:
        model = LLMForSequenceClassification.from_pretrained(save_small("Bert", hidden_dropout_prob=0.5))
        settings = TrainSettings(epochs=2, batch_size=8, lr=1e-3, precision="f32", seed=seed)
        dataset = TextDataset(small_rows(24), model.tokenizer)
        result = LLMTrainer(model, settings=settings, log_every=1).train(TextDataLoader(dataset, batch_size=8))
        assert not any("forward" in vars(module) for module in model.modules())
        return [loss for _, loss in result.losses]

    assert losses(0) == losses(0) != losses(1)


def test_only_dropping_layers_on_a_cpu_are_touched(save_small: Callable[..., Path]) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert", hidden_dropout_prob=0.5))
    assert not open_dropout(model.network, torch.device("meta")).layers
    opened = open_dropout(model.network, torch.device("cpu"))
    assert opened.layers and all(type(layer) is torch.nn.Dropout for layer in opened.layers)
    layer = opened.layers[0]
    layer.train()
    layer.p = 1.0  # Read at each call
    assert not layer(torch.ones(100)).any()
    layer.eval()
    assert layer(torch.ones(100)).all(), "asked, a model drops nothing"
    opened.close()
