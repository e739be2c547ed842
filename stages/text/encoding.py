"""Documents become token ids: those of encoding each document whole."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from stages.common.errors import UserError
from stages.text.tokenizers import TextTokenizer

import numpy as np

PIECE_BYTES = 1 << 16
BATCH_BYTES = 1 << 21  # enough for every core
WHOLE_BYTES = 1 << 23  # the encoding of a document of this size takes a GiB


@dataclass
class Changes:
    """What a tokenizer doesn't give back of the documents it encoded.

    Args:
        documents: how many differ from what their ids decode to.
        characters: how many of their characters the decoded text lacks.
        unknown: tokens that stand for what the vocabulary lacks.
        first: the first difference: the document's number from 1, what it holds there, and what came back.
    """

    documents: int = 0
    characters: int = 0
    unknown: int = 0
    first: tuple[int, str, str] | None = None


@dataclass
class Encoder:
    """Makes a stream of documents' ids and counts what it has made.

    Args:
        tokenizer: encodes.
        path: what the documents are of, for messages.
        lossy: refuse or allow: what to do when the tokenizer doesn't give a document's exact text back.
        before: how many documents there are before those that it is given.
        sizes: bytes and words of the documents that have ended since it was emptied last.
        sha256: of the documents' text: a size of 8 bytes after each, so that it tells where they end.
    """

    tokenizer: TextTokenizer
    path: str
    lossy: str
    before: Callable[[], int] = int
    documents: int = 0
    bytes: int = 0
    words: int = 0
    characters: int = 0
    changes: Changes = field(default_factory=Changes)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    sha256: Any = field(default_factory=hashlib.sha256)

    def streams(self, parts: Iterator[tuple[str, bool]]) -> Iterator[np.ndarray]:
        """The ids of a batch of documents at a time, end-of-text after each document: (n,) uint32.

        Args:
            parts: texts, and whether each ends its document.
        Raises:
            UserError: the tokenizer doesn't give the text back, and lossy is refuse.
        """
        inside_word = changed = False
        before = 0, 0  # bytes and words when the last document ended
        for batch, ids, ends in self.encoded(parts):
            if not self.tokenizer.loses_nothing:
                changed = self.compare(batch, ids, ends, changed)
            last = np.array([end for _, end in batch])
            for text, end in batch:
                raw = text.encode()
                self.sha256.update(raw)
                self.bytes += len(raw)
                self.characters += len(text)
                self.words += len(text.split())
                # A word that is longer than a part counts once.
                self.words -= inside_word and not text[:1].isspace()
                inside_word = not end and not text[-1:].isspace()
                if end:
                    size, words = self.bytes - before[0], self.words - before[1]
                    self.sizes.append((size, words))
                    self.sha256.update(size.to_bytes(8, "little"))
                    before = self.bytes, self.words
            yield np.insert(ids, ends[last], self.tokenizer.end_of_text)
            self.documents += int(last.sum())

    def counts(self) -> dict[str, Any]:
        """Of what it has been given so far, and a hash of it."""
        counts: dict[str, Any] = {key: getattr(self, key) for key in ("documents", "bytes", "words")}
        if not self.tokenizer.loses_nothing:
            counts["characters"] = self.characters
            counts["changed_documents"] = self.changes.documents
            counts["lost_characters"] = self.changes.characters
            counts["unknown_tokens"] = self.changes.unknown
        return counts | {"text": self.sha256.hexdigest()}

    def encoded(self, parts: Iterator[tuple[str, bool]]) -> Iterator[tuple[list, np.ndarray, np.ndarray]]:
        """Batches of parts, their ids and where in these each part ends. The next batch is encoded meanwhile."""
        batch = list(take(parts))
        with ThreadPoolExecutor(1) as thread:
            while batch:
                encoding = thread.submit(self.tokenizer.encode_batch, [text for text, _ in batch])
                following = list(take(parts))
                yield batch, *encoding.result()
                batch = following

    def compare(self, batch: list[tuple[str, bool]], ids: np.ndarray, ends: np.ndarray, changed: bool) -> bool:
        """Counts what isn't given back; returns whether the document that goes on after the batch has changed.

        Args:
            changed: the same of the batch before.
        """
        number = self.documents + 1
        self.changes.unknown += int(np.count_nonzero(ids == self.tokenizer.unknown))
        decoded = self.tokenizer.decode_batch([part.tolist() for part in np.split(ids, ends[:-1])])
        for (text, end), back in zip(batch, decoded):
            if text != back:
                changed = True
                self.changes.characters += (Counter(text) - Counter(back)).total()
                if self.changes.first is None:
                    at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
                    self.changes.first = number, text[at : at + 10], back[at : at + 10]
                    if self.lossy == "refuse":
                        number += self.before()
                        raise UserError(
                            f"{self.path}: document {number:,}: the tokenizer gives back {back[at : at + 10]!r} for "
                            f"{text[at : at + 10]!r}: use another tokenizer, or set tokenizer.lossy: allow"
                        )
            if end:
                self.changes.documents += changed
                number, changed = number + 1, False
        return changed


def take(parts: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Parts for one batch: BATCH_BYTES of them, or what is left."""
    size = 0
    for part in parts:
        yield part
        size += len(part[0])
        if size >= BATCH_BYTES:
            return


def document_parts(document: memoryview, path: str, cut: re.Pattern | None) -> Iterator[tuple[str, bool]]:
    """A document whole or, where that changes no id, in parts of bounded size.

    Args:
        document: its UTF-8 bytes.
        path: what it is of, for messages.
        cut: where the tokenizer allows a cut.
    Yields:
        a part's text, and whether it ends the document.
    Raises:
        UserError: the document is too large to be encoded whole.
    """
    start, end, size = 0, len(document), PIECE_BYTES if cut else WHOLE_BYTES
    while start < end:
        stop = min(start + size, end)
        while stop < end and document[stop] & 0xC0 == 0x80 and stop > start + size - 4:
            stop -= 1
        part = str(document[start:stop], "utf-8")
        if stop < end:
            cuts = [match.end() for match in cut.finditer(part, max(0, len(part) - 4096))] if cut else []
            if not cuts and size < WHOLE_BYTES:
                size *= 2
                continue
            if not cuts:
                raise UserError(
                    f"{path}: a document of {end:,} bytes, of which the tokenizer would need more than "
                    f"{WHOLE_BYTES >> 20} MiB at once: make documents smaller with data.document"
                )
            part = part[: cuts[-1]]
            stop = start + len(part.encode())
        yield part, stop == end
        start, size = stop, PIECE_BYTES
