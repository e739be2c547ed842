"""Documents from files as people have them: text, JSON lines, CSV, Parquet, compressed or not, alone or in folders.

Files are read, not mapped: one that is cut short meanwhile is an error, not a crash.
"""

import codecs
import csv
import io
import json
import lzma
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import BinaryIO

from stages.common.errors import UserError, note, one_line
from stages.common.files import state_of
from stages.common.hub import dataset_files
from stages.common.settings import Data
from stages.text.corpus import equal_share

import pyarrow as pa
import pyarrow.parquet as pq

CHUNK_BYTES = 1 << 22
FORMATS = {"": "txt", ".txt": "txt", ".text": "txt", ".md": "txt"}
FORMATS |= {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
READABLE = ".txt, .jsonl, .csv or .parquet, each also with .gz, .bz2, .xz or .zst"

LINE_END = re.compile(rb"\n")
LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)*")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")
csv.field_size_limit((1 << 31) - 1)


@dataclass(frozen=True)
class SourceFile:
    """One file that holds documents, and what it was when it was found.

    Args:
        format: txt, jsonl, csv or parquet.
        compression: gzip, bz2, xz, zstd or None.
        state: of `state_of`.
        start, end: the stretch of it that is meant; end None: to its own.
    """

    path: str
    format: str
    compression: str | None
    state: tuple[int, ...]
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        return self.state[0]

    @property
    def stretch(self) -> int:
        return (self.size if self.end is None else self.end) - self.start

    def lines_before(self) -> int:
        """How many lines of the file end before its stretch."""
        with open(self.path, "rb") as file:
            stream = io.BufferedReader(Stretch(file, 0, self.start))
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""))


class Stretch(io.RawIOBase):
    """The bytes of a file from one place to another."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        file.seek(start)
        self.file, self.left = file, end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        part = self.file.read(min(self.left, len(buffer)))
        buffer[: len(part)] = part
        self.left -= len(part)
        return len(part)


def share_of(files: list[SourceFile], rank: int, tasks: int, settings: Data) -> list[SourceFile]:
    """The stretches of files that are one task's: about as many bytes as each other's, and whole documents.

    Args:
        settings: the data group.
    """
    total, found = sum(file.size for file in files), []
    share = equal_share(total, rank, tasks)
    first, last = share.start, share.stop
    for file in files:
        start, end = (next_document(file, at, settings) for at in (first, last))
        if start < end:
            found.append(replace(file, start=start, end=end))
        first, last = first - file.size, last - file.size
    return found


def next_document(file: SourceFile, at: int, settings: Data) -> int:
    """Where the first document begins that begins after the byte `at`; the file's end where none does, or where only
    the file's beginning tells (compressed, CSV, Parquet)."""
    if at <= 0:
        return 0
    between, overlap = border(file, settings)
    with open(file.path, "rb") as raw:
        raw.seek(at)
        window = b""
        while between and at < file.size and (chunk := raw.read(CHUNK_BYTES)):
            window += chunk
            # What begins here may end in the next chunk: a later `at` must not find an earlier place.
            end = len(window.rstrip()) if between is BLANK_LINES else len(window)
            if match := between.search(window, 0, end):
                return raw.tell() - len(window) + match.end()
            window = window[max(0, end - overlap) :]
    return file.size


def border(file: SourceFile, settings: Data) -> tuple[re.Pattern | None, int]:
    """What stands between the documents of a file, if that can be told anywhere in it, and how many bytes of it may
    stand before the end of a chunk in which there is none."""
    marker = settings.separator.encode()
    if file.compression or file.format not in ("txt", "jsonl"):
        return None, 0
    if file.format == "jsonl" or settings.document == "line":
        return LINE_END, 0
    if settings.document != "separator":
        return (BLANK_LINES if settings.document == "blank_line" else None), 0
    if any(marker.endswith(marker[:i]) for i in range(1, len(marker))):
        return None, 0  # where markers overlap, only the file's beginning tells which of them count
    return re.compile(re.escape(marker)), len(marker) - 1


