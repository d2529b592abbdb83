"Models that only count: what a language model has to beat, on the same tokens."

from __future__ import annotations

import numpy as np


def ngram_losses(train: np.ndarray, heldout: np.ndarray, n_tokens: int, highest: int = 5) -> dict[int, float]:
    """Nats a token of interpolated n-gram models of order 1 to `highest`, on the tokens that all can foretell.

    Each order's counts are interpolated with the order below by Witten-Bell smoothing (Bell, Cleary and Witten,
    *Text Compression*, 1990): weight n / (n + t) for a context seen n times with t different successors.
    """
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    unigram = np.bincount(train, minlength=n_tokens).astype(np.float64)
    probability = (unigram[heldout] + 0.5) / (unigram.sum() + 0.5 * n_tokens)
    losses = {1: float(-np.log(probability[highest - 1 :]).mean())}
    gram, gram_heldout = train, heldout  # The number of the n-gram that ends at each place; -1 for one never seen
    for order in range(2, highest + 1):
        keys, numbers, counts = np.unique(gram[:-1] * n_tokens + train[1:], return_inverse=True, return_counts=True)
        n_contexts = max(n_tokens, gram.max() + 1)
        n_seen = np.bincount(keys // n_tokens, counts, minlength=n_contexts)  # Successors of each context
        n_kinds = np.bincount(keys // n_tokens, minlength=n_contexts)  # Different ones
        context = gram_heldout[:-1]
        wanted = np.where(context >= 0, context * n_tokens + heldout[1:], -1)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = keys[at] == wanted
        seen = np.where(context >= 0, n_seen[context], 0)
        kinds = np.where(context >= 0, n_kinds[context], 0)
        below = probability[1:]
        mixed = (counts[at] * found + kinds * below) / np.maximum(seen + kinds, 1)
        probability = np.where(seen > 0, mixed, below)
        losses[order] = float(-np.log(probability[highest - order :]).mean())
        train, heldout = train[1:], heldout[1:]
        gram, gram_heldout = numbers.astype(np.int64), np.where(found, at, -1)
    return losses
