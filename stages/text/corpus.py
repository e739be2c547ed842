"""data/corpus/: the documents of each split, SPLIT.arrow: an Arrow IPC file with one column, `text`.

`pandas.read_feather` opens it. Here it is mapped, and its pages are given back as they are read.
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from stages.common.errors import UserError
from stages.common.paths import CORPUS, SPLITS

import numpy as np
import pyarrow as pa

BATCH_BYTES = 1 << 20
BLANK_LINE = b"\n\n"
SCHEMA = pa.schema([pa.field("text", pa.large_string(), nullable=False)])


class Documents:
    """One split's documents, mapped into memory.

    Args:
        name: train, valid, test or another test set's.
        path: the file.
    """

    def __init__(self, name: str, folder: str | Path = CORPUS):
        self.name, self.path = name, Path(folder, f"{name}.arrow")
        try:
            with self.path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.file = pa.ipc.open_file(pa.py_buffer(self.map))
            if self.file.schema != SCHEMA:
                raise pa.ArrowInvalid("another schema")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{self.path}: can't be read as a corpus ({error}): make it again with `dvc repro prepare_corpus`"
            ) from None

    @property
    def size(self) -> int:
        """Bytes of the file, a little more than those of the documents."""
        return len(self.map)

    @property
    def batches(self) -> int:
        return self.file.num_record_batches

    def share(self, rank: int, tasks: int) -> range:
        """The batches of one task: as many as every other's."""
        return equal_share(self.batches, rank, tasks)

    def batch(self, i: int) -> "Batch":
        """The i-th run of documents, about BATCH_BYTES together."""
        text = self.file.get_batch(i).column(0)
        _, offsets, data = text.buffers()
        return Batch(np.frombuffer(offsets, np.int64)[: len(text) + 1], memoryview(data or b""))

    def read(self, share: range | None = None) -> Iterator["Batch"]:
        """All batches in order, or a share of them; what is done with leaves the memory."""
        for i in range(self.batches) if share is None else share:
            yield self.batch(i)
            self.release()

    def documents(self, share: range | None = None) -> Iterator[memoryview]:
        """The UTF-8 bytes of each document, in order: of all batches or a share of them."""
        return chain.from_iterable(self.read(share))

    def count(self, share: range) -> int:
        """How many documents some batches have."""
        return sum(self.file.get_batch(i).num_rows for i in share)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where batches begin and the last one ends, with a blank line after each document: (batches + 1,) int64."""
        batches = map(self.batch, range(self.batches))
        return np.cumsum([0, *(int(batch.places[-1]) for batch in batches)], dtype=np.int64)

    def joined(self, start: int, end: int) -> bytes:
        """The bytes from start to end of the documents with a blank line after each."""
        found = []
        for i in range(int(np.searchsorted(self.starts, start, "right")) - 1, self.batches):
            batch = self.batch(i)
            places = self.starts[i] + batch.places
            first = max(0, int(np.searchsorted(places, start, "right")) - 1)
            for j in range(first, int(np.searchsorted(places[:-1], end))):
                document = batch.text[batch.offsets[j] : batch.offsets[j + 1]]
                for part, place in ((document, places[j]), (BLANK_LINE, places[j] + len(document))):
                    found.append(part[max(0, start - place) : max(0, end - place)])
            if places[-1] >= end:
                break
        self.release()
        return b"".join(found)

    def release(self) -> None:
        """Gives pages that have been read back, so that resident memory doesn't grow with the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def split_names() -> list[str]:
    """train, valid, test, then the further test sets by name: those that the corpus has."""
    found = {path.stem for path in CORPUS.glob("[!.]*.arrow")}
    return [*(name for name in SPLITS if name in found), *sorted(found.difference(SPLITS))]


@dataclass
class Batch:
    """A run of documents.

    Args:
        offsets: (n + 1,) int64, where in `text` each document begins; the last one is its end.
        text: their UTF-8 bytes, one after the other.
    """

    offsets: np.ndarray
    text: memoryview

    @property
    def places(self) -> np.ndarray:
        """The offsets if each document had a blank line after it."""
        return self.offsets + len(BLANK_LINE) * np.arange(len(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[memoryview]:
        ends = self.offsets.tolist()
        for start, end in zip(ends, ends[1:]):
            yield self.text[start:end]


def write_documents(path: Path, batches: Iterable[list[bytes | memoryview]]) -> None:
    """Writes a split's file: the documents of some runs of them."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            offsets = np.cumsum([0, *map(len, batch)], dtype=np.int64)
            text = batch[0] if len(batch) == 1 else b"".join(batch)
            array = pa.LargeStringArray.from_buffers(len(batch), pa.py_buffer(offsets), pa.py_buffer(text))
            writer.write_batch(pa.record_batch([array], schema=SCHEMA))


def batched(documents: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """Documents in runs of about BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        if batch and size + len(document) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


def equal_share(total: int, rank: int, size: int) -> range:
    """Those of `total` things in a row that are one's of `size`: as many as every other's."""
    return range(total * rank // size, total * (rank + 1) // size)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Spreads differences over all bits (https://prng.di.unimi.it/splitmix64.c)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
