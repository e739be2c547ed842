"""The documents of each split from the files that the settings name.

Where valid_file or test_file is the path of train_file, documents are held out of it by a hash of their
text: equal ones are never on two sides, and text that is added moves none.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from stages.common.commands import progress_bar
from stages.common.errors import UserError, note
from stages.common.settings import Data
from stages.text.corpus import Documents, write_documents
from stages.text.leakage import mixed
from stages.text.sources import check_unchanged, find_files, read_source

import numpy as np
from tqdm import tqdm

PARAGRAPH_END = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")
PIECE_PARAGRAPHS = 8  # on average
SIMILARITY = 0.8  # Jaccard similarity of near-duplicates, by MinHash of their word 5-grams
SHINGLE_WORDS, PERMUTATIONS, MINHASH_SEED = 5, 128, 42


def sources_of(settings: Data) -> dict[str, str]:
    """The path of each split's text.

    Args:
        settings: the data group.
    """
    files = {"train": settings.train_file, "valid": settings.valid_file, "test": settings.test_file}
    return {name: os.path.normpath(path) for name, path in (files | settings.test_files).items()}


def write_splits(settings: Data, folder: Path, names: Iterable[str]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Writes NAME.arrow for each of some splits.

    Args:
        settings: the data group.
    Returns:
        by split, how many documents `deduplicate` has left out, and a hash of each document, (n,) uint64.
    Raises:
        UserError: a source that can't be read or that changed meanwhile; a split without documents.
    """
    sources = {name: path for name, path in sources_of(settings).items() if name in names}
    hashes = write_sources(settings, folder, set(sources.values()))
    documents = {name: Documents(source_name(path, hashes), folder) for name, path in sources.items()}
    hashes = {name: hashes[path] for name, path in sources.items()}
    parts = {name: part_of(name, hashes[name], settings) for name in sources}
    for name, part in parts.items():
        if not part.any():
            what = f"raise data.{name}_fraction" if name != "train" else "lower data.valid_fraction and test_fraction"
            raise UserError(
                f"{sources[name]}: no document of {len(part):,} is left for {name}: {what}, or name another text"
            )
    whole = {name: int(part.sum()) for name, part in parts.items()}
    if settings.deduplicate != "none":
        drop_equal(parts, hashes)
    if settings.deduplicate == "near" and "train" in parts:
        drop_similar(documents, parts)
    if "train" in parts and not parts["train"].any():
        raise UserError("data.deduplicate: no document is left to train on: all stand in valid or test")
    for name, part in parts.items():
        select(documents[name], part, folder / f"{name}.arrow")
    for source in documents.values():
        source.path.unlink(missing_ok=True)
    dropped = {name: whole[name] - int(part.sum()) for name, part in parts.items()}
    return dropped, {name: hashes[name][part] for name, part in parts.items()}


def write_sources(settings: Data, folder: Path, paths: set[str]) -> dict[str, np.ndarray]:
    """Writes the documents of each source to a hidden file of the folder; returns by path their hashes."""
    files = {path: find_files(path, settings.document) for path in sorted(paths)}
    shared = {path for path in (settings.valid_file, settings.test_file) if same(path, settings.train_file)}
    total, hashes = sum(file.size for found in files.values() for file in found), {}
    with progress_bar(total, "reading") as bar:
        for path, found in files.items():
            documents = read_source(path, found, settings, bar.update)
            if any(same(path, other) for other in shared):
                documents = cut_if_single(documents, path)
            hashes[path] = np.empty(0, np.uint64)
            hashes[path] = write_hashed(folder / f"{source_name(path, hashes)}.arrow", documents)
            check_unchanged(path, settings.document, found)
    return hashes


def source_name(path: str, paths: Iterable[str]) -> str:
    """The name of a source's file while the splits are made."""
    return f".{list(paths).index(path)}"


