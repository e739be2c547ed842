"""Checkpoints on the disk: one file, or a folder in which each process that trained has written its part.

A folder is one of torch.distributed.checkpoint (DCP) with two files more. rest.pt is the checkpoint with a key in
the place of each large tensor, so that whose it is can be read without them. checksums.json has the CRC-32 of all
other files.
"""

import json
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

REST, SUMS, METADATA = "rest.pt", "checksums.json", ".metadata"
CHUNK = 1 << 24  # bytes read at once
# What DCP's own reader would unpickle without a look: anything, and so code.
HARMLESS = {
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "torch.Size", "torch.serialization._get_layout"),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def in_parts(path: str | Path) -> bool:
    """Whether a path is a checkpoint's folder."""
    return (Path(path) / REST).is_file()


def mapped(path: str | Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay in the file until they are copied; in a folder, keys stand for the large ones."""
    file = Path(path) / REST if in_parts(path) else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def filled(path: str | Path, tree: Any, own: dict[str, Tensor] | None = None) -> Any:
    """What `mapped` has given of a checkpoint, or a piece of it, with tensors in place of their keys.

    Args:
        path: the checkpoint's.
        tree: from a file, it is returned as it is.
        own: by its key, what a tensor is read into, a DTensor this process's share; others are made, whole.
    Raises:
        ValueError: it can't be read.
    """
    if not in_parts(path):
        return tree
    own = own or {}
    reader, tensors = Reader(path), {}
    known = reader.read_metadata().state_dict_metadata

    def ask(text: str) -> None:
        if text in known:
            size, dtype = known[text].size, known[text].properties.dtype
            tensors[text] = own[text] if text in own else torch.empty(size, dtype=dtype)

    apply_to_collection(tree, str, ask)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each reads for itself
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise ValueError(f"{path}: {first_failure(error)}") from None
    return apply_to_collection(tree, str, lambda text: tensors.get(text, text))


def first_failure(error: dcp.api.CheckpointException) -> BaseException:
    """What went wrong in one process; DCP's own text has tracebacks."""
    return next(iter(error.failures.values()))[0]


class Reader(dcp.FileSystemReader):
    """DCP's, which runs no code that a folder may hold."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return HarmlessUnpickler(file).load()


class HarmlessUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        harmless = f"{module}.{name}" in HARMLESS
        if harmless or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def verify(path: Path) -> None:
    """Reads a checkpoint through; raises an error of any kind when its bytes aren't those that were written."""
    if in_parts(path):
        for name, expected in json.loads((path / SUMS).read_text()).items():
            if checksum(path / name) != expected:
                raise ValueError(f"{name} doesn't match its checksum")
        return
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} doesn't match its checksum")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(made: Path, path: Path) -> None:
    """Gives a checkpoint that is on the disk its name, which one of the other kind may have had."""
    if path.is_dir():
        delete(path)
    elif made.is_dir():
        path.unlink(missing_ok=True)
    os.replace(made, path)


def hide(path: Path) -> Path:
    """Takes a checkpoint its name, before it is deleted bit by bit; returns where it is then."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, hidden)
    return hidden


def delete(path: Path) -> None:
    """Deletes a checkpoint, or what is left of one."""
    if path.is_dir():
        shutil.rmtree(path if path.suffix == ".tmp" else hide(path))
    else:
        path.unlink()
