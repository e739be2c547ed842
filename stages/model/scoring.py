"""Exact perplexity of a token stream.

Definitions, for a stream of N tokens whose documents have B UTF-8 bytes and W words:
    loss           total negative log-likelihood in nats / (N - 1)
    ppl            exp(loss)
    bits_per_byte  total negative log-likelihood / ln 2 / B
    word_ppl       exp(total negative log-likelihood / W)
    unigram_ppl    ppl of the model that only counts how often each token is in train (add-one)
Every token but the first is predicted once, in the first window that reaches it
(https://huggingface.co/docs/transformers/perplexity). Losses are added up as whole numbers of UNIT, so that the sums
are the same in any order; from 0.125 nats on, that is the very float32 that the model gives.
"""

import math
from collections.abc import Iterator

from stages.common import processes
from stages.common.commands import progress_bar
from stages.common.devices import autocast
from stages.common.errors import UserError
from stages.common.paths import BLOCKS
from stages.common.settings import Evaluate
from stages.model import gpt2
from stages.model.intervals import MAX_LOG, interval, perplexity
from stages.text.corpus import equal_share
from stages.text.leakage import LONG_WORD_BYTES
from stages.text.streams import Split

import numpy as np
import pandas as pd
import torch
from transformers import GPT2LMHeadModel

DOCUMENT_ROWS = 1000
UNIT = 2.0**-26  # nats; int64 holds 10**11 of them, and float64, of one batch, 10**8


def figures_of(model: GPT2LMHeadModel, split: Split, settings: Evaluate) -> tuple[dict, dict, dict]:
    """A split's figures, what stands beside them, and the tables that they are sums of.

    Args:
        model: GPT-2 of any size.
        split: the token stream.
        settings: the evaluate group.
    Returns:
        figures: ppl, bits_per_byte, loss.
        details: tokens, bytes, words, word_ppl where the text has words, ppl_low and ppl_high (the 95 %
            interval over documents, where there are two), and what decides whether two runs' figures
            compare: text, stride, tokenizer, changed_documents.
        tables: documents (document, tokens, bytes, words, nll in nats), in order: above DOCUMENT_ROWS
            documents a row is a run of them, and `document` the first; loss_by_position (position, loss).
    Raises:
        UserError: the model's vocabulary is too small for the tokens, or stride above its positions.
    """
    stride = checked_stride(model, split, settings.stride)
    documents, by_position = losses_of(model, split, stride, settings)
    total, predicted = float(documents["nll"].sum()), len(split.tokens) - 1
    figures = {
        "ppl": perplexity(total / predicted),
        "bits_per_byte": total / math.log(2) / split.bytes,
        "loss": total / predicted,
    }
    details = {"tokens": predicted, "bytes": split.bytes, "words": split.words}
    if split.bytes < LONG_WORD_BYTES * split.words and total / split.words < MAX_LOG:
        details["word_ppl"] = math.exp(total / split.words)
    if len(documents) > 1:
        ends = interval(documents["nll"].to_numpy(), documents["tokens"].to_numpy())
        details["ppl_low"], details["ppl_high"] = map(perplexity, ends)
    details |= {"text": split.text, "stride": stride, "tokenizer": split.tokenizer}
    details["changed_documents"] = split.changed_documents
    return figures, details, {"documents": documents, "loss_by_position": by_position}


def checked_stride(model: GPT2LMHeadModel, split: Split, stride: int | None) -> int:
    """Tokens between the starts of two windows. Raises UserError when the model can't score the split so."""
    T = gpt2.block_size_of(model.config)
    if (stride or T) > T:
        raise UserError(f"evaluate.stride: {stride} is above the model's block_size {T}")
    if model.config.vocab_size < split.vocab_size:
        raise UserError(
            f"the model has {model.config.vocab_size:,} tokens, {BLOCKS} {split.vocab_size:,}: run `dvc repro`"
        )
    if len(split.tokens) < 2:
        raise UserError(f"{split.name}: no token to predict")
    return stride or T