def find_files(path: str, document: str) -> list[SourceFile]:
    """The files of a source in sorted order.

    Args:
        path: a file, a folder, or a data set of the Hugging Face hub.
        document: `file` takes any ending for text.
    Raises:
        UserError: nothing there, nothing readable, an unknown ending, formats mixed in a folder, an empty file.
    """
    files, unknown = [], []
    for name in names_at(path):
        stem, ending = os.path.splitext(name)
        compression = COMPRESSIONS.get(ending.lower())
        ending = os.path.splitext(stem)[1] if compression else ending
        kind = FORMATS.get(ending.lower(), "txt" if document == "file" else None)
        state = state_of(name)
        if kind is None:
            unknown.append((name, ending))
        elif state[0]:
            files.append(SourceFile(name, kind, compression, state))
        elif not os.path.isdir(path):
            raise UserError(f"{name}: empty file")
    if unknown and (not files or not os.path.isdir(path)):
        name, ending = unknown[0]
        raise UserError(
            f"{name}: no reader for {ending}: name a file or folder of {READABLE}, "
            "or set data.document: file, which takes every file for text"
        )
    if not files:
        raise UserError(f"{path}: no file in it that can be read: {READABLE}")
    formats = {file.format: file.path for file in files[::-1]} | {ending: name for name, ending in unknown[:1]}
    if len(formats) > 1:
        (one, first), (other, second) = sorted(formats.items(), key=lambda item: item[1])[:2]
        raise UserError(f"{path}: mixed formats: {first} is {one}, {second} {other}: a folder must hold one")
    return files


def names_at(path: str) -> list[str]:
    """A file, the files of a data set of the hub, or all files in a folder in sorted order, but for hidden
    ones and Python's __pycache__."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        names = dataset_files(path)
        if names is None:
            raise UserError(f"{path}: no such file or folder: set the data group of params.yaml to your text")
        return names
    left_out = re.compile(r"(^|/)(\.|__pycache__(/|$))|\.dvc$")
    names = []
    for folder, folders, files in os.walk(path):
        for name in (os.path.join(folder, name) for name in folders + files):
            if left_out.search(os.path.relpath(name, path)):
                continue
            if os.path.isfile(name):
                names.append(name)
            elif os.path.islink(name):
                raise UserError(f"{name}: a link to a folder or nowhere, which DVC doesn't watch: put a copy there")
    return sorted(names)


def check_unchanged(path: str, document: str, files: list[SourceFile]) -> None:
    """Raises UserError when a source isn't what it was before it was read."""
    try:
        same = find_files(path, document) == files
    except (UserError, OSError):
        same = False
    if not same:
        raise UserError(f"{path}: changed while it was read: run it again")


def read_documents(file: SourceFile, settings: Data, advance: Callable[[int], object]) -> Iterator[bytes]:
    """The documents of a file in order, in UTF-8, blank ones left out.

    Args:
        settings: the data group.
        advance: told the bytes of the file that have been read since it was called last.
    Raises:
        UserError: broken compression or format, not UTF-8, no such field, a field that is no text.
    """
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open(file.path, "rb"))
            stream = stack.enter_context(decompressed(raw, file.compression))
            if file.stretch < file.size:
                stream = io.BufferedReader(Stretch(raw, file.start, file.start + file.stretch))
            documents = READERS[file.format](stream, file, settings)
            read, since = file.start, 0
            for document in documents:
                since += len(document)
                if since >= CHUNK_BYTES:  # to ask for each short document would take as long as to find it
                    advance(raw.tell() - read)
                    read, since = raw.tell(), 0
                if document and not document.isspace() and (document.isascii() or document.decode().strip()):
                    yield document
            advance(file.start + file.stretch - read)
        except (pa.ArrowException, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = file.compression if file.compression else file.format
            raise UserError(f"{file.path}: broken {what}: {one_line(error)}: get it again") from None


def decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO | io.BufferedIOBase:
    if compression is None:
        return raw
    return lzma.open(raw) if compression == "xz" else io.BufferedReader(pa.CompressedInputStream(raw, compression))


def read_txt(stream: BinaryIO, file: SourceFile, settings: Data) -> Iterator[bytes | bytearray]:
    marker = settings.separator.encode()
    chunks = checked_chunks(stream, file)
    if settings.document == "separator":
        return split_at_marker(chunks, marker)
    return split_at_lines(chunks, settings.document)


def checked_chunks(stream: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    """A text in chunks that are known to be UTF-8."""
    path, offset, rest = file.path, file.start, b""
    while chunk := stream.read(CHUNK_BYTES):
        chunk = rest + chunk
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        if not chunk.isascii():
            try:
                _, end = codecs.utf_8_decode(chunk, "strict", False)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset + error.start) from None
            chunk, rest = chunk[:end], chunk[end:]
        else:
            rest = b""
        yield chunk
        offset += len(chunk)
    if rest:
        raise not_utf8(path, offset)


def not_utf8(path: str, offset: int) -> UserError:
    return UserError(f"{path}: not UTF-8 at byte offset {offset:,}: convert the file to UTF-8")


def split_at_lines(chunks: Iterator[bytes], document: str) -> Iterator[bytes | bytearray]:
    """Documents between blank lines, lines, or the whole text. But for the last, they end before their last line end.

    A chunk is searched up to its last visible character: what stands between documents is white space.
    """
    current, tail, leading = bytearray(), b"", document == "blank_line"
    for chunk in chunks:
        window = tail + chunk
        end = len(window.rstrip())
        start = LEADING_BLANK_LINES.match(window, 0, end).end() if leading and end else 0
        leading = leading and not end
        text, tail = window[start:end], window[end:]
        if document == "file":
            current += text
            continue
        first, *others = text.split(b"\n") if document == "line" else BLANK_LINES.split(text)
        current += first
        if others:
            yield current.removesuffix(b"\r")
            *whole, rest = others
            yield from (part.removesuffix(b"\r") for part in whole) if b"\r" in text else whole
            current = bytearray(rest)
    if document != "file" and b"\n" in tail:
        tail = tail[: tail.index(b"\n")].removesuffix(b"\r")
    current += tail
    yield current


def split_at_marker(chunks: Iterator[bytes], marker: bytes) -> Iterator[bytes | bytearray]:
    """Documents between markers; line ends around a marker belong to none."""
    current, tail = bytearray(), b""
    for chunk in chunks:
        *parts, rest = (tail + chunk).split(marker)
        for part in parts:
            yield (current + part).strip(b"\r\n")
            current = bytearray()
        cut = max(0, len(rest) - len(marker) + 1)
        current += rest[:cut]
        tail = rest[cut:]
    yield (current + tail).strip(b"\r\n")


def read_jsonl(stream: BinaryIO, file: SourceFile, settings: Data) -> Iterator[bytes]:
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            try:
                text = field(json_object(line), settings.text_key)
            except UserError as error:
                raise UserError(f"{file.path}: line {file.lines_before() + number:,}: {error}") from None
            yield text


def json_object(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON: {one_line(error)}: mend it") from None
    if not isinstance(row, dict):
        raise UserError("no object with fields: every line must be one")
    return row


def read_csv(stream: BinaryIO, file: SourceFile, settings: Data) -> Iterator[bytes]:
    path = file.path

    def lines() -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}: line {number:,}: not UTF-8: convert the file to UTF-8") from None

    rows = csv.reader(lines(), strict=True)
    try:
        names = next(rows, [])
        one_field(names, settings.text_key, f"{path}: line 1: ")
        at = names.index(settings.text_key)
        for row in rows:
            if len(row) != len(names) and row:
                raise UserError(f"{path}: line {rows.line_num:,}: {len(row)} fields, not {len(names)}: mend it")
            yield row[at].encode() if row else b""
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num:,}: broken CSV: {one_line(error)}: mend it") from None


