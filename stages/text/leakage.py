"""How much of the held-out text stands word for word in the training text.

An n-gram is 13 words (as in https://arxiv.org/abs/2005.14165, appendix C), or of text without spaces 50
bytes that begin at a character. Those of the held-out documents are kept as 64-bit hashes, and the training
text is streamed over them. Above MOST_GRAMS of them, a share of all possible ones is looked at, in both alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from stages.text.corpus import Batch, Documents, mixed

import numpy as np

WORDS, BYTES = 13, 50
LONG_WORD_BYTES = 25  # on average, where text has no spaces
MOST_GRAMS = 1 << 22
PART_BYTES = 1 << 20
SPACES = np.array([chr(i).isspace() for i in range(0x4000)])  # all that there are
LARGEST = np.uint64((1 << 64) - 1)
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
POWERS = np.multiply.accumulate(np.full(PART_BYTES + 1, BASE, np.uint64))
SUMS = np.zeros(PART_BYTES + 1, np.uint64)  # memory to work in: new one for each part would take as long again
INVERSES = np.multiply.accumulate(np.full(PART_BYTES + 1, pow(BASE, -1, 1 << 64), np.uint64))


def span_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2**64 of values[start:end], wherever it stands.

    Args:
        values: (N,) uint8 or uint64, N at most PART_BYTES.
        starts, ends: (n,) int64.
    """
    sums = SUMS[: len(values) + 1]
    np.multiply(values, POWERS[: len(values)], out=sums[1:])
    np.cumsum(sums[1:], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * INVERSES[starts])


def visible(text: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 text belong to characters that are not white space (str.isspace()): (N,) bool."""
    found = (text != 32) & (text - np.uint8(9) > 4) & (text - np.uint8(28) > 3)
    if (text > 127).any():
        first = np.flatnonzero(text[:-1] == 0xC2)  # of the characters 128 to 191, whose second byte is their number
        first = first[SPACES[text[first + 1]]]
        found[first] = found[first + 1] = False
        first = np.flatnonzero(text[:-2] - np.uint8(0xE1) < 3)  # of three bytes and below 0x4000
        low = [text[first + i] & np.uint16(0x3F) for i in (1, 2)]
        first = first[SPACES[(text[first] & np.uint16(15)) << 12 | low[0] << 6 | low[1]]]
        found[first] = found[first + 1] = found[first + 2] = False
    return found


@dataclass
class Part:
    """At most PART_BYTES of a batch: all of it, or where it is one long document, a part of that.

    Args:
        text: (N,) uint8, UTF-8.
        offsets: where in it each document begins, and the end of the last one.
        inside: whether the part before it ends within a word.
    """

    text: np.ndarray
    offsets: np.ndarray
    inside: bool = False

    @cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Where words (str.split()) begin and end, (n,) int64 each."""
        within = np.zeros(len(self.text) + 2, bool)
        within[1:-1] = visible(self.text)
        edges = np.flatnonzero(within[1:] != within[:-1])
        inner = self.offsets[1:-1]
        inner = np.repeat(inner[within[inner] & within[inner + 1]], 2)  # documents end words
        edges = np.insert(edges, np.searchsorted(edges, inner), inner) if len(inner) else edges
        return edges[::2], edges[1::2]

    def count_words(self) -> int:
        """Words that begin here."""
        starts = self.words[0]
        return len(starts) - (self.inside and 0 in starts[:1])


def parts(batch: Batch) -> Iterator[Part]:
    """A batch in one part; the one document of a large batch in several."""
    text = np.frombuffer(batch.text, np.uint8)[: batch.offsets[-1]]
    if len(text) <= PART_BYTES:
        yield Part(text, batch.offsets)
        return
    start, inside = 0, False
    while start < len(text):
        end = min(start + PART_BYTES, len(text))
        while end < len(text) and text[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        part = Part(text[start:end], np.array([0, end - start]), inside)
        yield part
        start, inside = end, len(part.text) in part.words[1][-1:]


@dataclass
class Grams:
    """N-grams of one kind.

    Args:
        unit: words or bytes.
        most: hashes above it aren't looked at.
    """

    unit: str
    most: np.uint64

    @property
    def name(self) -> str:
        return f"{WORDS if self.unit == 'words' else BYTES} {self.unit}"

    @staticmethod
    def of(words: int, size: int) -> "Grams":
        """The kind for held-out text of so many words and bytes."""
        unit = "words" if size < LONG_WORD_BYTES * words else "bytes"
        total = words if unit == "words" else size
        return Grams(unit, np.uint64(min(int(LARGEST), (MOST_GRAMS << 64) // max(total, 1))))

    def hashes(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of documents: hashes (n,) uint64, and the byte at which each begins."""
        text, offsets = part.text, part.offsets
        if self.unit == "words":
            starts, ends = part.words
            values = span_hashes(text + np.uint8(1), starts, ends)
            n, bounds, begins = WORDS, np.searchsorted(starts, offsets[1:]), np.ones(len(values), bool)
        else:
            # N-grams begin where characters do.
            starts, values, n, bounds, begins = None, text, BYTES, offsets[1:], text & 0xC0 != 0x80
        across = (bounds[:, None] - np.arange(1, n)).ravel()
        begins[across[across >= 0]] = False
        first = np.flatnonzero(begins)
        hashes = span_hashes(values, first, first + n)
        if self.most < LARGEST:
            kept = np.flatnonzero(hashes <= self.most)
            hashes, first = hashes[kept], first[kept]
        return hashes, first if starts is None else starts[first]

    def of_documents(self, splits: list[Documents]) -> np.ndarray:
        """The n-grams of some splits: hashes (n,) uint64, each once and in order."""
        batches = (batch for split in splits for batch in split.read())
        return np.unique(np.concatenate([self.hashes(part)[0] for batch in batches for part in parts(batch)]))


class Seen:
    """Which of the held-out n-grams the training text has."""

    def __init__(self, grams: Grams, hashes: np.ndarray):
        """
        Args:
            hashes: of the held-out n-grams, (n,) uint64, each once and in order.
        """
        self.grams, self.hashes = grams, hashes
        self.seen = np.zeros(len(self.hashes), bool)

    @cached_property
    def maybe(self) -> np.ndarray:
        """By low bits, which n-grams may be held-out ones: most of the training text's are none, at one look."""
        table = np.zeros(1 << max(16, (16 * len(self.hashes)).bit_length()), bool)
        table[low_bits(self.hashes, table)] = True
        return table

    def look(self, part: Part) -> None:
        """Marks the held-out n-grams that a part of the training text has."""
        if not len(self.hashes):
            return
        hashes, _ = self.grams.hashes(part)
        hashes = hashes[self.maybe[low_bits(hashes, self.maybe)]]
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        self.seen[at[self.hashes[at] == hashes]] = True

    def by_document(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """How many n-grams each document of a held-out batch has, and how many of them are in the training text."""
        total = np.zeros((2, len(batch)), np.int64)
        for part in parts(batch):
            hashes, places = self.grams.hashes(part)
            document = np.searchsorted(part.offsets, places, "right") - 1
            found = self.seen[np.searchsorted(self.hashes, hashes)]
            total += np.bincount(document, minlength=len(batch)), np.bincount(document, found, len(batch)).astype(int)
        return total[0], total[1]


def low_bits(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where in a table of 2**i rows hashes stand: (n,) int64."""
    return (hashes & np.uint64(len(table) - 1)).view(np.int64)
