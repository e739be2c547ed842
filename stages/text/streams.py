"""data/blocks/: the token stream of each split, and what it was made of.

A split's stream is the end-of-text token, then the documents in file order, each followed by
end-of-text. It lies in SPLIT.npy (uint16 when the vocabulary fits, else uint32; the files of a
long one: text/shards.py) and is mapped into memory at use; SPLIT.documents.npy holds the UTF-8
bytes and words of each document. SPLIT.json holds its counts and a hash of its text, and meta.json
what all splits share: the tokenizer's fingerprint, its vocabulary's size and its end-of-text id.
So one split's text changes no other split's files.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from stages.common.commands import progress_bar
from stages.common.errors import OneProcessError, UserError, note
from stages.common.files import new_folder, write_json, write_text
from stages.common.paths import BLOCKS
from stages.common.settings import Runtime
from stages.text.corpus import Documents
from stages.text.encoding import BATCH_BYTES, Encoder, document_parts, take
from stages.text.engine import in_tasks
from stages.text.shards import TokenFiles, TokenWriter, write_header
from stages.text.tokenizers import COMPARED_BYTES, TextTokenizer, load_tokenizer

import numpy as np

AGAIN = "make it again with `dvc repro tokenize_blocks` (or --force)"


@dataclass
class Split:
    """One split's token stream.

    Args:
        name: train, valid or test.
        tokens: N ids, uint16 or uint32, mapped into memory.
        documents: how many documents it holds.
        bytes: UTF-8 bytes of the documents.
        words: whitespace-separated words of the documents.
        changed_documents: how many of the documents the tokenizer doesn't give back exactly.
        text: a hash of the documents, whatever the tokenizer.
        path: the stream's file.
        vocab_size: every token id is below it.
        tokenizer: the fingerprint of the tokenizer that made it.
        end_of_text: the id after each document.
        sha256: of the stream's bytes.
    """

    name: str
    tokens: TokenFiles
    documents: int
    bytes: int
    words: int
    text: str
    path: Path
    vocab_size: int
    tokenizer: str
    end_of_text: int
    sha256: str
    changed_documents: int

    def windows(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Stretches of the stream: (len(starts), length) int64; alone, one at the end may be shorter.

        Raises:
            OneProcessError: a token id is outside the vocabulary.
        """
        windows = np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise OneProcessError(
                f"{self.path}: token id {windows.max()} is outside the vocabulary of {self.vocab_size:,}: "
                "make it again with `dvc repro --force tokenize_blocks`"
            )
        return windows

    def sizes(self) -> np.ndarray:
        """Bytes and words of each document: (documents, 2) uint64, mapped into memory.

        Raises:
            UserError: their file is missing, or not of as many documents.
        """
        file = self.path.with_suffix(".documents.npy")
        try:
            sizes = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: can't be read ({error}): {AGAIN}") from None
        if sizes.shape != (self.documents, 2):
            raise UserError(f"{file}: {sizes.shape} is not of {self.documents:,} documents: {AGAIN}")
        return sizes


def load_split(name: str, folder: str | Path = BLOCKS) -> Split:
    """Maps a split's token stream.

    Raises:
        UserError: it is missing, or not what its .json files say.
    """
    path = Path(folder, f"{name}.npy")
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        counts = json.loads(path.with_suffix(".json").read_text())
        return Split(
            name,
            TokenFiles(path, counts["tokens"], token_dtype(meta["vocab_size"])),
            path=path,
            **{key: meta[key] for key in ("vocab_size", "tokenizer", "end_of_text")},
            **{key: counts[key] for key in ("documents", "bytes", "words", "text", "sha256")},
            changed_documents=counts.get("changed_documents", 0),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path}: can't be read as token blocks ({error}): {AGAIN}") from None


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_blocks(
    splits: dict[str, Documents],
    tokenizer_folder: str | Path,
    target: str | Path,
    lossy: str = "allow",
    runtime: Runtime | None = None,
) -> dict:
    """Writes the token stream of each split, its counts, and meta.json.

    Args:
        splits: the documents of each split.
        tokenizer_folder: a folder that `load_tokenizer` reads.
        target: the folder to make.
        lossy: refuse or allow: a tokenizer that doesn't give the exact text back.
        runtime: in how many tasks, and who runs them; None: one, in this process.
    Returns:
        tokens, documents, bytes, words and sha256 of each split, and what of it isn't given back.
    Raises:
        UserError: a tokenizer that can't be read, or that changes the text and lossy is refuse.
    """
    paths = {split: documents.path for split, documents in splits.items()}
    inputs = [*paths.values(), *sorted(Path(tokenizer_folder).glob("*"))]
    work = partial(write_part, paths=paths, tokenizer_folder=str(tokenizer_folder), lossy=lossy)
    with new_folder(target) as folder, in_tasks(work, folder, inputs, runtime) as parts:
        counts = {split: join(folder / f"{split}.npy", parts, documents) for split, documents in splits.items()}
        changes = {split: count.pop("first") for split, count in counts.items()}
        for split, count in counts.items():
            write_json(folder / f"{split}.json", count)
        write_text(folder / "meta.json", (parts[0] / "meta.json").read_text())
    say_changes(counts, changes)
    return counts


