"""A token stream in files that one machine reads through at once: NAME.npy, NAME.1.npy, NAME.2.npy, ...

Each holds SHARD_TOKENS ids and the last one the rest, so most streams are one file.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
CHUNK = 1 << 22  # ids that are read at once


class TokenFiles:
    """The ids of a stream: tokens[i:j] is an array, of one file without a copy. The files are mapped into memory."""

    def __init__(self, path: Path, count: int, dtype: np.dtype):
        """
        Args:
            path: the first file.
            count: ids in all of them.
        Raises:
            OSError, ValueError, EOFError: a file is missing, or not an array of that type that belongs to the stream.
        """
        self.path, self.dtype, self.files = path, dtype, []
        self.edges = np.array([0])  # where each file begins, and the stream ends
        while self.edges[-1] < count:
            file = shard(path, len(self.files))
            if self.files and not file.exists():
                raise ValueError(f"{self.edges[-1]:,} ids and no {file.name} is not what its .json files say")
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
            end = self.edges[-1] + len(ids) if ids.ndim == 1 else 0
            if ids.dtype != dtype or not self.edges[-1] < end <= count:
                raise ValueError(f"{file.name}, {ids.dtype} {ids.shape}, is not what its .json files say")
            self.files.append(np.asarray(ids))  # a memmap takes several times as long to take a slice of
            self.edges = np.append(self.edges, end)
        self.read = None

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first, last = (bisect_right(self.edges, i) - 1 for i in (start, stop - 1))
        if first != self.read and start < stop:
            self.fetch(first)
        pieces = [self.files[i][max(0, start - self.edges[i]) : stop - self.edges[i]] for i in range(first, last + 1)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """The ids from the first one on, so many at a time that they need little memory."""
        end = len(self) if end is None else end
        for i in range(first, end, CHUNK):
            yield self[i : min(i + CHUNK, end)]

    def fetch(self, number: int) -> None:
        """Lets the system read a file from its start to its end: its blocks will be asked for in any order."""
        self.read = number
        if hasattr(os, "posix_fadvise"):
            with shard(self.path, number).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class TokenWriter:
    """Writes a stream to files, piece by piece, and knows its count and the SHA-256 of its bytes."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.count, self.digest = path, dtype, 0, hashlib.sha256()
        self.file, self.files = None, 0

    def write(self, ids: np.ndarray) -> None:
        ids = np.ascontiguousarray(ids, self.dtype)
        self.digest.update(ids.data)
        while len(ids):
            if self.file is None:
                self.file = shard(self.path, self.files).open("wb")
                write_header(self.file, (0,), self.dtype)
                self.files += 1
            piece = ids[: SHARD_TOKENS * self.files - self.count]
            self.file.write(piece.data)
            self.count, ids = self.count + len(piece), ids[len(piece) :]
            if self.count == SHARD_TOKENS * self.files:
                self.close()

    def close(self) -> None:
        """Writes the length of the file at work."""
        if self.file is not None:
            self.file.seek(0)
            write_header(self.file, (self.count - SHARD_TOKENS * (self.files - 1),), self.dtype)
            self.file.close()
            self.file = None


def shard(path: Path, number: int) -> Path:
    """A stream's file of that number, from 0."""
    return path.with_suffix(f".{number}.npy") if number else path


def write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """The beginning of an .npy file: of one size whatever the length, so it can be written again."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