def same(path: str, other: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(other)


def write_hashed(target: Path, documents: Iterator[bytes]) -> np.ndarray:
    """Writes documents; returns a hash of each, (n,) uint64."""
    hashes = bytearray()

    def hashed() -> Iterator[bytes]:
        for document in documents:
            hashes.extend(digest(document))
            yield document

    write_documents(target, hashed())
    return np.frombuffer(hashes, "<u8")


def digest(text: bytes) -> bytes:
    """8 bytes by which documents are equal, or held out."""
    return hashlib.blake2b(text, digest_size=8).digest()


def part_of(name: str, hashes: np.ndarray, settings: Data) -> np.ndarray:
    """Which documents of its source a split has, (n,) bool: all, or where it shares train's, those of some hashes."""
    where = mixed(hashes + mixed(np.array([settings.split_seed], np.uint64))) / 2.0**64
    held_out = {"test": where < settings.test_fraction, "valid": where >= 1 - settings.valid_fraction}
    shared = [other for other in held_out if same(getattr(settings, f"{other}_file"), settings.train_file)]
    if name in shared:
        return held_out[name]
    part = np.ones(len(hashes), bool)
    for other in shared if name == "train" else ():
        part &= ~held_out[other]
    return part


def drop_equal(parts: dict[str, np.ndarray], hashes: dict[str, np.ndarray]) -> None:
    """Leaves the first of equal documents in each split, and none in train that stands in another."""
    for name, part in parts.items():
        rows = np.flatnonzero(part)
        _, first = np.unique(hashes[name][rows], return_index=True)
        part[:] = False
        part[rows[first]] = True
    if "train" in parts:
        held_out = [hashes[name][part] for name, part in parts.items() if name != "train"]
        parts["train"] &= ~np.isin(hashes["train"], np.concatenate([np.empty(0, np.uint64), *held_out]))


def drop_similar(documents: dict[str, Documents], parts: dict[str, np.ndarray]) -> None:
    """Leaves no near-duplicate of a held-out document in train, and of each other the first."""
    from rensa import RMinHash, RMinHashDeduplicator

    known = RMinHashDeduplicator(SIMILARITY, PERMUTATIONS, True, seed=MINHASH_SEED)
    for name in sorted(parts, key="train".__eq__):
        part = parts[name]
        for i, document in enumerate(tqdm(documents[name].documents(), "comparing", len(part), disable=None)):
            if part[i]:
                words = str(document, "utf-8").split()
                words = words if len(words) > 1 else list("".join(words))  # text without spaces
                count = max(1, len(words) - SHINGLE_WORDS + 1)
                minhash = RMinHash(PERMUTATIONS, MINHASH_SEED)
                minhash.update([" ".join(words[j : j + SHINGLE_WORDS]) for j in range(count)])
                new = known.add(f"{name} {i}", minhash)
                part[i] = new or name != "train"


def select(source: Documents, part: np.ndarray, target: Path) -> None:
    """Writes those documents of a source that a split has, `part` (n,) bool."""
    if part.all():
        os.link(source.path, target)
    else:
        write_documents(target, (document for document, wanted in zip(source.documents(), part) if wanted))


def cut_if_single(documents: Iterator[bytes], path: str) -> Iterator[bytes]:
    """The documents, or if there is only one, pieces of it.

    A piece ends at a paragraph (or line) whose hash says so, some PIECE_PARAGRAPHS after the last one: text that is
    added changes no other piece.
    """
    first = list(islice(documents, 2))
    if len(first) != 1:
        yield from chain(first, documents)
        return
    (text,) = first
    ends = PARAGRAPH_END if PARAGRAPH_END.search(text) else LINE_END
    note(f"{path} is one document: it is held out of in pieces that end at paragraphs")
    start = last = 0
    for match in ends.finditer(text):
        paragraph, last = text[last : match.start()], match.end()
        if int.from_bytes(digest(paragraph)) % PIECE_PARAGRAPHS == 0:
            yield text[start : match.start()]
            start = last
    if text[start:].strip():
        yield text[start:]
