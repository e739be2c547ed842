"""Reading UTF-8 text of any size: documents, and pieces of them small enough to encode at once."""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from stages.common.errors import UserError

PIECE_BYTES = 1 << 16
WINDOW_BYTES = 1 << 22

# What stands between two documents: white space, so a window ends at none.
SEPARATORS = {"line": re.compile(rb"\r?\n"), "blank_line": re.compile(rb"\r?\n(?:[ \t\r\f\v]*\n)+")}
LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)*")
WHITE_SPACE = re.compile(rb"\s*")
VISIBLE = re.compile(rb"\S")
# Byte-level BPE never joins a visible character with white space after it, so a cut there
# changes no token (https://github.com/openai/gpt-2, the pattern in src/encoder.py).
SAFE_CUT = re.compile(r"\S(?=[ \n])")


@contextmanager
def open_text(path: str) -> Iterator[mmap.mmap]:
    """The bytes of a text file, mapped into memory.

    Raises:
        UserError: the file is missing, unreadable, no file, or empty.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file: set the data group of params.yaml to your text")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file")
    try:
        with open(path, "rb") as file:
            if os.path.getsize(path) == 0:
                raise UserError(f"{path}: empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                yield text
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None


def document_spans(text: mmap.mmap, document: str) -> Iterator[tuple[int, int]]:
    """Start and end (byte offsets) of each document, in file order, blank ones left out.

    A document of blank_line or line mode ends before its last line end ("\\n" or "\\r\\n").
    """
    if document == "file":
        if VISIBLE.search(text):
            yield 0, len(text)
        return
    start = LEADING_BLANK_LINES.match(text).end() if document == "blank_line" else 0
    for end, following in separators(text, document, start):
        if VISIBLE.search(text, start, end):
            yield start, end
        start = following
    end = text.rfind(b"\n", max(start, len(text) - WINDOW_BYTES))
    if end < 0 or VISIBLE.search(text, end):
        end = len(text)  # no line end, or a line after it
    elif end > start and text[end - 1] == ord("\r"):
        end -= 1
    if VISIBLE.search(text, start, end):
        yield start, end


def separators(text: mmap.mmap, document: str, start: int) -> Iterator[tuple[int, int]]:
    """Start and end of what stands between documents, in windows whose memory is given back."""
    while start < len(text):
        end = WHITE_SPACE.match(text, min(start + WINDOW_BYTES, len(text))).end()
        for match in SEPARATORS[document].finditer(text, start, end):
            yield match.span()
        release(text, start, end)
        start = end


def pieces(text: mmap.mmap, start: int, end: int, path: str) -> Iterator[str]:
    """The text between two byte offsets, in pieces of at most PIECE_BYTES.

    A piece ends between a visible character and white space where there is such a place near the
    limit, and anywhere between two characters otherwise.

    Raises:
        UserError: the bytes are not UTF-8; it names the offset of the first bad one.
    """
    while start < end:
        stop = min(start + PIECE_BYTES, end)
        while stop < end and text[stop] & 0xC0 == 0x80 and stop > start + PIECE_BYTES - 4:
            stop -= 1
        piece = decoded(text, start, stop, path)
        if stop < end:
            cuts = [match.end() for match in SAFE_CUT.finditer(piece, len(piece) - 4096 if len(piece) > 4096 else 0)]
            if cuts:
                piece = piece[: cuts[-1]]
                stop = start + len(piece.encode())
        yield piece
        if stop - start > PIECE_BYTES // 2:
            release(text, start, stop)
        start = stop


def decoded(text: mmap.mmap, start: int, end: int, path: str) -> str:
    """The text between two byte offsets.

    Raises:
        UserError: the bytes are not UTF-8; it names the offset of the first bad one.
    """
    try:
        return text[start:end].decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte offset {start + error.start:,}: convert the file to UTF-8"
        ) from None


def release(text: mmap.mmap, start: int, end: int) -> None:
    """Gives pages that have been read back, so that resident memory doesn't grow with the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        # Reading at `start` has brought back pages before it: Linux maps 64 KiB around a missing page.
        start -= start % (1 << 16)
        text.madvise(mmap.MADV_DONTNEED, start, end - start)
