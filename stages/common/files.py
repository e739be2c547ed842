"""Outputs appear whole or not at all: written beside their place, then renamed into it."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.common.errors import UserError, not_written


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """An empty folder that takes target's place when the block ends without an error."""
    target = Path(target)
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # a stage that outlived its `dvc` may be making it still
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # tokenizers and safetensors have no other sign of a full disk, a quota or a limit.
            if re.search(r"os error (27|28|122)\b", str(error)):
                raise not_written(target, error) from None
            raise
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)


def write_text(target: str | Path, text: str) -> None:
    """Writes a small UTF-8 file in one step."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, target)


def write_json(target: str | Path, content: Any) -> None:
    """Writes a small file of figures in one step."""
    write_text(target, json.dumps(content, indent=2) + "\n")


def state_of(path: str | Path) -> tuple[int, ...]:
    """Size, times and number of a file: no write leaves all of them as they were.

    The system alone sets the last time, so a copy that brings an old date along is noticed too. A hash of what was
    read could say no more: it would have to be compared with that of a second reading.
    """
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


def states_in(folder: str | Path | None) -> dict[Path, tuple[int, ...]]:
    """`state_of` each file in a folder; of no folder none."""
    return {path: state_of(path) for path in Path(folder or os.devnull).rglob("*") if path.is_file()}


def check_states(key: str, folder: str | Path | None, before: dict[Path, tuple[int, ...]]) -> None:
    """Raises UserError when the folder that a setting names isn't what it was."""
    if states_in(folder) != before:
        raise UserError(f"{key}: {folder} changed while it was used: run it again")
