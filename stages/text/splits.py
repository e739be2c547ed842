"""The documents of each split from the files that the settings name.

Where valid_file or test_file is the path of train_file, documents are held out of it by a hash of their
text: equal ones are never on two sides, and text that is added moves none. Where these two alone share a path, each
has half of it in the same way.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from pathlib import Path

from stages.common.commands import progress_bar
from stages.common.errors import UserError, note
from stages.common.paths import SPLITS
from stages.common.settings import Data, Runtime
from stages.text.corpus import Documents, batched, mixed, write_documents
from stages.text.engine import in_tasks
from stages.text.sources import SourceFile, check_unchanged, find_files, read_source, share_of

import numpy as np
from rensa import RMinHash, RMinHashDeduplicator
from tqdm import tqdm

PARAGRAPH_END = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")
PIECE_PARAGRAPHS = 8  # on average
SIMILARITY = 0.8  # Jaccard similarity of near-duplicates, by MinHash of their word 5-grams
SIGNED = ".signed"  # the file of signatures beside one of documents
SHINGLE_WORDS, PERMUTATIONS, MINHASH_SEED = 5, 128, 42


def sources_of(settings: Data) -> dict[str, str]:
    """The path of each split's text.

    Args:
        settings: the data group.
    """
    files = {"train": settings.train_file, "valid": settings.valid_file, "test": settings.test_file}
    return {name: os.path.normpath(path) for name, path in (files | settings.test_files).items()}


@contextmanager
def written_splits(
    settings: Data, folder: Path, names: Iterable[str], runtime: Runtime | None = None
) -> Iterator[tuple[dict[str, int], dict[str, np.ndarray]]]:
    """Writes NAME.arrow for each of some splits. What tasks have read stays until the block has ended without an error.

    Args:
        settings: the data group.
        runtime: in how many tasks text is read, and who runs them; None: one, in this process.
    Yields:
        by split, how many documents `deduplicate` has left out, and a hash of each document, (n,) uint64.
    Raises:
        UserError: a source that can't be read or that changed meanwhile; a split without documents.
    """
    paths = {name: path for name, path in sources_of(settings).items() if name in names}
    with read_sources(settings, folder, set(paths.values()), runtime) as read:
        sources = {name: read[path] for name, path in paths.items()}
        hashes = {name: source.hashes for name, source in sources.items()}
        parts = {name: part_of(name, hashes[name], settings) for name in sources}
        for name, part in parts.items():
            if not part.any():
                held_out = name != "train"
                what = f"raise data.{name}_fraction" if held_out else "lower data.valid_fraction and test_fraction"
                raise UserError(
                    f"{paths[name]}: no document of {len(part):,} is left for {name}: {what}, or name another text"
                )
        whole = {name: int(part.sum()) for name, part in parts.items()}
        if settings.deduplicate != "none":
            drop_equal(parts, hashes)
        if settings.deduplicate == "near" and "train" in parts:
            drop_similar(sources, parts)
        if "train" in parts and not parts["train"].any():
            raise UserError("data.deduplicate: no document is left to train on: all stand in valid or test")
        for name, part in parts.items():
            select(sources[name], part, folder / f"{name}.arrow")
        dropped = {name: whole[name] - int(part.sum()) for name, part in parts.items()}
        yield dropped, {name: hashes[name][part] for name, part in parts.items()}


@dataclass
class Source:
    """All documents of one path.

    Args:
        files: as tasks have written them, in order.
        hashes: of each document, (n,) uint64.
    """

    files: list[Documents]
    hashes: np.ndarray

    def documents(self) -> Iterator[memoryview]:
        return chain.from_iterable(file.documents() for file in self.files)

    def signatures(self) -> Iterator[memoryview]:
        """The state of each document's RMinHash, where write_hashed was to write them."""
        return chain.from_iterable(Documents(file.name + SIGNED, file.path.parent).documents() for file in self.files)


@contextmanager
def read_sources(settings: Data, folder: Path, paths: set[str], runtime: Runtime | None) -> Iterator[dict[str, Source]]:
    """The documents of some paths, in hidden files for the time being."""
    files = {path: find_files(path, settings.document) for path in sorted(paths)}
    work = partial(write_share, settings=settings, files=files)
    with in_tasks(work, folder, [], runtime) as parts:
        sources = {}
        for i, path in enumerate(files):
            check_unchanged(path, settings.document, files[path])
            hashes = [np.fromfile(part / f".{i}.hashes", "<u8") for part in parts]
            source = Source([Documents(f".{i}", part) for part in parts], np.concatenate(hashes))
            if not len(source.hashes):
                raise UserError(f"{path}: only white space: it has no document")
            if len(source.hashes) == 1 and path in shared(settings):
                source = in_pieces(source, path, folder / f".{i}.pieces.arrow", settings.deduplicate == "near")
            sources[path] = source
        yield sources
        for hidden in folder.glob(".*"):
            hidden.unlink()


