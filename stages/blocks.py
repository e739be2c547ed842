"""data/blocks/: the token stream of each split, and what it was made of.

A split's stream is the end-of-text token, then the documents in file order, each followed by
end-of-text. It lies in SPLIT.npy (uint16 when the vocabulary fits, else uint32) and is mapped
into memory at use. SPLIT.json holds its counts, and meta.json what all splits share: the
tokenizer's fingerprint, its vocabulary's size and its end-of-text id. So one split's text
changes no other split's files.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stages.settings import UserError

FOLDER = "data/blocks"
SPLITS = ("train", "valid", "test")


@dataclass
class Split:
    """One split's token stream.

    Args:
        name: train, valid or test.
        tokens: (N,) uint16 or uint32, mapped into memory.
        documents: how many documents it holds.
        bytes: UTF-8 bytes of the documents.
        words: whitespace-separated words of the documents.
        vocab_size: every token id is below it.
        tokenizer: the fingerprint of the tokenizer that made it.
        sha256: of the stream's bytes.
    """

    name: str
    tokens: np.ndarray
    documents: int
    bytes: int
    words: int
    vocab_size: int
    tokenizer: str
    sha256: str


def load_split(name: str, folder: str | Path = FOLDER) -> Split:
    """Maps a split's token stream.

    Raises:
        UserError: it is missing, or not what its .json files say.
    """
    path = Path(folder, f"{name}.npy")
    again = "make it again with `dvc repro tokenize_blocks` (or --force)"
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        counts = json.loads(path.with_suffix(".json").read_text())
        split = Split(
            name,
            tokens,
            vocab_size=meta["vocab_size"],
            tokenizer=meta["tokenizer"],
            **{key: counts[key] for key in ("documents", "bytes", "words", "sha256")},
        )
        expected = counts["tokens"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path}: can't be read as token blocks ({error}): {again}") from None
    if tokens.shape != (expected,) or tokens.dtype != token_dtype(split.vocab_size):
        raise UserError(f"{path}: {tokens.dtype} {tokens.shape} is not what its .json files say: {again}")
    return split


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def load_tokenizer(folder: str | Path) -> tuple[Tokenizer, int, str]:
    """The tokenizer of a folder, its end-of-text id and its fingerprint.

    Text that spells a special token is encoded as the text that it is.

    Raises:
        UserError: the folder holds no tokenizer that works.
    """
    try:
        raw = Path(folder, "tokenizer.json").read_bytes()
        tokenizer = Tokenizer.from_buffer(raw)
        config = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        end_of_text = config["eos_token"]
        end_of_text = end_of_text["content"] if isinstance(end_of_text, dict) else end_of_text
    except Exception as error:  # tokenizers raises plain Exception
        why = " ".join(str(error).split())
        raise UserError(f"{folder}: no working tokenizer ({why}): make it again with `dvc repro`") from None
    end_of_text_id = tokenizer.token_to_id(str(end_of_text))
    if end_of_text_id is None:
        raise UserError(f"{folder}: its end-of-text token {end_of_text!r} is not in its vocabulary")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, end_of_text_id, fingerprint(tokenizer, end_of_text_id)


def fingerprint(tokenizer: Tokenizer, end_of_text_id: int) -> str:
    """Of what decides the token ids: however often a tokenizer is saved anew, it stays the same."""
    state = json.loads(tokenizer.to_str())
    for key in ("version", "truncation", "padding", "post_processor"):
        state.pop(key, None)
    state["end_of_text_id"] = end_of_text_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the highest id: what an embedding must hold (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
