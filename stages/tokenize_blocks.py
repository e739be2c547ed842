"""Makes data/blocks/: the token streams of train_file, valid_file and test_file, ready to be mapped."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tqdm import tqdm

from stages.atomic import new_folder
from stages.blocks import FOLDER, load_tokenizer, token_dtype, vocab_size_of
from stages.settings import UserError, load, make_parser, run
from stages.text import document_spans, open_text, pieces

TOKENIZER = "models/tokenizer"
BATCH_BYTES = 1 << 21  # enough for every core; the encodings of one batch take up to 100 times as much


def main() -> None:
    settings = load(make_parser("tokenize_blocks", __doc__))
    files = {"train": settings.data.train_file, "valid": settings.data.valid_file, "test": settings.data.test_file}
    counts = write_blocks(files, settings.data.document, TOKENIZER, FOLDER)
    for split, count in counts.items():
        print(f"{split}: {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes")


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


def loses_no_byte(tokenizer: Tokenizer) -> bool:
    """Whether its kind guarantees that decoding gives the exact text: byte-level, and nothing normalized."""
    return (
        tokenizer.normalizer is None
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        and not tokenizer.pre_tokenizer.add_prefix_space
        and isinstance(tokenizer.decoder, decoders.ByteLevel)
        and set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()
    )


def check_round_trip(tokenizer: Tokenizer, batch: list, ids: list[list[int]], path: str) -> None:
    for (piece, _, end), decoded in zip(batch, tokenizer.decode_batch(ids, skip_special_tokens=False)):
        if decoded != piece:
            at = next((i for i, (a, b) in enumerate(zip(piece, decoded)) if a != b), min(len(piece), len(decoded)))
            offset = end - len(piece[at:].encode())
            raise UserError(
                f"{path}: at byte offset {offset:,}, the tokenizer gives back {decoded[at : at + 10]!r} "
                f"for {piece[at : at + 10]!r}: set tokenizer.tokenizer_model to one that loses nothing"
            )


if __name__ == "__main__":
    run(main)