def write_part(folder: Path, rank: int, tasks: int, paths: dict[str, Path], tokenizer_folder: str, lossy: str) -> None:
    """Writes the share of one task: of each split, the stream and counts of as many record batches as each other's.

    Args:
        paths: the documents' file of each split.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.speed_up()
    splits = {split: Documents(split, path.parent) for split, path in paths.items()}
    if tasks > 1:
        encode_beginning(tokenizer, splits)
    for split, documents in splits.items():
        share = documents.share(rank, tasks)
        encoder = Encoder(tokenizer, str(documents.path), lossy, partial(documents.count, range(share.start)))
        opening = [tokenizer.end_of_text] if rank == 0 else []
        write_json(folder / f"{split}.json", write_stream(folder / f"{split}.npy", encoder, documents, share, opening))
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
    }
    write_json(folder / "meta.json", meta)


def write_stream(target: Path, encoder: Encoder, documents: Documents, share: range, opening: list[int]) -> dict:
    """Writes one split's stream, or a share of it, in memory that doesn't grow with the text.

    Args:
        share: which of the documents' record batches.
        opening: ids before those of the first document.
    """
    tokenizer = encoder.tokenizer
    with (
        closing(TokenWriter(target, token_dtype(tokenizer.vocab_size))) as stream,
        target.with_suffix(".documents.npy").open("wb") as sizes,
        progress_bar(documents.size, documents.name) as bar,
    ):
        write_header(sizes, (0, 2), np.dtype(np.uint64))
        texts = documents.documents(share)
        parts = chain.from_iterable(document_parts(text, encoder.path, tokenizer.cut) for text in texts)
        for ids in chain([np.array(opening)], encoder.streams(parts)):
            stream.write(ids)
            sizes.write(np.array(encoder.sizes, np.uint64).data)
            encoder.sizes.clear()
            bar.update(encoder.bytes - bar.n)
            documents.release()
        bar.update(documents.size - bar.n)
        sizes.seek(0)
        write_header(sizes, (encoder.documents, 2), np.dtype(np.uint64))
    sha256 = stream.digest.hexdigest()
    return {"tokens": stream.count} | encoder.counts() | {"sha256": sha256, "first": encoder.changes.first}


def encode_beginning(tokenizer: TextTokenizer, splits: dict[str, Documents]) -> None:
    """Lets each task decide by the same text whether a faster library has the same ids."""
    documents = ((document, path) for path, split in splits.items() for document in split.documents())
    parts = chain.from_iterable(document_parts(document, path, tokenizer.cut) for document, path in documents)
    for _ in range(-(-COMPARED_BYTES // BATCH_BYTES)):
        if texts := [text for text, _ in take(parts)]:
            tokenizer.encode_batch(texts)


def join(target: Path, parts: list[Path], documents: Documents) -> dict:
    """One split's stream of the shares of all tasks; returns its counts."""
    counts = [json.loads((part / f"{documents.name}.json").read_text()) for part in parts]
    if parts == [target.parent]:
        return counts[0]
    first, before, text = None, 0, hashlib.sha256()
    for count in counts:
        if first is None and count["first"]:
            first = [before + count["first"][0], *count["first"][1:]]
        before += count["documents"]
    with progress_bar(documents.size, f"joining {documents.name}") as bar:
        for document in documents.documents():
            text.update(document)
            text.update(len(document).to_bytes(8, "little"))
            bar.update(len(document))
    total = {key: sum(count[key] for count in counts) for key in counts[0] if key not in ("text", "sha256", "first")}
    dtype = token_dtype(json.loads((parts[0] / "meta.json").read_text())["vocab_size"])
    with closing(TokenWriter(target, dtype)) as stream:
        for part, count in zip(parts, counts, strict=True):
            for ids in TokenFiles(part / target.name, count["tokens"], dtype).chunks():
                stream.write(ids)
    with target.with_suffix(".documents.npy").open("wb") as sizes:
        write_header(sizes, (total["documents"], 2), np.dtype(np.uint64))
        for part in parts:
            sizes.write(np.load(part / f"{target.stem}.documents.npy", mmap_mode="r").data)
    return total | {"text": text.hexdigest(), "sha256": stream.digest.hexdigest(), "first": first}


def token_figures(counts: dict) -> dict:
    """What metrics/tokens.json says of a split: how much text a token is, and what the tokenizer doesn't give back.

    Args:
        counts: one of those that `write_blocks` returns.
    """
    shares = {"lost_characters": "characters", "unknown_tokens": "tokens"}
    return {
        "tokens": counts["tokens"],
        "bytes_per_token": counts["bytes"] / counts["tokens"],
        "documents": counts["documents"],
        "changed_documents": counts.get("changed_documents", 0),
        **{key: counts.get(key, 0) / counts.get(of, 1) for key, of in shares.items()},
    }


def say_changes(counts: dict[str, dict], first: dict[str, tuple[int, str, str] | None]) -> None:
    """One note on a tokenizer that doesn't give the exact text back.

    Args:
        counts: what `write_blocks` returns.
        first: the first difference in each split.
    """
    changed = [split for split in counts if first[split]]
    if changed:
        number, text, back = first[changed[0]]
        many = ", ".join(f"{counts[s]['changed_documents']:,} of {counts[s]['documents']:,} {s}" for s in changed)
        note(
            f"the tokenizer changes the text of {many} documents, first {text!r} to {back!r} in {changed[0]} document "
            f"{number:,}: bytes and words are those of the original text"
        )
