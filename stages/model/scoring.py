"""Exact perplexity of a token stream.

Definitions, for a stream of N tokens whose documents have B UTF-8 bytes and W words:
    loss           total negative log-likelihood in nats / (N - 1)
    ppl            exp(loss)
    bits_per_byte  total negative log-likelihood / ln 2 / B
    word_ppl       exp(total negative log-likelihood / W)
    unigram_ppl    ppl of the model that only counts how often each token is in train (add-one)
Every token but the first is predicted once, in the first window that reaches it
(https://huggingface.co/docs/transformers/perplexity).
"""

import math
from collections.abc import Iterator

from stages.common.devices import autocast
from stages.common.errors import UserError
from stages.common.paths import BLOCKS
from stages.model import gpt2
from stages.text.streams import Split

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import GPT2LMHeadModel

DOCUMENT_ROWS = 500


def figures_of(model: GPT2LMHeadModel, split: Split, settings, end_of_text: int | None = None) -> tuple[dict, dict]:
    """A split's figures, and the tables behind two plots: loss by position and by document.

    Args:
        model: GPT-2 of any size.
        split: the token stream.
        settings: the evaluate group.
        end_of_text: id that ends a document; None: no tables.
    Returns:
        figures: loss, ppl, bits_per_byte, word_ppl, tokens, bytes.
        tables: loss_by_position (position, loss) and loss_by_document (rank, document, tokens, loss),
            sorted by loss. With 2 * DOCUMENT_ROWS documents or more, a row is a run of them, and
            `document` the first.
    Raises:
        UserError: the model's vocabulary is too small for the tokens, or stride above its positions.
    """
    T = gpt2.block_size_of(model.config)
    stride = settings.stride or T
    if stride > T:
        raise UserError(f"evaluate.stride: {stride} is above the model's block_size {T}")
    if model.config.vocab_size < split.vocab_size:
        raise UserError(
            f"the model has {model.config.vocab_size:,} tokens, {BLOCKS} {split.vocab_size:,}: run `dvc repro`"
        )
    if len(split.tokens) < 2:
        raise UserError(f"{split.name}: no token to predict")
    total = 0.0
    by_position = np.zeros((2, T))
    documents, group = [], 1
    sums, inside = np.zeros(2), 0
    for first, positions, nll in token_losses(model, split, stride, settings.batch_size, settings.precision):
        nll = nll.astype(np.float64)
        total += nll.sum()
        by_position[0] += np.bincount(positions, nll, T)
        by_position[1] += np.bincount(positions, minlength=T)
        if end_of_text is not None:
            ends = np.flatnonzero(split.tokens[first : first + len(nll)] == end_of_text) + 1
            for part in np.split(nll, ends)[:-1]:
                sums, inside = sums + (part.sum(), len(part)), inside + 1
                if inside == group:
                    documents.append(sums)
                    sums, inside = np.zeros(2), 0
                if len(documents) == 2 * DOCUMENT_ROWS:
                    documents, group = [a + b for a, b in zip(documents[::2], documents[1::2])], 2 * group
            rest = nll[ends[-1] :] if len(ends) else nll
            sums = sums + (rest.sum(), len(rest))
    if inside:
        documents.append(sums)
    predicted = len(split.tokens) - 1
    figures = {
        "loss": total / predicted,
        "ppl": math.exp(min(total / predicted, 700.0)),
        "bits_per_byte": total / math.log(2) / split.bytes,
        "word_ppl": math.exp(min(total / max(split.words, 1), 700.0)),
        "tokens": predicted,
        "bytes": split.bytes,
    }
    seen = by_position[1] > 0
    tables = {
        "loss_by_position": pd.DataFrame(
            {"position": np.flatnonzero(seen) + 1, "loss": by_position[0][seen] / by_position[1][seen]}
        ),
        "loss_by_document": pd.DataFrame(
            [{"document": i * group + 1, "tokens": int(n), "loss": s / n} for i, (s, n) in enumerate(documents)],
            columns=["document", "tokens", "loss"],
        ).sort_values(["loss", "document"], ignore_index=True),
    }
    tables["loss_by_document"].insert(0, "rank", tables["loss_by_document"].index + 1)
    return figures, tables


@torch.inference_mode()
def token_losses(
    model: GPT2LMHeadModel, split: Split, stride: int, batch_size: int, precision: str | None = "32-true"
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Negative log-likelihood of every token but the first, in order, a batch of windows at a time.

    Window k holds the inputs [k * stride, k * stride + T) and predicts the token after each. The model
    computes on the device where it is; precision None is that of its training.

    Yields:
        first: index in the stream of the first token scored.
        positions: (n,) int64, where in its window each prediction was made, from 0.
        nll: (n,) float32, nats.
    Raises:
        UserError: the loss of a token is not a finite number.
    """
    T, N = gpt2.block_size_of(model.config), len(split.tokens)
    model.eval()
    precision = precision or getattr(model.config, "precision", None)
    # Windows start at 0, stride, ... until one reaches the last token; all but that one are T long.
    full = max(0, math.ceil((N - 1 - T) / stride)) if N - 1 > T else 0
    starts = [list(range(i, min(i + batch_size, full))) for i in range(0, full, batch_size)]
    with tqdm(
        total=N - 1, desc=f"scoring {split.name}", unit="tokens", unit_scale=True, mininterval=1, disable=None
    ) as bar:
        for windows in [*starts, [full]]:
            length = min(T, N - 1 - windows[-1] * stride)
            batch = np.stack([split.tokens[k * stride : k * stride + length + 1] for k in windows]).astype(np.int64)
            if batch.max() >= model.config.vocab_size:
                raise UserError(
                    f"{BLOCKS}/{split.name}.npy: token id {batch.max()} is outside the model's vocabulary of "
                    f"{model.config.vocab_size:,}: make it again with `dvc repro --force tokenize_blocks`"
                )
            batch = torch.from_numpy(batch).to(model.device)
            with autocast(model.device, precision):
                nll = gpt2.token_losses(model, batch).cpu().numpy()
            if not np.isfinite(nll).all():
                raise UserError(f"{split.name}: the model's loss is not a finite number: train it again")
            # All but the first window score only what the one before did not reach.
            news = [0 if k == 0 else T - stride for k in windows]
            first = windows[0] * stride + news[0] + 1
            positions = np.concatenate([np.arange(new, length) for new in news])
            nll = np.concatenate([row[new:] for row, new in zip(nll, news)])
            bar.update(len(nll))
            yield first, positions, nll


def unigram_ppl(train: Split, split: Split) -> float:
    """Perplexity of a split under token counts of train, plus one each."""

    def counts(tokens: np.ndarray) -> np.ndarray:
        total = np.zeros(train.vocab_size, np.int64)
        for i in range(0, len(tokens), 1 << 22):
            total += np.bincount(tokens[i : i + (1 << 22)], minlength=train.vocab_size)
        return total

    seen = counts(train.tokens) + 1
    predicted = counts(split.tokens[1:])
    return math.exp(-(predicted * np.log(seen / seen.sum())).sum() / predicted.sum())
