"""Makes metrics/eval.json, the data of plots and metrics/samples.md from models/gpt2/.

With --model DIR_OR_CKPT it measures any GPT-2 folder or training checkpoint instead, on
valid_file and test_file, and prints the figures without writing a file.

Definitions, for a split of N tokens whose documents have B UTF-8 bytes and W words:
    loss           total negative log-likelihood in nats / (N - 1)
    ppl            exp(loss)
    bits_per_byte  total negative log-likelihood / ln 2 / B
    word_ppl       exp(total negative log-likelihood / W)
    unigram_ppl    ppl of the model that only counts how often each token is in train (add-one)
Every token but the first is predicted once, in the first window that reaches it
(https://huggingface.co/docs/transformers/perplexity).
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from stages import gpt2, ops
from stages.atomic import write_text
from stages.blocks import FOLDER, Split, load_split, load_tokenizer
from stages.generate import continuation
from stages.gpt2 import load_model
from stages.settings import UserError, load, make_parser, run, take_option
from stages.tokenize_blocks import write_blocks

MODEL = Path("models/gpt2")
TOKENIZER = Path("models/tokenizer")
METRICS = Path("metrics")
CHECKPOINTS = Path("models/checkpoints")
DOCUMENT_ROWS = 500


def main() -> None:
    checkpoint, argv = take_option("--model")
    settings = load(make_parser("evaluate", __doc__), argv)
    ops.reuse_memory()
    if checkpoint is not None:
        model, tokenizer_folder = load_checkpoint(Path(checkpoint))
        with tempfile.TemporaryDirectory() as folder:
            files = {"valid": settings.data.valid_file, "test": settings.data.test_file}
            write_blocks(files, settings.data.document, tokenizer_folder, folder)
            figures = {name: figures_of(model, load_split(name, folder), settings.evaluate)[0] for name in files}
        print(json.dumps(figures, indent=2))
        return

    model = load_model(MODEL)
    tokenizer = load_tokenizer(MODEL)
    train = load_split("train")
    if train.tokenizer != tokenizer[2]:
        raise UserError(f"{FOLDER} was made by another tokenizer than {MODEL}'s: run `dvc repro`")
    figures, plots = {}, {}
    for name in ("valid", "test"):
        split = load_split(name)
        figures[name], plots[name] = figures_of(model, split, settings.evaluate, tokenizer[1])
        figures[name]["unigram_ppl"] = unigram_ppl(train, split)
    samples = [
        continuation(model, tokenizer, prompt, settings.generate, settings.generate.seed)
        for prompt in settings.generate.prompts
    ]
    write_text(METRICS / "eval.json", json.dumps(figures, indent=2) + "\n")
    write_text(METRICS / "samples.md", samples_page(settings.generate.prompts, samples))
    for name, table in plots["test"].items():
        write_text(METRICS / f"{name}.csv", table.to_csv(index=False))
    remove_checkpoints()
    shown = {
        split: {key: f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for key, value in row.items()}
        for split, row in figures.items()
    }
    print(pd.DataFrame(shown).to_string())
    print(f"figures: {METRICS}/eval.json   samples: {METRICS}/samples.md   plots: `dvc plots show`")


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
    T = model.config.n_positions
    stride = settings.stride or T
    if stride > T:
        raise UserError(f"evaluate.stride: {stride} is above the model's block_size {T}")
    if model.config.vocab_size < split.vocab_size:
        raise UserError(
            f"the model has {model.config.vocab_size:,} tokens, {FOLDER} {split.vocab_size:,}: run `dvc repro`"
        )
    if len(split.tokens) < 2:
        raise UserError(f"{split.name}: no token to predict")
    total = 0.0
    by_position = np.zeros((2, T))
    documents, group = [], 1
    sums, inside = np.zeros(2), 0
    for first, positions, nll in token_losses(model, split, stride, settings.batch_size):
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
        "ppl": math.exp(total / predicted),
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
    model: GPT2LMHeadModel, split: Split, stride: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Negative log-likelihood of every token but the first, in order, a batch of windows at a time.

    Window k holds the inputs [k * stride, k * stride + T) and predicts the token after each.

    Yields:
        first: index in the stream of the first token scored.
        positions: (n,) int64, where in its window each prediction was made, from 0.
        nll: (n,) float32, nats.
    Raises:
        UserError: the loss of a token is not a finite number.
    """
    T, N = model.config.n_positions, len(split.tokens)
    model.eval()
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
                    f"{FOLDER}/{split.name}.npy: token id {batch.max()} is outside the model's vocabulary of "
                    f"{model.config.vocab_size:,}: make it again with `dvc repro --force tokenize_blocks`"
                )
            batch = torch.from_numpy(batch).to(model.device)
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


def load_checkpoint(path: Path) -> tuple[GPT2LMHeadModel, Path]:
    """The model of a GPT-2 folder or Lightning checkpoint, and the folder of its tokenizer.

    Raises:
        UserError: it is neither, or damaged, or a pickle that would run code.
    """
    if path.is_dir():
        return load_model(path), path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT2LMHeadModel(GPT2Config.from_dict(checkpoint["gpt2_config"]))
        weights = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"--model: {path}: no such file or folder") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        why = str(error).strip().split("\n")[0]
        raise UserError(f"--model: {path} is no checkpoint of this project's train stage: {why}") from None
    if checkpoint["tokenizer"] != load_tokenizer(TOKENIZER)[2]:
        raise UserError(f"--model: {path} was trained with another tokenizer than {TOKENIZER}")
    return model, TOKENIZER


def remove_checkpoints() -> None:
    """Deletes the checkpoints of the finished training: DVC recorded its stage before it started this one."""
    try:
        run = json.loads((METRICS / "run.json").read_text())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the model came from DVC's cache
    for finished in CHECKPOINTS.glob("*/final.ckpt"):
        if finished.parent.name == run:
            shutil.rmtree(finished.parent)


def samples_page(prompts: list[str], samples: list[str]) -> str:
    parts = ["# Samples of the trained model\n"]
    for prompt, text in zip(prompts, samples, strict=True):
        quoted = "\n".join(f"    {line}" for line in text.split("\n"))
        parts.append(f"Prompt: {json.dumps(prompt, ensure_ascii=False)}\n\n{quoted}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    run(main)