def read_parquet(stream: BinaryIO, file: SourceFile, settings: Data) -> Iterator[bytes]:
    path = file.path
    with tempfile.TemporaryFile() as copy:
        if not (isinstance(stream, io.BufferedReader) and stream.seekable()):
            while chunk := stream.read(CHUNK_BYTES):
                copy.write(chunk)
            stream = copy
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        one_field(table.schema_arrow.names, settings.text_key, f"{path}: ")
        kind = table.schema_arrow.field(settings.text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"{path}: field {settings.text_key!r} is {kind}, no text: set data.text_key")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[settings.text_key]):
            for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                number += 1
                if value is None:
                    raise UserError(f"{path}: row {number:,}: field {settings.text_key!r} is null, no text")
                try:
                    value.decode()
                except UnicodeDecodeError:
                    raise UserError(f"{path}: row {number:,}: not UTF-8: convert the file to UTF-8") from None
                yield value


def one_field(names: list[str], key: str, place: str) -> None:
    """Raises UserError, with the place, unless there is one field of that name."""
    field(dict.fromkeys(names, ""), key, place)
    if names.count(key) > 1:
        raise UserError(f"{place}{names.count(key)} fields are called {key!r}: rename one")


def field(row: dict, key: str, place: str = "") -> bytes:
    """The UTF-8 text of a row's field. Raises UserError, with the place, when there is none."""
    if key not in row:
        names = ", ".join(map(str, row)) or "none"
        raise UserError(f"{place}no field {key!r}, there are: {names}: set data.text_key")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{place}field {key!r} is {json.dumps(value)[:40]}, no text: set data.text_key or mend it")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}field {key!r} holds half a character (a surrogate): mend it") from None


READERS = {"txt": read_txt, "jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}


def read_source(
    path: str, files: list[SourceFile], settings: Data, advance: Callable[[int], object]
) -> Iterator[bytes]:
    """The documents of a source's files, one after the other. Raises UserError as `read_documents`."""
    marker = settings.separator.encode()
    for file in files:
        look = file.format == "txt" and settings.document != "separator"
        for document in read_documents(file, settings, advance):
            if look and marker and marker in document:
                where, marker = f"{file.path} holds {marker.decode()}", b""
                note(f"{where}: does data.document: separator fit {path}?")
            yield document