def losses_of(
    model: GPT2LMHeadModel, split: Split, stride: int, settings: Evaluate
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `figures_of`: nats of each document with its end-of-text, and loss by position."""
    T, group = gpt2.block_size_of(model.config), -(-split.documents // DOCUMENT_ROWS)
    documents, ended, mistake = sizes_of_rows(split, group), None, ""
    by_position, by_row = np.zeros((2, T), np.int64), np.zeros((2, len(documents)), np.int64)
    try:
        for first, positions, nll in token_losses(model, split, stride, settings.batch_size, settings.precision):
            ended = ended_before(split, first) if ended is None else ended
            ends = split.tokens[first : first + len(nll)] == split.end_of_text
            row = (ended + np.cumsum(ends) - ends) // group  # an end-of-text is its document's last token
            ended += int(ends.sum())
            for sums, keys in ((by_position, positions), (by_row, row)):
                sums[0] += np.bincount(keys, np.rint(nll / UNIT), sums.shape[1]).astype(np.int64)
                sums[1] += np.bincount(keys, minlength=sums.shape[1])
    except UserError as error:
        mistake = str(error)
    by_position, by_row, mistakes = zip(*processes.gather((by_position, by_row, mistake)))
    if any(mistakes):
        raise UserError(next(filter(None, mistakes)))
    (nll, predicted), (row_nll, documents["tokens"]) = sum(by_position), sum(by_row)
    documents["nll"], seen = row_nll * UNIT, predicted > 0
    positions = {"position": np.flatnonzero(seen) + 1, "loss": nll[seen] * UNIT / predicted[seen]}
    return documents.reindex(columns=["document", "tokens", "bytes", "words", "nll"]), pd.DataFrame(positions)


def ended_before(split: Split, first: int) -> int:
    """How many documents end before a token of the stream, which begins with an end-of-text that ends none."""
    return sum(int((ids == split.end_of_text).sum()) for ids in split.tokens.chunks(1, first))


def sizes_of_rows(split: Split, group: int) -> pd.DataFrame:
    """The first document, bytes and words of each run of `group` documents."""
    starts = np.arange(0, split.documents, group)
    sizes = np.add.reduceat(split.sizes(), starts, axis=0, dtype=np.int64)
    return pd.DataFrame({"document": starts + 1, "bytes": sizes[:, 0], "words": sizes[:, 1]})


@torch.inference_mode()
def token_losses(
    model: GPT2LMHeadModel, split: Split, stride: int, batch_size: int, precision: str | None = "32-true"
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Negative log-likelihood of every token but the first, in order, a batch of windows at a time.

    Window k holds the inputs [k * stride, k * stride + T) and predicts the token after each. The model
    computes on the device where it is; precision None is that of its training. Of several processes each
    yields a run of the batches that one process would, of as many as every other.

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
    full = max(0, math.ceil((N - 1 - T) / stride))
    batches = [range(i, min(i + batch_size, full)) for i in range(0, full, batch_size)] + [range(full, full + 1)]
    rank, _, size = processes.launched()
    share = equal_share(len(batches), rank, size)
    with progress_bar(-(-(N - 1) // size), f"scoring {split.name}", "tokens", shown=rank == 0) as bar:
        for windows in batches[share.start : share.stop]:
            nll = window_losses(model, split, [k * stride for k in windows], precision)
            if not np.isfinite(nll).all():
                raise UserError(f"{split.name}: the model's loss is not a finite number: train it again")
            # All but the first window score only what the one before did not reach.
            news = [0 if k == 0 else T - stride for k in windows]
            first = windows[0] * stride + news[0] + 1
            positions = np.concatenate([np.arange(new, nll.shape[1]) for new in news])
            nll = np.concatenate([row[new:] for row, new in zip(nll, news)])
            bar.update(len(nll))
            yield first, positions, nll


def window_losses(model: GPT2LMHeadModel, split: Split, starts: list[int], precision: str | None) -> np.ndarray:
    """Negative log-likelihoods in the windows that begin at `starts`: (len(starts), T or, alone at the end, less)."""
    length = min(gpt2.block_size_of(model.config), len(split.tokens) - 1 - starts[-1])
    batch = torch.from_numpy(split.windows(starts, length + 1)).to(model.device)
    with autocast(model.device, precision):
        return gpt2.token_losses(model, batch).cpu().numpy()


def token_counts(split: Split, first: int = 0) -> np.ndarray:
    """How often each token is in a split, from the first-th on: (vocab_size,) int64."""
    counts = np.zeros(split.vocab_size, np.int64)
    for tokens in split.tokens.chunks(first):
        counts += np.bincount(tokens, minlength=split.vocab_size)
    return counts


def unigram_ppl(train: np.ndarray, split: Split) -> float:
    """Perplexity of a split under token counts of train, plus one each."""
    seen, predicted = train + 1, token_counts(split, 1)
    return math.exp(-(predicted * np.log(seen / seen.sum())).sum() / predicted.sum())
