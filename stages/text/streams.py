"""data/blocks/: the token stream of each split, and what it was made of.

A split's stream is the end-of-text token, then the documents in file order, each followed by
end-of-text. It lies in SPLIT.npy (uint16 when the vocabulary fits, else uint32) and is mapped
into memory at use. SPLIT.json holds its counts, and meta.json what all splits share: the
tokenizer's fingerprint, its vocabulary's size and its end-of-text id. So one split's text
changes no other split's files.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from stages.common.errors import UserError
from stages.common.files import new_folder
from stages.common.paths import BLOCKS
from stages.text.documents import document_spans, open_text, pieces
from stages.text.tokenizers import check_round_trip, load_tokenizer, loses_no_byte, vocab_size_of

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

BATCH_BYTES = 1 << 21  # enough for every core; the encodings of one batch take up to 100 times as much


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


def load_split(name: str, folder: str | Path = BLOCKS) -> Split:
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


def write_blocks(files: dict[str, str], document: str, tokenizer_folder: str | Path, target: str | Path) -> dict:
    """Writes the token stream of each split, its counts, and meta.json.

    Args:
        files: the text file of each split.
        document: blank_line, line or file.
        tokenizer_folder: a folder that `load_tokenizer` reads.
        target: the folder to make.
    Returns:
        tokens, documents, bytes, words and sha256 of each split.
    Raises:
        UserError: a file that is missing, empty, blank or not UTF-8; a tokenizer that changes the text.
    """
    tokenizer, end_of_text, fingerprint = load_tokenizer(tokenizer_folder)
    vocab_size = vocab_size_of(tokenizer)
    for path in files.values():
        with open_text(path):
            pass  # all files are there before the long work on the first begins
    with new_folder(target) as folder:
        counts = {
            split: write_stream(folder / f"{split}.npy", path, document, tokenizer, end_of_text, vocab_size)
            for split, path in files.items()
        }
        meta = {"tokenizer": fingerprint, "vocab_size": vocab_size, "end_of_text": end_of_text}
        for name, content in {**counts, "meta": meta}.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return counts


def write_stream(
    target: Path, path: str, document: str, tokenizer: Tokenizer, end_of_text: int, vocab_size: int
) -> dict:
    """Writes one split's stream to an .npy file, in memory that doesn't grow with the text."""
    dtype = token_dtype(vocab_size)
    check = None if loses_no_byte(tokenizer) else tokenizer
    counts = {"tokens": 0, "documents": 0, "bytes": 0, "words": 0}
    digest = hashlib.sha256()
    with (
        open_text(path) as text,
        target.open("wb") as file,
        tqdm(total=len(text), unit="B", unit_scale=True, desc=path, mininterval=1, disable=None) as bar,
    ):

        def write(ids: np.ndarray) -> None:
            file.write(ids.data)
            digest.update(ids.data)
            counts["tokens"] += len(ids)

        # The header has a fixed size, so it can be written again once the length is known.
        np.lib.format.write_array_header_1_0(file, header(0, dtype))
        write(np.array([end_of_text], dtype))
        done, inside_word = 0, False
        for batch, ids in encoded(tokenizer, document_pieces(text, document, path)):
            if check is not None:
                check_round_trip(check, batch, ids, path)
            write(
                np.fromiter(
                    chain.from_iterable(chain(i, (end_of_text,)) if end else i for i, (_, end, _) in zip(ids, batch)),
                    dtype,
                )
            )
            for piece, end, _ in batch:
                counts["documents"] += end
                counts["bytes"] += len(piece.encode())
                counts["words"] += len(piece.split())
                # A word that is longer than a piece counts once.
                counts["words"] -= inside_word and not piece[:1].isspace()
                inside_word = not end and not piece[-1:].isspace()
            bar.update(batch[-1][2] - done)
            done = batch[-1][2]
        bar.update(len(text) - done)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header(counts["tokens"], dtype))
    if counts["documents"] == 0:
        raise UserError(f"{path}: only white space: it has no document")
    return counts | {"sha256": digest.hexdigest()}


def header(length: int, dtype: np.dtype) -> dict:
    return {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}


def document_pieces(text, document: str, path: str) -> Iterator[tuple[str, bool, int]]:
    """Pieces of documents in file order: the text, whether it ends its document, and where it ends."""
    for start, end in document_spans(text, document):
        here = start
        for piece in pieces(text, start, end, path):
            here += len(piece.encode())
            yield piece, here == end, here


def encoded(tokenizer: Tokenizer, parts: Iterator) -> Iterator[tuple[list, list[list[int]]]]:
    """Batches of pieces and their token ids. The tokenizer works on the next batch meanwhile."""
    batch, encoding = [], None
    with ThreadPoolExecutor(1) as thread:
        while True:
            following = list(take(parts, BATCH_BYTES))
            encodings = encoding.result() if batch else []
            texts = [piece for piece, _, _ in following]
            encoding = thread.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)
            ids = [each.ids for each in encodings]
            del encodings
            if batch:
                yield batch, ids
            if not following:
                return
            batch = following


def take(parts: Iterator, limit: int) -> Iterator:
    size = 0
    for part in parts:
        yield part
        size += len(part[0])
        if size >= limit:
            return