def write_share(folder: Path, rank: int, tasks: int, settings: Data, files: dict[str, list[SourceFile]]) -> None:
    """Writes the documents and hashes of one task's share of each path."""
    shares = [share_of(found, rank, tasks, settings) for found in files.values()]
    total = sum(file.stretch for share in shares for file in share)
    with progress_bar(total, "reading") as bar:
        for i, (path, share) in enumerate(zip(files, shares)):
            documents = read_source(path, share, settings, bar.update)
            hashes = write_hashed(folder / f".{i}.arrow", documents, settings.deduplicate == "near")
            hashes.tofile(folder / f".{i}.hashes")


def shared(settings: Data) -> set[str]:
    """The path that train, valid and test, or two of them, have documents of, if there is one."""
    paths = sources_of(settings)
    return {path for path, times in Counter(paths[name] for name in SPLITS).items() if times > 1}


def write_hashed(target: Path, documents: Iterator[bytes], signed: bool) -> np.ndarray:
    """Writes documents, and where `signed` their signatures; returns a hash of each, (n,) uint64."""
    hashes = bytearray()

    def hashed() -> Iterator[list[bytes | memoryview]]:
        for batch in batched(documents):
            hashes.extend(b"".join(map(digest, batch)))
            yield batch

    write_documents(target, hashed())
    if signed:
        signatures = map(signature, tqdm(Documents(target.stem, target.parent).documents(), "signing", disable=None))
        write_documents(target.with_name(target.stem + SIGNED + ".arrow"), batched(signatures))
    return np.frombuffer(hashes, "<u8")


def digest(text: bytes) -> bytes:
    """8 bytes by which documents are equal, or held out."""
    return hashlib.blake2b(text, digest_size=8).digest()


def part_of(name: str, hashes: np.ndarray, settings: Data) -> np.ndarray:
    """Which documents of its source a split has, (n,) bool: all, or where it shares another's, those of some hashes."""
    where = mixed(hashes + mixed(np.array([settings.split_seed], np.uint64))) / 2.0**64
    held_out = {"test": where < settings.test_fraction, "valid": where >= 1 - settings.valid_fraction}
    paths = sources_of(settings)
    if paths["valid"] == paths["test"] != paths["train"]:
        halves = {"test": where < 0.5, "valid": where >= 0.5}
        return halves.get(name, np.ones(len(hashes), bool))
    shared = [other for other in held_out if paths[other] == paths["train"]]
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


def signature(document: memoryview) -> bytes:
    """The state of the MinHash of a document's word 5-grams."""
    words = str(document, "utf-8").split()
    words = words if len(words) > 1 else list("".join(words))  # text without spaces
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    minhash = RMinHash(PERMUTATIONS, MINHASH_SEED)
    minhash.update([" ".join(words[j : j + SHINGLE_WORDS]) for j in range(count)])
    return minhash.__getstate__()


def drop_similar(sources: dict[str, Source], parts: dict[str, np.ndarray]) -> None:
    """Leaves no near-duplicate of a held-out document in train, and of each other the first."""
    known = RMinHashDeduplicator(SIMILARITY, PERMUTATIONS, True, seed=MINHASH_SEED)
    for name in sorted(parts, key="train".__eq__):
        part = parts[name]
        for i, state in enumerate(tqdm(sources[name].signatures(), "comparing", len(part), disable=None)):
            if part[i]:
                minhash = RMinHash(PERMUTATIONS, MINHASH_SEED)
                minhash.__setstate__(bytes(state))
                part[i] = known.add(f"{name} {i}", minhash) or name != "train"


def select(source: Source, part: np.ndarray, target: Path) -> None:
    """Writes those documents of a source that a split has, `part` (n,) bool."""
    if part.all() and len(source.files) == 1:
        os.link(source.files[0].path, target)
    else:
        write_documents(target, batched(compress(source.documents(), part)))


def in_pieces(source: Source, path: str, target: Path, signed: bool) -> Source:
    """A source of one document, in pieces of it.

    A piece ends at a paragraph (or line) whose hash says so, some PIECE_PARAGRAPHS after the last one: text that is
    added changes no other piece.
    """

    def pieces() -> Iterator[bytes]:
        start = last = 0
        for match in ends.finditer(text):
            paragraph, last = text[last : match.start()], match.end()
            if int.from_bytes(digest(paragraph)) % PIECE_PARAGRAPHS == 0:
                yield text[start : match.start()]
                start = last
        if text[start:].strip():
            yield text[start:]

    text = bytes(next(source.documents()))
    ends = PARAGRAPH_END if PARAGRAPH_END.search(text) else LINE_END
    note(f"{path} is one document: it is held out of in pieces that end at paragraphs")
    hashes = write_hashed(target, pieces(), signed)
    return Source([Documents(target.stem, target.parent)], hashes)
